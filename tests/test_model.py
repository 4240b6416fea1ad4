"""A mounted store and a plain directory, given the same system calls in any order, show the same.

And the digests, which the directory has none of, are those of its bytes. Names are few, so that calls meet: images
are removed, replaced, renamed and written to while they are open.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from imgfs.times import UTIME_NOW, UTIME_OMIT  # as moments they can't be told from what they stand for
from tests.clients import md5
from tests.conftest import Mounted, attribute

EXAMPLES = int(os.environ.get("IMGFS_TEST_EXAMPLES", "150"))
STEPS = 30
MOST_OPEN = 6
NAMES = st.sampled_from(["a", "b", "c"])
WHICH = st.integers(0, MOST_OPEN)
OFFSETS = st.one_of(st.integers(0, 20_000), st.sampled_from([0, 4096, 8192, 150_000, 1 << 20]))
DATA = st.builds(
    lambda size, seed: hashlib.shake_128(seed).digest(size), st.integers(1, 200_000), st.binary(max_size=2)
)
ACCESS = st.sampled_from([os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_APPEND])
WRITES = os.O_ACCMODE | os.O_TRUNC | os.O_CREAT  # all that an image may be unsealed for
MORE = st.sampled_from([0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_CREAT | os.O_TRUNC, os.O_TRUNC])
ATTRIBUTES = st.sampled_from(["user.one", "user.two"])
FALLOCATE = st.sampled_from([0, 1, 1 | 2, 16, 16 | 1])  # plain, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE

_libc = ctypes.CDLL(None, use_errno=True)


def called(result: int) -> None:
    """Raise the OSError of a C function that has failed."""
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def renameat2(old: Path, new: Path, flags: int) -> None:
    """renameat2(2)."""
    called(_libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    called(_libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def stored_attributes(path: Path) -> dict[str, bytes]:
    """The attributes that somebody set, by name."""
    names = [name for name in os.listxattr(path) if not name.startswith("user.imgfs.")]
    return {name: os.getxattr(path, name) for name in names}


class Programs(RuleBasedStateMachine):
    """Each rule makes one call on the image and on the file, and compares what came of it, errno included."""

    images: Path
    files: Path

    def __init__(self) -> None:
        super().__init__()
        self.open_files: list[tuple[int, int, int]] = []  # of the image, of the file, flags

    def teardown(self) -> None:
        self.close_all()
        try:
            self.digests_are_those_of_the_bytes()
        finally:  # the next program begins with nothing
            for path in (*self.files.iterdir(), *self.images.iterdir()):
                path.unlink()

    # --- both sides ---

    def same(self, call: Callable[..., Any], *arguments: Callable[[Path], Path] | str) -> None:
        """Make a call with the paths of some names on both sides."""
        outcomes = [outcome(call, *(side / str(name) for name in arguments)) for side in (self.images, self.files)]
        assert outcomes[0] == outcomes[1]

    def same_open(self, which: int, call: Callable[[int], Any]) -> None:
        """Make a call on an open image and file."""
        if self.open_files:
            ours, theirs, _ = self.open_files[which % len(self.open_files)]
            assert outcome(call, ours) == outcome(call, theirs)

    # --- handles ---

    @rule(name=NAMES, access=ACCESS, more=MORE, mode=st.sampled_from([0o600, 0o644, 0o666]))
    def open(self, name: str, access: int, more: int, mode: int) -> None:
        (ours, our_error), (theirs, their_error) = (
            outcome(lambda path: os.open(path, access | more, mode), side / name)
            for side in (self.images, self.files)
        )
        assert our_error == their_error
        if our_error is None:
            self.open_files.append((ours, theirs, access | more))
        if len(self.open_files) > MOST_OPEN:
            self.close(0)

    @rule(which=WHICH)
    def close(self, which: int) -> None:
        if self.open_files:
            ours, theirs, _ = self.open_files.pop(which % len(self.open_files))
            os.close(ours)
            os.close(theirs)

    @rule(which=WHICH, data=DATA)
    def write(self, which: int, data: bytes) -> None:
        self.same_open(which, lambda fd: os.write(fd, data))

    @rule(which=WHICH, offset=OFFSETS, data=DATA)
    def pwrite(self, which: int, offset: int, data: bytes) -> None:
        self.same_open(which, lambda fd: os.pwrite(fd, data, offset))

    @rule(which=WHICH, size=st.integers(1, 300_000))
    def read(self, which: int, size: int) -> None:
        self.same_open(which, lambda fd: os.read(fd, size))

    @rule(which=WHICH, offset=OFFSETS, size=st.integers(1, 300_000))
    def pread(self, which: int, offset: int, size: int) -> None:
        self.same_open(which, lambda fd: os.pread(fd, size, offset))

    @rule(which=WHICH, size=OFFSETS)
    def ftruncate(self, which: int, size: int) -> None:
        self.same_open(which, lambda fd: os.ftruncate(fd, size))

    @rule(which=WHICH)
    def fstat(self, which: int) -> None:
        self.same_open(which, lambda fd: shown(os.fstat(fd)))

    @rule(which=WHICH)
    def fsync(self, which: int) -> None:
        self.same_open(which, os.fsync)

    @rule(which=WHICH, whence=st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END]), offset=OFFSETS)
    def lseek(self, which: int, whence: int, offset: int) -> None:
        self.same_open(which, lambda fd: os.lseek(fd, offset, whence))

    # --- names ---

    @rule(name=NAMES, size=OFFSETS)
    def truncate(self, name: str, size: int) -> None:
        self.same(lambda path: os.truncate(path, size), name)

    @rule(name=NAMES)
    def unlink(self, name: str) -> None:
        self.same(os.unlink, name)

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        self.same(os.rename, old, new)

    @rule(name=NAMES, data=DATA)
    def create(self, name: str, data: bytes) -> None:
        """As most programs do: all at once."""
        self.same(lambda path: path.write_bytes(data), name)

    @rule(name=NAMES, mode=st.integers(0, 0o777))
    def chmod(self, name: str, mode: int) -> None:
        self.same(lambda path: path.chmod(mode), name)

    @rule(name=NAMES, mtime_ns=st.integers(0, 2**32 * 10**9).filter(lambda ns: ns not in {UTIME_NOW, UTIME_OMIT}))
    def utime(self, name: str, mtime_ns: int) -> None:
        self.same(lambda path: (os.utime(path, ns=(1, mtime_ns)), path.stat().st_mtime_ns)[1], name)

    @rule(name=NAMES, key=ATTRIBUTES, value=st.binary(max_size=20), flags=st.sampled_from([0, 1, 2]))
    def setxattr(self, name: str, key: str, value: bytes, flags: int) -> None:
        self.same(lambda path: os.setxattr(path, key, value, flags), name)

    @rule(name=NAMES, key=ATTRIBUTES)
    def getxattr(self, name: str, key: str) -> None:
        self.same(lambda path: os.getxattr(path, key), name)

    @rule(name=NAMES, key=ATTRIBUTES)
    def removexattr(self, name: str, key: str) -> None:
        self.same(lambda path: os.removexattr(path, key), name)

    # --- what is seen of it all ---

    @invariant()
    def shows_the_same(self) -> None:
        assert everything(self.images) == everything(self.files)

    @precondition(lambda self: not any(flags & WRITES for _, _, flags in self.open_files))
    @rule()
    def digests_are_those_of_the_bytes(self) -> None:
        for path in self.files.iterdir():
            assert attribute(self.images / path.name, "checksum") == md5(path.read_bytes())
            assert attribute(self.images / path.name, "state") == "active"

    def close_all(self) -> None:
        """Close what is open on both sides."""
        while self.open_files:
            self.close(0)


class KernelPrograms(Programs):
    """The same, with the calls that only the kernel transport carries."""

    @rule(old=NAMES, new=NAMES, flags=st.sampled_from([1, 2]))
    def renameat2(self, old: str, new: str, flags: int) -> None:
        """RENAME_NOREPLACE or RENAME_EXCHANGE."""
        self.same(lambda one, other: renameat2(one, other, flags), old, new)

    @rule(which=WHICH, mode=FALLOCATE, offset=OFFSETS, length=st.integers(1, 100_000))
    def fallocate(self, which: int, mode: int, offset: int, length: int) -> None:
        self.same_open(which, lambda fd: fallocate(fd, mode, offset, length))

    @rule(which=WHICH, whence=st.sampled_from([os.SEEK_DATA, os.SEEK_HOLE]), offset=OFFSETS)
    def seek_data_or_hole(self, which: int, whence: int, offset: int) -> None:
        self.same_open(which, lambda fd: os.lseek(fd, offset, whence))

    @rule(source=WHICH, other=WHICH, offset_in=OFFSETS, offset_out=OFFSETS, length=st.integers(1, 100_000))
    def copy_file_range(self, source: int, other: int, offset_in: int, offset_out: int, length: int) -> None:
        if not self.open_files:
            return
        first, second = (self.open_files[which % len(self.open_files)] for which in (source, other))
        copied = [
            outcome(lambda a, b: os.copy_file_range(a, b, length, offset_in, offset_out), first[side], second[side])
            for side in (0, 1)
        ]
        assert copied[0] == copied[1]


def outcome(call: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """What a call gives, or the name of its errno."""
    try:
        return call(*arguments), None
    except OSError as error:
        return None, errno.errorcode.get(error.errno or 0, str(error))


def shown(status: os.stat_result) -> tuple[int, ...]:
    """What of stat(2) both sides have in common."""
    return status.st_size, status.st_mode, status.st_nlink, status.st_uid, status.st_gid


def everything(directory: Path) -> dict[str, Any]:
    """All that a directory shows, by name."""
    found = {}
    for name in sorted(os.listdir(directory)):
        path = directory / name
        found[name] = shown(path.stat()), md5(path.read_bytes()), stored_attributes(path)
    return found


@pytest.fixture
def sides(mount: Callable[..., Mounted], tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The images of a mount, and a directory on the datadirs' disk."""
    (tmp_path / "files").mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(0o022))
        yield mount().path, tmp_path / "files"


def test_a_mount_behaves_like_a_directory(mount: Any, sides: tuple[Path, Path]) -> None:
    programs = KernelPrograms if mount.transport == "kernel" else Programs
    machine = type(programs.__name__, (programs,), {"images": sides[0], "files": sides[1]})
    few = settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, database=None,
                   suppress_health_check=list(HealthCheck))  # fmt: skip
    run_state_machine_as_test(machine, settings=few)
