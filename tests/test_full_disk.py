"""A disk that fills up in the middle of a write: the writer is told, and no plausible short image stays behind."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs import ImageStore, State
from imgfs.image import Image
from tests.clients import MIB, fails_with
from tests.conftest import Mounter, attribute, run, wait_until


def settled(image: Path) -> str:
    """The state once the image is sealed."""
    attribute(image, "checksum")
    return attribute(image, "state")


@pytest.fixture
def small(filesystem: Callable[..., Path]) -> Path:
    return filesystem("tmpfs", 8)


def test_image_that_found_no_room_is_removed_with_its_last_close(small: Path, mount: Mounter, tmp_path: Path) -> None:
    images = mount([small])
    images.expect_warning("is removed: .* was full")
    (images / "before").write_bytes(b"kept")
    (tmp_path / "big").write_bytes(os.urandom(12 * MIB))
    done = run("cp", tmp_path / "big", images / "big", check=False)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    wait_until(lambda: os.listdir(images.path) == ["before"], "the removal")
    assert settled(images / "before") == "active"
    wait_until(lambda: os.statvfs(small).f_bavail * 4096 > 7 * MIB, "the room")
    (images / "after").write_bytes(b"room again")
    assert settled(images / "after") == "active"


def test_writer_that_finds_room_after_all_keeps_its_image(small: Path, mount: Mounter) -> None:
    images = mount([small])
    (images / "other").write_bytes(bytes(4 * MIB))
    with open(images / "x", "wb", buffering=0) as file:
        written = 0
        with pytest.raises(OSError) as caught:
            while True:
                written += file.write(os.urandom(MIB // 2))
        assert caught.value.errno == errno.ENOSPC
        (images / "other").unlink()
        while written < 6 * MIB:
            written += file.write(os.urandom(MIB // 2))
    assert settled(images / "x") == "active"
    assert (images / "x").stat().st_size == written


def test_image_that_was_complete_is_not_removed_for_want_of_room(small: Path, mount: Mounter) -> None:
    images = mount([small])
    (images / "x").write_bytes(bytes(MIB))
    assert settled(images / "x") == "active"
    with open(images / "x", "ab", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(os.urandom(MIB))
    assert settled(images / "x") == "active"
    assert (images / "x").stat().st_size >= MIB


def test_an_image_that_can_not_even_be_removed_is_let_go(
    small: Path, open_store: Callable[..., ImageStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store([small])
    handle = store.create("x")
    with fails_with(errno.ENOSPC):
        for number in range(64):
            store.write(handle, os.urandom(MIB), number * MIB)

    def fail(_name: str) -> None:
        raise OSError(errno.EIO, "the disk fails")

    monkeypatch.setattr(store.datadirs[0], "unlink", fail)
    with fails_with(errno.EIO):
        store.close_handle(handle)
    assert store.state("x") is State.STALE
    assert handle.image.references == 0


def test_a_reservation_that_can_not_be_told_holds_no_image(
    open_store: Callable[..., ImageStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    handle = store.create("x")
    store.expect_size(handle.image, MIB)

    def fail(_image: Image) -> int:
        raise OSError(errno.EIO, "the disk fails")

    with monkeypatch.context() as patched:
        patched.setattr(Image, "outstanding_bytes", fail)
        with fails_with(errno.EIO):
            store.create("y")
    assert handle.image.references == 1
    store.close_handle(handle)


def test_a_full_disk_with_images_is_mounted_as_it_is(filesystem: Callable[..., Path], mount: Mounter) -> None:
    """Not even a directory can be made in it: no marker, no relocation to it, but its images are served."""
    full = filesystem("ext4", 16)
    (full / "old").write_bytes(b"glance")
    with open(full / "rest", "wb", buffering=0) as file, fails_with(errno.ENOSPC):
        while True:
            file.write(bytes(1024))
    images = mount([f"{full}:200", "low:100"])
    images.expect_warning(r"is full: \.imgfs can't be made|can't be marked")
    assert (images / "old").read_bytes() == b"glance"
    (images / "new").write_bytes(b"elsewhere")
    assert attribute(images / "new", "datadir") == str(images.datadirs[1])
    with fails_with(errno.ENOSPC):  # no room for the note that makes it safe
        os.rename(images / "new", images / "old")
    assert (images / "old").read_bytes() == b"glance"
    assert (images / "new").read_bytes() == b"elsewhere"
