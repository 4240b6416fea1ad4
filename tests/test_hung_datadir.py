"""A datadir that does not answer: it goes offline, nothing else does, and it comes back by itself."""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from imgfs import mounts
from tests.clients import assert_sealed, fails_with, md5
from tests.conftest import WAIT_SECONDS, FaultyMaker, Mounted, Mounter, attribute, run, wait_until
from tests.faulty import Faulty

TIMEOUT = 2
EXPECTED = "is offline|is online again|stays stale|still being worked on|came too late|is passed over"
PROMPT_SECONDS = 10.0
SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN


@pytest.fixture
def bad(faulty: FaultyMaker) -> Faulty:
    return faulty()


@pytest.fixture
def images(mount: Mounter, bad: Faulty, tmp_path: Path) -> Mounted:
    """A store with a datadir of higher priority that may hang, and a good one; each has an image."""
    good = tmp_path / "good"
    good.mkdir()
    (good / "on-good").write_bytes(b"good")
    mounted = mount([{"path": str(bad.path), "priority": 200}, {"path": str(good), "priority": 100}], timeout=TIMEOUT)
    mounted.expect_warning(EXPECTED)
    (mounted / "on-bad").write_bytes(b"bad")
    assert_sealed(mounted / "on-bad", md5(b"bad"))
    assert_sealed(mounted / "on-good", md5(b"good"))
    return mounted


def told(images: Mounted, what: str) -> int:
    """How often the log says something; the mount itself is better not asked while a datadir begins to hang."""
    return images.log.read_text().count(what)


def goes_offline(images: Mounted, times: int = 1) -> None:
    wait_until(lambda: told(images, " is offline: ") >= times, "the datadir to go offline")


def comes_back(images: Mounted, times: int = 1) -> None:
    wait_until(lambda: told(images, " is online again") >= times, "the datadir to come back")


def online(images: Mounted) -> list[bool]:
    return [datadir["online"] for datadir in json.loads(os.getxattr(images.path, "user.imgfs.datadirs"))]


def test_everything_else_goes_on_while_a_datadir_hangs(images: Mounted, bad: Faulty) -> None:
    bad.fault("hang", "*")
    goes_offline(images)
    began = time.monotonic()
    assert (images / "on-good").read_bytes() == b"good"
    assert sorted(p.name for p in images.path.iterdir()) == ["on-good"]
    (images / "new").write_bytes(b"new")
    assert_sealed(images / "new", md5(b"new"))
    assert attribute(images / "new", "datadir") == str(images.datadirs[1])
    (images / "new").rename(images / "newer")
    (images / "newer").unlink()
    os.statvfs(images.path)
    assert online(images) == [False, True]
    assert time.monotonic() - began < PROMPT_SECONDS
    bad.heal()
    comes_back(images)
    assert online(images) == [True, True]
    assert_sealed(images / "on-bad", md5(b"bad"))


def test_open_image_of_a_hung_datadir_gives_eio_and_works_again_afterwards(images: Mounted, bad: Faulty) -> None:
    with open(images / "open", "wb", buffering=0) as file:
        file.write(b"begun")
        bad.fault("hang", "*")
        goes_offline(images)
        with fails_with(errno.EIO):
            file.write(b" lost")
        with fails_with(errno.EIO):
            os.stat(images / "open")
        with fails_with(errno.EIO):
            os.open(images / "open", os.O_CREAT | os.O_WRONLY)
        bad.heal()
        comes_back(images)
        file.write(b", done")
    assert_sealed(images / "open", md5(b"begun, done"))


def test_digest_that_is_waited_for_gives_eio_and_the_seal_goes_on_when_the_datadir_is_back(
    images: Mounted, bad: Faulty
) -> None:
    bad.fault("hang", "fsync", "setxattr", name="new")
    (images / "new").write_bytes(b"new")
    wait_until(bad.hanging, "the seal to hang")
    bad.fault("hang", "*")
    goes_offline(images)
    with fails_with(errno.EIO):
        attribute(images / "new", "checksum")
    (images / "other").write_bytes(b"other")
    assert_sealed(images / "other", md5(b"other"))
    bad.heal()
    comes_back(images)
    assert_sealed(images / "new", md5(b"new"))


# --- what only imgfs's own transport can do: answer in place of a thread that is stuck ---


kernel_only = pytest.mark.parametrize("mount", ["kernel"], indirect=True)


