"""The same system calls on a mount and in a plain directory, call by call: same results, same errnos, same effects.

A case is a name and steps; each step is one call on a `Side`, and all of them are made, whatever the one before gave.
Where the mount is meant to differ, `DIFFERENCES` says so and why; any other difference fails, and so does one that is
listed and not there. The directory lies on the filesystem of the datadirs.
"""

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.clients import md5
from tests.conftest import Mounter
from tests.test_model import called, fallocate, renameat2

USER = 65534
NOW, OMIT = (1 << 30) - 1, (1 << 30) - 2
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, COLLAPSE_RANGE = 1, 2, 16, 8
GIB = 1 << 30
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Side:
    """One of the two directories; `fds` are what a case has opened, `fd` the last of them."""

    path: Path
    fds: list[int] = field(default_factory=list)

    @property
    def fd(self) -> int:
        return self.fds[-1]

    def at(self, name: str) -> str:
        """A path in the directory; a string, so that slashes at its end stay."""
        return f"{self.path}/{name}"

    def open(self, name: str, flags: int, mode: int = 0o644) -> str:
        self.fds.append(os.open(self.at(name), flags, mode))
        return "opened"

    def make(self, name: str, content: bytes = b"0123456789", mode: int = 0o644) -> None:
        fd = os.open(self.at(name), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)
        with open(fd, "wb") as file:
            file.write(content)
        os.chmod(self.at(name), mode)

    def stat(self, name: str) -> tuple[int, ...]:
        found = os.lstat(self.at(name))
        return found.st_mode, found.st_size, found.st_nlink, found.st_uid, found.st_gid

    def times(self, name: str) -> tuple[int, int]:
        found = os.stat(self.at(name))
        return found.st_atime_ns, found.st_mtime_ns

    def read(self, name: str) -> bytes:
        return Path(self.at(name)).read_bytes()

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        renameat2(Path(self.at(old)), Path(self.at(new)), flags) if flags else os.rename(self.at(old), self.at(new))

    def utimensat(self, name: str, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
        """utimensat(2) with seconds and nanoseconds, which may be NOW or OMIT."""
        values = (ctypes.c_long * 4)(*atime, *mtime)
        called(_libc.utimensat(-100, os.fsencode(self.at(name)), values, 0))

    @contextlib.contextmanager
    def user(self, groups: tuple[int, ...] = ()) -> Iterator[None]:
        """Be another user."""
        os.setgroups(groups)
        os.setegid(USER)
        os.seteuid(USER)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups([])

    def as_user(self, call: Callable[..., Any], *arguments: Any) -> Any:
        with self.user():
            return call(*arguments)

    def clean(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        os.chown(self.path, 0, 0)
        os.chmod(self.path, 0o755)
        for entry in list(os.scandir(self.path)):
            os.rmdir(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)

    def shown(self) -> Any:
        """All that the directory shows in the end."""
        found = {}
        for name in sorted(os.listdir(self.path)):
            content = brief(self.read(name)) if stat.S_ISREG(self.stat(name)[0]) else None
            found[name] = self.stat(name) if not stat.S_ISDIR(self.stat(name)[0]) else None, content
        return found


def brief(content: bytes) -> bytes | str:
    """Bytes, or what stands for many of them."""
    return content if len(content) <= 64 else f"bytes of md5 {md5(content)}"


Step = Callable[[Side], Any]


def made(s: Side) -> None:
    s.make("a")


def both(s: Side) -> None:
    s.make("a", b"one")
    s.make("b", b"two")


def opened(flags: int, name: str = "a", mode: int = 0o644) -> Step:
    return lambda s: s.open(name, flags, mode)


def named(flags: int) -> str:
    """The names of open(2)'s flags."""
    access = ("O_RDONLY", "O_WRONLY", "O_RDWR")[flags & os.O_ACCMODE]
    return "|".join([access, *(name for name, bit in FLAGS.items() if flags & bit == bit)])


FLAGS = {"O_CREAT": os.O_CREAT, "O_EXCL": os.O_EXCL, "O_TRUNC": os.O_TRUNC, "O_APPEND": os.O_APPEND,
         "O_DIRECTORY": os.O_DIRECTORY, "O_NOFOLLOW": os.O_NOFOLLOW}  # fmt: skip
COMBINATIONS = [
    access | sum(more)
    for access in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)
    for count in range(len(FLAGS) + 1)
    for more in itertools.combinations(FLAGS.values(), count)
    if not {os.O_CREAT, os.O_DIRECTORY} <= set(more)  # EINVAL since Linux 6.4, before that anything
]
USE: list[Step] = [
    lambda s: os.write(s.fd, b"xyz"),
    lambda s: os.lseek(s.fd, 0, os.SEEK_CUR),
    lambda s: os.pread(s.fd, 4, 1),
    lambda s: os.pwrite(s.fd, b"!", 1),
    lambda s: os.fstat(s.fd).st_size,
    lambda s: os.ftruncate(s.fd, 5),
]
O_PATH = 0o10000000

X8, X = (f"bytes of md5 {md5(b'x' * count)}" for count in (8192, 16384))

CASES: dict[str, list[Step]] = {
    **{f"open absent {named(flags)}": [opened(flags), *USE] for flags in COMBINATIONS},
    **{f"open existing {named(flags)}": [made, opened(flags), *USE] for flags in COMBINATIONS},
    **{f"open the directory {named(flags)}": [opened(flags, ".")] for flags in COMBINATIONS},
    "open with O_PATH": [made, opened(O_PATH), lambda s: os.read(s.fd, 1), lambda s: os.fstat(s.fd).st_size],
    "open with O_SYNC, O_DSYNC, O_NONBLOCK, O_NOATIME": [
        made,
        opened(os.O_RDWR | os.O_SYNC),
        *USE,
        opened(os.O_RDWR | os.O_DSYNC),
        *USE,
        opened(os.O_RDWR | os.O_NONBLOCK | os.O_NOATIME),
        *USE,
    ],
    "open with O_TMPFILE": [lambda s: s.open(".", os.O_TMPFILE | os.O_RDWR), lambda s: os.listdir(s.path)],
    "open with access mode 3": [made, opened(3), lambda s: os.read(s.fd, 1)],
    "open with a slash at the end": [made, opened(os.O_RDONLY, "a/"), opened(os.O_RDWR | os.O_CREAT, "b/")],
    "open below an image": [made, opened(os.O_RDONLY, "a/b"), opened(os.O_RDWR | os.O_CREAT, "a/b")],
    "open an empty name": [lambda s: os.open("", os.O_RDONLY, dir_fd=None)],
    "create with every mode": [
        lambda s, mode=mode: (s.open(f"m{mode:o}", os.O_CREAT | os.O_RDWR, mode), s.stat(f"m{mode:o}"))
        for mode in (0, 0o200, 0o400, 0o444, 0o777, 0o1777, 0o2755, 0o4755, 0o6777)
    ],
    "create, then write although the mode forbids it": [opened(os.O_CREAT | os.O_RDWR, "a", 0), *USE],
    "append through two handles": [
        opened(os.O_CREAT | os.O_WRONLY | os.O_APPEND),
        lambda s: os.write(s.fds[0], b"one"),
        opened(os.O_WRONLY | os.O_APPEND),
        lambda s: os.write(s.fds[1], b"two"),
        lambda s: os.write(s.fds[0], b"three"),
        lambda s: os.pwrite(s.fds[0], b"four", 1),
        lambda s: os.lseek(s.fds[1], 0, os.SEEK_SET),
        lambda s: os.write(s.fds[1], b"five"),
    ],
    "set and clear O_APPEND": [
        made,
        opened(os.O_RDWR),
        lambda s: fcntl.fcntl(s.fd, fcntl.F_SETFL, os.O_APPEND),
        lambda s: os.write(s.fd, b"end"),
        lambda s: fcntl.fcntl(s.fd, fcntl.F_SETFL, 0),
        lambda s: os.write(s.fd, b"!"),
    ],
    "truncate under an open reader": [
        made,
        opened(os.O_RDONLY),
        opened(os.O_WRONLY | os.O_TRUNC),
        lambda s: os.pread(s.fds[0], 10, 0),
        lambda s: os.write(s.fds[1], b"new"),
        lambda s: os.pread(s.fds[0], 10, 0),
    ],
    # reading and writing
    "read and write at odd places": [
        made,
        opened(os.O_RDWR),
        lambda s: os.pread(s.fd, 10, 100),
        lambda s: os.pread(s.fd, 0, 0),
        lambda s: os.pwrite(s.fd, b"", 100),
        lambda s: os.fstat(s.fd).st_size,
        lambda s: os.pwrite(s.fd, b"x", 5000),
        lambda s: os.pread(s.fd, 20, 4990),
        lambda s: os.pread(s.fd, 1, -1),
        lambda s: os.pwrite(s.fd, b"x", -1),
    ],
    "write far away": [
        opened(os.O_CREAT | os.O_RDWR),
        lambda s: os.pwrite(s.fd, b"far", 100 * GIB),
        lambda s: os.fstat(s.fd).st_size,
        lambda s: os.pread(s.fd, 10, 100 * GIB - 2),
        lambda s: os.ftruncate(s.fd, 0),
    ],
    "write beyond what files can be": [
        opened(os.O_CREAT | os.O_RDWR),
        lambda s: os.pwrite(s.fd, b"x", (1 << 63) - 1),
        lambda s: os.pread(s.fd, 1, (1 << 63) - 1),
        lambda s: os.ftruncate(s.fd, (1 << 63) - 1),
        lambda s: os.fstat(s.fd).st_size,
    ],
    "vectors": [
        made,
        opened(os.O_RDWR),
        lambda s: os.writev(s.fd, [b"ab", b"", b"cd"]),
        lambda s: os.pwritev(s.fd, [b"e"], 9),
        lambda s: (buffers := [bytearray(3), bytearray(9)], os.preadv(s.fd, buffers, 1), buffers)[1:],
    ],
    "lseek": [
        made,
        opened(os.O_RDWR),
        *[
            lambda s, offset=offset, whence=whence: os.lseek(s.fd, offset, whence)
            for whence in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END)
            for offset in (0, 5, -3, -100, 1 << 40)
        ],
        lambda s: os.lseek(s.fd, 0, 77),
    ],
    "lseek for holes": [
        opened(os.O_CREAT | os.O_RDWR),
        lambda s: os.ftruncate(s.fd, 1 << 20),
        lambda s: os.pwrite(s.fd, b"x", 1 << 19),
        *[
            lambda s, at=at, whence=whence: os.lseek(s.fd, at, whence)
            for whence in (os.SEEK_DATA, os.SEEK_HOLE)
            for at in (0, 1 << 19, (1 << 19) + 4096, (1 << 20) - 1, 1 << 20)
        ],
    ],
    "read what is open for writing, write what is open for reading": [
        made,
        opened(os.O_WRONLY),
        lambda s: os.read(s.fd, 1),
        opened(os.O_RDONLY),
        lambda s: os.write(s.fd, b"x"),
        lambda s: os.ftruncate(s.fd, 1),
    ],
    "fsync": [
        made,
        opened(os.O_RDONLY),
        lambda s: os.fsync(s.fd),
        lambda s: os.fdatasync(s.fd),
        opened(os.O_RDONLY | os.O_DIRECTORY, "."),
        lambda s: os.fsync(s.fd),
        lambda s: os.fdatasync(s.fd),
    ],
    "read and write the directory": [
        opened(os.O_RDONLY, "."),
        lambda s: os.read(s.fd, 1),
        lambda s: os.write(s.fd, b"x"),
        lambda s: os.ftruncate(s.fd, 0),
        lambda s: os.truncate(s.path, 0),
    ],
    # truncate
    "ftruncate": [
        made,
        opened(os.O_RDWR),
        lambda s: os.ftruncate(s.fd, 4),
        lambda s: os.ftruncate(s.fd, 4),
        lambda s: os.ftruncate(s.fd, 8),
        lambda s: os.pread(s.fd, 9, 0),
        lambda s: os.ftruncate(s.fd, -1),
        lambda s: os.ftruncate(s.fd, 50 * GIB),
        lambda s: os.fstat(s.fd).st_size,
        lambda s: os.ftruncate(s.fd, 0),
    ],
    "truncate by name": [
        made,
        lambda s: os.truncate(s.at("a"), 3),
        lambda s: os.truncate(s.at("none"), 0),
        lambda s: os.truncate(s.at("a"), -1),
        lambda s: os.truncate(s.at("a"), 30),
        lambda s: os.truncate(s.at("a/"), 0),
    ],
    # names
    "names of 255 bytes and more": [
        lambda s: s.make("n" * 255),
        lambda s: s.make("n" * 256),
        lambda s: os.stat(s.at("n" * 256)),
        lambda s: s.make("ä" * 127),
        lambda s: s.make("ä" * 128),
        lambda s: s.make("😀" * 64),
        lambda s: s.rename("n" * 255, "m" * 255),
        lambda s: s.rename("m" * 255, "m" * 256),
        lambda s: s.rename("n" * 256, "x"),
        lambda s: os.unlink(s.at("n" * 256)),
        lambda s: os.open(s.at("p/" * 2100), 0),
    ],
    "odd names": [
        lambda s, name=name: (s.make(name), os.listdir(s.path))[1]
        for name in ("\udcff\udcfe", "new\nline", "...", "-rf", " ", "\x7f\x01", "a\\b", "*", "~", ".hidden")
    ],
    "dot and dot dot": [
        lambda s: os.unlink(s.at(".")),
        lambda s: os.unlink(s.at("..")),
        lambda s: os.rmdir(s.at(".")),
        made,
        lambda s: s.rename("a", "."),
        lambda s: s.rename("a", ".."),
        lambda s: s.rename(".", "b"),
    ],
    # rename
    "rename": [made, lambda s: s.rename("a", "b"), lambda s: s.rename("a", "b"), lambda s: s.rename("b", "b")],
    "rename over": [both, lambda s: s.rename("a", "b"), lambda s: s.read("b")],
    "rename over what is open": [
        both,
        opened(os.O_RDONLY, "b"),
        lambda s: s.rename("a", "b"),
        lambda s: os.pread(s.fd, 9, 0),
        lambda s: os.fstat(s.fd).st_nlink,
        lambda s: s.read("b"),
    ],
    "rename what is open": [
        made,
        opened(os.O_RDWR),
        lambda s: s.rename("a", "b"),
        lambda s: os.write(s.fd, b"x"),
        lambda s: s.read("b"),
        lambda s: os.fstat(s.fd).st_nlink,
    ],
    "rename with slashes": [
        made,
        lambda s: s.rename("a/", "b"),
        lambda s: s.rename("a", "b/"),
        lambda s: s.rename("a", "a/"),
    ],
    "rename onto the directory, and itself": [
        made,
        lambda s: s.rename("a", "../" + s.path.name),
        lambda s: s.rename("../" + s.path.name, "a"),
        lambda s: s.rename("a/b", "c"),
    ],
    "rename out of the directory": [
        made,
        lambda s: os.rename(s.at("a"), "/dev/shm/a"),
        lambda s: os.rename("/dev/null", s.at("n")),
    ],
    "rename with RENAME_NOREPLACE": [
        both,
        lambda s: s.rename("a", "b", NOREPLACE),
        lambda s: s.rename("a", "c", NOREPLACE),
        lambda s: s.rename("none", "d", NOREPLACE),
        lambda s: s.rename("c", "c", NOREPLACE),
    ],
    "rename with RENAME_EXCHANGE": [
        both,
        lambda s: s.rename("a", "b", EXCHANGE),
        lambda s: s.read("a"),
        lambda s: s.rename("a", "none", EXCHANGE),
        lambda s: s.rename("a", "a", EXCHANGE),
    ],
    "rename with bad flags": [
        both,
        lambda s: s.rename("a", "b", NOREPLACE | EXCHANGE),
        lambda s: s.rename("a", "b", 64),
    ],
    # unlink
    "unlink": [made, lambda s: os.unlink(s.at("a")), lambda s: os.unlink(s.at("a")), lambda s: os.unlink(s.at("a/"))],
    "unlink with slashes, or as a directory": [made, lambda s: os.unlink(s.at("a/")), lambda s: os.rmdir(s.at("a"))],
    "unlink what is open": [
        made,
        opened(os.O_RDWR),
        lambda s: os.unlink(s.at("a")),
        lambda s: os.listdir(s.path),
        lambda s: os.stat(s.at("a")),
        lambda s: os.pwrite(s.fd, b"still", 3),
        lambda s: os.pread(s.fd, 20, 0),
        lambda s: os.ftruncate(s.fd, 4),
        lambda s: os.fstat(s.fd).st_size,
        lambda s: os.fstat(s.fd).st_nlink,
        lambda s: os.fchmod(s.fd, 0o600),
        lambda s: stat.S_IMODE(os.fstat(s.fd).st_mode),
        lambda s: os.fsync(s.fd),
        lambda s: s.make("a", b"new"),
        lambda s: os.pread(s.fd, 20, 0),
    ],
    "unlink what two have open": [
        made,
        opened(os.O_RDONLY),
        opened(os.O_WRONLY),
        lambda s: os.unlink(s.at("a")),
        lambda s: os.write(s.fds[1], b"xyz"),
        lambda s: os.pread(s.fds[0], 5, 0),
        lambda s: os.fstat(s.fds[0]).st_nlink,
    ],
    # other kinds of files
    "mkdir": [lambda s: os.mkdir(s.at("d"))],
    "mkdir where something is": [made, lambda s: os.mkdir(s.at("a")), lambda s: os.mkdir(s.at("a/b"))],
    "rmdir of what is no directory": [made, lambda s: os.rmdir(s.at("a")), lambda s: os.rmdir(s.at("none"))],
    "symlink": [lambda s: os.symlink("a", s.at("l"))],
    "symlink where something is": [made, lambda s: os.symlink("b", s.at("a"))],
    "link": [made, lambda s: os.link(s.at("a"), s.at("b"))],
    "link of what is not there": [
        both,
        lambda s: os.link(s.at("none"), s.at("b")),
        lambda s: os.link(s.at("a"), s.at("b")),
    ],
    "readlink": [made, lambda s: os.readlink(s.at("a")), lambda s: os.readlink(s.at("none"))],
    "mknod of a regular file": [lambda s: os.mknod(s.at("n"), stat.S_IFREG | 0o600)],
    "mkfifo": [lambda s: os.mkfifo(s.at("p"))],
    "mknod of a device": [lambda s: os.mknod(s.at("n"), stat.S_IFCHR | 0o600, os.makedev(1, 3))],
    "mknod where something is": [made, lambda s: os.mknod(s.at("a"), stat.S_IFREG | 0o600)],
    # permissions
    "chmod": [
        made,
        *[
            lambda s, mode=mode: (os.chmod(s.at("a"), mode), s.stat("a"))[1]
            for mode in (0, 0o777, 0o1644, 0o2755, 0o4755, 0o7777, 0o644)
        ],
        lambda s: os.chmod(s.at("none"), 0),
    ],
    "chown": [
        made,
        lambda s: os.chown(s.at("a"), 1, 2),
        lambda s: os.chown(s.at("a"), -1, 3),
        lambda s: os.chown(s.at("a"), 4, -1),
        lambda s: os.chown(s.at("none"), 1, 1),
    ],
    "chown clears setuid and setgid": [
        lambda s: s.make("a", mode=0o6755),
        lambda s: os.chown(s.at("a"), 1, 1),
        lambda s: s.stat("a"),
    ],
    "others may not": [
        made,
        lambda s: s.as_user(s.open, "a", os.O_RDWR),
        lambda s: s.as_user(s.open, "a", os.O_RDONLY),
        lambda s: s.as_user(s.open, "b", os.O_CREAT | os.O_RDWR),
        lambda s: s.as_user(os.unlink, s.at("a")),
        lambda s: s.as_user(s.rename, "a", "b"),
        lambda s: s.as_user(os.chmod, s.at("a"), 0o777),
        lambda s: s.as_user(os.chown, s.at("a"), USER, USER),
        lambda s: s.as_user(os.truncate, s.at("a"), 0),
        lambda s: s.as_user(os.utime, s.at("a")),
        lambda s: s.as_user(os.setxattr, s.at("a"), "user.x", b"1"),
        lambda s: s.as_user(os.access, s.at("a"), os.W_OK),
    ],
    "others may, where the mode says so": [
        lambda s: s.make("a", mode=0o606),
        lambda s: s.as_user(s.open, "a", os.O_RDWR),
        *USE,
        lambda s: s.as_user(os.utime, s.at("a")),
        lambda s: s.as_user(os.utime, s.at("a"), (1, 1)),
        lambda s: s.as_user(os.truncate, s.at("a"), 2),
        lambda s: s.as_user(os.setxattr, s.at("a"), "user.x", b"1"),
        lambda s: s.as_user(os.getxattr, s.at("a"), "user.x"),
    ],
    "nobody reads what is only written": [
        lambda s: s.make("a", mode=0o602),
        lambda s: s.as_user(s.open, "a", os.O_RDONLY),
        lambda s: s.as_user(s.open, "a", os.O_WRONLY),
        lambda s: s.as_user(os.getxattr, s.at("a"), "user.x"),
    ],
    "others in an open directory": [
        lambda s: os.chmod(s.path, 0o777),
        made,
        lambda s: s.as_user(s.open, "mine", os.O_CREAT | os.O_RDWR, 0o4711),
        lambda s: s.stat("mine"),
        lambda s: s.as_user(s.rename, "mine", "a"),
        lambda s: s.as_user(os.chown, s.at("a"), 0, 0),
        lambda s: s.as_user(os.chmod, s.at("a"), 0o2700),
        lambda s: s.stat("a"),
        lambda s: s.as_user(os.unlink, s.at("a")),
    ],
    "sticky directory": [
        lambda s: os.chmod(s.path, 0o1777),
        made,
        lambda s: s.as_user(os.unlink, s.at("a")),
        lambda s: s.as_user(s.rename, "a", "b"),
        lambda s: s.as_user(s.make, "mine"),
        lambda s: s.as_user(s.rename, "mine", "a"),
        lambda s: s.as_user(s.rename, "mine", "my"),
        lambda s: s.as_user(os.unlink, s.at("my")),
    ],
    "setgid directory": [
        lambda s: (os.chown(s.path, 0, 77), os.chmod(s.path, 0o2777))[0],
        made,
        lambda s: s.stat("a"),
        lambda s: s.as_user(s.make, "mine"),
        lambda s: s.stat("mine"),
    ],
    "a write by others clears setuid and setgid": [
        lambda s: s.make("a", mode=0o6777),
        lambda s: s.as_user(s.open, "a", os.O_RDWR),
        lambda s: s.as_user(os.write, s.fd, b"x"),
        lambda s: s.stat("a"),
    ],
    "a truncate by others clears setuid and setgid": [
        lambda s: s.make("a", mode=0o6777),
        lambda s: s.as_user(os.truncate, s.at("a"), 1),
        lambda s: s.stat("a"),
    ],
    "an open with O_TRUNC by others clears setuid and setgid": [
        lambda s: s.make("a", mode=0o6777),
        lambda s: s.as_user(s.open, "a", os.O_RDWR | os.O_TRUNC),
        lambda s: s.stat("a"),
    ],
    "a write by root leaves setuid": [
        lambda s: s.make("a", mode=0o4777),
        opened(os.O_WRONLY),
        lambda s: os.write(s.fd, b"x"),
        lambda s: s.stat("a"),
    ],
    "umask": [
        lambda s: (old := os.umask(0o077), s.open("a", os.O_CREAT | os.O_RDWR, 0o666), os.umask(old), s.stat("a"))[3]
    ],
    "access": [
        lambda s: s.make("a", mode=0o640),
        *[lambda s, how=how: os.access(s.at("a"), how) for how in (os.F_OK, os.R_OK, os.W_OK, os.X_OK)],
        lambda s: s.as_user(lambda: os.access(s.at("a"), os.R_OK, effective_ids=True)),
        lambda s: os.access(s.at("none"), os.F_OK),
    ],
    # times
    "utimensat": [
        made,
        lambda s: s.utimensat("a", (5, 6), (7, 8)),
        lambda s: s.times("a"),
        lambda s: s.utimensat("a", (0, OMIT), (9, 1)),
        lambda s: s.times("a"),
        lambda s: s.utimensat("a", (9, 2), (0, OMIT)),
        lambda s: s.times("a"),
        lambda s: s.utimensat("a", (0, OMIT), (0, OMIT)),
        lambda s: s.times("a"),
        lambda s: s.utimensat("a", (0, NOW), (0, OMIT)),
        lambda s: (s.times("a")[0] > GIB, s.times("a")[1]),
        lambda s: s.utimensat("a", (0, NOW), (0, NOW)),
        lambda s: min(s.times("a")) > GIB,
        lambda s: s.utimensat("a", (1, 10**9), (1, 1)),
        lambda s: s.utimensat("none", (1, 1), (1, 1)),
    ],
    "times before 1970 and after 2038": [
        made,
        lambda s: os.utime(s.at("a"), ns=(-5 * 10**9 - 1, -7 * 10**9)),
        lambda s: s.times("a"),
        lambda s: os.utime(s.at("a"), ns=(2**33 * 10**9 + 1, 2**33 * 10**9 + 999_999_999)),
        lambda s: s.times("a"),
    ],
    "what moves mtime": [
        made,
        *[
            lambda s, change=change: (os.utime(s.at("a"), ns=(5, 7)), change(s), s.times("a")[1] != 7)[2]
            for change in (
                lambda s: s.read("a"),
                lambda s: os.chmod(s.at("a"), 0o600),
                lambda s: os.chown(s.at("a"), 1, 1),
                lambda s: s.rename("a", "a"),
                lambda s: os.setxattr(s.at("a"), "user.x", b"1"),
                lambda s: os.truncate(s.at("a"), 10),
                lambda s: os.truncate(s.at("a"), 5),
                lambda s: os.close(os.open(s.at("a"), os.O_WRONLY)),
                lambda s: os.close(os.open(s.at("a"), os.O_WRONLY | os.O_TRUNC)),
            )
        ],
    ],
    "a write through an old handle moves mtime": [
        made,
        opened(os.O_RDWR),
        lambda s: os.utime(s.at("a"), ns=(5, 7)),
        lambda s: os.write(s.fd, b"x"),
        lambda s: os.fstat(s.fd).st_mtime_ns != 7,
    ],
    # fallocate and copies
    "fallocate": [
        opened(os.O_CREAT | os.O_RDWR),
        lambda s: fallocate(s.fd, 0, 0, 8192),
        lambda s: os.fstat(s.fd).st_size,
        lambda s: fallocate(s.fd, KEEP_SIZE, 8192, 8192),
        lambda s: os.fstat(s.fd).st_size,
        lambda s: os.pwrite(s.fd, b"x" * 8192, 0),
        lambda s: fallocate(s.fd, PUNCH_HOLE | KEEP_SIZE, 100, 5000),
        lambda s: brief(os.pread(s.fd, 8192, 0)),
        lambda s: fallocate(s.fd, ZERO_RANGE, 0, 50),
        lambda s: os.pread(s.fd, 50, 0),
        lambda s: fallocate(s.fd, PUNCH_HOLE, 0, 10),
        lambda s: fallocate(s.fd, 0, 0, 0),
        lambda s: fallocate(s.fd, 0, -1, 5),
        lambda s: fallocate(s.fd, 1 << 20, 0, 5),
    ],
    "fallocate that moves bytes": [
        lambda s: s.make("a", b"x" * 16384),
        opened(os.O_RDWR),
        lambda s: fallocate(s.fd, COLLAPSE_RANGE, 0, 4096),
    ],
    "fallocate of a reader": [made, opened(os.O_RDONLY), lambda s: fallocate(s.fd, 0, 0, 100)],
    "posix_fallocate": [
        opened(os.O_CREAT | os.O_RDWR),
        lambda s: os.posix_fallocate(s.fd, 0, 10_000),
        lambda s: os.fstat(s.fd).st_size,
    ],
    "copy_file_range": [
        made,
        opened(os.O_RDONLY),
        opened(os.O_CREAT | os.O_RDWR, "b"),
        lambda s: os.copy_file_range(s.fds[0], s.fds[1], 4, 2, 0),
        lambda s: os.copy_file_range(s.fds[0], s.fds[1], 100, 5, 10),
        lambda s: os.copy_file_range(s.fds[0], s.fds[1], 5, 100, 0),
        lambda s: os.copy_file_range(s.fds[1], s.fds[0], 5),
        lambda s: os.copy_file_range(s.fds[1], s.fds[1], 5, 0, 2),
        lambda s: s.read("b"),
    ],
    "sendfile": [
        made,
        opened(os.O_RDONLY),
        opened(os.O_CREAT | os.O_RDWR, "b"),
        lambda s: os.sendfile(s.fds[1], s.fds[0], 2, 5),
        lambda s: s.read("b"),
    ],
    # locks: of the kernel
    "flock": [
        made,
        opened(os.O_RDWR),
        lambda s: fcntl.flock(s.fd, fcntl.LOCK_EX),
        opened(os.O_RDWR),
        lambda s: fcntl.flock(s.fd, fcntl.LOCK_SH | fcntl.LOCK_NB),
        lambda s: fcntl.flock(s.fds[0], fcntl.LOCK_UN),
        lambda s: fcntl.flock(s.fd, fcntl.LOCK_SH | fcntl.LOCK_NB),
    ],
    "lockf": [
        made,
        opened(os.O_RDWR),
        lambda s: fcntl.lockf(s.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 5),
        opened(os.O_RDONLY),
        lambda s: fcntl.lockf(s.fd, fcntl.LOCK_EX),
    ],
    # extended attributes
    "xattrs": [
        made,
        lambda s: os.getxattr(s.at("a"), "user.x"),
        lambda s: os.setxattr(s.at("a"), "user.x", b"1"),
        lambda s: os.setxattr(s.at("a"), "user.x", b"2", os.XATTR_CREATE),
        lambda s: os.setxattr(s.at("a"), "user.y", b"2", os.XATTR_REPLACE),
        lambda s: os.setxattr(s.at("a"), "user.x", b"3", os.XATTR_REPLACE),
        lambda s: os.setxattr(s.at("a"), "user.y", b"", os.XATTR_CREATE),
        lambda s: os.getxattr(s.at("a"), "user.x"),
        lambda s: os.getxattr(s.at("a"), "user.y"),
        lambda s: os.removexattr(s.at("a"), "user.x"),
        lambda s: os.removexattr(s.at("a"), "user.x"),
        lambda s: os.getxattr(s.at("none"), "user.x"),
        lambda s: os.setxattr(s.at("none"), "user.x", b""),
    ],
    "xattrs of odd size and name": [
        made,
        lambda s: os.setxattr(s.at("a"), "user.x", b"v" * 2000),
        lambda s: len(os.getxattr(s.at("a"), "user.x")),
        lambda s: os.setxattr(s.at("a"), "user.big", b"v" * 60_000),
        lambda s: os.setxattr(s.at("a"), "user.big", b"v" * 65_537),
        lambda s: os.setxattr(s.at("a"), "user." + "n" * 250, b"1"),
        lambda s: os.setxattr(s.at("a"), "user." + "n" * 251, b"1"),
        lambda s: os.setxattr(s.at("a"), "user.", b"1"),
        lambda s: os.setxattr(s.at("a"), "", b"1"),
        lambda s: os.setxattr(s.at("a"), "nonsense", b"1"),
        lambda s: os.getxattr(s.at("a"), "user.\udcff"),
    ],
    "xattrs of the directory": [
        lambda s: os.setxattr(s.path, "user.x", b"1"),
        lambda s: os.getxattr(s.path, "user.x"),
        lambda s: os.removexattr(s.path, "user.x"),
        lambda s: os.getxattr(s.path, "user.x"),
    ],
    "xattrs through a handle": [
        made,
        opened(os.O_RDONLY),
        lambda s: os.setxattr(s.fd, "user.x", b"1"),
        lambda s: os.getxattr(s.fd, "user.x"),
        lambda s: os.removexattr(s.fd, "user.x"),
    ],
    "trusted xattrs": [
        made,
        lambda s: os.setxattr(s.at("a"), "trusted.x", b"1"),
        lambda s: os.getxattr(s.at("a"), "trusted.x"),
    ],
    "capabilities": [
        made,
        lambda s: os.setxattr(
            s.at("a"), "security.capability", bytes.fromhex("0100000200040000000000000000000000000000")
        ),
    ],
    "access lists": [made, lambda s: os.getxattr(s.at("a"), "system.posix_acl_access")],
    # the whole
    "listing": [
        both,
        lambda s: sorted(os.listdir(s.path)),
        lambda s: sorted((e.name, e.is_file(), e.is_symlink()) for e in os.scandir(s.path)),
        lambda s: all(e.inode() == os.stat(e.path).st_ino for e in os.scandir(s.path)),
    ],
    "link count and mode of the directory": [
        lambda s: stat.S_ISDIR(os.stat(s.path).st_mode),
        lambda s: os.stat(s.path).st_nlink,
        lambda s: stat.S_IMODE(os.stat(s.path).st_mode),
    ],
    "chmod and chown of the directory": [
        lambda s: os.chmod(s.path, 0o750),
        lambda s: s.as_user(os.listdir, s.path),
        lambda s: os.chown(s.path, USER, 3),
        lambda s: s.as_user(os.listdir, s.path),
        lambda s: os.stat(s.path).st_gid,
    ],
    "statvfs": [
        lambda s: (n := os.statvfs(s.path), n.f_frsize, n.f_blocks, n.f_files, n.f_namemax)[1:],
        lambda s: (n := os.statvfs(s.path), n.f_bfree >= n.f_bavail > 0, 0 < n.f_ffree <= n.f_files)[1:],
    ],
}


