"""Images that are removed or replaced while open: their handles go on, their names are free, nothing stays."""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clients import MIB, assert_sealed, fails_with, md5, new_image
from tests.conftest import Mounted, attribute, run, wait_until

Mount = Callable[..., Mounted]


@pytest.fixture
def images(mount: Mount) -> Iterator[Mounted]:
    """A mount of two datadirs, in which nothing of a removed image may show up, now or at the end."""
    mounted = mount()
    yield mounted
    assert_nothing_hidden(mounted)
    mounted.unmount()
    assert_nothing_hidden(mounted)


def assert_nothing_hidden(images: Mounted) -> None:
    """No name that libfuse gives to removed files is anywhere."""
    for directory in (images.path, *images.datadirs):
        assert [name for name in os.listdir(directory) if "fuse" in name] == []


def test_removed_image_stays_readable_through_its_handle(images: Mounted) -> None:
    content = new_image(images / "a", MIB)
    with open(images / "a", "rb") as image:
        (images / "a").unlink()
        assert_nothing_hidden(images)
        assert os.listdir(images.path) == []
        with fails_with(errno.ENOENT):
            (images / "a").stat()
        assert image.read() == content


def test_fstat_of_a_removed_image_works(images: Mounted) -> None:
    new_image(images / "a", MIB)
    with open(images / "a", "rb") as image:
        before = os.fstat(image.fileno())
        (images / "a").unlink()
        after = os.fstat(image.fileno())
    assert (after.st_size, after.st_ino, after.st_mtime_ns) == (MIB, before.st_ino, before.st_mtime_ns)
    assert after.st_nlink == 0


def test_removed_image_can_be_written_truncated_and_given_attributes(images: Mounted) -> None:
    with open(images / "a", "w+b", buffering=0) as image:
        image.write(b"first ")
        (images / "a").unlink()
        image.write(b"second")
        image.seek(0)
        assert image.read() == b"first second"
        os.ftruncate(image.fileno(), 5)
        os.fsync(image.fileno())
        assert os.fstat(image.fileno()).st_size == 5
        os.fchmod(image.fileno(), 0o600)
        os.utime(image.fileno(), ns=(1, 10**9))
        os.setxattr(image.fileno(), "user.note", b"x")
        assert os.getxattr(image.fileno(), "user.note") == b"x"
        assert os.fstat(image.fileno()).st_mtime_ns == 10**9
    assert os.listdir(images.path) == []


def test_bytes_of_a_removed_image_are_freed_with_its_last_handle(
    filesystem: Callable[..., Path], mount: Mount
) -> None:
    below = filesystem("tmpfs", 16)
    images = mount([below])
    before = os.statvfs(below).f_bfree
    new_image(images / "a", 4 * MIB)
    assert_sealed(images / "a")
    with open(images / "a", "rb"), open(images / "a", "rb"):
        (images / "a").unlink()
        assert os.statvfs(below).f_bfree < before - 500
    wait_until(lambda: os.statvfs(below).f_bfree >= before - 2, "the freed space")


def test_name_of_a_removed_open_image_can_be_used_anew(images: Mounted) -> None:
    contents, handles = [], []
    for number in range(5):
        contents.append(new_image(images / "a", 100_000 + number))
        handles.append(os.open(images / "a", os.O_RDONLY))
        (images / "a").unlink()
    last = new_image(images / "a", 7)
    assert len({os.fstat(fd).st_ino for fd in handles}) == 5
    for fd, content in zip(handles, contents, strict=True):
        assert os.pread(fd, 200_000, 0) == content
        os.close(fd)
    assert_sealed(images / "a", md5(last))


def test_two_handles_of_a_removed_image_go_one_by_one(images: Mounted) -> None:
    content = new_image(images / "a", MIB)
    first, second = (os.open(images / "a", os.O_RDONLY) for _ in range(2))
    (images / "a").unlink()
    os.close(first)
    assert os.pread(second, MIB, 0) == content
    wait_until(lambda: os.fstat(second).st_size == MIB, "its size")
    assert os.fstat(second).st_nlink == 0
    os.close(second)


def test_removed_image_stays_mapped(images: Mounted) -> None:
    content = new_image(images / "a", MIB)
    with open(images / "a", "rb") as image:
        mapped = mmap.mmap(image.fileno(), 0, prot=mmap.PROT_READ)
    (images / "a").unlink()
    assert mapped[:] == content
    mapped.close()


