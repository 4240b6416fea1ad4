"""Expectations: a size and digests declared while an image is written, held against it when it is sealed."""

import errno
import hashlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients import MIB, assert_sealed, crash, fails_with, fill, md5, new_image, opened, wait_for_state
from tests.conftest import WAIT_SECONDS, Mounted, Mounter, attribute, run, wait_until

CONTENT = b"the bytes of an image" * 5000
MET = {
    "size": str(len(CONTENT)),
    "checksum": hashlib.md5(CONTENT).hexdigest(),
    "os_hash_value": hashlib.sha512(CONTENT).hexdigest(),
}
UNMET = {
    "size": str(len(CONTENT) + 1),
    "checksum": hashlib.md5(b"other").hexdigest(),
    "os_hash_value": hashlib.sha512(b"other").hexdigest(),
}


def expect(file: int | Path, name: str, value: str) -> None:
    """Declare something of an image."""
    os.setxattr(file, f"user.imgfs.expect.{name}", value.encode())


@contextmanager
def writing(image: Path) -> Iterator[int]:
    """A new image with CONTENT in it, still open."""
    with opened(image, os.O_CREAT | os.O_EXCL | os.O_RDWR) as fd:
        assert os.write(fd, CONTENT) == len(CONTENT)
        yield fd


def make_failed(images: Mounted, name: str = "a") -> Path:
    """An image that did not meet an expectation."""
    images.expect_warning(f"image '{name}' .* failed: its checksum is ")
    with writing(images / name) as fd:
        expect(fd, "checksum", UNMET["checksum"])
    assert wait_for_state(images / name, "active", "failed", "stale") == "failed"
    return images / name


def test_met_expectation_ends_active(mount: Mounter) -> None:
    images = mount()
    for name, value in MET.items():
        with writing(images / name) as fd:
            expect(fd, name, value)
        assert_sealed(images / name, md5(CONTENT))


@pytest.mark.parametrize("name", UNMET)
def test_unmet_expectation_ends_failed_and_is_not_served(mount: Mounter, name: str) -> None:
    images = mount()
    images.expect_warning(f"image 'a' .* failed: its {name} is {MET[name]}, expected {UNMET[name]}")
    with writing(images / "a") as fd:
        expect(fd, name, UNMET[name])
    assert wait_for_state(images / "a", "active", "failed", "stale") == "failed"
    for read in ((images / "a").read_bytes, lambda: os.open(images / "a", os.O_RDONLY)):
        with fails_with(errno.EIO):
            read()
    assert "Input/output error" in run("cp", images / "a", "/dev/null", check=False).stderr
    assert (images / "a").stat().st_size == len(CONTENT)
    assert f"its {name} is" in images.log.read_text()


def test_all_expectations_count_together(mount: Mounter) -> None:
    images = mount()
    images.expect_warning("failed: its os_hash_value")
    with writing(images / "a") as fd, writing(images / "b") as other:
        for name, value in MET.items():
            expect(fd, name, value)
            expect(other, name, UNMET[name] if name == "os_hash_value" else value)
    assert_sealed(images / "a", md5(CONTENT))
    assert wait_for_state(images / "b", "active", "failed") == "failed"


def test_expectation_is_compared_without_regard_to_case(mount: Mounter) -> None:
    images = mount()
    with writing(images / "a") as fd:
        expect(fd, "checksum", MET["checksum"].upper())
        expect(fd, "os_hash_value", MET["os_hash_value"].upper())
    assert_sealed(images / "a", md5(CONTENT))


MALFORMED = [
    *(("size", value) for value in ("", "many", "-1", "1.5", "0x10", "1KiB", "²", "9" * 40)),
    *(("checksum", value) for value in ("", MET["checksum"][1:], MET["checksum"] + "0", "g" * 32, "ü" * 16)),
    *(("os_hash_value", value) for value in ("", MET["checksum"], "x" * 128)),
    *((name, "1") for name in ("anything", "sizes", "SIZE")),
]


def test_malformed_expectation_is_refused_and_changes_nothing(mount: Mounter) -> None:
    images = mount()
    with writing(images / "a") as fd:
        for name, value in MALFORMED:
            with fails_with(errno.EINVAL):
                expect(fd, name, value)
            with fails_with(errno.ENODATA):
                os.getxattr(fd, f"user.imgfs.expect.{name}")
    assert_sealed(images / "a", md5(CONTENT))


def test_digest_of_another_algorithm_has_another_length(mount: Mounter) -> None:
    images = mount(hashing_algo="sha256")
    with writing(images / "a") as fd:
        with fails_with(errno.EINVAL):
            expect(fd, "os_hash_value", MET["os_hash_value"])
        expect(fd, "os_hash_value", hashlib.sha256(CONTENT).hexdigest())
    assert_sealed(images / "a", md5(CONTENT))


