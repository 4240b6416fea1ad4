"""Who may read images: `file_perm`, the x bits of datadirs, and the kernel's checks, with real other users."""

import errno
import os
from pathlib import Path

import pytest

from tests.clients import assert_sealed, fails_with, md5, new_image, run_as, wait_for_state
from tests.conftest import Mounter, attribute, run

READERS_GROUP = 47_111


def mode_of(path: Path) -> int:
    """The permission bits of a file."""
    return path.stat().st_mode & 0o7777


def config_with_perm(base: Path, written: str) -> Path:
    """A configuration with `file_perm` exactly as written."""
    config = base / "imgfs.yaml"
    config.write_text(f"datadirs: [store]\nfile_perm: {written}\n")
    (base / "images").mkdir()
    return config


@pytest.mark.parametrize("written", ["640", "0640", '"0640"', '"640"'])
def test_file_perm_is_read_as_octal_digits(mount: Mounter, tmp_path: Path, written: str) -> None:
    images = mount.mount(config_with_perm(tmp_path, written), tmp_path / "images")
    new_image(images / "a", mode=0o777)
    assert_sealed(images / "a")
    assert mode_of(images / "a") == mode_of(tmp_path / "store" / "a") == 0o640


@pytest.mark.parametrize("written", ["0", "-1", '"0"'])
def test_file_perm_of_zero_or_less_leaves_modes_alone(mount: Mounter, tmp_path: Path, written: str) -> None:
    images = mount.mount(config_with_perm(tmp_path, written), tmp_path / "images")
    new_image(images / "a", mode=0o604)
    assert_sealed(images / "a")
    assert mode_of(images / "a") == 0o604


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o666)])
def test_without_file_perm_the_mode_is_the_callers(mount: Mounter, mask: int, mode: int) -> None:
    images = mount()
    run("cp", "/dev/null", images / "a", umask=mask)
    assert_sealed(images / "a")
    assert mode_of(images / "a") == mode


def test_group_reads_and_others_do_not(mount: Mounter, second_user: int) -> None:
    images = mount(file_perm="0640")
    content = new_image(images / "a")
    os.chown(images / "a", 0, READERS_GROUP)
    assert_sealed(images / "a", md5(content))
    command = ["md5sum", images / "a"]
    assert run_as(second_user, *command, groups=(READERS_GROUP,)).stdout.startswith(md5(content))
    refused = run_as(second_user, *command, check=False)
    assert refused.returncode == 1
    assert "Permission denied" in refused.stderr


def test_group_reads_the_backing_file_too(mount: Mounter, second_user: int) -> None:
    images = mount(file_perm="0640")
    content = new_image(images / "a")
    os.chown(images / "a", 0, READERS_GROUP)
    os.chown(images.datadirs[0], 0, READERS_GROUP)
    images.datadirs[0].chmod(0o710)
    assert_sealed(images / "a")
    below = ["md5sum", images.datadirs[0] / "a"]
    assert run_as(second_user, *below, groups=(READERS_GROUP,)).stdout.startswith(md5(content))
    assert run_as(second_user, *below, check=False).returncode == 1


def test_group_does_not_write_what_it_may_only_read(mount: Mounter, second_user: int) -> None:
    images = mount(file_perm="0640")
    content = new_image(images / "a")
    os.chown(images / "a", 0, READERS_GROUP)
    wait_for_state(images / "a", "active")
    write = ["dd", "if=/dev/zero", f"of={images / 'a'}", "count=1", "conv=notrunc"]
    assert "Permission denied" in run_as(second_user, *write, groups=(READERS_GROUP,), check=False).stderr
    assert "Permission denied" in run_as(second_user, "rm", "-f", images / "a", check=False).stderr
    assert_sealed(images / "a", md5(content))


@pytest.mark.parametrize(
    ("file_perm", "before", "after"),
    [
        ("0600", 0o700, 0o700),
        ("0640", 0o700, 0o710),
        ("0644", 0o700, 0o711),
        ("0604", 0o700, 0o701),
        ("0", 0o700, 0o700),
    ],
)
def test_datadir_gets_the_x_bits_that_file_perm_calls_for(
    mount: Mounter, tmp_path: Path, file_perm: str, before: int, after: int
) -> None:
    datadir = tmp_path / "store"
    datadir.mkdir(mode=before)
    mount([datadir], file_perm=file_perm)
    assert mode_of(datadir) == after


