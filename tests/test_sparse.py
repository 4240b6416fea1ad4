"""Sparse images: holes are seen, kept, made and copied, and every digest is that of the bytes."""

import errno
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import MIB, assert_sealed, digest, fails_with, md5, new_image
from tests.conftest import Mounted, attribute, run

Mount = Callable[..., Mounted]
GIB = 1 << 30
HUGE_BYTES = 100 * GIB
HUGE_DATA_BYTES = 100 * MIB
SECONDS = 30.0  # by reading all of it, a copy of HUGE_BYTES takes longer
UNMOUNT_SECONDS = 15.0  # to hash the holes takes longer
ATTRIBUTES_BYTES = 8192  # what extended attributes may take up beside the bytes (ext4)

pytestmark = pytest.mark.parametrize("mount", ["kernel"], indirect=True)


def sparse_file(path: Path, size: int, data_bytes: int, parts: int = 10) -> None:
    """A file of `size` bytes, with random data in `parts` places, the first and last bytes among them."""
    part = data_bytes // parts
    with open(path, "wb") as file:
        file.truncate(size)
        for number in range(parts):
            file.seek(number * (size - part) // (parts - 1) // 4096 * 4096)
            file.write(os.urandom(part))


def spans(path: Path) -> list[tuple[int, int]]:
    """Where a file has data, by SEEK_DATA and SEEK_HOLE."""
    found, end = [], 0
    fd = os.open(path, os.O_RDONLY)
    try:
        while True:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, end))
    except OSError as error:
        assert error.errno == errno.ENXIO
        return found
    finally:
        os.close(fd)


def qemu_map(path: Path, form: str = "raw") -> list[dict[str, object]]:
    """What qemu-img finds data and holes in."""
    return json.loads(run("qemu-img", "map", "--output=json", "-f", form, path).stdout)


