"""Whoever owns a datadir swaps its files for symlinks while the mount works on them: none is ever followed."""

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Mounted, Mounter

ROUNDS = 100
SECRET = b"the secret of root"
GONE = (errno.ENOENT, errno.EEXIST, errno.ESTALE, errno.EAGAIN, errno.ENODATA, errno.EPERM)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that nobody may read or change by way of the mount."""
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    path.chmod(0o600)
    os.utime(path, ns=(7, 7))
    return path


@contextlib.contextmanager
def swapping(place: Path, target: Path) -> Iterator[list[int]]:
    """Inside, a name is an image, then a symlink, and so on, as fast as can be; gives how often that was so."""
    ending, swaps = threading.Event(), [0]
    new = place.parent / ".imgfs" / "swapped"

    def swap() -> None:
        while not ending.is_set():
            new.symlink_to(target)
            new.replace(place)
            new.write_bytes(b"image")
            new.replace(place)
            swaps[0] += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield swaps
    finally:
        ending.set()
        thread.join()


def calls(images: Mounted) -> list[Callable[[], object]]:
    """All that could reach another file, if a name were followed."""
    path = images / "x"
    return [
        path.read_bytes,
        lambda: path.write_bytes(b"changed"),
        lambda: os.truncate(path, 3),
        lambda: os.close(os.open(path, os.O_RDWR | os.O_APPEND)),
        lambda: path.chmod(0o666),
        lambda: os.chown(path, 65534, 65534),
        lambda: os.utime(path),
        lambda: os.setxattr(path, "user.note", b"x"),
        lambda: os.getxattr(path, "user.imgfs.state"),
        lambda: os.getxattr(path, "user.imgfs.checksum"),
        lambda: path.rename(images / "y"),
        (images / "y").read_bytes,
        lambda: (images / "y").rename(path),
        path.unlink,
    ]


def test_symlink_swapped_in_at_any_moment_is_not_followed(mount: Mounter, secret: Path) -> None:
    images = mount(file_perm="0644")
    images.expect_warning("stays stale: sealing failed|can't set mode|keeps changing")
    (images.datadirs[0] / "x").write_bytes(b"image")
    done = 0
    with swapping(images.datadirs[0] / "x", secret) as swaps:
        for _ in range(ROUNDS):
            for call in calls(images):
                try:
                    found = call()
                except OSError as error:
                    assert error.errno in GONE, error
                    continue
                done += 1
                assert not isinstance(found, bytes) or SECRET not in found
    assert done
    assert swaps[0]
    after = secret.stat()
    assert secret.read_bytes() == SECRET
    assert (stat.S_IMODE(after.st_mode), after.st_uid, after.st_mtime_ns) == (0o600, 0, 7)
    assert os.listxattr(secret) == []
