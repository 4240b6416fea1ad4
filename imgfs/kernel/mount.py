"""Mounting and unmounting: mount(2) with a /dev/fuse descriptor, or fusermount3 where that takes privileges.

Owns the mount point, not the connection: what is said on the descriptor is the session's business. See
mount(2), umount(2), mount.fuse3(8) and, for the handover of the descriptor by fusermount3, its _FUSE_COMMFD
socket. No state, callable from any thread.
"""

import ctypes
import errno
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgfs import mount_table
from imgfs.errors import MountError
from imgfs.kernel import device
from imgfs.linux import check, libc

MS_RDONLY = 1 << 0
MS_NOSUID = 1 << 1
MS_NODEV = 1 << 2

MNT_FORCE = 1 << 0

# Options of mount(8) that are flags of mount(2): (set, cleared).
_FLAGS = {
    "ro": (MS_RDONLY, 0),
    "rw": (0, MS_RDONLY),
    "nosuid": (MS_NOSUID, 0),
    "suid": (0, MS_NOSUID),
    "nodev": (MS_NODEV, 0),
    "dev": (0, MS_NODEV),
    "noexec": (1 << 3, 0),
    "exec": (0, 1 << 3),
    "sync": (1 << 4, 0),
    "async": (0, 1 << 4),
    "dirsync": (1 << 7, 0),
    "noatime": (1 << 10, 0),
    "atime": (0, 1 << 10),
    "nodiratime": (1 << 11, 0),
    "relatime": (1 << 21, 0),
    "strictatime": (1 << 24, 0),
}


@dataclass(frozen=True)
class MountOptions:
    """How to mount. `extra` are further options as for mount(8), e.g. "noexec" or "max_read=65536"."""

    source: str = "imgfs"
    subtype: str = "imgfs"
    allow_other: bool = False
    read_only: bool = False
    default_permissions: bool = True
    extra: Sequence[str] = ()

    def words(self) -> Iterator[str]:
        """The options that both ways of mounting take."""
        if self.default_permissions:
            yield "default_permissions"
        if self.allow_other:
            yield "allow_other"
        if self.read_only:
            yield "ro"
        yield from self.extra


def mount(mountpoint: Path, options: MountOptions) -> int:
    """Mount and give the /dev/fuse descriptor of the new connection; raises `MountError`."""
    if os.geteuid() != 0:
        return _mount_with_fusermount(mountpoint, options)
    try:
        return _mount_directly(mountpoint, options)
    except PermissionError:
        # Root without CAP_SYS_ADMIN, as in a container.
        return _mount_with_fusermount(mountpoint, options)


def connection_number(mountpoint: Path) -> int | None:
    """The minor device number of the mount, which names it under /sys/fs/fuse/connections.

    From the mount table: asking the filesystem itself would take an answer from it.
    """
    mounted = mount_table.mounted_at(str(mountpoint))
    return int(mounted.device.partition(":")[2]) if mounted else None


def set_readahead(connection: int, size_bytes: int) -> bool:
    """Let the kernel read ahead further than INIT can ask for (/sys/class/bdi); False without the rights."""
    try:
        Path(f"/sys/class/bdi/0:{connection}/read_ahead_kb").write_text(str(size_bytes >> 10), "ascii")
    except OSError:
        return False
    return True


def abort(mountpoint: Path | None, connection: int | None) -> bool:
    """End a connection whatever is open on it; False where that can't be had.

    By /sys/fs/fuse/connections/N/abort, or where that is not mounted by umount2(2) with MNT_FORCE, which takes a
    mountpoint, and privileges.
    """
    try:
        Path(f"/sys/fs/fuse/connections/{connection}/abort").write_text("1", "ascii")
    except OSError:
        if mountpoint is None:
            return False
        return not libc.umount2(os.fsencode(mountpoint), MNT_FORCE) or ctypes.get_errno() == errno.EBUSY
    return True


def fusermount() -> str | None:
    """The path of fusermount3, if it is installed."""
    return shutil.which("fusermount3")


def _mount_directly(mountpoint: Path, options: MountOptions) -> int:
    flags, words = MS_NOSUID | MS_NODEV, []
    for word in options.words():
        if word in _FLAGS:
            added, removed = _FLAGS[word]
            flags = (flags | added) & ~removed
        else:
            words.append(word)
    fd = os.open(device.PATH, os.O_RDWR | os.O_CLOEXEC)
    try:
        root_mode = stat.S_IFMT(mountpoint.stat().st_mode)
        data = [f"fd={fd}", f"rootmode={root_mode:o}", f"user_id={os.geteuid()}", f"group_id={os.getegid()}"]
        _sys_mount(options.source, mountpoint, f"fuse.{options.subtype}", flags, ",".join([*data, *words]))
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EPERM:
            raise PermissionError(error.errno, error.strerror) from None
        raise MountError(f"{mountpoint} can't be mounted: {error.strerror}", errno=error.errno) from None
    return fd


def _mount_with_fusermount(mountpoint: Path, options: MountOptions) -> int:
    program = fusermount()
    if program is None:
        raise MountError(f"{mountpoint} can't be mounted: not root, and fusermount3 is not installed")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        words = [f"fsname={options.source}", f"subtype={options.subtype}", *options.words()]
        _run(
            [program, "-o", ",".join(words), "--", str(mountpoint)],
            f"{mountpoint} can't be mounted",
            pass_fd=theirs.fileno(),
        )
        theirs.close()
        _data, fds, _flags, _address = socket.recv_fds(ours, 1, 1)
    if not fds:
        raise MountError(f"{mountpoint} can't be mounted: fusermount3 gave no descriptor")
    os.set_inheritable(fds[0], False)
    return fds[0]


def _run(command: list[str], failure: str, pass_fd: int | None = None) -> None:
    environment, fds = dict(os.environ), [] if pass_fd is None else [pass_fd]
    if pass_fd is not None:
        environment["_FUSE_COMMFD"] = str(pass_fd)
    try:
        done = subprocess.run(command, env=environment, pass_fds=fds, capture_output=True, text=True, check=False)
    except OSError as error:
        raise MountError(f"{failure}: {command[0]}: {error.strerror}") from None
    if done.returncode:
        raise MountError(f"{failure}: {done.stderr.strip() or f'{command[0]} failed'}")


def _sys_mount(source: str, target: Path, kind: str, flags: int, data: str) -> None:
    arguments = [os.fsencode(word) for word in (source, target, kind)]
    check(libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(data)))
