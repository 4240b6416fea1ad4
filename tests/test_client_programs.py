"""The programs that everybody has (cp, mv, dd, touch, ls ...) work on a mount as on any directory."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import COMPUTED, MIB, OLD_MTIME_NS, assert_sealed, backing_file, digest, md5, new_image
from tests.conftest import Mounted, attribute, run

STAT_FORMAT = "%n %s %f %u %g %b %h %X %Y %y %Z %z"


@pytest.fixture
def images(mount: Callable[..., Mounted]) -> Mounted:
    """A mount with two datadirs."""
    return mount()


def test_cp_in_gives_a_sealed_image_of_the_same_bytes(images: Mounted, tmp_path: Path) -> None:
    content = new_image(tmp_path / "a")
    run("cp", tmp_path / "a", images.path)
    assert_sealed(images / "a", md5(content))
    assert backing_file(images / "a").read_bytes() == content


def test_cp_out_gives_the_same_bytes(images: Mounted, tmp_path: Path) -> None:
    content = new_image(images / "a")
    run("cp", images / "a", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content


def test_cp_within_a_mount_gives_an_image_of_its_own(images: Mounted) -> None:
    content = new_image(images / "a")
    run("cp", images / "a", images / "b")
    (images / "a").unlink()
    assert_sealed(images / "b", md5(content))


def test_cp_over_an_image_changes_its_digests(images: Mounted, tmp_path: Path) -> None:
    new_image(images / "a", 500_000)
    assert_sealed(images / "a")
    content = new_image(tmp_path / "a", 200_000)
    run("cp", tmp_path / "a", images.path)
    assert_sealed(images / "a", md5(content))


def test_cp_of_an_empty_file_is_sealed(images: Mounted) -> None:
    run("cp", "/dev/null", images / "empty")
    assert_sealed(images / "empty", md5(b""))


@pytest.mark.parametrize("inwards", [True, False], ids=["into", "out of"])
def test_cp_a_keeps_mode_owner_times_and_attributes(images: Mounted, tmp_path: Path, inwards: bool) -> None:
    source, target = (tmp_path / "a", images / "a") if inwards else (images / "a", tmp_path / "a")
    content = new_image(source, mode=0o604)
    os.chown(source, 1234, 2345)
    os.setxattr(source, "user.note", b"kept")
    os.utime(source, ns=(1_111_111_111_222_333_444, OLD_MTIME_NS))
    run("cp", "-a", source, target)
    status = target.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o604, 1234, 2345)
    assert status.st_mtime_ns == OLD_MTIME_NS
    assert os.getxattr(target, "user.note") == b"kept"
    assert digest(target) == md5(content)
    assert_sealed(images / "a")
    assert (images / "a").stat().st_mtime_ns == OLD_MTIME_NS


def test_cp_sparse_always_leaves_holes_that_hash_as_zeros(images: Mounted, tmp_path: Path) -> None:
    content = bytes(3 * MIB) + os.urandom(MIB) + bytes(4 * MIB)
    (tmp_path / "a").write_bytes(content)
    run("cp", "--sparse=always", tmp_path / "a", images.path)
    assert_sealed(images / "a", md5(content))
    assert MIB <= (images / "a").stat().st_blocks * 512 < 2 * MIB
    assert (images / "a").stat().st_blocks == backing_file(images / "a").stat().st_blocks


def test_cp_out_of_a_sparse_image_gives_the_same_bytes(images: Mounted, tmp_path: Path) -> None:
    with open(images / "a", "wb") as image:
        image.seek(2 * MIB)
        image.write(b"middle")
        image.truncate(5 * MIB)
    run("cp", "--sparse=auto", images / "a", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == bytes(2 * MIB) + b"middle" + bytes(3 * MIB - 6)
    assert_sealed(images / "a", digest(tmp_path / "out"))


def test_mv_keeps_inode_datadir_and_record(images: Mounted) -> None:
    new_image(images / "a")
    assert_sealed(images / "a")
    before, record = (images / "a").stat(), os.getxattr(backing_file(images / "a"), "user.imgfs.record")
    run("mv", images / "a", images / "b")
    assert attribute(images / "b", "state") == "active"
    assert (images / "b").stat().st_ino == before.st_ino
    assert (images / "b").stat().st_mtime_ns == before.st_mtime_ns
    assert os.listdir(images.path) == ["b"]
    assert os.getxattr(backing_file(images / "b"), "user.imgfs.record") == record
    assert_sealed(images / "b")


def test_mv_replaces_an_image_in_another_datadir(images: Mounted) -> None:
    high, low = images.datadirs
    new_image(low / "old")
    content = new_image(images / "new")
    run("mv", images / "new", images / "old")
    assert_sealed(images / "old", md5(content))
    assert attribute(images / "old", "datadir") == str(high)
    assert [p.name for p in (*high.glob("[!.]*"), *low.glob("[!.]*"))] == ["old"]


def test_mv_into_a_mount_and_out_again_loses_nothing(images: Mounted, tmp_path: Path) -> None:
    content = new_image(tmp_path / "a", mode=0o640)
    os.utime(tmp_path / "a", ns=(OLD_MTIME_NS, OLD_MTIME_NS))
    run("mv", tmp_path / "a", images.path)
    assert not (tmp_path / "a").exists()
    assert_sealed(images / "a", md5(content))
    run("mv", images / "a", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
    assert (tmp_path / "back").stat().st_mtime_ns == OLD_MTIME_NS
    assert os.listdir(images.path) == []


def test_rm_removes_the_backing_file_and_frees_the_name(images: Mounted) -> None:
    new_image(images / "a")
    below = backing_file(images / "a")
    run("rm", images / "a")
    assert not below.exists()
    assert not (images / "a").exists()
    assert run("rm", images / "a", check=False).stderr.endswith("No such file or directory\n")
    assert_sealed(images / "a", md5(new_image(images / "a", 10)))


def test_dd_notrunc_changes_bytes_in_place(images: Mounted, tmp_path: Path) -> None:
    content = bytearray(new_image(images / "a", 2 * MIB))
    assert_sealed(images / "a", md5(content))
    patch = new_image(tmp_path / "patch", 100_000)
    run("dd", f"if={tmp_path / 'patch'}", f"of={images / 'a'}", "conv=notrunc", "bs=50000", "seek=7")
    content[350_000:450_000] = patch
    assert_sealed(images / "a", md5(content))


def test_dd_with_seek_leaves_a_hole_that_hashes_as_zeros(images: Mounted, tmp_path: Path) -> None:
    content = new_image(tmp_path / "a", 70_000)
    run("dd", f"if={tmp_path / 'a'}", f"of={images / 'a'}", "bs=10000", "seek=30")
    assert_sealed(images / "a", md5(bytes(300_000) + content))


def test_truncate_gives_the_size_and_new_digests(images: Mounted) -> None:
    for size in (0, 1, 100_000, 300_001, 900_000):
        content = new_image(images / "a", 300_001)
        assert_sealed(images / "a")
        run("truncate", "-s", size, images / "a")
        assert_sealed(images / "a", md5(content[:size].ljust(size, b"\0")))


def test_truncate_makes_a_new_image_of_zeros(images: Mounted) -> None:
    run("truncate", "-s", 5 * MIB, images / "a")
    assert (images / "a").stat().st_blocks == 0
    assert_sealed(images / "a", md5(bytes(5 * MIB)))


def test_touch_d_sets_the_time_and_keeps_the_image_active(images: Mounted) -> None:
    new_image(images / "a")
    assert_sealed(images / "a")
    run("touch", "-d", "2001-02-03 04:05:06.123456789 UTC", images / "a")
    assert (images / "a").stat().st_mtime_ns == 981173106_123456789
    assert attribute(images / "a", "state") == "active"


def test_touch_a_leaves_the_mtime_alone(images: Mounted) -> None:
    new_image(images / "a")
    os.utime(images / "a", ns=(OLD_MTIME_NS, OLD_MTIME_NS))
    run("touch", "-a", images / "a")
    assert (images / "a").stat().st_mtime_ns == OLD_MTIME_NS
    assert (images / "a").stat().st_atime_ns > OLD_MTIME_NS
    assert_sealed(images / "a")


def test_touch_m_leaves_the_atime_alone(images: Mounted) -> None:
    new_image(images / "a")
    os.utime(images / "a", ns=(OLD_MTIME_NS, OLD_MTIME_NS))
    run("touch", "-m", images / "a")
    assert (images / "a").stat().st_atime_ns == OLD_MTIME_NS
    assert (images / "a").stat().st_mtime_ns > OLD_MTIME_NS
    assert_sealed(images / "a")


def test_touch_makes_an_empty_image_and_renews_the_times_of_an_old_one(images: Mounted) -> None:
    run("touch", images / "a")
    assert_sealed(images / "a", md5(b""))
    os.utime(images / "a", ns=(OLD_MTIME_NS, OLD_MTIME_NS))
    run("touch", images / "a")
    assert (images / "a").stat().st_mtime_ns > OLD_MTIME_NS
    assert attribute(images / "a", "state") == "active"


def test_cat_appends_and_reads(images: Mounted) -> None:
    content = new_image(images / "a", 400_000)
    assert_sealed(images / "a")
    run("sh", "-c", 'printf tail | cat >> "$0" && cat "$0" | cmp - "$1"', images / "a", backing_file(images / "a"))
    assert_sealed(images / "a", md5(content + b"tail"))


def test_ls_and_stat_show_what_they_show_in_the_datadir(images: Mounted) -> None:
    for number in range(5):
        new_image(images / f"image {number}", 1000 * number, mode=0o600 + number)
        os.chown(images / f"image {number}", number, 2 * number)
        assert_sealed(images / f"image {number}")
    for command in (["ls", "-l", "--time-style=full-iso"], ["sh", "-c", f"stat -c '{STAT_FORMAT}' *"]):
        on_mount = run(*command, cwd=images.path).stdout
        assert on_mount == run(*command, cwd=images.datadirs[0]).stdout
        assert on_mount.count("image ") == 5


def test_ls_of_many_images_shows_each_once(images: Mounted) -> None:
    names = [f"{number:04}" for number in range(2000)]
    for name in names:
        (images.datadirs[int(name) % 2] / name).touch()
    assert run("ls", images.path).stdout.split() == names


def test_df_shows_the_filesystem_below(filesystem: Callable[..., Path], mount: Callable[..., Mounted]) -> None:
    below = filesystem("tmpfs", 16)
    images = mount([below / "a"])
    new_image(images / "x", 3 * MIB)
    (images / "x").chmod(0o600)
    assert_sealed(images / "x")
    command = ["df", "-B1", "--output=size,used,avail,itotal,iavail"]
    assert run(*command, images.path).stdout == run(*command, below).stdout
    assert run("df", "--output=fstype,source", images.path).stdout.split()[-2:] == ["fuse.imgfs", "imgfs"]


def test_getfattr_d_dumps_every_attribute(images: Mounted) -> None:
    content = new_image(images / "a")
    run("setfattr", "-n", "user.os", "-v", "debian 13", images / "a")
    dump = run("getfattr", "-d", "--absolute-names", images / "a").stdout.splitlines()[1:]
    values = dict(line.split("=", 1) for line in dump if line)
    assert set(values) == {f"user.imgfs.{name}" for name in COMPUTED} | {"user.os"}
    assert values["user.os"] == '"debian 13"'
    assert values["user.imgfs.checksum"] == f'"{md5(content)}"'
    assert values["user.imgfs.state"] == '"active"'


def test_setfattr_sets_replaces_and_removes(images: Mounted) -> None:
    new_image(images / "a")
    assert_sealed(images / "a")
    run("setfattr", "-n", "user.os", "-v", "one", images / "a")
    run("setfattr", "-n", "user.os", "-v", "two", images / "a")
    assert run("getfattr", "-n", "user.os", "--only-values", images / "a").stdout == "two"
    run("setfattr", "-x", "user.os", images / "a")
    gone = run("getfattr", "-n", "user.os", images / "a", check=False)
    assert gone.returncode == 1
    assert "No such attribute" in gone.stderr
    assert attribute(images / "a", "state") == "active"
