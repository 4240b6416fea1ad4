"""Two copies of a name: the better one is served, by a fixed rule, and no copy goes before somebody has looked."""

import errno
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs import ImageStore, load
from imgfs.copies import SETTLE_SECONDS
from imgfs.errors import NameDoubled
from imgfs.record import State
from tests.clients import fails_with
from tests.conftest import IMGFS, Mounter, attribute, run, wait_until, write_config

OpenStore = Callable[..., ImageStore]


def put(place: Path, name: str, content: bytes, mtime: int = 1000, sealed: bool = False) -> None:
    """Put an image into a datadir, with a record if it is to be sealed."""
    place.mkdir(exist_ok=True)
    (place / name).write_bytes(content)
    os.utime(place / name, (mtime, mtime))
    if sealed:
        with ImageStore(load(write_config(place.parent, [place]))) as store:
            store.digests(name)


def known(store: ImageStore, name: str) -> None:
    """Wait until a name is known to be doubled."""
    wait_until(lambda: name in store._namespace.copies.names, f"{name!r} to be found")


def served(store: ImageStore, name: str) -> str:
    """The datadir from which a name is served, by all ways."""
    with store.image(name) as image:
        shown = image.datadir.path
    assert store.status(name)[0].path == shown
    numbers = dict(store.listing())
    datadir, status = store.status(name)
    assert numbers[name] == datadir.inode_number(status.st_ino)
    return Path(shown).name