@dataclass(frozen=True)
class Difference:
    """Where a mount is meant to differ: why, and the outcomes of steps there, by number; the last is all shown."""

    why: str
    outcomes: dict[int, Any]
    transports: tuple[str, ...] = ("kernel", "fusepy")


FLAT = "the namespace is flat, and only regular files are images"
FUSEPY = "libfuse 2 carries no such request"
EMPTY = 0o100644, 0, 1, 0, 0
TEN = 0o100644, 10, 1, 0, 0
DIFFERENCES: dict[str, list[Difference]] = {
    "mkdir": [Difference(FLAT, {0: "EPERM", 1: {}})],
    "symlink": [Difference(FLAT, {0: "EPERM", 1: {}})],
    "link": [Difference(FLAT, {1: "EPERM", 2: {"a": (TEN, b"0123456789")}})],
    "mkfifo": [Difference(FLAT, {0: "EPERM", 1: {}})],
    "mknod of a device": [Difference(FLAT, {0: "EPERM", 1: {}})],
    "mknod of a regular file": [
        Difference(
            "images are created by open(2); libfuse 2 makes one of the other", {0: "EPERM", 1: {}}, ("kernel",)
        )
    ],
    "write beyond what files can be": [
        Difference("no datadir can take it, which is told as a full disk", {3: "ENOSPC"})
    ],
    "open with O_TMPFILE": [Difference("an image has a name", {0: "ENOTSUP"})],
    "rename onto the directory, and itself": [
        Difference("the directory is a mountpoint", {1: "EXDEV", 2: "EXDEV"}),
    ],
    "fallocate that moves bytes": [
        Difference(
            "images are written once, nothing needs it", {2: "ENOTSUP", 3: {"a": ((0o100644, 16384, 1, 0, 0), X)}}
        )
    ],
    "trusted xattrs": [Difference("user.* attributes alone are kept", {1: "ENOTSUP", 2: "ENODATA"})],
    "capabilities": [Difference("images are not programs", {1: "ENOTSUP"})],
    "access lists": [Difference("there are none", {1: "ENOTSUP"}, ("kernel",))],
    "an open with O_TRUNC by others clears setuid and setgid": [
        Difference(
            "libfuse 2 does not tell; the first write clears them",
            {2: (0o106777, 0, 1, 0, 0), 3: {"a": ((0o106777, 0, 1, 0, 0), b"")}},
            ("fusepy",),
        )
    ],
    "lseek for holes": [
        Difference(
            FUSEPY + "; the kernel then sees data up to the end",
            {3: 0, 5: 528384, 6: 1048575, 8: 1 << 20, 9: 1 << 20, 10: 1 << 20, 11: 1 << 20},
            ("fusepy",),
        )
    ],
    "rename with RENAME_NOREPLACE": [
        Difference(
            FUSEPY,
            {
                2: "EINVAL",
                4: "ENOENT",
                5: {"a": ((0o100644, 3, 1, 0, 0), b"one"), "b": ((0o100644, 3, 1, 0, 0), b"two")},
            },
            ("fusepy",),
        )
    ],
    "rename with RENAME_EXCHANGE": [
        Difference(
            FUSEPY,
            {
                1: "EINVAL",
                2: b"one",
                5: {"a": ((0o100644, 3, 1, 0, 0), b"one"), "b": ((0o100644, 3, 1, 0, 0), b"two")},
            },
            ("fusepy",),
        )
    ],
    "fallocate": [
        Difference(
            FUSEPY,
            {
                1: "ENOTSUP",
                2: 0,
                3: "ENOTSUP",
                4: 0,
                6: "ENOTSUP",
                7: X8,
                8: "ENOTSUP",
                9: b"x" * 50,
                14: {"a": ((0o100644, 8192, 1, 0, 0), X8)},
            },
            ("fusepy",),
        )
    ],
}


