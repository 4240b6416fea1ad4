"""One datadir: made where it is missing, refused by name where it can't be used, and never left through a link."""

import contextlib
import errno
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgfs import DatadirConfig, ImageStore, Mode, datadir
from imgfs.datadir import Datadir, give_tags, unusable
from imgfs.errors import DatadirError, ImageExists, ImageNotFound, WriteDenied
from tests.conftest import run

OpenStore = Callable[..., ImageStore]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Datadir]]:
    """Call it with a name below tmp_path, and more of a DatadirConfig, to get a Datadir."""
    with contextlib.ExitStack() as stack:

        def make(name: str = "images", file_perm: int = 0, **settings: object) -> Datadir:
            found = Datadir(DatadirConfig(str(tmp_path / name), **settings), file_perm)  # type: ignore[arg-type]
            stack.callback(found.close)
            return found

        yield make


@contextlib.contextmanager
def as_user(uid: int) -> Iterator[None]:
    """Be another user for the duration of a block."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def descriptors() -> set[str]:
    """What this process has open."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return found


# --- creating and refusing ---


def test_missing_directory_is_created_with_its_parents(opened: Callable[..., Datadir], tmp_path: Path) -> None:
    opened("a/b/c")
    assert (tmp_path / "a/b/c").is_dir()


def test_race_with_another_creator_is_harmless(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)
    failed: list[BaseException] = []

    def create_twenty() -> None:
        for number in range(20):
            barrier.wait()
            try:
                Datadir(DatadirConfig(f"{tmp_path}/{number}/a/b")).close()
            except DatadirError as error:
                failed.append(error)

    threads = [threading.Thread(target=create_twenty) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_missing_directory_is_not_created_to_be_read_only(opened: Callable[..., Datadir], tmp_path: Path) -> None:
    with pytest.raises(DatadirError, match=f"{tmp_path}/images does not exist"):
        opened(mode=Mode.READ_ONLY)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("kind", ["file", "dangling symlink", "below a file"])
def test_what_is_no_directory_is_refused_by_name(opened: Callable[..., Datadir], tmp_path: Path, kind: str) -> None:
    name = "images/below" if kind == "below a file" else "images"
    if kind == "dangling symlink":
        (tmp_path / "images").symlink_to("nowhere")
    else:
        (tmp_path / "images").touch()
    with pytest.raises(DatadirError, match=f"{tmp_path}/{name} "):
        opened(name)


@pytest.fixture
def refusing(request: pytest.FixtureRequest, tmp_path: Path, filesystem: Callable[..., Path]) -> Iterator[Path]:
    """A directory where nothing can be written, for one of several reasons."""
    if request.param == "read-only filesystem":
        place = filesystem("tmpfs")
        run("mount", "-o", "remount,ro", place)
        yield place
        return
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)
    with as_user(65534):
        yield place


@pytest.mark.parametrize("refusing", ["read-only filesystem", "no permission"], indirect=True)
@pytest.mark.parametrize("name", ["", "below"])
def test_unwritable_directory_is_refused_by_name(refusing: Path, name: str) -> None:
    place = refusing / name
    reason = unusable(DatadirConfig(str(place)))
    assert reason is not None
    assert str(place) in reason
    with pytest.raises(DatadirError, match=str(place)) as caught:
        Datadir(DatadirConfig(str(place)))
    assert caught.value.errno == errno.EACCES


@pytest.mark.parametrize("refusing", ["read-only filesystem", "no permission"], indirect=True)
def test_unwritable_directory_serves_as_a_read_only_datadir(refusing: Path) -> None:
    config = DatadirConfig(str(refusing), mode=Mode.READ_ONLY)
    assert unusable(config) is None
    Datadir(config).close()


def test_directory_that_can_not_even_be_looked_at_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "closed/images").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    with as_user(65534):
        reason = unusable(DatadirConfig(f"{tmp_path}/closed/images"))
    assert reason is not None
    assert f"{tmp_path}/closed/images" in reason


def test_asking_whether_a_datadir_is_usable_changes_nothing(tmp_path: Path) -> None:
    assert unusable(DatadirConfig(f"{tmp_path}/a/b")) is None
    assert os.listdir(tmp_path) == []


def test_symlink_to_a_directory_is_good_as_a_datadir(opened: Callable[..., Datadir], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "images").symlink_to("disk")
    os.close(opened().create("x", 0o600))
    assert (tmp_path / "disk/x").exists()


