"""What the tests of client programs share: images to copy, digests to compare, other users to be, crashes."""

import contextlib
import errno
import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgfs import mounts
from imgfs.datadir import Datadir
from tests.conftest import WAIT_SECONDS, Mounted, Mounter, attribute, run, wait_until

MIB = 1 << 20
OLD_MTIME_NS = 1_234_567_890_123_456_789
COMPUTED = ("state", "size", "checksum", "os_hash_algo", "os_hash_value", "location", "datadir", "metadata")


def new_image(path: Path, size_bytes: int = 300_001, mode: int = 0o644) -> bytes:
    """Write a file of random bytes and give them."""
    content = os.urandom(size_bytes)
    path.write_bytes(content)
    path.chmod(mode)
    return content


def digest(path: Path, algorithm: str = "md5") -> str:
    """The digest of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def md5(content: bytes) -> str:
    """The md5 of bytes, in hex."""
    return hashlib.md5(content).hexdigest()


def backing_file(image: Path) -> Path:
    """Where an image on a mount lies in its datadir."""
    return Path(attribute(image, "datadir")) / image.name


def assert_sealed(image: Path, checksum: str | None = None) -> None:
    """The image is active, and its digests are those of its bytes (and `checksum`, where given)."""
    assert attribute(image, "checksum") == (checksum or digest(backing_file(image)))
    assert attribute(image, "state") == "active"
    assert digest(image) == attribute(image, "checksum")
    assert attribute(image, "os_hash_value") == digest(image, attribute(image, "os_hash_algo"))
    assert int(attribute(image, "size")) == image.stat().st_size


def wait_for_state(image: Path, *states: str) -> str:
    """Wait until an image is in one of some states; gives that."""
    wait_until(lambda: attribute(image, "state") in states, f"state {' or '.join(states)} of {image.name!r}")
    return attribute(image, "state")


@contextlib.contextmanager
def fails_with(*codes: int) -> Iterator[None]:
    """The block raises an OSError of one of these errnos."""
    with pytest.raises(OSError) as caught:
        yield
    names = [errno.errorcode[code] for code in codes]
    assert errno.errorcode.get(caught.value.errno or 0) in names, f"{caught.value}, not {names}"


def run_as(
    uid: int, *command: object, groups: tuple[int, ...] = (), check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a program as another user, in no groups but its own and `groups`."""
    return run(*command, check=check, user=uid, group=uid, extra_groups=list(groups))


def crash(mounter: Mounter, mounted: Mounted) -> None:
    """End a daemon by SIGKILL and take its dead mount away; nothing is asked of it any more."""
    mounted.daemon.send_signal(signal.SIGKILL)
    try:
        mounted.daemon.wait(WAIT_SECONDS)
    finally:
        mounts.detach(str(mounted.path))
    mounter._mounted.remove(mounted)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor of a file, closed in the end even if the daemon that serves it is gone."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def fill(directory: Path, leave_bytes: int) -> None:
    """Take up the free space of a filesystem but for about `leave_bytes`, by a file that is no image."""
    (directory / ".filled").mkdir()
    numbers = os.statvfs(directory)
    with open(directory / ".filled" / "file", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, numbers.f_bavail * numbers.f_frsize - leave_bytes)


def note_replaced(old_in: Datadir, name: str, new_in: Datadir, new_name: str) -> None:
    """Note in a datadir that an image there gives way to one of another datadir, as a rename over it begins."""
    old, new = old_in.inode(name), new_in.inode(new_name)
    assert old is not None
    assert new is not None
    old_in.note_replaced(name, old_in, old, new_in, new)
