"""Attributes of backing files: native ones and sidecars behave alike; a read-only datadir keeps them in memory."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgfs import DatadirConfig, ImageStore, Mode, State
from imgfs.config import Config
from imgfs.datadir import Datadir
from imgfs.xattrs import NativeXattrs, ReadOnlyXattrs, SidecarXattrs, Xattrs, supported

Filesystem = Callable[..., Path]


@pytest.fixture(params=["ext4", "ramfs", "ext4, ro", "ramfs, ro"])
def datadir(request: pytest.FixtureRequest, filesystem: Filesystem) -> Iterator[Datadir]:
    """A datadir with native attributes, with sidecars, and the like with the mode `ro`."""
    kind, _, mode = request.param.partition(", ")
    found = Datadir(DatadirConfig(str(filesystem(kind)), mode=Mode(mode or "rw")))
    yield found
    found.close()


@pytest.fixture
def fd(datadir: Datadir) -> Iterator[int]:
    """An image of the datadir, opened as the store does it: with O_PATH."""
    Path(datadir.path, "x").touch()
    fd = datadir.pin("x")
    yield fd
    os.close(fd)


@pytest.fixture
def xattrs(datadir: Datadir) -> Xattrs:
    """The attributes of the datadir."""
    return datadir.xattrs


def refused(code: int, call: Callable[..., object], *arguments: object) -> bool:
    """Whether a call ends with this errno."""
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno == code


def test_datadir_takes_what_its_filesystem_has(datadir: Datadir, xattrs: Xattrs) -> None:
    native = supported(datadir.fd)
    wanted: type = NativeXattrs if native else SidecarXattrs
    assert isinstance(xattrs, wanted if datadir.writable else ReadOnlyXattrs)


@pytest.mark.parametrize("value", [b"", b"plain", bytes(range(256)), b"x" * 700])
def test_value_comes_back_as_it_was_set(xattrs: Xattrs, fd: int, value: bytes) -> None:
    xattrs.set(fd, "user.a", b"before")
    xattrs.set(fd, "user.a", value)
    assert xattrs.get(fd, "user.a") == value


def test_absent_attribute_is_enodata(xattrs: Xattrs, fd: int) -> None:
    assert refused(errno.ENODATA, xattrs.get, fd, "user.none")
    xattrs.set(fd, "user.a", b"x")
    assert refused(errno.ENODATA, xattrs.get, fd, "user.none")


def test_attributes_of_two_files_are_apart(datadir: Datadir, xattrs: Xattrs, fd: int) -> None:
    Path(datadir.path, "y").touch()
    other = datadir.pin("y")
    xattrs.set(fd, "user.a", b"x")
    assert refused(errno.ENODATA, xattrs.get, other, "user.a")
    os.close(other)


def test_attributes_follow_the_inode_through_a_rename(datadir: Datadir, xattrs: Xattrs, fd: int) -> None:
    xattrs.set(fd, "user.a", b"x")
    datadir.rename("x", "y")
    again = datadir.pin("y")
    assert xattrs.get(again, "user.a") == b"x"
    os.close(again)


# --- what only a writable datadir is asked ---

writable = pytest.mark.parametrize("datadir", ["ext4", "ramfs"], indirect=True)


@writable
def test_list_names_what_was_set(xattrs: Xattrs, fd: int) -> None:
    assert [name for name in xattrs.list(fd) if name.startswith("user.")] == []
    xattrs.set(fd, "user.a", b"x")
    xattrs.set(fd, "user.b", b"y")
    assert sorted(name for name in xattrs.list(fd) if name.startswith("user.")) == ["user.a", "user.b"]


@writable
def test_removed_attribute_is_gone_and_others_stay(xattrs: Xattrs, fd: int) -> None:
    xattrs.set(fd, "user.a", b"x")
    xattrs.set(fd, "user.b", b"y")
    xattrs.remove(fd, "user.a")
    assert refused(errno.ENODATA, xattrs.get, fd, "user.a")
    assert refused(errno.ENODATA, xattrs.remove, fd, "user.a")
    assert xattrs.get(fd, "user.b") == b"y"


@writable
def test_flags_are_those_of_setxattr(xattrs: Xattrs, fd: int) -> None:
    assert refused(errno.ENODATA, xattrs.set, fd, "user.a", b"x", os.XATTR_REPLACE)
    xattrs.set(fd, "user.a", b"x", os.XATTR_CREATE)
    assert refused(errno.EEXIST, xattrs.set, fd, "user.a", b"y", os.XATTR_CREATE)
    xattrs.set(fd, "user.a", b"z", os.XATTR_REPLACE)
    assert xattrs.get(fd, "user.a") == b"z"


@writable
def test_attributes_outlast_the_datadir(datadir: Datadir, fd: int) -> None:
    datadir.xattrs.set(fd, "user.a", b"x")
    datadir.close()
    again = Datadir(datadir.config)
    other = again.pin("x")
    assert again.xattrs.get(other, "user.a") == b"x"
    os.close(other)
    again.close()


@writable
def test_new_file_inherits_nothing_of_a_removed_one(datadir: Datadir) -> None:
    """Inode numbers are used again; a sidecar must go with its inode."""
    for _ in range(20):
        fd = datadir.create("y", 0o600)
        assert refused(errno.ENODATA, datadir.xattrs.get, fd, "user.a")
        datadir.xattrs.set(fd, "user.a", b"x")
        os.close(fd)
        datadir.unlink("y")


# --- sidecars ---

sidecars = pytest.mark.parametrize("datadir", ["ramfs"], indirect=True)


@sidecars
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b'{"user.a": 7}', b"[" * 100_000])
def test_damaged_sidecar_is_as_good_as_none(datadir: Datadir, fd: int, content: bytes) -> None:
    datadir.xattrs.set(fd, "user.a", b"x")
    (sidecar,) = Path(datadir.path, ".imgfs/xattrs").iterdir()
    sidecar.write_bytes(content)
    assert refused(errno.ENODATA, datadir.xattrs.get, fd, "user.a")
    datadir.xattrs.set(fd, "user.b", b"y")
    assert datadir.xattrs.list(fd) == ["user.b"]


@sidecars
def test_forgetting_leaves_no_sidecar(datadir: Datadir, fd: int) -> None:
    datadir.xattrs.set(fd, "user.a", b"x")
    datadir.xattrs.forget(os.fstat(fd).st_ino)
    datadir.xattrs.forget(os.fstat(fd).st_ino)
    assert os.listdir(f"{datadir.path}/.imgfs/xattrs") == []


@sidecars
def test_symlink_in_place_of_a_sidecar_is_not_followed(datadir: Datadir, fd: int, tmp_path: Path) -> None:
    datadir.xattrs.set(fd, "user.a", b"x")
    (sidecar,) = Path(datadir.path, ".imgfs/xattrs").iterdir()
    secret = tmp_path / "secret"
    secret.write_bytes(sidecar.read_bytes())
    sidecar.unlink()
    sidecar.symlink_to(secret)
    with pytest.raises(OSError):
        datadir.xattrs.get(fd, "user.a")
    (sidecar.parent / f"{sidecar.name}.new").symlink_to(secret)
    with pytest.raises(OSError):
        datadir.xattrs.set(fd, "user.a", b"changed")
    assert b"changed" not in secret.read_bytes()


def store_on(*places: Path, **settings: object) -> ImageStore:
    """A store over these directories."""
    return ImageStore(Config(tuple(DatadirConfig(str(place), **settings) for place in places)))  # type: ignore[arg-type]


def test_image_on_a_filesystem_without_attributes_is_sealed_and_stays_so(filesystem: Filesystem) -> None:
    place = filesystem("ramfs")
    (place / "x").write_bytes(b"abc")
    with store_on(place) as store:
        assert store.state("x") is State.STALE
        digests = store.digests("x")
        store.rename("x", "y")
        assert store.state("y") is State.ACTIVE
    with store_on(place) as store:
        assert store.state("y") is State.ACTIVE
        assert store.digests("y") == digests
        store.delete("y")
    assert os.listdir(place / ".imgfs/xattrs") == []


def test_removed_image_that_is_open_keeps_its_sidecar_from_the_next(filesystem: Filesystem) -> None:
    place = filesystem("ramfs")
    (place / "x").write_bytes(b"abc")
    with store_on(place) as store:
        store.digests("x")
        handle = store.open("x")
        store.delete("x")
        store.close_handle(handle)
    assert os.listdir(place / ".imgfs/xattrs") == []


@pytest.mark.parametrize("kind", ["ext4", "ramfs"])
def test_read_only_datadir_computes_digests_once_and_writes_nothing(filesystem: Filesystem, kind: str) -> None:
    place = filesystem(kind)
    (place / "x").write_bytes(b"abc")
    with store_on(place, mode=Mode.READ_ONLY) as store:
        store.digests("x")
        assert store.state("x") is State.ACTIVE
        (place / "x").write_bytes(b"changed")
        assert store.state("x") is State.STALE
        assert store.digests("x").size == 7
    assert os.listdir(place) == ["x"]
    assert "user.imgfs.record" not in (os.listxattr(place / "x") if kind == "ext4" else [])


def test_read_only_datadir_shows_records_that_are_there(filesystem: Filesystem) -> None:
    place = filesystem("ext4")
    (place / "x").write_bytes(b"abc")
    with store_on(place) as store:
        digests = store.digests("x")
    with store_on(place, mode=Mode.READ_ONLY) as store:
        assert store.state("x") is State.ACTIVE
        assert store.digests("x") == digests
