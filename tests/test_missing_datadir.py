"""A datadir whose disk is not mounted: never written to, named with what lies there, and taken in when it is back."""

import contextlib
import errno
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgfs import DatadirConfig, ImageStore, load, membership
from imgfs.errors import DatadirError
from imgfs.identity import look
from tests.clients import assert_sealed, fails_with, md5, new_image, note_replaced
from tests.conftest import IMGFS, Mounter, attribute, run, wait_until, write_config

Filesystem = Callable[..., Path]


def marker(place: Path) -> dict[str, object]:
    """The marker of a datadir."""
    found: dict[str, object] = json.loads((place / ".imgfs/marker").read_text())
    return found


def disk_of(place: Path) -> Path:
    """The file that holds the filesystem mounted at a place."""
    return place.parent / place.name.replace("fs", "disk")


@contextlib.contextmanager
def taken_out(place: Path) -> Iterator[None]:
    """The disk is not mounted for the duration of a block."""
    run("umount", place)
    try:
        yield
    finally:
        if not os.path.ismount(place):
            put_in(place)


def put_in(place: Path, disk: Path | None = None) -> None:
    """Mount a disk (its own, unless another is given) at its place."""
    place.mkdir(exist_ok=True)
    run("mount", "-o", "loop", disk or disk_of(place), place)


def online(mounted: Path) -> dict[str, bool]:
    """Which datadirs are online."""
    return {found["path"]: found["online"] for found in json.loads(attribute(mounted, "datadirs"))}


@pytest.fixture
def disk(filesystem: Filesystem) -> Path:
    """A datadir on a disk of its own."""
    return filesystem("ext4")


@pytest.fixture
def stays(filesystem: Filesystem) -> Path:
    """A datadir that stays."""
    return filesystem("tmpfs")


# --- through the mount ---


@pytest.mark.parametrize("timeout", [0, 20])
def test_mount_goes_on_without_a_missing_disk_and_takes_it_in_when_it_is_there(
    disk: Path, stays: Path, mount: Mounter, timeout: int
) -> None:
    images = mount([f"{disk}:200", f"{stays}:100"], timeout=timeout)
    content = new_image(images / "there")
    assert_sealed(images / "there")
    new_image(stays / "here")
    assert_sealed(images / "here")
    assert images.unmount() == 0
    with taken_out(disk):
        again = mount.mount(images.config, images.path)
        again.expect_warning(f"datadir {disk} is offline: its disk is not mounted .*--adopt CONFIG {disk}")
        again.expect_warning(f"datadir {disk} is online again")
        assert online(again.path) == {str(disk): False, str(stays): True}
        assert os.listdir(again.path) == ["here"]
        assert_sealed(again / "here")
        for refused in (os.stat, os.open, os.unlink, lambda path, _flags=0: path.write_bytes(b"x")):
            with fails_with(errno.EIO):
                refused(again / "there", *([os.O_RDONLY] if refused is os.open else []))  # type: ignore[operator]
        with fails_with(errno.EIO):
            (again / "here").rename(again / "there")
        new_image(again / "new")
        assert attribute(again / "new", "datadir") == str(stays)
        assert not (again / "never").exists()
        assert os.listdir(disk) == []
        put_in(disk)
        wait_until(lambda: online(again.path)[str(disk)], "the return of the disk")
        wait_until(lambda: sorted(os.listdir(again.path)) == ["here", "new", "there"], "its images")
        wait_until((again / "there").exists, "the image")
        assert (again / "there").read_bytes() == content
        assert_sealed(again / "there", md5(content))
        new_image(again / "newer")
        assert attribute(again / "newer", "datadir") == str(disk)
        again.unmount()


def test_directory_of_a_known_datadir_is_not_made_anew(disk: Path, stays: Path, mount: Mounter) -> None:
    images = mount([disk, stays])
    images.unmount()
    with taken_out(disk):
        disk.rmdir()
        again = mount.mount(images.config, images.path)
        again.expect_warning(f"datadir {disk} is offline: there is no such directory")
        new_image(again / "new")
        assert attribute(again / "new", "datadir") == str(stays)
        assert again.unmount() == 0
        assert not disk.exists()


