"""What stat(2) and statvfs(3) say: blocks, inode numbers, links, owners, times, and space counted once."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import MIB, OLD_MTIME_NS, assert_sealed, backing_file, fill, new_image, run_as
from tests.conftest import Mounter, run, wait_until

Filesystem = Callable[..., Path]
SPACE = ("f_blocks", "f_bfree", "f_bavail")


def space_bytes(path: Path) -> tuple[int, ...]:
    """Total, free and available bytes of a filesystem."""
    numbers = os.statvfs(path)
    return tuple(getattr(numbers, key) * numbers.f_frsize for key in SPACE)


def total(*paths: Path) -> tuple[int, ...]:
    """The sum over filesystems."""
    return tuple(map(sum, zip(*map(space_bytes, paths), strict=True)))


def test_statvfs_adds_up_filesystems(filesystem: Filesystem, mount: Mounter) -> None:
    first, second = filesystem("tmpfs", 8), filesystem("tmpfs", 16)
    images = mount([first, second])
    fill(first, MIB)
    new_image(images / "a", 2 * MIB)
    assert_sealed(images / "a")
    assert space_bytes(images.path) == total(first, second)
    assert total(first, second)[0] == 24 * MIB
    assert os.statvfs(images.path).f_namemax == 255


def test_statvfs_counts_a_filesystem_of_several_datadirs_once(filesystem: Filesystem, mount: Mounter) -> None:
    first, second = filesystem("tmpfs", 8), filesystem("tmpfs", 16)
    images = mount([first / "a", first / "b", second / "c", first / "d"])
    assert space_bytes(images.path) == total(first, second)
    numbers, below = os.statvfs(images.path), [os.statvfs(p) for p in (first, second)]
    assert numbers.f_files == sum(n.f_files for n in below)
    assert numbers.f_ffree == sum(n.f_ffree for n in below)


def test_statvfs_keeps_apart_what_only_the_superuser_may_use(filesystem: Filesystem, mount: Mounter) -> None:
    below = filesystem("ext4", 16)
    disk = run("findmnt", "-no", "SOURCE", below).stdout.strip()
    run("tune2fs", "-r", "2048", disk)
    run("mount", "-o", "remount", below)
    images = mount([below])
    for shown, real in zip(space_bytes(images.path), space_bytes(below), strict=True):
        assert 0 <= real - shown < 4096
    _, free, available = space_bytes(images.path)
    assert free - available > MIB


def test_statvfs_sums_different_block_sizes(filesystem: Filesystem, mount: Mounter) -> None:
    first, second = filesystem("ext4", 8), filesystem("tmpfs", 16)
    assert os.statvfs(first).f_frsize != os.statvfs(second).f_frsize
    images = mount([first, second])
    for shown, real in zip(space_bytes(images.path), total(first, second), strict=True):
        assert 0 <= real - shown < 2 * 4096


def test_blocks_are_those_of_the_backing_file(mount: Mounter) -> None:
    images = mount()
    for size in (0, 1, 4096, 1_000_000):
        new_image(images / "a", size)
        assert_sealed(images / "a")
        status = (images / "a").stat()
        assert status.st_blocks == backing_file(images / "a").stat().st_blocks
        assert size <= status.st_blocks * 512


def test_blocks_of_a_sparse_image_show_that_it_is_sparse(mount: Mounter) -> None:
    images = mount()
    with open(images / "a", "wb") as image:
        image.truncate(20 * MIB)
        image.seek(5 * MIB)
        image.write(bytes(MIB))
    assert_sealed(images / "a")
    assert (images / "a").stat().st_size == 20 * MIB
    assert MIB <= (images / "a").stat().st_blocks * 512 < 2 * MIB
    assert run("du", "-k", images / "a").stdout == run("du", "-k", backing_file(images / "a")).stdout.replace(
        str(backing_file(images / "a")), str(images / "a")
    )


def test_inode_numbers_are_unique_across_datadirs(filesystem: Filesystem, mount: Mounter) -> None:
    images = mount([filesystem("ext4", 8) for _ in range(3)])
    for number, datadir in enumerate(images.datadirs):
        for name in "abc":
            new_image(datadir / f"{name}{number}", 10)
    below = {
        (datadir / f"{name}{number}").stat().st_ino
        for number, datadir in enumerate(images.datadirs)
        for name in "abc"
    }
    numbers = {(images / name).stat().st_ino for name in os.listdir(images.path)}
    assert len(numbers) == 9
    assert len(below) < 9  # so it could have gone wrong


def test_inode_numbers_of_the_listing_are_those_of_stat(mount: Mounter) -> None:
    images = mount()
    for number in range(6):
        new_image(images.datadirs[number % 2] / f"{number}", 10)
    with os.scandir(images.path) as entries:
        listed = {entry.name: entry.inode() for entry in entries}
    assert listed == {name: (images / name).stat().st_ino for name in listed}
    assert len(listed) == 6


def test_inode_numbers_are_stable_over_remount_and_rename(mount: Mounter) -> None:
    images = mount()
    for name in "abc":
        new_image(images / name, 10)
        assert_sealed(images / name)
    before = {name: (images / name).stat().st_ino for name in "abc"}
    (images / "c").rename(images / "d")
    images.unmount()
    again = mount.mount(images.config, images.path)
    after = {name: (again / name).stat().st_ino for name in "abd"}
    assert list(after.values()) == list(before.values())


def test_inode_numbers_do_not_depend_on_the_other_datadirs(mount: Mounter) -> None:
    images = mount(["one:1", "two:2"])
    new_image(images.datadirs[0] / "a", 10)
    before = (images / "a").stat().st_ino
    images.unmount()
    images.config.write_text("datadirs: [zero, 'one:1', 'three:3']\n")
    again = mount.mount(images.config, images.path)
    assert (again / "a").stat().st_ino == before


def test_image_has_one_link_and_is_a_regular_file(mount: Mounter) -> None:
    images = mount()
    new_image(images / "a", mode=0o640)
    assert (images / "a").stat().st_nlink == 1
    assert (images / "a").is_file()
    assert run("stat", "-c", "%F %h %a", images / "a").stdout == "regular file 1 640\n"
    assert run("stat", "-c", "%F", images.path).stdout == "directory\n"


def test_hard_link_in_a_datadir_is_counted(mount: Mounter) -> None:
    images = mount()
    new_image(images / "a")
    (images.datadirs[0] / "b").hardlink_to(images.datadirs[0] / "a")
    wait_until(lambda: (images / "a").stat().st_nlink == 2)
    assert os.path.samefile(images / "a", images / "b")


def test_owner_is_the_caller(mount: Mounter, second_user: int) -> None:
    images = mount()
    images.path.chmod(0o777)
    run("touch", images / "root")
    run_as(second_user, "touch", images / "other")
    run("touch", images / "third", user=1234, group=2345, extra_groups=[])
    owners = [(p.stat().st_uid, p.stat().st_gid) for p in (images / "root", images / "other", images / "third")]
    assert owners == [(0, 0), (second_user, second_user), (1234, 2345)]
    assert (images.datadirs[0] / "third").stat().st_uid == 1234


def test_times_keep_their_nanoseconds(mount: Mounter) -> None:
    images = mount()
    new_image(images / "a", 10)
    assert_sealed(images / "a")
    for time_ns in (0, 1, 999_999_999, OLD_MTIME_NS, 4_102_444_800_000_000_001, -1_500_000_000):
        os.utime(images / "a", ns=(time_ns + 7, time_ns))
        status = (images / "a").stat()
        assert (status.st_atime_ns, status.st_mtime_ns) == (time_ns + 7, time_ns)
        assert backing_file(images / "a").stat().st_mtime_ns == time_ns


def test_root_changes_its_time_with_the_listing(mount: Mounter) -> None:
    images = mount()
    os.utime(images.path, ns=(OLD_MTIME_NS, OLD_MTIME_NS))
    assert images.path.stat().st_mtime_ns == OLD_MTIME_NS
    new_image(images / "a")
    assert images.path.stat().st_mtime_ns > OLD_MTIME_NS


def test_size_grows_as_it_is_written(mount: Mounter) -> None:
    images = mount()
    with open(images / "a", "wb", buffering=0) as image:
        for number in range(1, 6):
            image.write(bytes(100_000))
            assert (images / "a").stat().st_size == os.fstat(image.fileno()).st_size == number * 100_000


def test_mount_is_known_by_its_type(mount: Mounter) -> None:
    images = mount()
    assert run("findmnt", "-no", "FSTYPE,SOURCE", images.path).stdout.split() == ["fuse.imgfs", "imgfs"]


def born(path: Path) -> str:
    """When a file was made, to the nanosecond; "-" where that is not known (statx(2), STATX_BTIME)."""
    return run("stat", "--format=%w", path).stdout.strip()


@pytest.mark.parametrize("mount", ["kernel"], indirect=True)
def test_birth_time_is_that_of_the_file(filesystem: Filesystem, mount: Mounter) -> None:
    images = mount([f"{filesystem('ext4')}:2", f"{filesystem('ramfs')}:1"])
    new_image(images / "a", 10)
    assert_sealed(images / "a")
    os.utime(images / "a", ns=(OLD_MTIME_NS, OLD_MTIME_NS))
    assert born(images / "a") == born(backing_file(images / "a")) != "-"
    assert born(images.path) == born(images.datadirs[0]) != "-"
    (images.datadirs[1] / "b").touch()
    assert born(images / "b") == "-"  # ramfs keeps none
    assert (images / "b").stat().st_size == 0