def test_sealed_image_takes_no_expectation(mount: Mounter) -> None:
    images = mount()
    (images / "a").write_bytes(CONTENT)
    assert_sealed(images / "a")
    for name, value in UNMET.items():
        with fails_with(errno.EPERM):
            expect(images / "a", name, value)
        said = run("setfattr", "-n", f"user.imgfs.expect.{name}", "-v", value, images / "a", check=False)
        assert "Operation not permitted" in said.stderr
    assert attribute(images / "a", "state") == "active"


def test_stale_image_takes_no_expectation(mount: Mounter) -> None:
    images = mount()
    (images.datadirs[0] / "a").write_bytes(CONTENT)
    with fails_with(errno.EPERM):
        expect(images / "a", "checksum", UNMET["checksum"])
    assert_sealed(images / "a", md5(CONTENT))


def test_expectation_is_read_back_until_sealing_and_never_listed(mount: Mounter) -> None:
    images = mount()
    with writing(images / "a") as fd:
        with fails_with(errno.ENODATA):
            os.getxattr(fd, "user.imgfs.expect.size")
        for name, value in MET.items():
            expect(images / "a", name, value)
        for name, value in MET.items():
            assert attribute(images / "a", f"expect.{name}") == value
        assert [name for name in os.listxattr(fd) if "expect" in name] == []
    assert_sealed(images / "a", md5(CONTENT))
    for name in MET:
        with fails_with(errno.ENODATA):
            attribute(images / "a", f"expect.{name}")
    assert [name for name in os.listxattr(images / "a") if "expect" in name] == []


def test_last_expectation_counts(mount: Mounter) -> None:
    images = mount()
    with writing(images / "a") as fd:
        expect(fd, "checksum", UNMET["checksum"])
        expect(fd, "size", UNMET["size"])
        expect(fd, "checksum", MET["checksum"])
        expect(fd, "size", MET["size"])
    assert_sealed(images / "a", md5(CONTENT))


def test_expectation_may_be_declared_before_the_first_byte(mount: Mounter) -> None:
    images = mount()
    with opened(images / "a", os.O_CREAT | os.O_WRONLY) as fd:
        for name, value in MET.items():
            expect(fd, name, value)
        os.write(fd, CONTENT)
    assert_sealed(images / "a", md5(CONTENT))


def test_expectation_is_checked_where_bytes_came_out_of_order(mount: Mounter) -> None:
    images = mount()
    images.expect_warning("failed: its checksum")
    for name, value in (("good", MET["checksum"]), ("bad", UNMET["checksum"])):
        with opened(images / name, os.O_CREAT | os.O_WRONLY) as fd:
            os.pwrite(fd, CONTENT[1000:], 1000)
            os.pwrite(fd, CONTENT[:1000], 0)
            expect(fd, "checksum", value)
    assert_sealed(images / "good", md5(CONTENT))
    assert wait_for_state(images / "bad", "active", "failed") == "failed"


def test_short_copy_of_a_declared_size_fails(mount: Mounter) -> None:
    images = mount()
    images.expect_warning("failed: its size is 1000, expected 5000")
    with opened(images / "a", os.O_CREAT | os.O_WRONLY) as fd:
        expect(fd, "size", "5000")
        os.write(fd, bytes(1000))
    assert wait_for_state(images / "a", "active", "failed") == "failed"


def test_writer_that_is_killed_leaves_no_active_image_of_another_size(mount: Mounter) -> None:
    images = mount()
    images.expect_warning("failed: its size is")
    script = 'exec 3>"$0"; setfattr -n user.imgfs.expect.size -v 1000000 "$0"; head -c 5000 /dev/zero >&3; read wait'
    writer = subprocess.Popen(["sh", "-c", script, str(images / "a")], stdin=subprocess.PIPE)
    assert writer.stdin
    wait_until(lambda: (images / "a").exists() and (images / "a").stat().st_size == 5000, "its bytes")
    writer.send_signal(signal.SIGKILL)
    writer.wait(WAIT_SECONDS)
    writer.stdin.close()
    assert wait_for_state(images / "a", "active", "failed", "stale") == "failed"


def test_failed_image_stays_failed_over_a_remount(mount: Mounter) -> None:
    images = mount()
    make_failed(images)
    images.unmount()
    again = mount.mount(images.config, images.path)
    assert attribute(again / "a", "state") == "failed"
    with fails_with(errno.EIO):
        (again / "a").read_bytes()


@pytest.mark.parametrize("name", UNMET)
def test_expectation_outlives_a_killed_daemon(mount: Mounter, name: str) -> None:
    images = mount()
    with writing(images / "a") as fd:
        expect(fd, name, UNMET[name])
        crash(mount, images)
    again = mount.mount(images.config, images.path)
    again.expect_warning(f"failed: its {name}")
    assert attribute(again / "a", "state") == "stale"
    assert attribute(again / "a", "checksum") == MET["checksum"]
    assert attribute(again / "a", "state") == "failed"
    with fails_with(errno.EIO):
        (again / "a").read_bytes()