@pytest.mark.parametrize("mount", ["kernel"], indirect=True)
def test_nothing_is_written_where_another_store_is_mounted(
    disk: Path, stays: Path, filesystem: Filesystem, mount: Mounter
) -> None:
    other = filesystem("ext4")
    foreign = mount([other])
    new_image(foreign / "foreign")
    foreign.unmount()
    images = mount([disk, stays])
    images.unmount()
    run("umount", other)
    with taken_out(disk):
        put_in(disk, disk_of(other))
        before = (disk / ".imgfs/marker").read_bytes()
        again = mount.mount(images.config, images.path)
        again.expect_warning(f"datadir {disk} is offline: what is there belongs to another store")
        assert os.listdir(again.path) == []
        new_image(again / "new")
        again.unmount()
        assert (disk / ".imgfs/marker").read_bytes() == before
        assert sorted(os.listdir(disk)) == [".imgfs", "foreign"]
        run("umount", disk)
    put_in(other)


def test_datadirs_that_change_places_are_followed(mount: Mounter, tmp_path: Path) -> None:
    images = mount([tmp_path / "one", tmp_path / "two"])
    (tmp_path / "one/x").write_bytes(b"x")
    identities = [marker(tmp_path / name)["datadir"] for name in ("one", "two")]
    images.unmount()
    (tmp_path / "one").rename(tmp_path / "aside")
    (tmp_path / "two").rename(tmp_path / "one")
    (tmp_path / "aside").rename(tmp_path / "two")
    again = mount.mount(images.config, images.path)
    again.expect_warning("was at .* before")
    assert attribute(again / "x", "datadir") == f"{tmp_path}/two"
    assert [marker(tmp_path / name)["datadir"] for name in ("two", "one")] == identities
    again.unmount()
    once_more = mount.mount(images.config, images.path)
    assert online(once_more.path) == {f"{tmp_path}/one": True, f"{tmp_path}/two": True}


def test_mount_that_is_read_only_marks_nothing(mount: Mounter, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    mounter = mount([tmp_path / "one", tmp_path / "two"], ("-o", "ro"))
    mounter.unmount()
    assert [os.listdir(tmp_path / name) for name in ("one", "two")] == [[], []]


def test_refusing_mount_names_the_datadir_and_what_to_do(disk: Path, stays: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, [disk, stays], missing_datadirs="refuse")
    ImageStore(load(config)).close()
    (tmp_path / "images").mkdir()
    with taken_out(disk):
        done = run(*IMGFS, "mount", "--foreground", config, tmp_path / "images", check=False)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"imgfs: datadir {disk} is offline: its disk is not mounted")
        assert f"imgfs check --adopt CONFIG {disk}" in line
        assert os.listdir(disk) == []


# --- markers ---


def test_store_of_before_is_taken_for_a_first_mount(open_store: Callable[..., ImageStore], tmp_path: Path) -> None:
    for name in ("high", "low"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"in-{name}").write_bytes(b"x")
    store = open_store()
    assert [datadir.offline for datadir in store.datadirs] == [None, None]
    assert sorted(store.names()) == ["in-high", "in-low"]
    high, low = marker(tmp_path / "high"), marker(tmp_path / "low")
    assert high["store"] == low["store"]
    assert high["datadir"] != low["datadir"]
    assert (
        high["members"] == low["members"] == {high["datadir"]: f"{tmp_path}/high", low["datadir"]: f"{tmp_path}/low"}
    )


def test_datadir_that_is_added_joins_and_one_that_is_taken_out_is_forgotten(tmp_path: Path) -> None:
    def opened(*places: str) -> None:
        with ImageStore(load(write_config(tmp_path, list(places)))) as store:
            assert [datadir.offline for datadir in store.datadirs] == [None] * len(places)

    opened("a", "b")
    before = {name: marker(tmp_path / name)["datadir"] for name in "ab"}
    opened("a", "b", "c")
    assert {name: marker(tmp_path / name)["datadir"] for name in "ab"} == before
    assert len(marker(tmp_path / "a")["members"]) == 3  # type: ignore[arg-type]
    opened("a", "c")
    assert marker(tmp_path / "a")["members"] == marker(tmp_path / "c")["members"]
    assert len(marker(tmp_path / "a")["members"]) == 2  # type: ignore[arg-type]
    opened("b", "c", "a")
    assert marker(tmp_path / "b")["datadir"] == before["b"]


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    config = load(write_config(tmp_path))
    ImageStore(config).close()
    before = [os.stat(tmp_path / name / ".imgfs/marker").st_ino for name in ("high", "low")]
    ImageStore(config).close()
    assert [os.stat(tmp_path / name / ".imgfs/marker").st_ino for name in ("high", "low")] == before