def test_symlink_in_place_of_the_room_of_imgfs_is_refused(opened: Callable[..., Datadir], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images/.imgfs").symlink_to("../elsewhere")
    with pytest.raises(DatadirError, match=f"{tmp_path}/images"):
        opened()
    assert os.listdir(tmp_path / "elsewhere") == []


def test_refused_datadir_leaves_no_descriptor(opened: Callable[..., Datadir], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/.imgfs").touch()
    before = descriptors()
    with pytest.raises(DatadirError):
        opened()
    assert descriptors() == before


# --- one imgfs at a time ---


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datadir, "LOCK_WAIT_SECONDS", 0.2)


@pytest.mark.usefixtures("_impatient")
def test_second_store_on_a_datadir_is_refused(open_store: OpenStore, tmp_path: Path) -> None:
    first = open_store(["a", "b"])
    with pytest.raises(DatadirError, match=f"{tmp_path}/b is in use by another imgfs") as caught:
        open_store(["c", "b"])
    assert caught.value.errno == errno.EBUSY
    first.close()
    open_store(["c", "b"]).add("x", [b"x"])


@pytest.mark.usefixtures("_impatient")
def test_refused_store_lets_go_of_its_other_datadirs(open_store: OpenStore) -> None:
    open_store(["b"])
    with pytest.raises(DatadirError):
        open_store(["c:5", "b"])
    open_store(["c"])


@pytest.mark.usefixtures("_impatient")
def test_read_only_stores_share_a_datadir_but_not_with_a_writer(open_store: OpenStore, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    shared = {"path": "a", "mode": "ro"}
    readers = [open_store([shared]), open_store([shared])]
    with pytest.raises(DatadirError):
        open_store(["a"])
    for reader in readers:
        reader.close()
    open_store(["a"])
    with pytest.raises(DatadirError):
        open_store([shared])


def test_store_waits_for_the_one_before_it_to_finish(open_store: OpenStore) -> None:
    first = open_store(["a"])
    closer = threading.Timer(0.3, first.close)
    closer.start()
    open_store(["a"]).add("x", [b"x"])
    closer.join()


# --- permissions ---


@pytest.mark.parametrize(
    ("file_perm", "before", "after"),
    [
        (0, 0o700, 0o700),
        (0o600, 0o700, 0o700),
        (0o640, 0o700, 0o710),
        (0o604, 0o700, 0o701),
        (0o644, 0o700, 0o711),
        (0o660, 0o750, 0o750),
        (0o620, 0o700, 0o710),
        (0o644, 0o2750, 0o2751),
    ],
)
def test_datadir_gets_the_x_bits_of_those_whom_file_perm_serves(
    opened: Callable[..., Datadir], tmp_path: Path, file_perm: int, before: int, after: int
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images").chmod(before)
    opened(file_perm=file_perm)
    assert stat.S_IMODE((tmp_path / "images").stat().st_mode) == after


def test_read_only_datadir_keeps_its_mode(opened: Callable[..., Datadir], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir(mode=0o700)
    opened(file_perm=0o644, mode=Mode.READ_ONLY)
    assert stat.S_IMODE((tmp_path / "images").stat().st_mode) == 0o700


def test_failing_to_set_the_x_bits_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "others"
    place.mkdir()
    place.chmod(0o770)
    os.chown(place, 0, 65534)
    os.setegid(65534)
    try:
        with as_user(65534):
            Datadir(DatadirConfig(str(place)), 0o644).close()
    finally:
        os.setegid(0)
    assert [(r.levelname, r.getMessage().split(": ")[0]) for r in caplog.records] == [("WARNING", f"datadir {place}")]


def test_room_of_imgfs_is_closed_to_others(opened: Callable[..., Datadir], tmp_path: Path) -> None:
    opened(file_perm=0o644)
    assert stat.S_IMODE((tmp_path / "images/.imgfs").stat().st_mode) == 0o700


# --- only regular files are images ---

NO_IMAGES = ["symlink", "dangling", "directory", "pipe", "socket"]


@pytest.fixture
def strange(tmp_path: Path) -> Iterator[Path]:
    """A datadir where one of each lies that is no image, and one image."""
    place = tmp_path / "images"
    place.mkdir()
    (tmp_path / "secret").write_text("secret")
    (place / "symlink").symlink_to(tmp_path / "secret")
    (place / "dangling").symlink_to(tmp_path / "nowhere")
    (place / "directory").mkdir()
    os.mkfifo(place / "pipe")
    (place / "x").write_text("image")
    with socket.socket(socket.AF_UNIX) as listening:
        directory = os.open(place, os.O_PATH)
        listening.bind(f"/proc/self/fd/{directory}/socket")
        os.close(directory)
        yield place


@pytest.mark.parametrize("name", [*NO_IMAGES, ".imgfs"])
@pytest.mark.timeout(20)
def test_only_regular_files_are_images(open_store: OpenStore, strange: Path, tmp_path: Path, name: str) -> None:
    store = open_store([strange])
    assert list(store.names()) == ["x"]
    calls: list[Callable[[str], object]] = [
        store.status, store.size, store.open, store.read, store.state, store.digests, store.location, store.delete,
        lambda name: store.open(name, os.O_RDWR | os.O_TRUNC), lambda name: store.rename(name, "y"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ImageNotFound):
            call(name)
    assert os.path.lexists(strange / name)
    assert (tmp_path / "secret").read_text() == "secret"


@pytest.mark.parametrize("name", NO_IMAGES)
@pytest.mark.timeout(20)
def test_name_of_what_is_no_image_is_taken_all_the_same(
    open_store: OpenStore, strange: Path, tmp_path: Path, name: str
) -> None:
    store = open_store([strange, "other:5"])
    with pytest.raises(ImageExists):
        store.add(name, [b"new"])
    with pytest.raises(ImageExists):
        store.rename("x", name)
    assert store.size("x") == 5
    assert (tmp_path / "secret").read_text() == "secret"
    assert not (tmp_path / "nowhere").exists()
    assert os.path.lexists(strange / name)


def test_symlink_put_in_place_of_an_image_is_not_followed(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store(["images"])
    store.add("x", [b"image"])
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "images/x").unlink()
    (tmp_path / "images/x").symlink_to(tmp_path / "secret")
    with pytest.raises(ImageNotFound):
        b"".join(store.read("x"))
    with pytest.raises(ImageNotFound):
        store.open("x", os.O_WRONLY)
    assert (tmp_path / "secret").read_text() == "secret"


def test_directory_moved_away_stays_the_datadir(open_store: OpenStore, tmp_path: Path) -> None:
    """What is put at its path afterwards, another disk not mounted in time, say, gets nothing."""
    store = open_store(["images"])
    (tmp_path / "images").rename(tmp_path / "moved")
    (tmp_path / "images").mkdir()
    store.add("x", [b"x"])
    assert os.listdir(tmp_path / "images") == []
    assert (tmp_path / "moved/x").read_bytes() == b"x"


# --- facts ---


def test_inode_numbers_are_unique_across_datadirs_and_stay(
    filesystem: Callable[..., Path], open_store: OpenStore
) -> None:
    places = [filesystem("tmpfs"), filesystem("tmpfs")]
    for place, name in zip(places, "ab", strict=True):
        (place / name).touch()
    assert (places[0] / "a").stat().st_ino == (places[1] / "b").stat().st_ino
    with open_store(list(places)) as store:
        first = dict(store.listing())
    second = dict(open_store(list(reversed(places))).listing())
    assert first == second
    assert len(set(first.values())) == 2


def test_tags_of_many_datadirs_are_all_different(opened: Callable[..., Datadir]) -> None:
    found = [opened(f"d{number}") for number in range(300)]
    give_tags(found)
    assert len({d.tag for d in found}) == 300
    assert all(1 <= d.tag <= 0x7FFF for d in found)


@pytest.mark.parametrize("ino", [1, 2**48 - 1, 2**48, 2**63 + 12345, 2**64 - 1])
def test_inode_number_fits_and_is_stable_for_any_inode_below(opened: Callable[..., Datadir], ino: int) -> None:
    found = opened()
    found.tag = 0x7FFF
    assert 0 < found.inode_number(ino) < 2**63
    assert found.inode_number(ino) == found.inode_number(ino) != found.inode_number(ino - 1)


def test_free_space_is_what_an_unprivileged_user_may_use(filesystem: Callable[..., Path]) -> None:
    place = filesystem("ext4", 32)
    lines = Path("/proc/mounts").read_text(errors="replace").splitlines()
    (disk,) = [line.split()[0] for line in lines if f" {place} " in line]
    run("tune2fs", "-r", "8192", disk)
    run("mount", "-o", "remount", place)
    found = Datadir(DatadirConfig(str(place)))
    numbers = os.statvfs(place)
    assert found.free_bytes() == numbers.f_bavail * numbers.f_frsize < numbers.f_bfree * numbers.f_frsize
    found.close()


def test_mode_of_a_datadir_says_what_may_be_done(opened: Callable[..., Datadir], tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    rw, nc, ro = opened("rw"), opened("nc", mode=Mode.NO_CREATE), opened("ro", mode=Mode.READ_ONLY)
    assert [d.takes_images for d in (rw, nc, ro)] == [True, False, False]
    assert [d.writable for d in (rw, nc, ro)] == [True, True, False]
    rw.require_writable()
    nc.require_writable()
    with pytest.raises(WriteDenied, match="mode: ro"):
        ro.require_writable()
