"""Bytes written behind a mount, mapped, appended, cut off or past the cache: seen at once, never vouched for."""

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import (
    MIB,
    OLD_MTIME_NS,
    assert_sealed,
    backing_file,
    digest,
    fails_with,
    md5,
    new_image,
    opened,
)
from tests.conftest import Mounted, attribute, run, wait_until


@pytest.fixture
def images(mount: Callable[..., Mounted]) -> Mounted:
    """A mount with two datadirs."""
    return mount()


@pytest.fixture
def image(images: Mounted) -> Path:
    """A sealed image that was read, so that the kernel has it in its cache."""
    path = images / "a"
    new_image(path, 200_000)
    assert_sealed(path)
    path.read_bytes()
    return path


def overwrite(below: Path) -> bytes:
    """Other bytes, of the same size."""
    content = os.urandom(below.stat().st_size)
    with open(below, "r+b") as file:
        file.write(content)
    return content


def append(below: Path) -> bytes:
    """Further bytes."""
    with open(below, "ab") as file:
        file.write(b"tail" * 1000)
    return below.read_bytes()


def shorten(below: Path) -> bytes:
    """Fewer bytes."""
    os.truncate(below, 1234)
    return below.read_bytes()


def replace(below: Path) -> bytes:
    """Another file of that name, as rsync does it."""
    other = below.parent / ".other"
    content = new_image(other, 150_000)
    other.rename(below)
    return content


def touch(below: Path) -> bytes:
    """The same bytes, with another time."""
    os.utime(below, ns=(OLD_MTIME_NS, OLD_MTIME_NS))
    return below.read_bytes()


CHANGES = [overwrite, append, shorten, replace, touch]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_behind_the_mount_is_seen_at_once_and_makes_the_image_stale(
    image: Path, change: Callable[[Path], bytes]
) -> None:
    content = change(backing_file(image))
    assert image.stat().st_size == len(content)
    assert image.read_bytes() == content
    assert image.stat().st_mtime_ns == backing_file(image).stat().st_mtime_ns
    assert attribute(image, "state") == "stale"
    assert attribute(image, "size") == str(len(content))
    assert_sealed(image, md5(content))


def test_change_behind_an_open_handle_is_seen_by_others(image: Path) -> None:
    with open(image, "rb") as handle:
        handle.read(10)
        content = append(backing_file(image))
        wait_until(lambda: image.stat().st_size == len(content), "the new size")
        assert digest(image) == md5(content)


def test_image_removed_behind_the_mount_is_gone(image: Path) -> None:
    backing_file(image).unlink()
    with fails_with(errno.ENOENT):
        image.stat()
    with fails_with(errno.ENOENT):
        image.read_bytes()


def test_write_while_another_writes_behind_the_mount_is_hashed_as_it_ended(image: Path) -> None:
    with open(image, "r+b", buffering=0) as handle:
        handle.write(b"through the mount")
        with open(backing_file(image), "r+b", buffering=0) as below:
            below.seek(100_000)
            below.write(b"behind the mount")
        handle.write(b"and again")
    assert_sealed(image, digest(backing_file(image)))


@pytest.mark.parametrize("size", [1, 4096, 200_000])
def test_bytes_written_through_a_mapping_are_hashed(image: Path, size: int) -> None:
    patch = os.urandom(size)
    with open(image, "r+b") as handle, mmap.mmap(handle.fileno(), 0) as mapped:
        mapped[:size] = patch
        mapped.flush()
    assert image.read_bytes()[:size] == patch
    assert_sealed(image, digest(backing_file(image)))


def test_mapping_that_outlives_its_descriptor_is_hashed_when_it_ends(image: Path) -> None:
    with open(image, "r+b") as handle:
        mapped = mmap.mmap(handle.fileno(), 0)
    mapped[1000:1005] = b"first"
    mapped.flush()
    mapped[5000:5004] = b"last"
    mapped.close()
    assert digest(image) == digest(backing_file(image))
    assert image.read_bytes()[5000:5004] == b"last"
    assert_sealed(image)


def test_new_image_written_only_through_a_mapping_is_hashed(images: Mounted) -> None:
    content = os.urandom(MIB)
    with open(images / "a", "w+b") as handle:
        handle.truncate(MIB)
        with mmap.mmap(handle.fileno(), 0) as mapped:
            mapped[:] = content
    assert_sealed(images / "a", md5(content))