def same_data(one: Path, other: Path) -> bool:
    """Whether two sparse files have equal bytes, read where either has data."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as first, open(other, "rb") as second:
        for start, end in sorted({*spans(one), *spans(other)}):
            first.seek(start)
            second.seek(start)
            if first.read(end - start) != second.read(end - start):
                return False
    return True


def allocated(path: Path) -> int:
    """The bytes a file takes up on its disk."""
    return path.stat().st_blocks * 512


# Holes that are there


def test_holes_are_where_they_are_in_the_datadir(mount: Mount) -> None:
    images = mount()
    sparse_file(images.datadirs[0] / "a", GIB, 4 * MIB)
    assert spans(images / "a") == spans(images.datadirs[0] / "a")
    assert len(spans(images / "a")) == 10
    assert allocated(images / "a") == allocated(images.datadirs[0] / "a")


def test_holes_of_an_image_that_is_being_written_are_seen(mount: Mount) -> None:
    images = mount()
    with open(images / "a", "w+b", buffering=0) as image:
        image.truncate(10 * MIB)
        os.pwrite(image.fileno(), b"x" * 65536, 4 * MIB)
        assert os.lseek(image.fileno(), 0, os.SEEK_DATA) == 4 * MIB
        assert os.lseek(image.fileno(), 4 * MIB, os.SEEK_HOLE) == 4 * MIB + 65536
        with fails_with(errno.ENXIO):
            os.lseek(image.fileno(), 5 * MIB, os.SEEK_DATA)
        with fails_with(errno.ENXIO):
            os.lseek(image.fileno(), 10 * MIB, os.SEEK_HOLE)
    assert_sealed(images / "a")


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_map_equals_that_of_the_file_in_the_datadir(mount: Mount, tmp_path: Path, form: str) -> None:
    images = mount()
    sparse_file(tmp_path / "source", 4 * GIB, 8 * MIB)
    run("qemu-img", "convert", "-f", "raw", "-O", form, tmp_path / "source", images / "a")
    seen = qemu_map(images / "a", form)
    assert seen == qemu_map(images.datadirs[0] / "a", form)
    assert len([extent for extent in seen if extent["data"]]) >= 10
    assert len([extent for extent in seen if not extent["data"]]) >= 9
    images.unmount()
    assert seen == qemu_map(images.datadirs[0] / "a", form)


# Copies


COPIES = {
    "cp": ["cp", "--sparse=auto"],
    "qemu-img convert": ["qemu-img", "convert", "-f", "raw", "-O", "raw"],
    "qemu-img convert past the cache": ["qemu-img", "convert", "-T", "none", "-t", "none", "-f", "raw", "-O", "raw"],
}


@pytest.mark.parametrize("way", COPIES)
def test_sparse_image_of_100_gib_is_copied_in_seconds(mount: Mount, tmp_path: Path, way: str) -> None:
    """Into the mount, within it, and out of it; sealing, which takes longer, goes on behind and is given up."""
    images = mount()
    source = tmp_path / "source"
    sparse_file(source, HUGE_BYTES, HUGE_DATA_BYTES)
    began = time.monotonic()
    for one, other in ((source, images / "a"), (images / "a", images / "b"), (images / "b", tmp_path / "out")):
        run(*COPIES[way], one, other)
    assert time.monotonic() - began < SECONDS
    for copy in (images / "a", images / "b", tmp_path / "out"):
        assert allocated(copy) <= allocated(source) + 4 * MIB
        assert same_data(source, copy)
    began = time.monotonic()
    assert images.unmount() == 0
    assert time.monotonic() - began < UNMOUNT_SECONDS


def test_copied_sparse_image_gets_the_digest_of_its_bytes(mount: Mount, tmp_path: Path) -> None:
    images = mount()
    sparse_file(tmp_path / "source", GIB // 2, 10 * MIB, parts=4)
    run("cp", tmp_path / "source", images / "a")
    run("cp", images / "a", images / "b")
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", images / "a", images / "c")
    expected = digest(tmp_path / "source")
    for name in "abc":
        assert attribute(images / name, "checksum") == expected
        assert attribute(images / name, "state") == "active"
        assert allocated(images / name) <= allocated(tmp_path / "source") + MIB


# Holes that are made


KIB = 1 << 10


@pytest.mark.parametrize(
    "options, expected_size, zeroed",
    [
        ([], MIB + 512 * KIB, False),
        (["--keep-size"], MIB, False),
        (["--punch-hole"], MIB, True),
        (["--zero-range"], MIB + 512 * KIB, True),
        (["--zero-range", "--keep-size"], MIB, True),
    ],
    ids=["allocate", "keep size", "punch hole", "zero range", "zero range, keep size"],
)  # fmt: skip
@pytest.mark.parametrize("when", ["at rest", "being written"])
def test_fallocate_does_what_it_does_to_a_file(
    mount: Mount, tmp_path: Path, options: list[str], expected_size: int, zeroed: bool, when: str
) -> None:
    """From the last 512 KiB of an image of 1 MiB to as much beyond it, compared with a file of the datadirs' disk."""
    images = mount()
    content = os.urandom(MIB)
    with open(tmp_path / "plain", "wb", buffering=0) as plain, open(images / "a", "wb", buffering=0) as image:
        for file in (plain, image):
            file.write(content)
        if when == "at rest":
            image.close()
            assert_sealed(images / "a", md5(content))
        for path in (tmp_path / "plain", images / "a"):
            run("fallocate", *options, "--offset", 512 * KIB, "--length", MIB, path)
    assert (images / "a").stat().st_size == expected_size
    assert (images / "a").read_bytes() == (tmp_path / "plain").read_bytes()
    assert ((images / "a").read_bytes()[512 * KIB : MIB] == bytes(512 * KIB)) is zeroed
    assert 0 <= allocated(images / "a") - allocated(tmp_path / "plain") <= ATTRIBUTES_BYTES
    assert_sealed(images / "a", digest(tmp_path / "plain"))


def test_fallocate_of_moving_bytes_is_not_supported(mount: Mount) -> None:
    images = mount()
    content = new_image(images / "a", MIB)
    done = run("fallocate", "--collapse-range", "--offset", 0, "--length", 4096, images / "a", check=False)
    assert "not supported" in done.stderr
    assert_sealed(images / "a", md5(content))


def test_fallocate_is_not_supported_where_the_datadir_can_not(filesystem: Callable[..., Path], mount: Mount) -> None:
    """And the mount goes on asking: another datadir can."""
    below, able = filesystem("ramfs"), filesystem("ext4", 32)
    images = mount([f"{below}:2", f"{able}:1"])
    content = new_image(images / "a", MIB)
    new_image(able / "b", MIB)
    for options in ([], ["--keep-size"], ["--punch-hole"], ["--zero-range"]):
        done = run("fallocate", *options, "--offset", 0, "--length", 4096, images / "a", check=False)
        assert re.search("not supported|mode is unsupported", done.stderr)  # EOPNOTSUPP in fallocate(1)'s words
    run("fallocate", "--punch-hole", "--offset", 0, "--length", 4096, images / "b")
    assert (images / "b").read_bytes()[:4096] == bytes(4096)
    assert_sealed(images / "a", md5(content))
    assert_sealed(images / "b")


