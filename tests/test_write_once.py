"""`write_once: true`: a complete image can be removed, and in no other way lose or change its bytes."""

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import OLD_MTIME_NS, assert_sealed, backing_file, fails_with, md5, new_image
from tests.conftest import Mounted, Mounter, attribute, run


@pytest.fixture
def images(mount: Mounter) -> Mounted:
    """A write-once store with an active image `a`."""
    mounted = mount(write_once=True)
    new_image(mounted / "a")
    assert_sealed(mounted / "a")
    return mounted


def attempts(images: Mounted) -> dict[str, Callable[[], object]]:
    """Ways to change the bytes that the name `a` has."""
    image = images / "a"
    return {
        "open for writing": lambda: os.open(image, os.O_WRONLY),
        "open for both": lambda: os.open(image, os.O_RDWR),
        "append": lambda: os.open(image, os.O_WRONLY | os.O_APPEND),
        "direct": lambda: os.open(image, os.O_WRONLY | os.O_DIRECT),
        "overwrite": lambda: image.write_bytes(b"other"),
        "empty": lambda: os.open(image, os.O_RDONLY | os.O_TRUNC),
        "truncate": lambda: os.truncate(image, 10),
        "extend": lambda: os.truncate(image, 10**6),
        "truncate to its size": lambda: os.truncate(image, image.stat().st_size),
        "replace": lambda: (images / "new").rename(image),
    }


def test_active_image_can_not_be_changed(images: Mounted) -> None:
    new_image(images / "new")
    assert_sealed(images / "new")
    before = backing_file(images / "a").stat()
    checksum = attribute(images / "a", "checksum")
    for attempt in attempts(images).values():
        with fails_with(errno.EPERM):
            attempt()
    assert backing_file(images / "a").stat().st_mtime_ns == before.st_mtime_ns
    assert_sealed(images / "a", checksum)
    assert sorted(os.listdir(images.path)) == ["a", "new"]


def test_active_image_can_not_be_changed_while_it_is_read(images: Mounted, mount: Mounter) -> None:
    content = (images / "a").read_bytes()
    new_image(images / "new")
    assert_sealed(images / "new")
    ways = attempts(images)
    if mount.transport == "fusepy":
        del ways["replace"]  # libfuse 2 removes an open image by itself before it asks for the rename
    with open(images / "a", "rb") as reader:
        for attempt in ways.values():
            with fails_with(errno.EPERM):
                attempt()
        assert reader.read() == content
        assert (images / "a").read_bytes() == content
    assert_sealed(images / "a", md5(content))
    assert sorted(os.listdir(images.path)) == ["a", "new"]


def test_programs_say_that_it_is_not_permitted(images: Mounted, tmp_path: Path) -> None:
    new_image(tmp_path / "a", 1000)
    for command in (
        ["cp", tmp_path / "a", images / "a"],
        ["dd", f"if={tmp_path / 'a'}", f"of={images / 'a'}", "conv=notrunc"],
        ["truncate", "-s", "0", images / "a"],
        ["rsync", "-a", tmp_path / "a", f"{images.path}/"],
    ):
        done = run(*command, check=False)
        assert done.returncode != 0
        assert "Operation not permitted" in done.stderr
    assert_sealed(images / "a")


def test_rsync_leaves_the_old_image_and_no_remains(images: Mounted, tmp_path: Path) -> None:
    content = (images / "a").read_bytes()
    new_image(tmp_path / "a", 1000)
    assert run("rsync", "-a", tmp_path / "a", f"{images.path}/", check=False).returncode != 0
    assert os.listdir(images.path) == ["a"]
    assert_sealed(images / "a", md5(content))


def test_removing_stays_possible_and_frees_the_name(images: Mounted) -> None:
    (images / "a").unlink()
    assert_sealed(images / "a", md5(new_image(images / "a", 100)))


def test_removing_an_open_image_stays_possible(images: Mounted) -> None:
    content = (images / "a").read_bytes()
    with open(images / "a", "rb") as reader:
        (images / "a").unlink()
        assert reader.read() == content
    assert os.listdir(images.path) == []


def test_name_times_owner_and_attributes_stay_changeable(images: Mounted) -> None:
    (images / "a").rename(images / "b")
    os.utime(images / "b", ns=(OLD_MTIME_NS, OLD_MTIME_NS))
    os.chown(images / "b", 12, 34)
    (images / "b").chmod(0o640)
    os.setxattr(images / "b", "user.note", b"x")
    assert (images / "b").stat().st_mtime_ns == OLD_MTIME_NS
    assert_sealed(images / "b")


def test_reading_and_private_mapping_stay_possible(images: Mounted) -> None:
    with open(images / "a", "rb") as image, mmap.mmap(image.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        assert mapped[:] == image.read()
        mapped[:3] = b"own"
    assert_sealed(images / "a")


def test_image_that_is_still_written_can_be_written_by_others(images: Mounted) -> None:
    with open(images / "b", "wb", buffering=0) as first:
        first.write(b"one")
        with open(images / "b", "r+b", buffering=0) as second:
            second.seek(3)
            second.write(b"two")
        first.seek(6)
        first.write(b"three")
    assert_sealed(images / "b", md5(b"onetwothree"))
    with fails_with(errno.EPERM):
        os.open(images / "b", os.O_WRONLY)


def test_image_is_complete_from_the_moment_its_writer_is_gone(images: Mounted) -> None:
    fd = os.open(images / "b", os.O_CREAT | os.O_WRONLY, 0o600)
    os.pwrite(fd, os.urandom(1_000_000), 4_000_000)
    os.pwrite(fd, b"first", 0)
    os.close(fd)
    attribute(images / "b", "checksum")
    with fails_with(errno.EPERM):
        os.open(images / "b", os.O_WRONLY)
    assert_sealed(images / "b")


@pytest.mark.parametrize("command", [["cp", "-p"], ["cp", "-a"], ["rsync", "-a"], ["mv"]], ids=" ".join)
def test_copies_into_a_write_once_store_end_active(images: Mounted, tmp_path: Path, command: list[str]) -> None:
    content = new_image(tmp_path / "b")
    os.utime(tmp_path / "b", ns=(OLD_MTIME_NS, OLD_MTIME_NS))
    run(*command, tmp_path / "b", f"{images.path}/")
    assert_sealed(images / "b", md5(content))
    assert (images / "b").stat().st_mtime_ns == OLD_MTIME_NS


def test_image_in_a_lower_datadir_is_not_replaced_either(mount: Mounter) -> None:
    images = mount(write_once=True)
    content = new_image(images.datadirs[1] / "a")
    assert_sealed(images / "a", md5(content))
    new_image(images / "new", 10)
    assert_sealed(images / "new")
    with fails_with(errno.EPERM):
        (images / "new").rename(images / "a")
    assert_sealed(images / "a", md5(content))
    assert_sealed(images / "new")
