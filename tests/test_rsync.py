"""rsync, which writes beside its target, sets times after the close and then renames, in all its ways of writing."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import MIB, OLD_MTIME_NS, assert_sealed, backing_file, digest, md5, new_image, wait_for_state
from tests.conftest import WAIT_SECONDS, Mounted, Mounter, attribute, run, wait_until

NAMES = ["a.raw", "b c.qcow2", "cß.iso", "empty"]
STATUS = ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A plain directory of images that differ in size, mode, owner and time."""
    directory = tmp_path / "plain"
    directory.mkdir()
    for number, name in enumerate(NAMES):
        new_image(directory / name, 400_000 * (3 - number), mode=0o600 + 8 * number)
        os.chown(directory / name, number, 100 + number)
        os.utime(directory / name, ns=(OLD_MTIME_NS, OLD_MTIME_NS + number * 10**15 + number))
    return directory


def images_in(directory: Path) -> dict[str, tuple[object, ...]]:
    """Name, status and digest of every image of a directory."""
    files = [directory / name for name in os.listdir(directory) if name != ".imgfs"]
    return {f.name: (digest(f), *(getattr(f.stat(), key) for key in STATUS)) for f in files}


def test_directory_goes_in_and_out_again(mount: Mounter, plain: Path, tmp_path: Path) -> None:
    images = mount()
    run("rsync", "-a", f"{plain}/", f"{images.path}/")
    assert images_in(images.path) == images_in(plain)
    for name in NAMES:
        assert_sealed(images / name, digest(plain / name))
    run("rsync", "-a", f"{images.path}/", f"{tmp_path / 'out'}/")
    assert images_in(tmp_path / "out") == images_in(plain)


def test_images_are_active_with_their_mtimes_although_rsync_sets_those_late(mount: Mounter, plain: Path) -> None:
    images = mount()
    run("rsync", "-a", f"{plain}/", f"{images.path}/")
    for name in NAMES:
        assert wait_for_state(images / name, "active", "stale", "failed") == "active"
        assert (images / name).stat().st_mtime_ns == (plain / name).stat().st_mtime_ns


@pytest.mark.parametrize("options", [["-a"], ["-aX"], ["-ac"]], ids="".join)
def test_second_run_transfers_nothing(mount: Mounter, plain: Path, options: list[str]) -> None:
    images = mount()
    run("rsync", *options, f"{plain}/", f"{images.path}/")
    records = {name: os.getxattr(sealed_file(images / name), "user.imgfs.record") for name in NAMES}
    said = run("rsync", *options, "--stats", f"{plain}/", f"{images.path}/").stdout
    assert "regular files transferred: 0\n" in said
    assert "Literal data: 0 bytes\n" in said
    for name in NAMES:
        assert attribute(images / name, "state") == "active"
        assert os.getxattr(backing_file(images / name), "user.imgfs.record") == records[name]


def sealed_file(image: Path) -> Path:
    """The backing file of an image, once it is sealed."""
    assert_sealed(image)
    return backing_file(image)


@pytest.mark.parametrize(
    ("source", "target"),
    [("plain", "one"), ("one", "plain"), ("one", "two"), ("two", "one")],
    ids=lambda place: place,
)
def test_attributes_travel_with_images_in_every_direction(
    mount: Mounter, plain: Path, tmp_path: Path, source: str, target: str
) -> None:
    (tmp_path / "copy").mkdir()
    mounted = {name: mount(store_id=name) for name in {source, target} - {"plain"}}
    start = plain if source == "plain" else mounted[source].path
    end = tmp_path / "copy" if target == "plain" else mounted[target].path
    if start != plain:
        run("rsync", "-a", f"{plain}/", f"{start}/")
    for name in NAMES:
        os.setxattr(start / name, "user.os", name.encode())
    said = run("rsync", "-aX", f"{start}/", f"{end}/")
    assert said.stderr == ""
    assert images_in(end) == images_in(start)
    for name in NAMES:
        assert os.getxattr(end / name, "user.os") == name.encode()
        if target != "plain":
            assert_sealed(end / name, digest(plain / name))
            assert attribute(end / name, "store") == target
            assert Path(attribute(end / name, "datadir")) in mounted[target].datadirs


def test_attributes_of_another_store_do_not_become_those_of_a_changed_copy(mount: Mounter, tmp_path: Path) -> None:
    one, two = mount(), mount()
    new_image(one / "a")
    assert_sealed(one / "a")
    run("rsync", "-aX", one / "a", f"{tmp_path}/a")
    content = new_image(tmp_path / "a", 100)
    assert os.getxattr(tmp_path / "a", "user.imgfs.checksum") != md5(content).encode()
    run("rsync", "-aX", tmp_path / "a", f"{two.path}/")
    assert_sealed(two / "a", md5(content))


def test_inplace_writes_into_the_old_image(mount: Mounter, tmp_path: Path) -> None:
    images = mount()
    content = bytearray(new_image(tmp_path / "a", 2 * MIB))
    run("rsync", "-a", "--inplace", tmp_path / "a", f"{images.path}/")
    assert_sealed(images / "a", md5(content))
    before = (images / "a").stat()
    content[700_000:700_010] = b"0123456789"
    (tmp_path / "a").write_bytes(content)
    run("rsync", "-a", "--inplace", "--no-whole-file", "--ignore-times", tmp_path / "a", f"{images.path}/")
    assert_sealed(images / "a", md5(content))
    assert (images / "a").stat().st_ino == before.st_ino
    assert (images / "a").stat().st_mtime_ns == (tmp_path / "a").stat().st_mtime_ns


