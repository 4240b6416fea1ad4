"""glance_store's own filesystem driver, with its single `filesystem_store_datadir` set to a mount."""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import MIB, assert_sealed, fill, md5
from tests.conftest import Mounted, attribute, wait_until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import glance_store
    from glance_store import exceptions, location
    from glance_store._drivers import filesystem as driver
    from oslo_config import cfg

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Configure = Callable[..., Any]


@pytest.fixture
def configure() -> Iterator[Configure]:
    """Call it with a directory and options to get the driver, ready to add and to read."""

    def make(datadir: Path, **options: object) -> Any:
        conf = cfg.ConfigOpts()
        conf([])
        glance_store.register_opts(conf)
        for name, value in {"datadir": str(datadir), **options}.items():
            conf.set_override(f"filesystem_store_{name}", value, "glance_store")
        store = driver.Store(conf)
        store.configure()
        schemes = {"store": store, "location_class": store.get_store_location_class(), "store_entry": "file"}
        location.register_scheme_map(dict.fromkeys(store.get_schemes(), schemes))
        return store

    yield make
    location.SCHEME_TO_CLS_MAP.clear()


def add(store: Any, image_id: str, content: bytes, size: int | None = None) -> tuple[Any, ...]:
    """What the driver says of an image it has added."""
    return store.add(image_id, io.BytesIO(content), len(content) if size is None else size, "sha512")


def at(uri: str) -> Any:
    """The driver's form of a location."""
    return location.get_location_from_uri(uri)


@pytest.mark.parametrize("size", [0, 1, 65536, 3_000_001])
def test_added_image_has_the_checksums_of_glance(
    mount: Callable[..., Mounted], configure: Configure, size: int
) -> None:
    images, content = mount(), os.urandom(size)
    uri, written, checksum, hash_value, metadata = add(configure(images.path), "an-id", content)
    assert (uri, written, metadata) == (f"file://{images / 'an-id'}", size, {})
    assert checksum == attribute(images / "an-id", "checksum") == md5(content)
    assert hash_value == attribute(images / "an-id", "os_hash_value") == hashlib.sha512(content).hexdigest()
    assert_sealed(images / "an-id")


def test_images_are_read_whole_and_in_part_and_sized(mount: Callable[..., Mounted], configure: Configure) -> None:
    images, content = mount(), os.urandom(500_000)
    store = configure(images.path)
    uri = add(store, "an-id", content)[0]
    chunks, size = store.get(at(uri))
    assert (b"".join(chunks), size) == (content, 500_000)
    chunks, _ = store.get(at(uri), offset=100_000, chunk_size=200_000)
    assert b"".join(chunks) == content[100_000:300_000]
    assert store.get_size(at(uri)) == 500_000


def test_deleted_image_is_gone_from_the_mount(mount: Callable[..., Mounted], configure: Configure) -> None:
    images = mount()
    store = configure(images.path)
    uri = add(store, "an-id", b"bytes")[0]
    store.delete(at(uri))
    assert os.listdir(images.path) == []
    for gone in (store.delete, store.get, store.get_size):
        with pytest.raises(exceptions.NotFound):
            gone(at(uri))


def test_taken_name_is_refused_in_whichever_datadir_it_lies(
    mount: Callable[..., Mounted], configure: Configure
) -> None:
    images = mount()
    (images.datadirs[1] / "an-id").write_bytes(b"old")
    with pytest.raises(exceptions.Duplicate):
        add(configure(images.path), "an-id", b"new")
    assert (images / "an-id").read_bytes() == b"old"


@pytest.mark.parametrize("declared", [99_999, 100_001])
def test_add_of_another_size_than_declared_leaves_nothing(
    mount: Callable[..., Mounted], configure: Configure, declared: int
) -> None:
    images = mount()
    with pytest.raises(Exception, match=r"[Ss]ize"):
        add(configure(images.path), "an-id", bytes(100_000), declared)
    assert os.listdir(images.path) == []


def test_full_store_is_told_as_storage_full_and_leaves_nothing(
    filesystem: Callable[..., Path], mount: Callable[..., Mounted], configure: Configure
) -> None:
    below = filesystem("tmpfs", 8)
    images = mount([below / "a"])
    images.expect_warning("image 'an-id' is removed: .* was full")
    fill(below, 2 * MIB)
    with pytest.raises(exceptions.StorageFull):
        add(configure(images.path), "an-id", os.urandom(4 * MIB), 0)
    wait_until(lambda: os.listdir(images.path) == [], "the removal")


def test_file_perm_of_the_driver_and_thin_provisioning_work(
    mount: Callable[..., Mounted], configure: Configure
) -> None:
    images = mount()
    content = os.urandom(65536) + bytes(4 * MIB) + os.urandom(65536) + bytes(2 * MIB)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = configure(images.path, file_perm=640)
        store.conf.set_override("filesystem_thin_provisioning", True, "glance_store")
        store.configure()
    checksum = add(store, "an-id", content)[2]
    assert checksum == attribute(images / "an-id", "checksum") == md5(content)
    wait_until(lambda: attribute(images / "an-id", "state") == "active", "the seal")
    assert (images / "an-id").stat().st_mode & 0o777 == 0o640
    assert (images / "an-id").stat().st_blocks * 512 < MIB
