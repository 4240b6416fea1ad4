"""A directory of images that Glance left: mounted as it is, read as it is, sealed when asked or by itself."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from tests.clients import COMPUTED, OLD_MTIME_NS, assert_sealed, crash, digest, md5, new_image, opened, wait_for_state
from tests.conftest import Mounter, attribute, run, wait_until

IDS = ["0c8e7a31-5a4e-4f7c-9d0e-5f1f3c8a2b10", "71c675ab-d94f-49cd-a114-e12490b328d9", "f00ba4"]


@pytest.fixture
def datadirs(tmp_path: Path) -> list[Path]:
    """Two datadirs of images as Glance writes them."""
    places = [tmp_path / "fast", tmp_path / "slow"]
    for place in places:
        place.mkdir()
    for number, name in enumerate(IDS):
        new_image(places[number % 2] / name, 200_000 + number, mode=0o640)
        os.utime(places[number % 2] / name, ns=(OLD_MTIME_NS, OLD_MTIME_NS + number))
    return places


def test_images_are_listed_and_read_as_they_are(mount: Mounter, datadirs: list[Path]) -> None:
    images = mount([f"{datadirs[0]}:200", f"{datadirs[1]}:100"])
    assert sorted(os.listdir(images.path)) == sorted(IDS)
    for number, name in enumerate(IDS):
        below = datadirs[number % 2] / name
        assert digest(images / name) == digest(below)
        shown, real = (images / name).stat(), below.stat()
        for key in ("st_mode", "st_uid", "st_gid", "st_size", "st_blocks", "st_mtime_ns", "st_ctime_ns", "st_nlink"):
            assert getattr(shown, key) == getattr(real, key)


def test_mounting_and_reading_changes_no_file(mount: Mounter, datadirs: list[Path]) -> None:
    before = {p: (p.stat().st_ctime_ns, os.listxattr(p)) for d in datadirs for p in d.iterdir()}
    images = mount(datadirs)
    for name in IDS:
        (images / name).read_bytes()
        assert attribute(images / name, "state") == "stale"
        assert attribute(images / name, "size") == str((images / name).stat().st_size)
    assert images.unmount() == 0
    after = {p: (p.stat().st_ctime_ns, os.listxattr(p)) for d in datadirs for p in d.iterdir() if p.is_file()}
    assert after == before


@pytest.mark.parametrize("name", ["checksum", "os_hash_algo", "os_hash_value"])
def test_asking_for_a_digest_seals(mount: Mounter, datadirs: list[Path], name: str) -> None:
    images = mount(datadirs)
    image = images / IDS[0]
    assert attribute(image, "state") == "stale"
    attribute(image, name)
    assert attribute(image, "state") == "active"
    assert_sealed(image, digest(datadirs[0] / IDS[0]))
    assert image.stat().st_mtime_ns == OLD_MTIME_NS
    assert attribute(images / IDS[1], "state") == "stale"


def test_seal_outlives_the_mount(mount: Mounter, datadirs: list[Path]) -> None:
    images = mount(datadirs)
    checksums = {name: attribute(images / name, "checksum") for name in IDS}
    images.unmount()
    again = mount.mount(images.config, images.path)
    for name in IDS:
        assert attribute(again / name, "state") == "active"
        assert attribute(again / name, "checksum") == checksums[name]


def test_on_demand_seals_nothing_by_itself(mount: Mounter, datadirs: list[Path]) -> None:
    images = mount(datadirs)
    for name in IDS[1:]:
        assert_sealed(images / name)
    assert attribute(images / IDS[0], "state") == "stale"


def test_background_resealing_seals_by_itself(mount: Mounter, datadirs: list[Path]) -> None:
    images = mount(datadirs, reseal="background", hashing_algo="blake2b")
    for number, name in enumerate(IDS):
        assert wait_for_state(images / name, "active") == "active"
        assert attribute(images / name, "os_hash_value") == digest(datadirs[number % 2] / name, "blake2b")
        assert_sealed(images / name)


def test_background_resealing_finds_what_a_crash_left(mount: Mounter, tmp_path: Path) -> None:
    images = mount([tmp_path / "fast"])
    with opened(images / "a", os.O_CREAT | os.O_WRONLY) as image:
        os.write(image, b"begun")
        crash(mount, images)
    os.utime(tmp_path / "fast" / "a", ns=(OLD_MTIME_NS, OLD_MTIME_NS))
    config = images.config
    config.write_text(config.read_text() + "reseal: background\n")
    again = mount.mount(config, images.path)
    wait_for_state(again / "a", "active")
    assert_sealed(again / "a", md5(b"begun"))


def test_crash_while_writing_leaves_a_visibly_stale_image(mount: Mounter, tmp_path: Path) -> None:
    images = mount([tmp_path / "fast"])
    with opened(images / "a", os.O_CREAT | os.O_WRONLY) as image:
        os.write(image, os.urandom(500_000))
        crash(mount, images)
    again = mount.mount(images.config, images.path)
    assert attribute(again / "a", "state") == "stale"


def test_crash_while_an_active_image_is_overwritten_leaves_it_stale(mount: Mounter, tmp_path: Path) -> None:
    images = mount([tmp_path / "fast"])
    new_image(images / "a", 500_000)
    assert_sealed(images / "a")
    with opened(images / "a", os.O_RDWR) as image:
        os.write(image, b"changed")
        crash(mount, images)
    os.utime(tmp_path / "fast" / "a", ns=(OLD_MTIME_NS, OLD_MTIME_NS))
    again = mount.mount(images.config, images.path)
    assert attribute(again / "a", "state") == "stale"
    assert_sealed(again / "a", digest(tmp_path / "fast" / "a"))


@pytest.mark.parametrize("command", [["cp", "-p"], ["cp", "-a"], ["rsync", "-a"], ["rsync", "-aX"]], ids=" ".join)
def test_copy_that_sets_times_after_the_close_ends_active(
    mount: Mounter, datadirs: list[Path], command: list[str]
) -> None:
    images = mount()
    source = datadirs[0] / IDS[0]
    run(*command, source, f"{images.path}/")
    assert wait_for_state(images / IDS[0], "active", "stale", "failed") == "active"
    assert (images / IDS[0]).stat().st_mtime_ns == OLD_MTIME_NS
    assert_sealed(images / IDS[0], digest(source))


def test_times_set_again_and_again_while_sealing_runs_end_active(mount: Mounter) -> None:
    images = mount()
    content = os.urandom(8_000_000)
    with open(images / "a", "wb", buffering=0) as image:
        os.pwrite(image.fileno(), content[4_000_000:], 4_000_000)
        os.pwrite(image.fileno(), content[:4_000_000], 0)
    deadline = time.monotonic() + 20
    turn = 0
    while attribute(images / "a", "state") == "saving" and time.monotonic() < deadline:
        turn += 1
        os.utime(images / "a", ns=(OLD_MTIME_NS, OLD_MTIME_NS + turn))
    assert attribute(images / "a", "state") == "active"
    assert_sealed(images / "a", hashlib.md5(content).hexdigest())


def test_datadir_stays_readable_without_imgfs(mount: Mounter, datadirs: list[Path]) -> None:
    images = mount(datadirs)
    content = new_image(images / "new")
    assert_sealed(images / "new")
    images.unmount()
    found = [p for d in datadirs for p in d.iterdir() if p.name == "new"]
    assert [p.read_bytes() for p in found] == [content]
    assert {p.name for d in datadirs for p in d.iterdir()} == {*IDS, "new", ".imgfs"}


def test_image_that_appears_in_a_datadir_appears_in_the_mount(mount: Mounter, datadirs: list[Path]) -> None:
    images = mount(datadirs)
    assert not (images / "late").exists()
    content = new_image(datadirs[1] / "late")
    assert (images / "late").read_bytes() == content
    assert "late" in os.listdir(images.path)
    assert set(os.listxattr(images / "late")) == {f"user.imgfs.{name}" for name in COMPUTED}
    assert_sealed(images / "late", md5(content))
    (datadirs[1] / "late").unlink()
    wait_until(lambda: not (images / "late").exists(), "its end")


def test_higher_priority_hides_a_second_image_of_a_name(mount: Mounter, datadirs: list[Path]) -> None:
    content = new_image(datadirs[1] / IDS[0], 10)
    images = mount([f"{datadirs[0]}:1", f"{datadirs[1]}:2"])
    images.expect_warning("lies in more than one datadir")
    assert sorted(os.listdir(images.path)) == sorted(IDS)
    assert (images / IDS[0]).read_bytes() == content
