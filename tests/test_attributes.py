"""The extended attributes of images and of the root, on filesystems that have attributes and on others."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import COMPUTED, assert_sealed, fails_with, md5, new_image, wait_for_state
from tests.conftest import Mounted, Mounter, attribute, run

Filesystem = Callable[..., Path]


@pytest.fixture
def images(mount: Mounter) -> Mounted:
    """A mount with two datadirs."""
    return mount(["high dir:200", "low:100"], store_id="ssd-pool")


def names_of(path: Path) -> set[str]:
    """The names of all attributes."""
    return set(os.listxattr(path))


def test_every_attribute_says_what_it_should(images: Mounted) -> None:
    content = new_image(images / "an image")
    image = images / "an image"
    assert attribute(image, "checksum") == md5(content)
    assert attribute(image, "os_hash_algo") == "sha512"
    assert attribute(image, "os_hash_value") == hashlib.sha512(content).hexdigest()
    assert attribute(image, "state") == "active"
    assert attribute(image, "size") == str(len(content))
    assert attribute(image, "location") == f"file://{str(images.datadirs[0]).replace(' ', '%20')}/an%20image"
    assert attribute(image, "datadir") == str(images.datadirs[0])
    assert attribute(image, "store") == "ssd-pool"
    assert json.loads(attribute(image, "metadata")) == {"store": "ssd-pool"}
    assert names_of(image) == {f"user.imgfs.{name}" for name in (*COMPUTED, "store")}


def test_store_is_absent_where_none_is_configured(mount: Mounter) -> None:
    images = mount()
    new_image(images / "a")
    with fails_with(errno.ENODATA):
        attribute(images / "a", "store")
    assert names_of(images / "a") == {f"user.imgfs.{name}" for name in COMPUTED}
    assert json.loads(attribute(images / "a", "metadata")) == {}


@pytest.mark.parametrize("algorithm", ["sha256", "sha3_512", "blake2s", "md5"])
def test_hash_algorithm_is_the_configured_one(mount: Mounter, algorithm: str) -> None:
    images = mount(hashing_algo=algorithm)
    content = new_image(images / "a")
    assert attribute(images / "a", "os_hash_algo") == algorithm
    assert attribute(images / "a", "os_hash_value") == hashlib.new(algorithm, content).hexdigest()
    assert attribute(images / "a", "checksum") == md5(content)


def test_metadata_is_that_of_the_mountpoint_that_holds_the_datadir(mount: Mounter, tmp_path: Path) -> None:
    objects = [
        {"id": "a", "mountpoint": f"{tmp_path}/a", "share": "nfs://one", "list": ["x"]},
        {"id": "ab", "mountpoint": f"{tmp_path}/ab"},
        {"id": "deep", "mountpoint": f"{tmp_path}/a/deep"},
    ]
    (tmp_path / "metadata.json").write_text(json.dumps(objects))
    places = [f"{tmp_path}/a/x", f"{tmp_path}/ab", f"{tmp_path}/a/deep/y", f"{tmp_path}/none"]
    images = mount(places, metadata_file=str(tmp_path / "metadata.json"), store_id="s")
    images.expect_warning(f"no object of the metadata file .* datadir {tmp_path}/none")
    for number, place in enumerate(places):
        new_image(Path(place) / f"{number}", 10)
    found = [json.loads(attribute(images / f"{number}", "metadata")) for number in range(4)]
    assert found == [
        {**objects[0], "store": "s"},
        {**objects[1], "store": "s"},
        {**objects[2], "store": "s"},
        {"store": "s"},
    ]


def test_computed_attributes_can_be_set_and_removed_without_effect(images: Mounted) -> None:
    new_image(images / "a")
    assert_sealed(images / "a")
    names = [f"user.imgfs.{name}" for name in (*COMPUTED, "store", "record", "unknown", "pid")]
    before = {name: os.getxattr(images / "a", name) for name in names_of(images / "a")}
    for name in names:
        for flags in (0, os.XATTR_CREATE, os.XATTR_REPLACE):
            os.setxattr(images / "a", name, b"bogus", flags)
        os.removexattr(images / "a", name)
    assert {name: os.getxattr(images / "a", name) for name in names_of(images / "a")} == before
    assert attribute(images / "a", "state") == "active"
    with fails_with(errno.ENODATA):
        attribute(images / "a", "record")
    with fails_with(errno.ENODATA):
        attribute(images / "a", "unknown")


def test_record_is_kept_from_users_of_the_mount(images: Mounted) -> None:
    new_image(images / "a")
    assert_sealed(images / "a")
    assert "user.imgfs.record" in os.listxattr(images.datadirs[0] / "a")
    assert "user.imgfs.record" not in names_of(images / "a")


def test_state_and_size_never_wait(images: Mounted) -> None:
    with open(images / "a", "wb", buffering=0) as image:
        image.write(b"123")
        assert attribute(images / "a", "state") == "saving"
        assert attribute(images / "a", "size") == "3"
        dump = run("getfattr", "-d", "--absolute-names", images / "a").stdout
        assert 'user.imgfs.state="saving"' in dump
        assert "checksum" not in dump
    assert wait_for_state(images / "a", "active") == "active"


@pytest.fixture(params=["tmpfs", "ext4", "xfs"])
def below(request: pytest.FixtureRequest, filesystem: Filesystem) -> Path:
    """A directory on a filesystem of some kind."""
    return filesystem(request.param, 320 if request.param == "xfs" else 16)


def test_attributes_work_on_every_filesystem(below: Path, mount: Mounter) -> None:
    images = mount([below])
    image = images / "a"
    new_image(image)
    exercise_attributes(image)
    image.rename(images / "b")
    assert os.getxattr(images / "b", "user.note") == b"new"
    assert attribute(images / "b", "state") == "active"
    images.unmount()
    again = mount.mount(images.config, images.path)
    assert attribute(again / "b", "state") == "active"
    assert os.getxattr(again / "b", "user.note") == b"new"
    (again / "b").unlink()
    new_image(again / "b", 10)
    assert names_of(again / "b") == {f"user.imgfs.{name}" for name in COMPUTED}
    assert_sealed(again / "b")


def exercise_attributes(image: Path) -> None:
    """Set, replace, list and remove stored attributes of an image, and have it sealed."""
    assert_sealed(image)
    with fails_with(errno.ENODATA):
        os.getxattr(image, "user.note")
    with fails_with(errno.ENODATA):
        os.removexattr(image, "user.note")
    with fails_with(errno.ENODATA):
        os.setxattr(image, "user.note", b"x", os.XATTR_REPLACE)
    os.setxattr(image, "user.note", b"\0binary\xff", os.XATTR_CREATE)
    os.setxattr(image, "user.empty", b"")
    with fails_with(errno.EEXIST):
        os.setxattr(image, "user.note", b"x", os.XATTR_CREATE)
    assert os.getxattr(image, "user.note") == b"\0binary\xff"
    assert os.getxattr(image, "user.empty") == b""
    os.setxattr(image, "user.note", b"new", os.XATTR_REPLACE)
    assert {"user.note", "user.empty"} < names_of(image)
    os.removexattr(image, "user.empty")
    assert {"user.note"} | {f"user.imgfs.{name}" for name in COMPUTED} == names_of(image)
    assert attribute(image, "state") == "active"


def test_attributes_work_on_ramfs_which_has_none(filesystem: Filesystem, mount: Mounter) -> None:
    below = filesystem("ramfs", 16)
    with fails_with(errno.EOPNOTSUPP):
        os.setxattr(below, "user.note", b"x")
    new_image(below / "a")
    images = mount([below])
    assert attribute(images / "a", "state") == "stale"
    exercise_attributes(images / "a")
    content = new_image(images / "a", 1000)
    assert_sealed(images / "a", md5(content))
    assert os.getxattr(images / "a", "user.note") == b"new"
    (images / "a").rename(images / "b")
    assert attribute(images / "b", "state") == "active"


def test_new_images_are_sealed_on_ramfs_which_has_no_attributes(filesystem: Filesystem, mount: Mounter) -> None:
    below = filesystem("ramfs", 16)
    images = mount([below])
    content = new_image(images / "a")
    assert_sealed(images / "a", md5(content))
    os.setxattr(images / "a", "user.note", b"x")
    new_image(images / "b")
    (images / "b").rename(images / "a")
    assert "user.note" not in names_of(images / "a")
    assert_sealed(images / "a")
    (images / "a").unlink()
    assert [p.name for p in below.rglob("*") if p.is_file()] == ["marker"]


def test_root_shows_the_store(images: Mounted) -> None:
    new_image(images / "a")
    assert_sealed(images / "a")
    new_image(images.datadirs[1] / "b")
    assert run("getfattr", "--only-values", "-n", "user.imgfs.version", images.path).stdout.count(".") >= 1
    assert attribute(images.path, "transport").startswith(("fusepy", "kernel"))
    high, low = json.loads(attribute(images.path, "datadirs"))
    assert [high["path"], low["path"]] == [str(d) for d in images.datadirs]
    assert [high["priority"], low["priority"]] == [200, 100]
    for shown, datadir in ((high, images.datadirs[0]), (low, images.datadirs[1])):
        numbers = os.statvfs(datadir)
        assert (shown["mode"], shown["online"], shown["images"], shown["reserved"]) == ("rw", True, 1, 0)
        assert shown["total"] == numbers.f_blocks * numbers.f_frsize
        assert 0 < shown["free"] < shown["total"]
    assert {"user.imgfs.version", "user.imgfs.transport", "user.imgfs.datadirs"} <= names_of(images.path)


def test_root_attribute_keeps_its_length_for_programs_that_ask_for_that_first(images: Mounted) -> None:
    before = attribute(images.path, "datadirs")
    for number in range(10):
        (images / f"image{number}").write_bytes(b"x" * 100_000)
    after = attribute(images.path, "datadirs")
    assert before != after
    assert len(before) == len(after)


def test_root_takes_attributes_as_images_do(images: Mounted) -> None:
    os.setxattr(images.path, "user.note", b"x")
    assert os.getxattr(images.path, "user.note") == b"x"
    assert "user.note" in names_of(images.path)
    os.removexattr(images.path, "user.note")
    for name in ("user.note", "user.imgfs.unknown", "user.imgfs.checksum", "security.capability"):
        with fails_with(errno.ENODATA):
            os.getxattr(images.path, name)
    os.setxattr(images.path, "user.imgfs.version", b"bogus")
    os.removexattr(images.path, "user.imgfs.version")
    assert attribute(images.path, "version") != "bogus"


def test_absent_attributes_are_enodata(images: Mounted) -> None:
    new_image(images / "a")
    for name in ("user.absent", "user.imgfs.absent", "user.imgfs.", "security.capability"):
        with fails_with(errno.ENODATA):
            os.getxattr(images / "a", name)
    for name in ("trusted.x", "security.x"):  # a transport may say that there are never any
        with fails_with(errno.ENODATA, errno.EOPNOTSUPP):
            os.getxattr(images / "a", name)


def test_attributes_that_are_not_users_are_not_supported(images: Mounted) -> None:
    new_image(images / "a")
    for name in ("trusted.x", "security.x", "system.x"):
        with fails_with(errno.EOPNOTSUPP):
            os.setxattr(images / "a", name, b"x")
    assert_sealed(images / "a")


def test_many_and_large_attributes_are_all_listed(images: Mounted) -> None:
    new_image(images / "a")
    assert_sealed(images / "a")
    os.setxattr(images / "a", "user.large", b"x" * 1500)
    assert os.getxattr(images / "a", "user.large") == b"x" * 1500
    for number in range(10):
        os.setxattr(images / "a", f"user.{number}.{'n' * 100}", b"")
    assert len(names_of(images / "a")) == 11 + len(COMPUTED) + 1
    assert run("getfattr", "-d", images / "a").stdout.count("\nuser.") == 11 + len(COMPUTED) + 1


def test_attributes_of_nothing_are_enoent(images: Mounted) -> None:
    for call in (os.listxattr, lambda path: os.getxattr(path, "user.imgfs.state")):
        with fails_with(errno.ENOENT):
            call(images / "missing")
    with fails_with(errno.ENOENT):
        os.setxattr(images / "missing", "user.note", b"x")