def test_full_datadir_is_used_without_a_marker(
    filesystem: Filesystem, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = filesystem("tmpfs", 4, options="rw,nr_inodes=4")
    (small / "x").write_bytes(b"x")
    (small / ".imgfs").mkdir()
    while os.statvfs(small).f_ffree:
        (small / f"filler{os.statvfs(small).f_ffree}").touch()
    config = load(write_config(tmp_path, [small, "low"]))
    for _ in range(2):
        with ImageStore(config) as store:
            assert "x" in store.names()
            assert store.datadirs[0].offline is None
    assert f"datadir {small} can't be marked (No space left on device)" in caplog.text


def test_read_only_datadir_needs_no_marker(tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    (tmp_path / "ro/x").touch()
    config = load(write_config(tmp_path, ["rw", {"path": "ro", "mode": "ro"}]))
    for _ in range(2):
        with ImageStore(config) as store:
            assert list(store.names()) == ["x"]
    assert os.listdir(tmp_path / "ro") == ["x"]


def test_copy_of_a_datadir_with_its_marker_is_not_taken_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ImageStore(load(write_config(tmp_path, ["a", "b"]))).close()
    run("cp", "-a", tmp_path / "a", tmp_path / "copy")
    with ImageStore(load(write_config(tmp_path, ["copy", "a", "b"]))) as store:
        assert [datadir.path for datadir in store.datadirs if datadir.offline] == [f"{tmp_path}/copy"]
    assert f"what is there is a copy of the datadir at {tmp_path}/a, with the same identity" in caplog.text


def test_missing_directory_is_no_mistake_of_the_configuration_for_an_ordinary_user(
    tmp_path: Path, second_user: int
) -> None:
    for place in (tmp_path.parent.parent, tmp_path.parent, tmp_path):
        place.chmod(0o755)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, second_user, second_user)
    config = write_config(tmp_path, ["one/images", "two/images"])
    os.seteuid(second_user)
    try:
        ImageStore(load(config, membership.unusable)).close()
    finally:
        os.seteuid(0)
    (tmp_path / "one").rename(tmp_path / "away")
    (tmp_path / "one").mkdir()
    os.seteuid(second_user)
    try:
        with ImageStore(load(config, membership.unusable)) as store:
            assert [datadir.path for datadir in store.datadirs if datadir.offline] == [f"{tmp_path}/one/images"]
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("directory", ["stays", "goes"])
def test_disk_that_goes_while_it_is_opened_is_not_written_to(
    disk: Path, stays: Path, tmp_path: Path, directory: str
) -> None:
    config = load(write_config(tmp_path, [disk, stays]))
    ImageStore(config).close()
    judgement = membership.survey(config.datadirs)
    with taken_out(disk):
        if directory == "goes":
            disk.rmdir()
        with pytest.raises(DatadirError, match=r"was taken away|can't be opened"):
            membership._opened(judgement, config)
        assert disk.exists() == (directory == "stays")
        assert directory == "goes" or os.listdir(disk) == []


def test_first_start_that_is_killed_leaves_no_datadir_missing(tmp_path: Path) -> None:
    """kill -9 at random moments of first starts."""
    opener = "import sys, imgfs\nprint(flush=True)\nimgfs.ImageStore(imgfs.load(sys.argv[1])).close()\n"
    cut_short = 0
    for attempt in range(40):
        base = tmp_path / str(attempt)
        base.mkdir()
        config = write_config(base, ["a", "b", "c", "d"])
        with subprocess.Popen([sys.executable, "-c", opener, config], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            if attempt % 2:
                time.sleep(random.uniform(0, 0.05))
            else:
                while not (base / "a/.imgfs/marker").exists() and process.poll() is None:
                    pass  # quicker than any wait
            process.send_signal(signal.SIGKILL)
        marked = sum((base / name / ".imgfs/marker").exists() for name in "abcd")
        cut_short += 0 < marked < 4
        with ImageStore(load(config)) as store:
            assert [datadir.offline for datadir in store.datadirs] == [None] * 4
            assert len(marker(base / "a")["members"]) == 4  # type: ignore[arg-type]
        if cut_short == 2 and attempt >= 6:
            return
    assert cut_short, "no start was cut short between two markers"


@pytest.mark.parametrize("missing", ["low", "high"])
def test_replacement_that_was_cut_short_waits_for_the_missing_datadir(
    open_store: Callable[..., ImageStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """An image in `high` was renamed over one in `low`, but that is still there."""
    monkeypatch.setattr(membership, "LOOK_SECONDS", 0.05)
    with open_store() as store:
        high, low = store.datadirs
        store.add("x", [b"new"])
        (tmp_path / "low/y").write_bytes(b"old")
        note_replaced(low, "y", high, "x")
        high.rename("x", "y")
    (tmp_path / missing).rename(tmp_path / "away")
    store = open_store()
    assert b"".join(store.read("y")) == (b"new" if missing == "low" else b"old")
    (tmp_path / "away").rename(tmp_path / missing)
    wait_until(lambda: len(store.online_datadirs()) == 2, "the return")
    wait_until(lambda: not (tmp_path / "low/y").exists(), "the end of the old one")
    assert b"".join(store.read("y")) == b"new"
    assert (tmp_path / "high/y").exists()


@pytest.mark.parametrize("changed", [False, True])
def test_relocation_that_was_cut_short_is_completed_at_the_return(
    open_store: Callable[..., ImageStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """An image went from `high` to `low`, but the old file is still there; or somebody went on writing to that."""
    monkeypatch.setattr(membership, "LOOK_SECONDS", 0.05)
    with open_store() as store:
        high, low = store.datadirs
        (tmp_path / "high/x").write_bytes(b"part")
        (tmp_path / "low/x").write_bytes(b"part and more")
        old, new = high.inode("x"), low.inode("x")
        assert old
        assert new
        low.note_replaced("x", high, old, low, new)
    (tmp_path / "high").rename(tmp_path / "away")
    store = open_store()
    assert b"".join(store.read("x")) == b"part and more"
    if changed:
        (tmp_path / "away/x").write_bytes(b"precious")
    (tmp_path / "away").rename(tmp_path / "high")
    wait_until(lambda: not list((tmp_path / "low/.imgfs").glob("replaced-*")), "the end of the note")
    store.close()
    assert (tmp_path / "high/x").exists() == changed
    assert not changed or (tmp_path / "high/x").read_bytes() == b"precious"
    assert (tmp_path / "low/x").read_bytes() == b"part and more"


def test_datadir_that_is_there_again_but_can_not_be_used_is_tried_again(
    open_store: Callable[..., ImageStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr("imgfs.datadir.LOCK_WAIT_SECONDS", 0.0)
    open_store().close()
    (tmp_path / "low").rename(tmp_path / "away")
    store = open_store()
    with open_lock(tmp_path / "away"):
        (tmp_path / "away").rename(tmp_path / "low")
        wait_until(lambda: "in use by another imgfs" in str(store.datadirs[1].offline), "the refusal")
    wait_until(lambda: store.datadirs[1].offline is None, "the return")


@contextlib.contextmanager
def open_lock(place: Path) -> Iterator[None]:
    """Hold the lock of a datadir, as another imgfs does."""
    fd = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# --- check, adopt ---


def checked(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`imgfs check`, which never says more on stderr than one line."""
    done = run(*IMGFS, "check", *arguments, check=False)
    assert len(done.stderr.splitlines()) <= 1
    return done


@pytest.fixture
def lost(disk: Path, stays: Path, tmp_path: Path) -> Iterator[tuple[Path, Path, dict[str, str]]]:
    """A store whose disk was taken out: its configuration, the disk's place, the md5 of each image there."""
    config = write_config(tmp_path, [f"{disk}:2", f"{stays}:1"])
    contents = {name: os.urandom(5000 + number) for number, name in enumerate(["a", "b", "c\n", "gone"])}
    with ImageStore(load(config)) as store:
        checksums = {name: store.add(name, [content]).checksum for name, content in contents.items()}
        store.delete("gone")
        store.rename("b", "b2")
    del checksums["gone"]
    checksums["b2"] = checksums.pop("b")
    with taken_out(disk):
        yield config, disk, checksums


def test_check_names_what_is_missing_and_what_lies_there(lost: tuple[Path, Path, dict[str, str]]) -> None:
    config, disk, checksums = lost
    for _ in range(2):
        done = checked(config)
        assert done.returncode == 1
        assert f"datadir {disk} is offline: its disk is not mounted" in done.stdout
        assert "3 images known there:" in done.stdout
        for name, size in (("a", 5000), ("b2", 5001), ("c\\n", 5002)):
            md5sum = checksums[name.replace("\\n", "\n")]
            assert re.search(rf"^ +{re.escape(name)}: {size} bytes, active, md5 {md5sum}, sha512 [0-9a-f]{{128}}$",
                             done.stdout, re.MULTILINE)  # fmt: skip
        assert "gone" not in done.stdout
        assert os.listdir(disk) == []


def test_adopting_makes_a_new_datadir_and_lists_what_was_lost(
    lost: tuple[Path, Path, dict[str, str]], stays: Path
) -> None:
    config, disk, checksums = lost
    replaced = next(iter(marker(stays)["members"]))  # type: ignore[call-overload]
    done = checked("--adopt", config)
    assert done.returncode == 0, done.stderr
    assert (
        f"datadir {disk} is a new one of this store now; 3 images of the one that was there are listed as lost"
        in (done.stdout)
    )
    assert marker(disk)["store"] == marker(stays)["store"]
    assert replaced not in marker(disk)["members"]  # type: ignore[operator]
    with ImageStore(load(config)) as store:
        assert [datadir.offline for datadir in store.datadirs] == [None, None]
        assert store.add("a", [b"again"]).location == f"file://{disk}/a"
    done = checked(config)
    assert done.returncode == 0
    assert f"lost with datadir {replaced}, which is no part of the store any more: 2 images:" in done.stdout
    assert f"b2: 5001 bytes, active, md5 {checksums['b2']}" in done.stdout
    assert "nothing to adopt" in checked("--adopt", config).stdout


def test_only_what_is_named_is_adopted(filesystem: Filesystem, tmp_path: Path) -> None:
    places = [filesystem("ext4"), filesystem("ext4"), tmp_path / "stays"]
    config = write_config(tmp_path, places)
    ImageStore(load(config)).close()
    with taken_out(places[0]), taken_out(places[1]):
        assert checked("--adopt", config, places[1]).returncode == 1
        assert os.listdir(places[0]) == []
        assert os.listdir(places[1]) == [".imgfs"]
        refused = checked("--adopt", config, tmp_path)
        assert (refused.returncode, "no datadir of the configuration" in refused.stderr) == (1, True)


def test_disk_of_another_store_is_adopted_by_name(tmp_path: Path) -> None:
    for place in ("a", "b"):
        with ImageStore(load(write_config(tmp_path, [place]))) as store:
            store.add(f"in-{place}", [b"x"])
    config = write_config(tmp_path, ["a", "b"])
    refused = checked(config)
    assert refused.returncode == 1
    assert "belong to different stores" in refused.stderr
    assert checked("--adopt", config).returncode == 1
    assert checked("--adopt", config, tmp_path / "b").returncode == 0
    with ImageStore(load(config)) as store:
        assert sorted(store.names()) == ["in-a", "in-b"]
    assert marker(tmp_path / "a")["store"] == marker(tmp_path / "b")["store"]


def test_adopting_beside_a_mount_is_refused(lost: tuple[Path, Path, dict[str, str]], monkeypatch) -> None:
    config, disk, _ = lost
    monkeypatch.setattr("imgfs.datadir.LOCK_WAIT_SECONDS", 0.0)
    with ImageStore(load(config)):
        with pytest.raises(DatadirError, match="in use by another imgfs"):
            membership.adopt(load(config))
        assert not (disk / ".imgfs/marker").exists()


def test_check_beside_a_mount_needs_no_lock(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with ImageStore(load(config)) as store:
        store.add("x", [b"x"])
        began = time.monotonic()
        assert checked(config).returncode == 0
        assert time.monotonic() - began < 9


def test_hostile_marker_refuses_nothing_but_itself(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    ImageStore(load(config)).close()
    (tmp_path / "low/.imgfs/marker").write_bytes(b"[" * 100_000)
    with ImageStore(load(config)) as store:
        assert [d.path for d in store.datadirs if d.offline] == [f"{tmp_path}/low"]
    done = checked(config)
    assert done.returncode == 1
    assert "is damaged" in done.stdout
    assert look(DatadirConfig(f"{tmp_path}/low")).marker is None