def test_image_removed_while_it_is_written_is_not_sealed(images: Mounted) -> None:
    with open(images / "a", "wb", buffering=0) as image:
        image.write(os.urandom(MIB))
        (images / "a").unlink()
    new = new_image(images / "a", 10)
    assert_sealed(images / "a", md5(new))
    assert "sealing failed" not in images.log.read_text()


@pytest.mark.parametrize("where", [0, 1], ids=["same datadir", "other datadir"])
def test_rename_over_an_open_image_leaves_its_handle_the_old_bytes(images: Mounted, where: int) -> None:
    old = new_image(images.datadirs[where] / "a", MIB)
    new = new_image(images / "b", 2000)
    with open(images / "a", "rb", buffering=0) as image:
        inode = os.fstat(image.fileno()).st_ino
        (images / "b").rename(images / "a")
        assert_nothing_hidden(images)
        assert os.listdir(images.path) == ["a"]
        assert image.read() == old
        assert os.fstat(image.fileno()).st_ino == inode
        assert (images / "a").read_bytes() == new
    assert_sealed(images / "a", md5(new))


def test_open_image_that_is_renamed_is_followed_by_its_handle(images: Mounted) -> None:
    with open(images / "a", "wb", buffering=0) as image:
        image.write(b"begun ")
        (images / "a").rename(images / "b")
        image.write(b"and done")
    assert os.listdir(images.path) == ["b"]
    assert_sealed(images / "b", md5(b"begun and done"))


def test_both_sides_of_a_rename_can_be_open(images: Mounted) -> None:
    old, new = new_image(images / "a", 1000), new_image(images / "b", 2000)
    with open(images / "a", "rb") as first, open(images / "b", "r+b", buffering=0) as second:
        (images / "b").rename(images / "a")
        second.write(b"change")
        assert first.read() == old
    assert_sealed(images / "a", md5(b"change" + new[6:]))


def test_image_can_be_removed_right_after_it_was_closed(images: Mounted) -> None:
    for size in (0, 1, 300_000):
        for _ in range(60):
            (images / "a").write_bytes(bytes(size))
            (images / "a").unlink()
    assert os.listdir(images.path) == []


def test_image_can_be_replaced_right_after_it_was_closed(images: Mounted) -> None:
    for number in range(100):
        (images / "a").write_bytes(b"old")
        (images / "b").write_bytes(b"%d" % number)
        (images / "b").rename(images / "a")
        assert (images / "a").read_bytes() == b"%d" % number
    assert os.listdir(images.path) == ["a"]


def test_nobody_can_make_a_name_that_libfuse_hides_images_under(images: Mounted) -> None:
    content = new_image(images.datadirs[0] / "a", 10)
    hidden = images / ".fuse_hidden0123456789abcdef"
    for operation in (hidden.touch, lambda: (images / "a").rename(hidden)):
        with fails_with(errno.EPERM):
            operation()
    assert os.listdir(images.path) == ["a"]
    assert_sealed(images / "a", md5(content))


def test_program_that_uses_unlinked_temporary_files_works(images: Mounted) -> None:
    script = 'exec 3<>"$0/tmp"; rm "$0/tmp"; printf hello >&3; cat < /proc/self/fd/3; ls -A "$0"'
    assert run("sh", "-c", script, images.path).stdout == "hello"


def test_descriptors_end_with_handles(images: Mounted) -> None:
    new_image(images / "a", 1000)
    assert attribute(images / "a", "checksum")
    descriptors = Path(f"/proc/{images.daemon.pid}/fd")
    wait_until(lambda: not open_images(descriptors), "the descriptors of the first image")
    for number in range(30):
        new_image(images / f"{number}", 1000)
        with open(images / f"{number}", "rb"):
            (images / f"{number}").unlink()
    wait_until(lambda: not open_images(descriptors), "the end of all descriptors")


def open_images(descriptors: Path) -> list[str]:
    """What of the datadirs' files a daemon has open."""
    found = []
    for link in os.listdir(descriptors):
        try:
            target = os.readlink(descriptors / link)
        except FileNotFoundError:
            continue
        if "/high/" in target and ".imgfs" not in target:
            found.append(target)
    return found