def test_private_mapping_changes_nothing(image: Path) -> None:
    before = digest(image)
    with open(image, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[:5] = b"other"
    assert attribute(image, "state") == "active"
    assert_sealed(image, before)


def test_o_direct_reads_and_writes(images: Mounted) -> None:
    content = mmap.mmap(-1, 64 * 4096)
    content.write(os.urandom(64 * 4096))
    fd = os.open(images / "a", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    assert os.pwritev(fd, [content], 0) == len(content)
    back = mmap.mmap(-1, 8192)
    assert os.preadv(fd, [back], 4096) == 8192
    assert back[:] == content[4096 : 4096 + 8192]
    assert os.preadv(fd, [back], len(content) - 4096) == 4096
    os.close(fd)
    assert_sealed(images / "a", md5(content[:]))


def test_o_direct_takes_the_alignment_of_the_bare_file_or_any(image: Path) -> None:
    """By passthrough an image takes what its file takes, as qemu's probing expects; by the daemon all is taken."""
    before = image.read_bytes()
    bare = Path(attribute(image, "datadir")) / image.name
    with opened(image, os.O_RDONLY | os.O_DIRECT) as fd, opened(bare, os.O_RDONLY | os.O_DIRECT) as bare_fd:
        for size, offset in ((4096, 0), (512, 0), (1, 1), (777, 1001), (4096, 512)):
            try:
                assert os.pread(fd, size, offset) == before[offset : offset + size]
            except OSError as error:
                assert error.errno == errno.EINVAL
                with pytest.raises(OSError):
                    os.pread(bare_fd, size, offset)


def test_o_direct_write_is_seen_by_a_cached_reader(image: Path) -> None:
    with open(image, "rb", buffering=0) as reader:
        reader.read(4096)
        fd = os.open(image, os.O_WRONLY | os.O_DIRECT)
        page = mmap.mmap(-1, 4096)
        page.write(b"y" * 4096)
        os.pwritev(fd, [page], 0)
        assert os.pread(reader.fileno(), 4096, 0) == page[:]
        os.close(fd)
    assert_sealed(image)


def test_dd_with_direct_flags_copies(images: Mounted, image: Path) -> None:
    run("dd", f"if={image}", f"of={images / 'b'}", "iflag=direct", "oflag=direct", "bs=64k")
    assert_sealed(images / "b", digest(image))


def test_o_append_writes_at_the_end(image: Path) -> None:
    content = image.read_bytes()
    first, second = (os.open(image, os.O_WRONLY | os.O_APPEND) for _ in range(2))
    for fd, piece in ((first, b"one"), (second, b"two"), (first, b"three")):
        os.write(fd, piece)
    os.close(first)
    os.close(second)
    assert_sealed(image, md5(content + b"onetwothree"))


def test_o_append_writes_at_the_end_that_was_moved_behind_the_mount(image: Path) -> None:
    content = append(backing_file(image))
    assert image.stat().st_size == len(content)
    fd = os.open(image, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"end")
    os.close(fd)
    assert_sealed(image, md5(content + b"end"))


def test_o_trunc_empties_at_the_open(image: Path) -> None:
    fd = os.open(image, os.O_WRONLY | os.O_TRUNC)
    assert image.stat().st_size == 0
    assert attribute(image, "state") == "saving"
    os.write(fd, b"new")
    os.close(fd)
    assert_sealed(image, md5(b"new"))


def test_o_trunc_for_reading_only_is_sealed_as_empty(image: Path) -> None:
    os.close(os.open(image, os.O_RDONLY | os.O_TRUNC))
    assert image.stat().st_size == 0
    assert_sealed(image, md5(b""))


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY], ids=["O_RDWR", "O_WRONLY"])
def test_open_for_writing_without_a_write_leaves_the_image_active(image: Path, flags: int) -> None:
    record = os.getxattr(backing_file(image), "user.imgfs.record")
    fd = os.open(image, flags)
    assert attribute(image, "state") == "active"
    os.close(fd)
    assert attribute(image, "state") == "active"
    assert os.getxattr(backing_file(image), "user.imgfs.record") == record


def test_first_changed_byte_takes_the_record_away(image: Path) -> None:
    below = backing_file(image)
    with open(image, "r+b", buffering=0) as handle:
        handle.write(b"x")
        assert attribute(image, "state") == "saving"
        assert "user.imgfs.record" not in os.listxattr(below)
    assert_sealed(image)


def test_write_past_the_end_leaves_zeros_between(image: Path) -> None:
    content = image.read_bytes()
    fd = os.open(image, os.O_WRONLY)
    os.pwrite(fd, b"far", MIB)
    os.close(fd)
    assert_sealed(image, md5(content.ljust(MIB, b"\0") + b"far"))


def test_write_and_truncate_in_turns_are_hashed_as_they_end(images: Mounted) -> None:
    with open(images / "a", "w+b", buffering=0) as handle:
        handle.write(b"0123456789")
        handle.truncate(4)
        handle.seek(0, os.SEEK_END)
        handle.write(b"abc")
        handle.truncate(9)
        assert os.pread(handle.fileno(), 20, 0) == b"0123abc\0\0"
    assert_sealed(images / "a", md5(b"0123abc\0\0"))


def test_fsync_and_fdatasync_succeed(images: Mounted) -> None:
    with open(images / "a", "wb", buffering=0) as handle:
        handle.write(b"bytes")
        os.fsync(handle.fileno())
        os.fdatasync(handle.fileno())
    run("sync", images / "a")
    assert_sealed(images / "a", md5(b"bytes"))


def test_read_and_write_on_the_wrong_kind_of_handle_fail(image: Path) -> None:
    reading, writing = os.open(image, os.O_RDONLY), os.open(image, os.O_WRONLY)
    with fails_with(errno.EBADF):
        os.write(reading, b"x")
    with fails_with(errno.EBADF):
        os.read(writing, 1)
    with fails_with(errno.EINVAL):
        os.ftruncate(reading, 0)
    os.close(reading)
    os.close(writing)
    assert attribute(image, "state") == "active"


def test_duplicated_descriptor_keeps_the_image_open(images: Mounted) -> None:
    first = os.open(images / "a", os.O_WRONLY | os.O_CREAT, 0o600)
    second = os.dup(first)
    os.write(first, b"one")
    os.close(first)
    assert attribute(images / "a", "state") == "saving"
    os.write(second, b"two")
    os.close(second)
    assert_sealed(images / "a", md5(b"onetwo"))