def test_created_datadir_is_not_for_others_to_write(mount: Mounter, second_user: int) -> None:
    images = mount(["deep/er:1", "other"])
    assert [mode_of(p) & 0o022 for p in (*images.datadirs, images.datadirs[0].parent, images.path)] == [0, 0, 0, 0]
    refused = run_as(second_user, "touch", images / "a", check=False)
    assert "Permission denied" in refused.stderr


def test_chmod_has_no_effect_where_file_perm_says_the_mode(mount: Mounter, tmp_path: Path) -> None:
    images = mount(file_perm="0640")
    new_image(tmp_path / "a", mode=0o600)
    run("cp", "-p", tmp_path / "a", images.path)
    assert_sealed(images / "a")
    run("chmod", "0777", images / "a")
    run("rsync", "-a", tmp_path / "a", f"{images.path}/")
    assert mode_of(images / "a") == 0o640
    assert attribute(images / "a", "state") == "active"


def test_chmod_works_without_file_perm_and_keeps_the_image_active(mount: Mounter) -> None:
    images = mount()
    new_image(images / "a", mode=0o644)
    assert_sealed(images / "a")
    run("chmod", "0400", images / "a")
    assert mode_of(images / "a") == 0o400
    assert attribute(images / "a", "state") == "active"


def test_new_image_belongs_to_its_creator(mount: Mounter, second_user: int) -> None:
    images = mount()
    images.path.chmod(0o777)
    run_as(second_user, "dd", "if=/dev/urandom", f"of={images / 'a'}", "bs=1000", "count=300", "status=none")
    assert_sealed(images / "a")
    status = (images / "a").stat()
    assert (status.st_uid, status.st_gid) == (second_user, second_user)
    assert run_as(second_user, "rm", images / "a").returncode == 0


def test_creator_writes_on_although_the_mode_forbids_it(mount: Mounter, second_user: int, tmp_path: Path) -> None:
    images = mount()
    images.path.chmod(0o777)
    content = new_image(tmp_path / "a", mode=0o444)
    run_as(second_user, "cp", "-p", tmp_path / "a", images.path)
    assert mode_of(images / "a") == 0o444
    assert_sealed(images / "a", md5(content))


def test_sticky_root_keeps_users_from_each_others_images(mount: Mounter, second_user: int) -> None:
    images = mount()
    images.path.chmod(0o1777)
    new_image(images / "a")
    refused = run_as(second_user, "mv", "-f", images / "a", images / "b", check=False)
    assert refused.returncode == 1
    assert (images / "a").exists()


def test_only_the_owner_changes_mode_times_and_owner(mount: Mounter, second_user: int) -> None:
    images = mount()
    new_image(images / "a", mode=0o666)
    assert_sealed(images / "a")
    for command in (["chmod", "600"], ["chown", str(second_user)], ["touch", "-d", "2001-01-01"]):
        assert run_as(second_user, *command, images / "a", check=False).returncode == 1
    assert mode_of(images / "a") == 0o666
    with fails_with(errno.ENODATA):
        os.getxattr(images / "a", "user.absent")


def test_chown_is_shown_and_keeps_the_image_active(mount: Mounter) -> None:
    images = mount()
    new_image(images / "a")
    assert_sealed(images / "a")
    run("chown", "12:34", images / "a")
    status = (images / "a").stat()
    assert (status.st_uid, status.st_gid) == (12, 34)
    run("chgrp", "56", images / "a")
    status = (images / "a").stat()
    assert (status.st_uid, status.st_gid) == (12, 56)
    assert attribute(images / "a", "state") == "active"


def test_attributes_are_guarded_by_the_mode_of_the_image(mount: Mounter, second_user: int) -> None:
    images = mount()
    new_image(images / "a", mode=0o600)
    assert_sealed(images / "a")
    for command in (
        ["getfattr", "-n", "user.imgfs.checksum"],
        ["setfattr", "-n", "user.note", "-v", "x"],
    ):
        refused = run_as(second_user, *command, images / "a", check=False)
        assert "Permission denied" in refused.stderr


def test_mount_without_allow_other_is_for_its_owner_alone(mount: Mounter, second_user: int) -> None:
    images = mount(options=("--no-allow-other",))
    new_image(images / "a", mode=0o644)
    refused = run_as(second_user, "cat", images / "a", check=False)
    assert "Permission denied" in refused.stderr
