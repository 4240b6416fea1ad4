"""Every fault that a datadir may have, under every operation of a mount: the right errno, and no wrong record."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients import assert_sealed, backing_file, digest, md5
from tests.conftest import FaultyMaker, Mounted, Mounter, attribute, run
from tests.faulty import Faulty

FAULTS = {
    "ENOSPC": {errno.ENOSPC},
    "EDQUOT": {errno.EDQUOT, errno.ENOSPC},
    "EIO": {errno.EIO},
    "EROFS": {errno.EROFS, errno.ENOSPC},
    "short": set(),
}
# fmt: off
OPERATIONS = [
    "create", "write", "read", "truncate", "fallocate", "fsync", "getxattr", "setxattr", "listxattr", "removexattr",
    "rename", "unlink", "readdir", "statfs", "open", "chmod", "chown", "utimens", "getattr", "flush", "lseek",
    "copy_file_range",
]
# fmt: on
OLD, NEW = b"old" * 50_000, b"newer" * 50_000
NOTHING_THERE = {errno.ENOENT, errno.ENODATA, errno.ENXIO}
EXPECTED = (
    "stays stale|is passed over|is removed: |is offline|is online again|can't set mode|could not be closed|"
    "closing it gives|on a read-only filesystem"
)


def with_file(act: Callable[[int], Any], flags: int = os.O_RDWR) -> Callable[[Path], Any]:
    """Do something with an image that is opened for it."""

    def call(path: Path) -> None:
        fd = os.open(path, flags)
        try:
            act(fd)
        finally:
            os.close(fd)

    return call


CALLS: dict[str, Callable[[Path], Any]] = {
    "create and write": lambda path: path.with_suffix(".new").write_bytes(NEW),
    "read": lambda path: path.read_bytes(),
    "overwrite": with_file(lambda fd: os.pwrite(fd, NEW, 10)),
    "truncate": with_file(lambda fd: os.ftruncate(fd, 1000)),
    "fsync": with_file(os.fsync),
    "seek": with_file(lambda fd: os.lseek(fd, 0, os.SEEK_HOLE), os.O_RDONLY),
    "get digest": lambda path: attribute(path, "checksum"),
    "get state": lambda path: attribute(path, "state"),
    "set attribute": lambda path: os.setxattr(path, "user.x", b"y"),
    "list attributes": os.listxattr,
    "remove attribute": lambda path: os.removexattr(path, "user.x"),
    "chmod": lambda path: path.chmod(0o600),
    "chown": lambda path: os.chown(path, 1, 1),
    "utimens": lambda path: os.utime(path, (1, 1)),
    "stat": os.stat,
    "readdir": lambda path: list(path.parent.iterdir()),
    "statfs": lambda path: os.statvfs(path.parent),
    "rename": lambda path: path.rename(path.with_suffix(".renamed")),
    "rename over": lambda path: path.with_suffix(".renamed").rename(path.with_suffix(".other")),
    "unlink": lambda path: path.with_suffix(".other").unlink(),
}


def outcome(call: Callable[[Path], Any], path: Path) -> int:
    """The errno of a call, 0 where it succeeds."""
    try:
        call(path)
    except OSError as error:
        return error.errno or -1
    return 0


def assert_no_wrong_record(images: Mounted) -> None:
    """What is active has the bytes that its digests say."""
    for image in images.path.iterdir():
        if attribute(image, "state") == "active":
            assert attribute(image, "checksum") == digest(backing_file(image)), image


def test_directory_without_a_fault_is_a_good_datadir(faulty: FaultyMaker, mount: Mounter) -> None:
    images = mount([faulty().path])
    (images / "a").write_bytes(OLD)
    assert_sealed(images / "a", md5(OLD))
    (images / "a").rename(images / "b")
    run("setfattr", "-n", "user.x", "-v", "y", images / "b")
    assert_sealed(images / "b", md5(OLD))
    (images / "b").unlink()
    assert list(images.path.iterdir()) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_under_every_operation(faulty: FaultyMaker, mount: Mounter, tmp_path: Path, fault: str) -> None:
    bad = faulty()
    images = mount([{"path": str(bad.path), "priority": 200}, {"path": str(tmp_path / "good"), "priority": 100}])
    images.expect_warning(EXPECTED)
    (tmp_path / "good" / "well").write_bytes(OLD)
    assert_sealed(images / "well", md5(OLD))
    found: dict[tuple[str, str], int] = {}
    for number, operation in enumerate(OPERATIONS):
        found |= outcomes(images, bad, fault, operation, number)
        assert (images / "well").read_bytes() == OLD
        assert_no_wrong_record(images)
        for image in images.path.glob("victim*"):
            image.unlink()
    fit = {0} | NOTHING_THERE | FAULTS[fault]
    assert {calls: errno.errorcode[code] for calls, code in found.items() if code not in fit} == {}
    assert fault == "short" or FAULTS[fault] & set(found.values())
    assert attribute(images.path, "datadirs").count('"online": true') == 2
    assert images.unmount() == 0


def outcomes(images: Mounted, bad: Faulty, fault: str, operation: str, number: int) -> dict[tuple[str, str], int]:
    """Make every call while one operation of the datadir fails; the errno of each, 0 where it succeeds."""
    victim = images / f"victim{number}"
    for path in (victim, victim.with_suffix(".other")):
        path.write_bytes(OLD)
        assert_sealed(path, md5(OLD))
    bad.fault(fault, operation, name="victim*")
    found = {(operation, name): outcome(call, victim) for name, call in CALLS.items()}
    bad.heal()
    return found
