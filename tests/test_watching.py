"""Changes made to a datadir directly are seen through the mount, though the kernel caches names and attributes."""

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgfs.config import DatadirConfig
from imgfs.datadir import Datadir
from imgfs.watching import Change, Watcher, watch
from tests.conftest import Mounted, Mounter, wait_until

ON_KERNEL = pytest.mark.parametrize("mount", ["kernel"], indirect=True)


class Told:
    """What a watcher told, by name."""

    def __init__(self) -> None:
        self.names: dict[str, bool] = {}
        self._lock = threading.Lock()

    def __call__(self, told: dict[str, Change] | None) -> None:
        assert told is not None
        with self._lock:
            for name, change in told.items():
                self.names[name] = self.names.get(name, False) or change.data


@pytest.fixture
def datadir(tmp_path: Path) -> Iterator[Datadir]:
    datadir = Datadir(DatadirConfig(str(tmp_path / "d")))
    yield datadir
    datadir.close()


@pytest.fixture
def watched(datadir: Datadir) -> Iterator[tuple[Path, Told]]:
    told = Told()
    watcher = Watcher([datadir], told)
    yield Path(datadir.path), told
    watcher.close()


def test_each_kind_of_change_is_told(watched: tuple[Path, Told]) -> None:
    path, told = watched
    (path / "new").write_bytes(b"x")
    wait_until(lambda: told.names.get("new") is True)
    (path / "new").rename(path / "moved")
    wait_until(lambda: "moved" in told.names)
    (path / "moved").chmod(0o600)
    told.names.clear()
    (path / "moved").chmod(0o640)
    wait_until(lambda: told.names == {"moved": False})
    (path / "moved").unlink()
    (path / os.fsdecode(b"\xff")).touch()
    wait_until(lambda: os.fsdecode(b"\xff") in told.names)


def test_own_files_are_not_told(watched: tuple[Path, Told]) -> None:
    path, told = watched
    (path / ".imgfs.note").touch()
    (path / "after").touch()
    wait_until(lambda: "after" in told.names)
    assert ".imgfs.note" not in told.names


def test_burst_of_changes_is_told_completely(watched: tuple[Path, Told]) -> None:
    path, told = watched
    names = {f"image-{number}" for number in range(2000)}
    for name in names:
        (path / name).touch()
    wait_until(lambda: names <= told.names.keys())


def test_missing_library_is_no_error(
    datadir: Datadir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setitem(sys.modules, "inotify_simple", None)
    assert watch([datadir], lambda _: None) is None
    assert "inotify_simple is not installed" in caplog.text


@ON_KERNEL
def test_cached_names_and_attributes_follow_direct_changes(mount: Mounter) -> None:
    images = mount()
    below = images.datadirs[0]
    (below / "a").write_bytes(b"one")
    wait_until(lambda: os.listdir(images.path) == ["a"])
    assert (images / "a").read_bytes() == b"one"
    (below / "a").write_bytes(b"three")
    wait_until(lambda: (images / "a").stat().st_size == 5)
    assert (images / "a").read_bytes() == b"three"
    (below / "new").write_bytes(b"replacement")
    (below / "new").rename(below / "a")
    wait_until(lambda: (images / "a").read_bytes() == b"replacement")
    assert os.listdir(images.path) == ["a"]
    (below / "a").unlink()
    wait_until(lambda: not (images / "a").exists())
    assert os.listdir(images.path) == []


@ON_KERNEL
def test_directory_follows_a_direct_change_of_the_datadir_itself(mount: Mounter) -> None:
    images = mount()
    before = images.path.stat()
    images.datadirs[0].chmod(0o700 if before.st_mode & 0o077 else 0o750)
    wait_until(lambda: images.path.stat().st_mode != before.st_mode, "the new mode")
    (images / "x").write_bytes(b"x")
    assert os.listdir(images.path) == ["x"]


@ON_KERNEL
def test_reader_by_passthrough_of_a_replaced_file_keeps_the_old_bytes(mount: Mounter) -> None:
    images = mount()
    (images / "a").write_bytes(b"old" * 100_000)
    with open(images / "a", "rb", buffering=0) as reader:
        assert reader.read(3) == b"old"
        (images.datadirs[0] / "new").write_bytes(b"new" * 100_000)
        (images.datadirs[0] / "new").rename(images.datadirs[0] / "a")
        wait_until(lambda: (images / "a").read_bytes()[:3] == b"new")
        assert os.pread(reader.fileno(), 3, 299_997) == b"old"


@ON_KERNEL
def test_attributes_of_a_remote_datadir_are_cached_for_a_moment_only(mount: Mounter) -> None:
    """Another imgfs stands for a network filesystem: what happens on it is not told."""
    remote = mount()
    images = mount([{"path": str(remote.path), "mode": "ro"}])
    (remote / "a").write_bytes(b"one")
    wait_until((images / "a").exists)
    (remote / "a").write_bytes(b"three")
    wait_until(lambda: (images / "a").stat().st_size == 5)
    assert "changes there are not told" in images.log.read_text()


@ON_KERNEL
@pytest.mark.parametrize("timeouts", ["attr_timeout=0,entry_timeout=0", "attr_timeout=0.5"])
def test_timeouts_can_be_set(mount: Callable[..., Mounted], timeouts: str) -> None:
    images = mount(options=("-o", timeouts))
    (images / "a").write_bytes(b"x")
    (images.datadirs[0] / "a").write_bytes(b"longer")
    wait_until(lambda: (images / "a").stat().st_size == 6)


@ON_KERNEL
@pytest.mark.parametrize("inside", [True, False])
def test_a_file_with_several_names_is_shown_as_it_is_whichever_was_used(
    mount: Mounter, tmp_path: Path, inside: bool
) -> None:
    images = mount()
    (images / "a").write_bytes(b"one")
    assert (images / "a").stat().st_nlink == 1
    other = images.datadirs[0] / "b" if inside else tmp_path / "b"
    other.hardlink_to(images.datadirs[0] / "a")
    with open(other, "ab") as file:
        file.write(b" and more")
    with open(images / "a", "rb") as opened:  # an open, as qemu-img does it, is never too early
        assert os.fstat(opened.fileno()).st_size == len(b"one and more")
        assert opened.read() == b"one and more"
    wait_until(lambda: (images / "a").stat().st_nlink == 2)
    with open(other, "ab") as file:
        file.write(b" still")
    wait_until(lambda: (images / "a").stat().st_size == len(b"one and more still"))


@ON_KERNEL
def test_a_file_replaced_directly_is_never_read_under_the_size_of_another(mount: Mounter) -> None:
    images = mount()
    below = images.datadirs[0]
    sizes = (4096, 100_000, 1_000_001)
    (below / "a").write_bytes(b"0" * sizes[0])
    ending = threading.Event()

    def replace() -> None:
        number = 0
        while not ending.wait(0.002):
            number += 1
            (below / ".imgfs" / "new").write_bytes(b"%d" % (number % 10) * sizes[number % 3])
            (below / ".imgfs" / "new").rename(below / "a")

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(1500):
            try:
                fd = os.open(images / "a", os.O_RDONLY)
            except OSError as error:  # it was replaced twice between lookup and open
                assert error.errno == errno.ESTALE
                continue
            size, content = os.fstat(fd).st_size, os.pread(fd, 2_000_000, 0)
            assert size == len(content) == os.lseek(fd, 0, os.SEEK_END)
            assert len(set(content)) == 1
            os.close(fd)
    finally:
        ending.set()
        thread.join()