def outcome(call: Callable[[], Any]) -> int:
    """The errno of a call, 0 where it succeeds."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


CALLS: dict[str, Callable[[Path, int], Any]] = {
    "read": lambda path, fd: os.pread(fd, 10, 0),
    "write": lambda path, fd: os.pwrite(fd, b"x", 0),
    "fsync": lambda path, fd: os.fsync(fd),
    "truncate": lambda path, fd: os.ftruncate(fd, 1),
    "fallocate": lambda path, fd: os.posix_fallocate(fd, 0, 100),
    "setxattr": lambda path, fd: os.setxattr(path, "user.x", b"y"),
    "getxattr": lambda path, fd: os.getxattr(path, "user.x"),
    "listxattr": lambda path, fd: os.listxattr(path),
    "chmod": lambda path, fd: os.chmod(path, 0o600),
    "chown": lambda path, fd: os.chown(path, 1, 1),
    "utimens": lambda path, fd: os.utime(path, (1, 1)),
    "unlink": lambda path, fd: os.unlink(path),
    "rename": lambda path, fd: os.rename(path, path.with_suffix(".renamed")),
    "create": lambda path, fd: path.with_suffix(".new").touch(),
}


@kernel_only
def test_each_call_that_is_stuck_gets_an_answer(images: Mounted, bad: Faulty) -> None:
    fds = {}
    for call in CALLS:
        (images / call).write_bytes(call.encode())
        fds[call] = os.open(images / call, os.O_RDWR)
    bad.fault("hang", "*")
    with ThreadPoolExecutor(len(CALLS)) as pool:
        began = time.monotonic()
        running = {name: pool.submit(outcome, lambda n=name: CALLS[n](images / n, fds[n])) for name in CALLS}
        found = {name: future.result(WAIT_SECONDS) for name, future in running.items()}
    assert time.monotonic() - began < PROMPT_SECONDS
    # The name was looked up again without the datadir that hangs, and the image is on the other one.
    assert {name: code for name, code in found.items() if code != errno.EIO} == {"create": 0}
    bad.heal()
    comes_back(images)
    for fd in fds.values():
        os.close(fd)
    for image in images.path.iterdir():
        assert_sealed(image)


@kernel_only
def test_late_answer_changes_nothing_any_more(images: Mounted, bad: Faulty) -> None:
    bad.fault("hang", "create", name="new")
    with ThreadPoolExecutor(2) as pool:
        creating = pool.submit(outcome, lambda: (images / "new").write_bytes(b"first"))
        wait_until(bad.hanging, "the create to hang")
        bad.fault("hang", "getattr", name="on-good")
        truncating = pool.submit(outcome, lambda: (images / "on-good").open("wb").close())
        assert creating.result(WAIT_SECONDS) == errno.EIO
        assert truncating.result(WAIT_SECONDS) in (0, errno.EIO)
    goes_offline(images)
    (images / "on-good").write_bytes(b"written meanwhile")
    bad.heal()
    comes_back(images)
    assert (images.datadirs[1] / "on-good").read_bytes() == b"written meanwhile"
    assert attribute(images / "on-good", "checksum") == md5(b"written meanwhile")
    wait_until(lambda: not (bad.below / "new").exists(), "the late create to be undone")
    (images / "new").write_bytes(b"second")
    assert_sealed(images / "new", md5(b"second"))


@kernel_only
def test_stuck_requests_leave_room_for_others(mount: Mounter, bad: Faulty, tmp_path: Path) -> None:
    good = tmp_path / "good"
    images = mount([{"path": str(good), "priority": 200}, {"path": str(bad.path), "priority": 100}], timeout=6)
    images.expect_warning(EXPECTED + "|threads are busy")
    (good / "on-good").write_bytes(b"good")
    (bad.below / "on-bad").write_bytes(b"bad")
    fd = os.open(images / "on-bad", os.O_RDWR)
    bad.fault("hang", "*")

    def ask() -> int:
        return outcome(lambda: os.getxattr(fd, "user.x"))

    with ThreadPoolExecutor(320) as pool:
        asking = [pool.submit(ask) for _ in range(80)]
        wait_until(lambda: bad.hanging() > 60, "many to hang")
        assert (images / "on-good").read_bytes() == b"good"
        while not wait([pool.submit(ask)], timeout=0.3).done:
            assert told(images, " is offline: ") == 0, "none was refused"
        assert (images / "on-good").read_bytes() == b"good"
        assert {future.result(WAIT_SECONDS) for future in asking} == {errno.EIO}
    os.close(fd)
    bad.heal()
    comes_back(images)
    assert_sealed(images / "on-bad", md5(b"bad"))


def test_mount_ends_though_requests_are_stuck(images: Mounted, bad: Faulty) -> None:
    images.expect_warning("is in use; it ends all the same|the daemon ends without them|could not be closed")
    fd = os.open(images / "on-bad", os.O_RDWR)
    bad.fault("hang", "*")
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(outcome, lambda: os.getxattr(fd, "user.x"))
        goes_offline(images)
        images.daemon.terminate()
        assert asking.result(WAIT_SECONDS) in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)
        wait_until(lambda: not mounts.is_imgfs(images.path), "the mount to go")
        wait_until(lambda: is_done(images.daemon.pid), "the daemon to have done all it can")
    with contextlib.suppress(OSError):
        os.close(fd)
    bad.heal()
    assert images.daemon.wait(WAIT_SECONDS) == 0


def is_done(pid: int) -> bool:
    """Whether a process has ended but for threads that the kernel can't end."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@kernel_only