@pytest.mark.parametrize("tail", [b"", b"end"], ids=["ends in a hole", "ends in bytes"])
def test_sparse_leaves_holes(mount: Mounter, tmp_path: Path, tail: bytes) -> None:
    images = mount()
    content = os.urandom(MIB) + bytes(6 * MIB) + tail
    (tmp_path / "a").write_bytes(content)
    run("rsync", "-aS", tmp_path / "a", f"{images.path}/")
    assert_sealed(images / "a", md5(content))
    assert (images / "a").stat().st_blocks * 512 < 2 * MIB


def test_sparse_update_in_place_gives_the_bytes_of_the_source(mount: Mounter, tmp_path: Path) -> None:
    images = mount()
    new_image(images / "a", 4 * MIB)
    assert_sealed(images / "a")
    content = os.urandom(MIB) + bytes(2 * MIB) + os.urandom(MIB)
    (tmp_path / "a").write_bytes(content)
    run("rsync", "-aSI", "--inplace", "--no-whole-file", tmp_path / "a", f"{images.path}/")
    assert_sealed(images / "a", md5(content))


def test_preallocate_gives_the_right_bytes_and_complains_only_where_it_is_not_supported(
    mount: Mounter, plain: Path
) -> None:
    images = mount()
    said = run("rsync", "-a", "--preallocate", f"{plain}/", f"{images.path}/").stderr.splitlines()
    not_supported = [line for line in said if line.endswith("Operation not supported (95)")]
    assert said == (not_supported if mount.transport == "fusepy" else [])
    assert images_in(images.path) == images_in(plain)
    for name in NAMES:
        assert_sealed(images / name, digest(plain / name))


def test_delayed_updates_want_a_directory_so_the_old_image_stays(mount: Mounter, tmp_path: Path) -> None:
    images = mount()
    content = new_image(images / "a")
    assert_sealed(images / "a", md5(content))
    new_image(tmp_path / "a", 1000)
    said = run("rsync", "-a", "--delay-updates", tmp_path / "a", f"{images.path}/", check=False)
    assert "Unable to create partial-dir" in said.stderr
    assert os.listdir(images.path) == ["a"]
    assert_sealed(images / "a", md5(content))


@contextlib.contextmanager
def slow_rsync(source: Path, images: Mounted, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """An rsync that would take many seconds, with some bytes written, in a process group of its own."""
    command = ["rsync", "-a", "--bwlimit=500", "--whole-file", *options, str(source), f"{images.path}/"]
    rsync = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: any(0 < size < source.stat().st_size for size in sizes_of_copies(images)), "a part of it")
        yield rsync
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rsync.pid, signal.SIGKILL)
        rsync.wait(WAIT_SECONDS)


def sizes_of_copies(images: Mounted) -> list[int]:
    """The sizes of all files that can be the copy of `big` that is under way."""
    found = [p for datadir in images.datadirs for p in datadir.iterdir() if "big" in p.name]
    return [p.stat().st_size for p in found if not p.name.startswith(".imgfs")]


def assert_nothing_is_active_and_wrong(images: Mounted) -> None:
    """Whatever is left says of itself what is true."""
    for name in os.listdir(images.path):
        if wait_for_state(images / name, "active", "stale", "failed") == "active":
            assert (
                attribute(images / name, "checksum") == digest(images / name) == digest(backing_file(images / name))
            )


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_interrupted_rsync_leaves_no_image_of_that_name(mount: Mounter, tmp_path: Path, how: signal.Signals) -> None:
    images = mount()
    content = new_image(tmp_path / "big", 8 * MIB)
    with slow_rsync(tmp_path / "big", images) as rsync:
        assert not (images / "big").exists()
        os.killpg(rsync.pid, how)
        assert rsync.wait(WAIT_SECONDS) != 0
    assert not (images / "big").exists()
    assert_nothing_is_active_and_wrong(images)
    run("rsync", "-a", tmp_path / "big", f"{images.path}/")
    assert_sealed(images / "big", md5(content))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_interrupted_rsync_leaves_the_old_image_active(mount: Mounter, tmp_path: Path, how: signal.Signals) -> None:
    images = mount()
    old = new_image(images / "big", 1000)
    assert_sealed(images / "big", md5(old))
    new_image(tmp_path / "big", 8 * MIB)
    with slow_rsync(tmp_path / "big", images) as rsync:
        os.killpg(rsync.pid, how)
        assert rsync.wait(WAIT_SECONDS) != 0
    assert_sealed(images / "big", md5(old))
    assert_nothing_is_active_and_wrong(images)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_interrupted_inplace_rsync_leaves_no_record_of_other_bytes(
    mount: Mounter, tmp_path: Path, how: signal.Signals
) -> None:
    images = mount()
    old = new_image(images / "big", 8 * MIB)
    assert_sealed(images / "big", md5(old))
    content = new_image(tmp_path / "big", 8 * MIB + 1)
    with slow_rsync(tmp_path / "big", images, "--inplace") as rsync:
        wait_until(lambda: attribute(images / "big", "state") == "saving", "the first changed byte")
        os.killpg(rsync.pid, how)
        assert rsync.wait(WAIT_SECONDS) != 0
    assert_nothing_is_active_and_wrong(images)
    assert attribute(images / "big", "checksum") not in (md5(old), md5(content))
    run("rsync", "-a", "--inplace", "--no-whole-file", "--ignore-times", tmp_path / "big", f"{images.path}/")
    assert_sealed(images / "big", md5(content))