def test_met_expectation_outlives_a_killed_daemon_and_ends_active(mount: Mounter) -> None:
    images = mount()
    with writing(images / "a") as fd:
        for name, value in MET.items():
            expect(fd, name, value)
        crash(mount, images)
    again = mount.mount(images.config, images.path)
    assert_sealed(again / "a", md5(CONTENT))


def test_digests_of_a_failed_image_can_be_read(mount: Mounter) -> None:
    images = mount()
    image = make_failed(images)
    assert attribute(image, "checksum") == MET["checksum"]
    assert attribute(image, "os_hash_value") == MET["os_hash_value"]
    assert attribute(image, "size") == MET["size"]


def test_failed_image_can_be_removed(mount: Mounter) -> None:
    images = mount()
    make_failed(images).unlink()
    assert os.listdir(images.path) == []


@pytest.mark.parametrize("write_once", [False, True])
def test_failed_image_can_be_written_again(mount: Mounter, write_once: bool) -> None:
    images = mount(write_once=write_once)
    image = make_failed(images)
    content = new_image(image, 1000)
    assert_sealed(image, md5(content))


def test_failed_image_can_be_replaced_and_renamed(mount: Mounter) -> None:
    images = mount()
    make_failed(images).rename(images / "b")
    assert attribute(images / "b", "state") == "failed"
    content = new_image(images / "new")
    (images / "new").rename(images / "b")
    assert_sealed(images / "b", md5(content))


def test_reader_of_an_image_that_fails_gets_no_more_bytes(mount: Mounter) -> None:
    images = mount()
    images.expect_warning("failed: its checksum")
    with writing(images / "a") as fd:
        reader = os.open(images / "a", os.O_RDONLY | os.O_DIRECT)
        assert os.pread(reader, 10, 0) == CONTENT[:10]
        expect(fd, "checksum", UNMET["checksum"])
    wait_for_state(images / "a", "failed")
    with fails_with(errno.EIO):
        os.pread(reader, 10, 0)
    os.close(reader)


def test_expected_size_moves_an_empty_image_to_a_datadir_that_holds_it(
    filesystem: Callable[..., Path], mount: Mounter
) -> None:
    images = mount([f"{filesystem('tmpfs', 8)}:200", f"{filesystem('tmpfs', 32)}:100"])
    content = os.urandom(12 * MIB)
    with opened(images / "a", os.O_CREAT | os.O_RDWR) as fd:
        os.setxattr(fd, "user.note", b"kept")
        os.fchmod(fd, 0o604)
        os.fchown(fd, 12, 34)
        expect(fd, "size", str(len(content)))
        assert attribute(images / "a", "datadir") == str(images.datadirs[1])
        assert os.write(fd, content) == len(content)
        assert os.pread(fd, 1000, MIB) == content[MIB : MIB + 1000]
    status = (images / "a").stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o604, 12, 34)
    assert os.getxattr(images / "a", "user.note") == b"kept"
    assert_sealed(images / "a", md5(content))


def test_expected_size_that_fits_nowhere_is_refused_at_once(filesystem: Callable[..., Path], mount: Mounter) -> None:
    images = mount([filesystem("tmpfs", 8), filesystem("tmpfs", 16)])
    with writing(images / "a") as fd:
        for size in (17 * MIB, 10**15, 10**18 - 1):
            with fails_with(errno.ENOSPC):
                expect(fd, "size", str(size))
        with fails_with(errno.ENODATA):
            os.getxattr(fd, "user.imgfs.expect.size")
    assert_sealed(images / "a", md5(CONTENT))


def test_expected_size_is_not_promised_twice(filesystem: Callable[..., Path], mount: Mounter) -> None:
    images = mount([filesystem("tmpfs", 32)])
    with opened(images / "a", os.O_CREAT | os.O_RDWR) as first:
        expect(first, "size", str(20 * MIB))
        with opened(images / "b", os.O_CREAT | os.O_RDWR) as second:
            with fails_with(errno.ENOSPC):
                expect(second, "size", str(20 * MIB))
            expect(second, "size", str(5 * MIB))
            os.ftruncate(second, 5 * MIB)
        os.ftruncate(first, 20 * MIB)
    assert_sealed(images / "b")


def test_image_with_bytes_moves_where_its_expected_size_fits(filesystem: Callable[..., Path], mount: Mounter) -> None:
    images = mount([f"{filesystem('tmpfs', 8)}:200", f"{filesystem('tmpfs', 32)}:100"])
    fill(images.datadirs[0], 4 * MIB)
    with writing(images / "a") as fd:
        with fails_with(errno.ENOSPC):
            expect(fd, "size", str(64 * MIB))
        assert attribute(images / "a", "datadir") == str(images.datadirs[0])
        expect(fd, "size", str(12 * MIB))
        assert attribute(images / "a", "datadir") == str(images.datadirs[1])
        expect(fd, "size", str(len(CONTENT)))
    assert attribute(images / "a", "datadir") == str(images.datadirs[1])
    assert_sealed(images / "a", md5(CONTENT))