def test_fallocate_beyond_the_space_is_refused_and_leaves_the_image(
    filesystem: Callable[..., Path], mount: Mount
) -> None:
    images = mount([filesystem("tmpfs", 16)])
    content = new_image(images / "a", MIB)
    assert_sealed(images / "a", md5(content))
    done = run("fallocate", "--length", 64 * MIB, images / "a", check=False)
    assert "No space left" in done.stderr
    assert (images / "a").read_bytes()[:MIB] == content
    assert_sealed(images / "a")


def test_qemu_discards_into_holes(mount: Mount) -> None:
    images = mount()
    content = bytearray(new_image(images / "a", 4 * MIB))
    before = allocated(images / "a")
    run("qemu-io", "-d", "unmap", "-f", "raw", "-c", "discard 1M 2M", images / "a")
    content[MIB : 3 * MIB] = bytes(2 * MIB)
    assert allocated(images / "a") <= before - 2 * MIB + 64 * KIB
    assert_sealed(images / "a", md5(content))


# Copies by the kernel


def copy_range(source: Path, target: Path, length: int, offset_in: int = 0, offset_out: int = 0) -> int:
    """copy_file_range(2) until it is done; gives the bytes copied."""
    with open(source, "rb") as one, open(target, "r+b") as other:
        done = 0
        while done < length:
            copied = os.copy_file_range(
                one.fileno(), other.fileno(), length - done, offset_in + done, offset_out + done
            )
            if not copied:
                break
            done += copied
        return done


@pytest.mark.parametrize("datadirs", [("high", "high"), ("high", "low")], ids=["one datadir", "two datadirs"])
def test_copy_file_range_between_images_moves_no_bytes_through_requests(
    mount: Mount, datadirs: tuple[str, str]
) -> None:
    images = mount()
    by_name = {datadir.name: datadir for datadir in images.datadirs}
    content = new_image(by_name[datadirs[0]] / "a", 16 * MIB)
    assert_sealed(images / "a", md5(content))
    target = new_image(by_name[datadirs[1]] / "b", MIB)
    syscalls = f"/proc/{images.daemon.pid}/io"
    before = int(Path(syscalls).read_text("ascii").split()[5])
    assert copy_range(images / "a", images / "b", 16 * MIB, 0, 4096) == 16 * MIB
    assert int(Path(syscalls).read_text("ascii").split()[5]) - before < 50
    expected = target[:4096] + content
    assert (images / "b").read_bytes() == expected
    assert_sealed(images / "b", md5(expected))
    assert_sealed(images / "a", md5(content))


def test_copy_file_range_within_an_image(mount: Mount) -> None:
    images = mount()
    content = bytearray(new_image(images / "a", 2 * MIB))
    assert_sealed(images / "a")
    assert copy_range(images / "a", images / "a", 100_000, 5000, MIB) == 100_000
    content[MIB : MIB + 100_000] = content[5000:105_000]
    assert_sealed(images / "a", md5(content))
    with fails_with(errno.EINVAL):
        copy_range(images / "a", images / "a", 100_000, 0, 50_000)
    assert_sealed(images / "a", md5(content))


def test_copy_file_range_ends_at_the_end_of_its_source(mount: Mount) -> None:
    images = mount()
    content = new_image(images / "a", 10_000)
    (images / "b").touch()
    assert copy_range(images / "a", images / "b", MIB, 4000) == 6000
    assert copy_range(images / "a", images / "b", MIB, 10_000) == 0
    assert_sealed(images / "b", md5(content[4000:]))


def test_copy_within_a_datadir_that_can_share_blocks_takes_no_space(
    filesystem: Callable[..., Path], mount: Mount
) -> None:
    below = filesystem("xfs", 400)
    images = mount([below])
    content = new_image(images / "a", 32 * MIB)
    assert_sealed(images / "a", md5(content))
    os.sync()
    before = os.statvfs(below)
    run("cp", images / "a", images / "b")
    assert_sealed(images / "b", md5(content))
    os.sync()
    after = os.statvfs(below)
    assert (before.f_bfree - after.f_bfree) * after.f_frsize < 4 * MIB


@pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE])
def test_seeking_from_before_the_beginning_finds_nothing(mount: Mount, whence: int) -> None:
    images = mount()
    (images / "a").write_bytes(b"x")
    with open(images / "a", "rb") as file, pytest.raises(OSError) as caught:
        os.lseek(file.fileno(), -5, whence)
    assert caught.value.errno == errno.ENXIO