def outcomes(side: Side, steps: list[Step]) -> list[Any]:
    """What each step gives, or the name of its errno; last, what the directory shows."""
    found: list[Any] = []
    try:
        for step in [*steps, Side.shown]:
            try:
                found.append(step(side))
            except IndexError:
                found.append("nothing is open")
            except OSError as error:
                found.append(errno.errorcode.get(error.errno or 0, error))
    finally:
        side.clean()
    return found


def meant(name: str, transport: str, theirs: list[Any]) -> list[Any]:
    """The outcomes that a mount should have, given those of the directory."""
    expected = dict(enumerate(theirs))
    for difference in DIFFERENCES.get(name, []):
        if transport in difference.transports:
            assert all(expected[step] != other for step, other in difference.outcomes.items()), (
                f"{name}: no difference"
            )
            expected |= difference.outcomes
    return list(expected.values())


def test_calls_do_what_they_do_in_a_directory(mount: Mounter, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(0o022))
        plain = tmp_path / "plain"
        plain.mkdir()
        images, directory = Side(mount(["only"]).path), Side(plain)
        wrong = []
        for name, steps in CASES.items():
            ours, theirs = outcomes(images, steps), outcomes(directory, steps)
            pairs = enumerate(zip(ours, meant(name, mount.transport, theirs), strict=True))
            wrong += [f"{name}, step {step}: {us}, not {them}" for step, (us, them) in pairs if us != them]
    assert wrong == []


def test_every_difference_is_one_of_a_case() -> None:
    assert DIFFERENCES.keys() <= CASES.keys()