RULE = {
    "record before priority": (("a", 1, True, 1), ("b", 2, False, 9)),
    "record before age": (("a", 1, True, 1), ("b", 1, False, 9)),
    "priority where both have one": (("a", 2, True, 1), ("b", 1, True, 9)),
    "priority where none has one": (("a", 2, False, 1), ("b", 1, False, 9)),
    "the newest where all else is equal": (("a", 1, True, 9), ("b", 1, True, 1)),
    "the newest where none has a record": (("a", 1, False, 9), ("b", 1, False, 1)),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", RULE)
def test_better_copy_is_served(open_store: OpenStore, tmp_path: Path, case: str, turned: bool) -> None:
    """RULE says of two copies: datadir, priority, whether sealed, mtime; the first is the better one."""
    copies = RULE[case]
    for place, _, sealed, mtime in copies:
        put(tmp_path / place, "x", place.encode(), mtime, sealed)
        (tmp_path / place / ".imgfs/marker").unlink(missing_ok=True)
    datadirs = [f"{place}:{priority}" for place, priority, _, _ in copies]
    store = open_store(datadirs[::-1] if turned else datadirs)
    known(store, "x")
    assert served(store, "x") == "a"
    assert b"".join(store.read("x")) == b"a"
    assert [name for name, _ in store.listing()] == ["x"]


@pytest.fixture
def doubled(open_store: OpenStore, tmp_path: Path) -> ImageStore:
    """A store with a doubled name `x`, served from `high`, and `y`."""
    put(tmp_path / "high", "x", b"high")
    put(tmp_path / "low", "x", b"low")
    store = open_store()
    store.add("y", [b"y"])
    known(store, "x")
    return store


def test_doubled_name_is_neither_removed_nor_renamed(doubled: ImageStore, tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: doubled.delete("x"),
        lambda: doubled.rename("x", "z"),
        lambda: doubled.rename("y", "x"),
        lambda: doubled.exchange("x", "y"),
    ]
    for call in calls:
        with pytest.raises(NameDoubled, match=r"/high \(stale, 4 bytes\) is served, not .*/low"):
            call()
    assert (tmp_path / "high/x").read_bytes() == b"high"
    assert (tmp_path / "low/x").read_bytes() == b"low"
    assert sorted(doubled.names()) == ["x", "y"]


@pytest.mark.parametrize("kept", ["high", "low"])
def test_name_is_free_once_one_copy_was_removed_there(doubled: ImageStore, tmp_path: Path, kept: str) -> None:
    (tmp_path / ("low" if kept == "high" else "high") / "x").unlink()
    assert b"".join(doubled.read("x")) == kept.encode()
    doubled.rename("x", "z")
    doubled.delete("z")
    assert list(doubled.names()) == ["y"]


def test_writing_stays_with_the_copy_that_is_served(open_store: OpenStore, tmp_path: Path) -> None:
    put(tmp_path / "low", "x", b"low", sealed=True)
    (tmp_path / "low/.imgfs/marker").unlink()
    put(tmp_path / "high", "x", b"high")
    store = open_store()
    known(store, "x")
    handle = store.open("x", os.O_WRONLY)
    handle.write(b"LOW", 0)
    assert served(store, "x") == "low"
    assert store.state("x") is State.SAVING
    store.close_handle(handle)
    store.digests("x")
    assert served(store, "x") == "low"
    assert (tmp_path / "high/x").read_bytes() == b"high"


def test_copy_that_comes_later_is_found_by_a_listing(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store()
    store.add("x", [b"high"])
    put(tmp_path / "low", "x", b"low")
    assert list(store.names()) == ["x"]
    known(store, "x")
    assert served(store, "x") == "high"


def test_each_name_is_told_once_and_many_in_short(
    open_store: OpenStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for place, number in itertools.product(("high", "low"), range(30)):
        put(tmp_path / place, f"x{number:02}", b"x")
    store = open_store()
    known(store, "x29")
    for _ in range(3):
        list(store.names())
    store._namespace.copies.look()
    store.close()
    told = [record.message for record in caplog.records if "in more than one datadir" in record.message]
    assert len(told) == 21
    assert told[-1].startswith("10 more images")


def test_image_that_is_renamed_across_datadirs_is_no_double(
    open_store: OpenStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the old one still lies there, somebody looks."""
    store = open_store()
    put(tmp_path / "low", "x", b"old")
    store.add("new", [b"new"])
    low = store.datadirs[1]
    unlink = low.unlink

    def slowly(name: str) -> None:
        store._namespace.copies.suspect([name])
        time.sleep(5 * SETTLE_SECONDS)
        unlink(name)

    monkeypatch.setattr(low, "unlink", slowly)
    store.rename("new", "x")
    store.delete("x")
    store.close()
    assert "more than one" not in caplog.text


def test_what_is_no_image_is_no_copy(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store()
    store.add("x", [b"high"])
    (tmp_path / "low/x").mkdir()
    store._namespace.copies.look()
    store.delete("x")
    assert list(store.names()) == []


def test_programs_are_refused_and_see_the_better_copy(mount: Mounter, tmp_path: Path) -> None:
    put(tmp_path / "low", "x", b"low", sealed=True)
    put(tmp_path / "high", "x", b"high")
    (tmp_path / "low/.imgfs/marker").unlink()
    images = mount([f"{tmp_path}/high:2", f"{tmp_path}/low:1"])
    images.expect_warning("'x' lies in more than one datadir: .*/low .* is served, not .*/high .*")
    wait_until(lambda: (images / "x").read_bytes() == b"low", "the better one")
    assert attribute(images / "x", "datadir") == f"{tmp_path}/low"
    (images / "y").write_bytes(b"y")
    with fails_with(errno.EBUSY):
        (images / "x").unlink()
    with fails_with(errno.EBUSY):
        (images / "x").rename(images / "z")
    with fails_with(errno.EBUSY):
        (images / "y").rename(images / "x")
    with open(images / "x", "rb") as reader, fails_with(errno.EBUSY):
        (images / "x").unlink()
        reader.read()
    assert sorted(os.listdir(images.path)) == ["x", "y"]
    (tmp_path / "low/x").unlink()
    wait_until(lambda: (images / "x").read_bytes() == b"high", "the other one")
    (images / "x").unlink()
    assert os.listdir(images.path) == ["y"]
    assert not (tmp_path / "high/x").exists()


def test_copy_made_beside_the_mount_is_told(mount: Mounter) -> None:
    images = mount()
    images.expect_warning("'x' lies in more than one datadir")
    (images / "x").write_bytes(b"x")
    attribute(images / "x", "checksum")
    run("cp", "-a", images.datadirs[0] / "x", images.datadirs[1] / "x")
    if mount.transport != "kernel":
        assert os.listdir(images.path) == ["x"]
    images.wait_for_log("lies in more than one datadir")
    with fails_with(errno.EBUSY):
        (images / "x").unlink()


def test_check_names_doubled_images(tmp_path: Path) -> None:
    put(tmp_path / "high", "x", b"high")
    put(tmp_path / "low", "x", b"low")
    done = run(*IMGFS, "check", write_config(tmp_path), check=False)
    assert done.returncode == 1
    assert (
        f"image x lies in more than one datadir: {tmp_path}/high (stale, 4 bytes) is served, "
        f"not {tmp_path}/low (stale, 3 bytes); remove one there"
    ) in done.stdout