def test_unmount_does_not_wait_for_a_hung_datadir(images: Mounted, bad: Faulty) -> None:
    images.expect_warning("is in use; it ends all the same")
    bad.fault("hang", "*")
    goes_offline(images)
    began = time.monotonic()
    done = run(sys.executable, "-m", "imgfs", "umount", images.path)
    assert "can't end before a datadir answers" in done.stderr
    assert time.monotonic() - began < WAIT_SECONDS
    bad.heal()
    assert images.daemon.wait(WAIT_SECONDS) == 0


def test_dead_datadir_is_passed_over_at_once_without_any_timeout(mount: Mounter, bad: Faulty, tmp_path: Path) -> None:
    images = mount([{"path": str(bad.path), "priority": 200}, {"path": str(tmp_path / "good")}])
    images.expect_warning(EXPECTED)
    (images / "on-bad").write_bytes(b"bad")
    assert_sealed(images / "on-bad", md5(b"bad"))
    bad.fault("EIO")
    began = time.monotonic()
    (images / "new").write_bytes(b"new")
    assert_sealed(images / "new", md5(b"new"))
    assert time.monotonic() - began < PROMPT_SECONDS / 2
    assert online(images) == [False, True]
    assert [path.name for path in images.path.iterdir()] == ["new"]
    bad.heal()
    comes_back(images)
    assert_sealed(images / "on-bad", md5(b"bad"))


def test_read_error_of_one_image_concerns_that_image_only(mount: Mounter, bad: Faulty) -> None:
    images = mount([{"path": str(bad.path)}], timeout=5)
    (images / "well").write_bytes(b"well")
    (bad.below / "sick").write_bytes(b"sick")  # directly, so that it is in no cache
    for operation in ("read", "getattr", "open"):
        bad.fault("EIO", operation, name="sick")
        with fails_with(errno.EIO):
            read_from_disk(images / "sick")
        assert (images / "well").read_bytes() == b"well"
        assert online(images) == [True]
        bad.heal()
    read_from_disk(images / "sick")


def read_from_disk(path: Path) -> None:
    """Read by O_DIRECT, which no cache answers."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        os.preadv(fd, [mmap.mmap(-1, 4096)], 0)
    finally:
        os.close(fd)


# --- real filesystems ---


@kernel_only
def test_frozen_filesystem_is_a_datadir_that_hangs(
    filesystem: Callable[..., Path], mount: Mounter, tmp_path: Path
) -> None:
    ext4 = filesystem("ext4", 32)
    images = mount([{"path": str(ext4), "priority": 200}, {"path": str(tmp_path / "good")}], timeout=TIMEOUT)
    images.expect_warning(EXPECTED)
    (images / "before").write_bytes(b"before")
    assert_sealed(images / "before", md5(b"before"))
    run("fsfreeze", "--freeze", ext4)
    try:
        assert outcome(lambda: (images / "stuck").write_bytes(b"1")) == errno.EIO
        (images / "new").write_bytes(b"new")
        assert_sealed(images / "new", md5(b"new"))
        assert attribute(images / "new", "datadir") == str(tmp_path / "good")
    finally:
        run("fsfreeze", "--unfreeze", ext4)
    comes_back(images)
    assert_sealed(images / "before", md5(b"before"))
    wait_until(lambda: not (ext4 / "stuck").exists(), "the late create to be undone")


@kernel_only
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_filesystem_that_shut_down_is_passed_over(
    filesystem: Callable[..., Path], mount: Mounter, tmp_path: Path, kind: str
) -> None:
    disk = filesystem(kind, 320 if kind == "xfs" else 32)
    images = mount([{"path": str(disk), "priority": 200}, {"path": str(tmp_path / "good")}])
    images.expect_warning(EXPECTED)
    (images / "before").write_bytes(b"before")
    assert_sealed(images / "before", md5(b"before"))
    fd = os.open(disk, os.O_RDONLY)
    fcntl.ioctl(fd, SHUTDOWN, (2).to_bytes(4, "little"))
    os.close(fd)
    (images / "new").write_bytes(b"new")
    assert_sealed(images / "new", md5(b"new"))
    assert attribute(images / "new", "datadir") == str(tmp_path / "good")
    assert images.unmount() == 0
