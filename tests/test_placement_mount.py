"""Where new images go, on small real filesystems: priority, free space, modes, declared sizes."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import MIB, assert_sealed, fails_with, fill, md5, new_image
from tests.conftest import FaultyMaker, Mounted, attribute, run, wait_until

Filesystem = Callable[..., Path]
Mount = Callable[..., Mounted]


def datadir_of(image: Path) -> str:
    """The last part of the path of the datadir an image is in."""
    return Path(attribute(image, "datadir")).name


def declare(file: int, size: int) -> None:
    """Declare the final size of an image that is being written."""
    os.setxattr(file, "user.imgfs.expect.size", str(size).encode())


def test_highest_priority_takes_new_images(filesystem: Filesystem, mount: Mount) -> None:
    images = mount([f"{filesystem('tmpfs', 32)}:1", f"{filesystem('tmpfs', 8)}:9", f"{filesystem('tmpfs', 32)}:5"])
    new_image(images / "a")
    assert datadir_of(images / "a") == "fs1"


@pytest.mark.parametrize(("first", "second", "chosen"), [(8, 16, "fs1"), (16, 8, "fs0")])
def test_most_free_space_decides_among_equals(
    filesystem: Filesystem, mount: Mount, first: int, second: int, chosen: str
) -> None:
    images = mount([f"{filesystem('tmpfs', first)}:7", f"{filesystem('tmpfs', second)}:7"])
    new_image(images / "a")
    assert datadir_of(images / "a") == chosen


def test_images_alternate_between_equals_as_they_fill(filesystem: Filesystem, mount: Mount) -> None:
    images = mount([filesystem("tmpfs", 16), filesystem("tmpfs", 16)])
    for name in "abcd":
        new_image(images / name, 2 * MIB)
    assert sorted(datadir_of(images / name) for name in "abcd") == ["fs0", "fs0", "fs1", "fs1"]


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "xfs"])
def test_full_preferred_datadir_is_passed_over(filesystem: Filesystem, mount: Mount, kind: str) -> None:
    mib = 320 if kind == "xfs" else 16
    images = mount([f"{filesystem(kind, mib)}:200", f"{filesystem(kind, mib)}:100"])
    fill(images.datadirs[0], 64 << 10)
    content = new_image(images / "a", MIB)
    assert datadir_of(images / "a") == "fs1"
    assert_sealed(images / "a", md5(content))


@pytest.mark.parametrize("mode", ["nc", "ro"])
def test_datadir_that_takes_no_images_still_serves_its_own(filesystem: Filesystem, mount: Mount, mode: str) -> None:
    preferred = filesystem("tmpfs", 16)
    content = new_image(preferred / "old")
    images = mount([{"path": str(preferred), "priority": 200, "mode": mode}, f"{filesystem('tmpfs', 16)}:100"])
    new_image(images / "new")
    assert datadir_of(images / "new") == "fs1"
    assert datadir_of(images / "old") == "fs0"
    assert_sealed(images / "old", md5(content))


def test_datadir_without_new_images_lets_its_own_be_changed(filesystem: Filesystem, mount: Mount) -> None:
    below = filesystem("tmpfs", 16)
    new_image(below / "old")
    images = mount([{"path": str(below), "mode": "nc"}])
    content = new_image(images / "old", 1000)
    assert_sealed(images / "old", md5(content))
    with fails_with(errno.ENOSPC):
        (images / "new").touch()
    (images / "old").unlink()
    assert os.listdir(images.path) == []


def test_read_only_datadir_refuses_every_change(filesystem: Filesystem, mount: Mount) -> None:
    below = filesystem("tmpfs", 16)
    content = new_image(below / "old")
    before = (below / "old").stat()
    images = mount([{"path": str(below), "mode": "ro"}])
    old = images / "old"
    changes: list[Callable[[], object]] = [
        lambda: os.open(old, os.O_RDWR),
        lambda: os.open(old, os.O_WRONLY | os.O_TRUNC),
        lambda: os.truncate(old, 0),
        old.unlink,
        lambda: old.rename(images / "new"),
        lambda: old.chmod(0o600),
        lambda: os.chown(old, 1, 1),
        lambda: os.utime(old, (1, 1)),
        lambda: os.setxattr(old, "user.note", b"x"),
    ]
    for change in changes:
        with fails_with(errno.EACCES, errno.EROFS):
            change()
    assert_sealed(old, md5(content))
    after = (below / "old").stat()
    assert (after.st_mtime_ns, after.st_ctime_ns, after.st_mode) == (
        before.st_mtime_ns,
        before.st_ctime_ns,
        before.st_mode,
    )
    assert os.listdir(below) == ["old"]


def test_datadir_on_a_read_only_filesystem_is_served(filesystem: Filesystem, mount: Mount) -> None:
    below = filesystem("tmpfs", 16)
    content = new_image(below / "old")
    run("mount", "-o", "remount,ro", below)
    images = mount([{"path": str(below), "mode": "ro"}])
    assert_sealed(images / "old", md5(content))


def test_datadir_that_turns_read_only_is_passed_over_until_it_is_writable_again(
    filesystem: Filesystem, mount: Mount
) -> None:
    images = mount([f"{filesystem('tmpfs', 16)}:200", f"{filesystem('tmpfs', 16)}:100"])
    images.expect_warning("fs0 is on a read-only filesystem: new images go elsewhere")
    old = new_image(images / "old")
    assert_sealed(images / "old", md5(old))
    run("mount", "-o", "remount,ro", images.datadirs[0])
    for name in "abc":
        assert_sealed(images / name, md5(new_image(images / name)))
        assert datadir_of(images / name) == "fs1"
    assert_sealed(images / "old", md5(old))
    with fails_with(errno.EROFS):
        (images / "old").unlink()
    run("mount", "-o", "remount,rw", images.datadirs[0])
    new_image(images / "d")
    assert datadir_of(images / "d") == "fs0"
    assert images.log.read_text().count("read-only filesystem") == 1


def test_datadir_that_answers_read_only_is_not_tried_each_time(faulty: FaultyMaker, mount: Mount) -> None:
    """A server may export read-only what looks writable to its clients."""
    refusing = faulty()
    images = mount([f"{refusing.path}:200", "low:100"])
    images.expect_warning("read-only filesystem: new images go elsewhere|is passed over for 'a': Read-only")
    refusing.fault("EROFS", "create")
    for name in "abc":
        assert_sealed(images / name, md5(new_image(images / name)))
        assert datadir_of(images / name) == "low"
    assert images.log.read_text().count("is passed over for") == 1


def test_min_free_is_left_free(filesystem: Filesystem, mount: Mount) -> None:
    preferred = {"path": str(filesystem("tmpfs", 16)), "priority": 200, "min_free": "14MiB"}
    images = mount([preferred, f"{filesystem('tmpfs', 16)}:100"])
    new_image(images / "a", 3 * MIB // 2)
    new_image(images / "b", 1000)
    assert [datadir_of(images / "a"), datadir_of(images / "b")] == ["fs0", "fs1"]


def test_nothing_fits_anywhere(filesystem: Filesystem, mount: Mount) -> None:
    images = mount([filesystem("tmpfs", 8), filesystem("tmpfs", 8)])
    for datadir in images.datadirs:
        fill(datadir, 0)
    with fails_with(errno.ENOSPC):
        (images / "a").touch()
    assert os.listdir(images.path) == []


def test_declared_size_passes_over_a_datadir_that_is_too_small(filesystem: Filesystem, mount: Mount) -> None:
    images = mount([f"{filesystem('tmpfs', 8)}:200", f"{filesystem('tmpfs', 32)}:100"])
    content = os.urandom(12 * MIB)
    with open(images / "a", "wb") as image:
        assert datadir_of(images / "a") == "fs0"
        declare(image.fileno(), len(content))
        assert datadir_of(images / "a") == "fs1"
        image.write(content)
    assert_sealed(images / "a", md5(content))
    assert [p.name for p in images.datadirs[0].glob("[!.]*")] == []


def test_truncated_empty_image_counts_as_declared(filesystem: Filesystem, mount: Mount) -> None:
    images = mount([f"{filesystem('tmpfs', 8)}:200", f"{filesystem('tmpfs', 32)}:100"])
    with open(images / "a", "wb") as image:
        image.truncate(12 * MIB)
        image.write(b"head")
    assert datadir_of(images / "a") == "fs1"
    assert_sealed(images / "a", md5(b"head" + bytes(12 * MIB - 4)))


def test_reservation_is_shown_and_ends_with_the_image(filesystem: Filesystem, mount: Mount) -> None:
    images = mount([filesystem("tmpfs", 32)])
    with open(images / "a", "wb", buffering=0) as image:
        declare(image.fileno(), 10 * MIB)
        assert f'"reserved": {10 * MIB}' in attribute(images.path, "datadirs")
        image.write(bytes(4 * MIB))
        assert f'"reserved": {6 * MIB}' in attribute(images.path, "datadirs")
        (images / "a").unlink()
    wait_until(lambda: os.statvfs(images.datadirs[0]).f_bavail * 4096 > 31 * MIB)
    with open(images / "b", "wb") as image:
        declare(image.fileno(), 31 * MIB)
        image.truncate(31 * MIB)


@pytest.mark.parametrize("declaration", ["expect.size", "ftruncate"])
def test_two_large_images_at_once_do_not_choose_a_datadir_that_holds_only_one(
    filesystem: Filesystem, mount: Mount, declaration: str
) -> None:
    images = mount([f"{filesystem('tmpfs', 32)}:200", f"{filesystem('tmpfs', 32)}:100"])
    content = os.urandom(20 * MIB)
    start = threading.Barrier(2, timeout=30)

    def add(name: str) -> None:
        with open(images / name, "wb") as image:
            start.wait()
            if declaration == "expect.size":
                declare(image.fileno(), len(content))
            else:
                image.truncate(len(content))
            start.wait()
            image.write(content)

    threads = [threading.Thread(target=add, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {datadir_of(images / "a"), datadir_of(images / "b")} == {"fs0", "fs1"}
    for name in "ab":
        assert_sealed(images / name, md5(content))


def test_undeclared_image_leaves_room_to_those_declared(filesystem: Filesystem, mount: Mount) -> None:
    images = mount([f"{filesystem('tmpfs', 16)}:200", f"{filesystem('tmpfs', 16)}:100"])
    with open(images / "a", "wb") as image:
        declare(image.fileno(), 16 * MIB - (256 << 10))
        new_image(images / "b")
        image.truncate(16 * MIB - (256 << 10))
    assert [datadir_of(images / "a"), datadir_of(images / "b")] == ["fs0", "fs1"]


def test_write_beyond_the_room_fails_and_says_so(filesystem: Filesystem, mount: Mount, tmp_path: Path) -> None:
    images = mount([filesystem("tmpfs", 8)])
    fill(images.datadirs[0], 2 * MIB)
    new_image(tmp_path / "a", 4 * MIB)
    done = run("cp", tmp_path / "a", images.path, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    images.expect_warning("image 'a' is removed: .* was full")
    wait_until(lambda: not (images / "a").exists())
    wait_until(lambda: os.statvfs(images.datadirs[0]).f_bavail * 4096 > 3 * MIB / 2)
    assert_sealed(images / "b", md5(new_image(images / "b", MIB)))
