"""A datadir that is offline: passed over, its images give EIO, everything else goes on."""

import errno
from collections.abc import Callable

import pytest

from imgfs import ImageStore
from imgfs.attributes import RootAttributes
from imgfs.errors import DatadirOffline, ImageNotFound

OpenStore = Callable[..., ImageStore]


def test_offline_datadir_is_passed_over(open_store: OpenStore) -> None:
    store = open_store()
    high, low = store.datadirs
    store.add("there", [b"1"])
    high.go_offline("unplugged")
    assert store.add("x", [b"2"]).location.startswith(f"file://{low.path}/")
    assert list(store.names()) == ["x"]
    with pytest.raises((ImageNotFound, DatadirOffline)):  # the latter once its sibling's list is read
        store.status("there")
    high.come_back()
    assert sorted(store.names()) == ["there", "x"]
    assert store.status("there")[0] is high


def test_image_known_to_be_on_an_offline_datadir_gives_eio(open_store: OpenStore) -> None:
    store = open_store()
    handle = store.create("x")
    handle.image.datadir.go_offline("unplugged")
    with pytest.raises(DatadirOffline) as caught:
        store.status("x")
    assert caught.value.errno == errno.EIO
    for refused in (store.create, store.open, store.delete, store.size):
        with pytest.raises(DatadirOffline):
            refused("x")
    store.add("other", [b"1"])
    with pytest.raises(DatadirOffline):
        store.rename("other", "x")
    handle.image.datadir.come_back()
    store.close_handle(handle)


def test_root_tells_which_datadir_is_offline_and_why(open_store: OpenStore) -> None:
    store = open_store()
    store.datadirs[0].go_offline("unplugged")
    described = RootAttributes(store, lambda: "none").get("user.imgfs.datadirs").decode()
    assert '"online": false' in described
    assert '"online": true' in described
    assert "unplugged" in described


def test_name_whose_removal_an_offline_datadir_may_forget_is_not_given_out(open_store: OpenStore) -> None:
    store = open_store()
    store.add("x", [b"old"])
    high = store.status("x")[0]
    store.delete("x")
    high.go_offline("unplugged")
    with pytest.raises(DatadirOffline):
        store.create("x")
    with pytest.raises(DatadirOffline):
        store.sync()
    store.add("y", [b"other"])
    high.come_back()
    store.sync()
    assert store.add("x", [b"new"]).bytes_written == 3
