"""The Python API of the store: adding, reading, removing, renaming and sealing images over several datadirs."""

import contextlib
import errno
import hashlib
import io
import os
import random
import resource
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imgfs import Added, Handle, ImageStore, State, load, resealing
from imgfs.datadir import Datadir
from imgfs.errors import (
    ImageExists,
    ImageFailed,
    ImageNotFound,
    InvalidName,
    InvalidValue,
    NameTooLong,
    NotPermitted,
    ReservedName,
    SizeMismatch,
    StorageFull,
    VerificationFailed,
    WriteDenied,
)
from imgfs.image import Image
from tests.clients import note_replaced
from tests.conftest import run, wait_until, write_config

MIB = 1 << 20
CONTENT = random.Random(11).randbytes(3 * MIB + 17)

OpenStore = Callable[..., ImageStore]
Filesystem = Callable[..., Path]


@pytest.fixture
def store(open_store: OpenStore) -> ImageStore:
    """A store over high (priority 200) and low (100)."""
    return open_store()


def files(*directories: Path) -> list[str]:
    """What lies in datadirs, imgfs's own room left out."""
    return sorted(name for d in directories for name in os.listdir(d) if name != ".imgfs")


def notes(directory: Path) -> list[str]:
    """The notes of replacements in a datadir."""
    return [name for name in os.listdir(directory / ".imgfs") if name.startswith("replaced-")]


def content(store: ImageStore, name: str, *part: int) -> bytes:
    """What is read of an image."""
    return b"".join(store.read(name, *part))


def datadir_of(store: ImageStore, name: str) -> str:
    """The last component of the path of the datadir where an image lies."""
    return Path(store.status(name)[0].path).name


def sealed(store: ImageStore, name: str) -> bool:
    """Whether no seal of an image is to come."""
    return store.state(name) is not State.SAVING


def at_rest(store: ImageStore) -> bool:
    """Whether nobody is concerned with any image: no handle, no seal, no descriptor."""
    return store._namespace.live_images() == []


class Reader:
    """A readable that gives pieces of any length, and may fail."""

    def __init__(self, data: bytes, fails_at: int | None = None) -> None:
        self._data = io.BytesIO(data)
        self._fails_at = fails_at

    def read(self, size: int, /) -> bytes:
        if self._fails_at is not None and self._data.tell() >= self._fails_at:
            raise ConnectionResetError("the source went away")
        return self._data.read(min(size, 70_001))


class Collector:
    """A verifier that remembers what it was fed with."""

    def __init__(self, verdict: object = None) -> None:
        self.seen = b""
        self.asked = 0
        self._verdict = verdict

    def update(self, chunk: bytes, /) -> None:
        self.seen += bytes(chunk)

    def verify(self) -> object:
        self.asked += 1
        if isinstance(self._verdict, Exception):
            raise self._verdict
        return self._verdict


# --- adding ---


@pytest.mark.parametrize(
    "source",
    [
        io.BytesIO,
        Reader,
        lambda data: [data],
        lambda data: (data[i : i + 100_000] for i in range(0, len(data), 100_000)),
        lambda data: iter([b"", data, b""]),
    ],
    ids=["file", "short reads", "list", "generator", "empty chunks"],
)
@pytest.mark.parametrize("size", [None, 0, len(CONTENT)])
def test_add_gives_location_size_digests_and_metadata(
    store: ImageStore, tmp_path: Path, source: Callable[[bytes], Any], size: int | None
) -> None:
    added = store.add("x", source(CONTENT), size)
    assert added == Added(
        location=f"file://{tmp_path}/high/x",
        bytes_written=len(CONTENT),
        checksum=hashlib.md5(CONTENT).hexdigest(),
        os_hash_value=hashlib.sha512(CONTENT).hexdigest(),
        metadata={},
    )
    assert (tmp_path / "high/x").read_bytes() == CONTENT
    assert store.state("x") is State.ACTIVE


def test_added_image_is_sealed_when_add_returns(open_store: OpenStore) -> None:
    with open_store() as store:
        added = store.add("x", [CONTENT])
    again = open_store()
    assert again.state("x") is State.ACTIVE
    assert again.digests("x").checksum == added.checksum


def test_empty_image_can_be_added(store: ImageStore) -> None:
    added = store.add("x", [])
    assert (added.bytes_written, added.checksum) == (0, hashlib.md5(b"").hexdigest())
    assert content(store, "x") == b""


@pytest.mark.parametrize("algo", ["sha256", "md5", "SHA1"])
def test_hash_is_the_configured_one(open_store: OpenStore, algo: str) -> None:
    store = open_store(hashing_algo=algo)
    assert store.add("x", [CONTENT]).os_hash_value == hashlib.new(algo, CONTENT).hexdigest()
    assert store.digests("x").os_hash_algo == algo.lower()


def test_chunk_size_is_what_the_source_is_asked_for(open_store: OpenStore) -> None:
    asked: list[int] = []

    class Asked(Reader):
        def read(self, size: int, /) -> bytes:
            asked.append(size)
            return super().read(size)

    store = open_store(chunk_size="4KiB")
    store.add("x", Asked(bytes(10_000)))
    assert set(asked) == {4096}
    assert [len(chunk) for chunk in store.read("x")] == [4096, 4096, 1808]


def test_verifier_sees_every_byte_and_is_asked_once(store: ImageStore) -> None:
    verifier = Collector()
    store.add("x", Reader(CONTENT), verifier=verifier)
    assert verifier.seen == CONTENT
    assert verifier.asked == 1


def test_buffer_that_its_source_uses_again_is_hashed_as_it_was(store: ImageStore) -> None:
    def refilled() -> Iterator[bytearray]:
        buffer = bytearray(MIB)
        for number in range(64):
            buffer[:] = bytes([number]) * MIB
            yield buffer

    expected = b"".join(bytes([number]) * MIB for number in range(64))
    added = store.add("x", refilled())  # type: ignore[arg-type]
    assert added.checksum == hashlib.md5(expected).hexdigest()


def test_new_image_belongs_to_the_process_with_the_mode_asked_for(store: ImageStore, tmp_path: Path) -> None:
    store.add("x", [b"x"])
    store.add("y", [b"y"], mode=0o604)
    assert [stat.S_IMODE((tmp_path / "high" / n).stat().st_mode) for n in "xy"] == [0o640, 0o604]


@pytest.mark.parametrize("perm", [0o400, 0o640, 0o644])
def test_file_perm_is_the_mode_of_a_sealed_image(open_store: OpenStore, tmp_path: Path, perm: int) -> None:
    open_store(file_perm=f"{perm:o}").add("x", [b"x"])
    assert stat.S_IMODE((tmp_path / "high/x").stat().st_mode) == perm


# --- every failure leaves nothing behind ---


class _Refusal(Exception):
    pass


FAILURES: dict[str, tuple[type[BaseException], Callable[[], dict[str, Any]]]] = {
    "more than declared": (SizeMismatch, lambda: {"data": [CONTENT], "size": len(CONTENT) - 1}),
    "more than declared, in a later chunk": (SizeMismatch, lambda: {"data": Reader(CONTENT), "size": 2 * MIB}),
    "more than declared, without end": (SizeMismatch, lambda: {"data": iter(lambda: b"x", b""), "size": 100}),
    "fewer than declared": (SizeMismatch, lambda: {"data": [CONTENT], "size": len(CONTENT) + 1}),
    "nothing, though declared": (SizeMismatch, lambda: {"data": [], "size": 1}),
    "negative size": (OSError, lambda: {"data": [b"x"], "size": -1}),
    "reader fails at once": (ConnectionResetError, lambda: {"data": Reader(CONTENT, fails_at=0)}),
    "reader fails midway": (ConnectionResetError, lambda: {"data": Reader(CONTENT, fails_at=MIB)}),
    "reader gives text": (TypeError, lambda: {"data": ["text"]}),
    "reader gives nothing readable": (TypeError, lambda: {"data": 7}),
    "reader is interrupted": (KeyboardInterrupt, lambda: {"data": _interrupted()}),
    "verifier refuses": (VerificationFailed, lambda: {"data": [CONTENT], "verifier": Collector(False)}),
    "verifier raises": (_Refusal, lambda: {"data": [CONTENT], "verifier": Collector(_Refusal())}),
    "verifier without update": (AttributeError, lambda: {"data": [CONTENT], "verifier": object()}),
}


def _interrupted() -> Iterator[bytes]:
    yield CONTENT
    raise KeyboardInterrupt


@pytest.mark.parametrize("case", FAILURES)
def test_failure_while_adding_leaves_nothing_behind(store: ImageStore, tmp_path: Path, case: str) -> None:
    expected, arguments = FAILURES[case]
    with pytest.raises(expected):
        store.add("x", **arguments())
    assert files(tmp_path / "high", tmp_path / "low") == []
    assert list(store.names()) == []
    wait_until(lambda: at_rest(store), "nobody concerned with the image")
    assert [store.reserved_bytes(d) for d in store.datadirs] == [0, 0]
    assert store.add("x", [CONTENT]).bytes_written == len(CONTENT)


@pytest.mark.parametrize("size", [None, 64 * MIB])
def test_full_datadirs_are_storage_full_and_nothing_is_left(
    filesystem: Filesystem, open_store: OpenStore, size: int | None
) -> None:
    place = filesystem("tmpfs", 8)
    store = open_store([place])
    free = store.datadirs[0].free_bytes()
    with pytest.raises(StorageFull) as caught:
        store.add("x", (bytes(MIB) for _ in range(64)), size)
    assert caught.value.errno == errno.ENOSPC
    assert files(place) == []
    wait_until(lambda: at_rest(store), "the descriptors closed")
    assert store.datadirs[0].free_bytes() == free


def test_file_too_big_is_storage_full(store: ImageStore, tmp_path: Path) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, most))
    try:
        with pytest.raises(StorageFull) as caught:
            store.add("x", (bytes(MIB) for _ in range(8)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert files(tmp_path / "high", tmp_path / "low") == []


@pytest.mark.parametrize(
    ("code", "told_as"),
    [
        (errno.EDQUOT, StorageFull),
        (errno.ENOSPC, StorageFull),
        (errno.EFBIG, StorageFull),
        (errno.EACCES, WriteDenied),
        (errno.EPERM, WriteDenied),
        (errno.EROFS, WriteDenied),
        (errno.EIO, OSError),
    ],
)
def test_error_of_the_filesystem_has_its_exception(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, told_as: type[OSError]
) -> None:
    def refusing(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", refusing)
        with pytest.raises(told_as) as caught:
            store.add("x", [b"x"])
    assert caught.value.errno == told_as("").errno if told_as is not OSError else code
    assert files(tmp_path / "high", tmp_path / "low") == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_datadir_that_says_it_is_full_when_creating_is_passed_over(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    create = Datadir.create

    def full(datadir: Datadir, name: str, mode: int) -> int:
        if datadir.path.endswith("high"):
            raise OSError(code, os.strerror(code))
        return create(datadir, name, mode)

    monkeypatch.setattr(Datadir, "create", full)
    store.add("x", [b"x"])
    assert (files(tmp_path / "high"), files(tmp_path / "low")) == ([], ["x"])


def test_datadir_that_turned_read_only_is_write_denied_or_passed_over(
    filesystem: Filesystem, open_store: OpenStore
) -> None:
    place = filesystem("ext4")
    store = open_store([place])
    run("mount", "-o", "remount,ro", place)
    with pytest.raises((WriteDenied, StorageFull)):
        store.add("x", [b"x"])
    assert files(place) == []


# --- names ---


@pytest.mark.parametrize(
    "name", ["x", "a" * 255, "é" * 127, os.fsdecode(b"\xff\xfe"), "new\nline", "-rf", "..x", ".x"]
)
def test_any_file_name_will_do(store: ImageStore, tmp_path: Path, name: str) -> None:
    store.add(name, [b"x"])
    assert os.listdir(os.fsencode(tmp_path / "high")).count(os.fsencode(name)) == 1
    assert list(store.names()) == [name]
    store.rename(name, "other")
    store.rename("other", name)
    store.delete(name)
    assert files(tmp_path / "high") == []


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("", InvalidName),
        (".", InvalidName),
        ("..", InvalidName),
        ("a/b", InvalidName),
        ("/x", InvalidName),
        ("../x", InvalidName),
        ("a\0b", InvalidName),
        ("a" * 256, NameTooLong),
        ("é" * 128, NameTooLong),
        (".imgfs", ReservedName),
        (".imgfs.x", ReservedName),
        (".imgfsx", ReservedName),
        (".fuse_hidden0000000100000001", ReservedName),
    ],
)
def test_name_that_no_image_can_have_is_refused(
    store: ImageStore, tmp_path: Path, name: str, refusal: type[Exception]
) -> None:
    store.add("x", [b"x"])
    with pytest.raises(refusal):
        store.add(name, [b"y"])
    with pytest.raises(refusal):
        store.rename("x", name)
    with pytest.raises((refusal, ImageNotFound)):
        store.delete(name)
    assert files(tmp_path / "high", tmp_path / "low") == ["x"]
    assert files(tmp_path) == ["high", "imgfs.yaml", "low"]


@pytest.mark.parametrize("where", ["high", "low"])
def test_taken_name_is_refused_in_whichever_datadir_it_lies(store: ImageStore, tmp_path: Path, where: str) -> None:
    (tmp_path / where / "x").write_bytes(b"old")
    with pytest.raises(ImageExists) as caught:
        store.add("x", [b"new"])
    assert caught.value.errno == errno.EEXIST
    assert files(tmp_path / "high", tmp_path / "low") == ["x"]
    assert content(store, "x") == b"old"


def test_of_many_creators_of_one_name_exactly_one_wins(store: ImageStore) -> None:
    barrier = threading.Barrier(20)
    won: list[bytes] = []

    def create(number: int) -> None:
        barrier.wait()
        with contextlib.suppress(ImageExists):
            store.add("x", [b"%d" % number])
            won.append(b"%d" % number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [content(store, "x")] == won


def test_many_images_added_at_once_have_the_right_digests(store: ImageStore) -> None:
    contents = {f"image{seed}": random.Random(seed).randbytes(MIB + seed) for seed in range(20)}
    added: dict[str, Added] = {}

    def add(name: str) -> None:
        added[name] = store.add(name, Reader(contents[name]))

    threads = [threading.Thread(target=add, args=(name,)) for name in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: a.checksum for n, a in added.items()} == {n: hashlib.md5(c).hexdigest() for n, c in contents.items()}
    assert sorted(store.names()) == sorted(contents)


# --- reading ---


@pytest.mark.parametrize("chunk_size", [1000, "64KiB", "8MiB"])
@pytest.mark.parametrize(
    "part",
    [(), (0,), (1,), (MIB,), (len(CONTENT) - 1,), (len(CONTENT),), (1 << 50,), (0, 0), (0, 1), (5, 100_000),
     (MIB, None), (0, len(CONTENT)), (len(CONTENT) - 10, 100), (7, 1 << 50)],
)  # fmt: skip
def test_reading_gives_the_part_asked_for(
    open_store: OpenStore, part: tuple[int, ...], chunk_size: int | str
) -> None:
    store = open_store(chunk_size=chunk_size)
    store.add("x", [CONTENT])
    offset, length = (*part, None, None)[:2] if part else (0, None)
    end = None if length is None else (offset or 0) + length
    assert content(store, "x", *part) == CONTENT[offset:end]


@pytest.mark.parametrize("part", [(-1,), (0, -1)])
def test_negative_offset_or_length_is_refused(store: ImageStore, part: tuple[int, ...]) -> None:
    store.add("x", [b"x"])
    with pytest.raises(InvalidValue):
        store.read("x", *part)


@pytest.mark.parametrize(
    "call",
    ["read", "size", "delete", "open", "state", "digests", "location", "metadata", "status"],
)
def test_absent_image_is_not_found(store: ImageStore, call: str) -> None:
    with pytest.raises(ImageNotFound) as caught:
        getattr(store, call)("none")
    assert caught.value.errno == errno.ENOENT


def test_size_by_location(store: ImageStore) -> None:
    location = store.add("x", [CONTENT]).location
    assert store.size(store.resolve(location)) == len(CONTENT)


@pytest.mark.parametrize("read", [0, 1])
def test_reading_that_is_not_finished_leaves_no_descriptor(store: ImageStore, read: int) -> None:
    store.add("x", [CONTENT])
    chunks = store.read("x")
    for _ in range(read):
        next(chunks)
    del chunks
    wait_until(lambda: at_rest(store), "the descriptor closed")


def test_image_that_was_removed_while_read_is_read_to_its_end(store: ImageStore) -> None:
    store.add("x", [CONTENT])
    chunks = store.read("x")
    first = next(chunks)
    store.delete("x")
    store.add("x", [b"another"])
    assert first + b"".join(chunks) == CONTENT
    assert content(store, "x") == b"another"


# --- listing and deleting ---


def test_listing_gives_every_image_once_with_an_inode_number(store: ImageStore, tmp_path: Path) -> None:
    for name in ("a", "b", "twice"):
        (tmp_path / "high" / name).touch()
    for name in ("c", "twice"):
        (tmp_path / "low" / name).touch()
    listing = list(store.listing())
    assert sorted(name for name, _ in listing) == sorted(store.names()) == ["a", "b", "c", "twice"]
    assert len({ino for _, ino in listing}) == 4


def test_deleted_image_is_gone(store: ImageStore, tmp_path: Path) -> None:
    store.add("x", [b"x"])
    store.delete("x")
    assert list(store.names()) == files(tmp_path / "high") == []
    with pytest.raises(ImageNotFound):
        store.delete("x")


def test_failure_to_delete_has_its_true_errno(store: ImageStore, tmp_path: Path) -> None:
    store.add("x", [b"x"])
    run("chattr", "+i", tmp_path / "high/x")
    try:
        with pytest.raises(OSError) as caught:
            store.delete("x")
    finally:
        run("chattr", "-i", tmp_path / "high/x")
    assert caught.value.errno == errno.EPERM
    assert content(store, "x") == b"x"


# --- placement ---


def test_highest_priority_gets_new_images(open_store: OpenStore) -> None:
    store = open_store(["a:1", "b:300", "c:20"])
    store.add("x", [b"x"])
    assert datadir_of(store, "x") == "b"


def test_full_preferred_datadir_is_passed_over(filesystem: Filesystem, open_store: OpenStore) -> None:
    fast, slow = filesystem("tmpfs", 4), filesystem("tmpfs", 16)
    store = open_store([f"{fast}:9", f"{slow}:1"])
    (fast / "filler").write_bytes(bytes(4 * MIB - 8192))
    store.add("x", [bytes(MIB)])
    store.add("declared", [bytes(MIB)], size=MIB)
    assert files(slow) == ["declared", "x"]


def test_most_free_space_wins_among_equals(filesystem: Filesystem, open_store: OpenStore) -> None:
    small, large = filesystem("tmpfs", 8), filesystem("tmpfs", 16)
    store = open_store([small, large])
    store.add("x", [bytes(10 * MIB)])
    store.add("y", [b"y"])
    assert (files(small), files(large)) == (["y"], ["x"])


def test_declared_size_that_only_one_datadir_holds_goes_there(filesystem: Filesystem, open_store: OpenStore) -> None:
    fast, slow = filesystem("tmpfs", 4), filesystem("tmpfs", 16)
    store = open_store([f"{fast}:9", f"{slow}:1"])
    store.add("x", (bytes(MIB) for _ in range(6)), size=6 * MIB)
    assert (files(fast), files(slow)) == ([], ["x"])


@contextlib.contextmanager
def declared(store: ImageStore, name: str, size: int) -> Iterator[Handle]:
    """A new image whose size is declared but not written yet, for the duration of a block."""
    handle = store.create(name)
    try:
        store.expect_size(handle.image, size)
        yield handle
    finally:
        store.close_handle(handle)


def test_two_large_images_declared_at_once_do_not_share_a_datadir(
    filesystem: Filesystem, open_store: OpenStore
) -> None:
    places = [filesystem("tmpfs", 16), filesystem("tmpfs", 16)]
    store = open_store(list(places))
    barrier = threading.Barrier(2)

    def arriving_together() -> Iterator[bytes]:
        barrier.wait(20)
        yield from (bytes(MIB) for _ in range(10))

    threads = [threading.Thread(target=store.add, args=(name, arriving_together(), 10 * MIB)) for name in ("x", "y")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(files(place) for place in places) == [["x"], ["y"]]


def test_reserved_bytes_count_as_used_until_the_writer_is_gone(filesystem: Filesystem, open_store: OpenStore) -> None:
    place = filesystem("tmpfs", 16)
    store = open_store([place])
    with declared(store, "x", 10 * MIB) as first:
        assert store.reserved_bytes(store.datadirs[0]) == 10 * MIB
        with pytest.raises(StorageFull):
            store.add("y", [], size=10 * MIB)
        first.write(bytes(4 * MIB), 0)
        assert store.reserved_bytes(store.datadirs[0]) == 6 * MIB
        with pytest.raises(StorageFull), declared(store, "y", 10 * MIB):
            pass
    assert store.reserved_bytes(store.datadirs[0]) == 0
    store.delete("x")
    wait_until(lambda: at_rest(store), "the space given back")
    with declared(store, "z", 10 * MIB):
        assert store.reserved_bytes(store.datadirs[0]) == 10 * MIB


def test_datadirs_on_one_filesystem_share_what_is_reserved(filesystem: Filesystem, open_store: OpenStore) -> None:
    place = filesystem("tmpfs", 16)
    store = open_store([place / "a", place / "b"])
    with declared(store, "x", 10 * MIB), pytest.raises(StorageFull), declared(store, "y", 10 * MIB):
        pass


def test_size_declared_late_counts_what_is_written_already(filesystem: Filesystem, open_store: OpenStore) -> None:
    store = open_store([filesystem("tmpfs", 16)])
    handle = store.create("x")
    handle.write(bytes(9 * MIB), 0)
    try:
        store.expect_size(handle.image, 12 * MIB)
        assert store.reserved_bytes(store.datadirs[0]) == 3 * MIB
    finally:
        store.close_handle(handle)


def test_declaring_a_size_moves_an_empty_image_with_its_handles(
    filesystem: Filesystem, open_store: OpenStore
) -> None:
    fast, slow = filesystem("tmpfs", 4), filesystem("tmpfs", 16)
    store = open_store([f"{fast}:9", f"{slow}:1"])
    handle = store.create("x", mode=0o604)
    reader = store.open("x")
    os.setxattr(fast / "x", "user.note", b"kept") if xattrs_on(fast) else None
    store.expect_size(handle.image, 10 * MIB)
    assert (files(fast), files(slow)) == ([], ["x"])
    handle.write(b"abc", 0)
    assert reader.read(10, 0) == b"abc"
    assert stat.S_IMODE(reader.status().st_mode) == 0o604
    assert not xattrs_on(fast) or os.getxattr(slow / "x", "user.note") == b"kept"
    store.close_handle(handle)
    store.close_handle(reader)


def xattrs_on(place: Path) -> bool:
    """Whether a filesystem has user attributes."""
    try:
        os.setxattr(place, "user.probe", b"")
    except OSError:
        return False
    return True


@pytest.mark.parametrize("size", [None, 8 * MIB])
def test_min_free_is_kept_free(filesystem: Filesystem, open_store: OpenStore, size: int | None) -> None:
    fast, slow = filesystem("tmpfs", 16), filesystem("tmpfs", 16)
    store = open_store([{"path": str(fast), "priority": 9, "min_free": "10MiB" if size else "16MiB"},
                        {"path": str(slow)}])  # fmt: skip
    store.add("x", (bytes(MIB) for _ in range(8)), size)
    assert (files(fast), files(slow)) == ([], ["x"])


def test_datadirs_that_are_nc_or_ro_get_nothing_new(open_store: OpenStore, tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    store = open_store(
        [{"path": "nc", "priority": 9, "mode": "nc"}, {"path": "ro", "priority": 8, "mode": "ro"}, "rw"]
    )
    store.add("x", [b"x"])
    assert datadir_of(store, "x") == "rw"


@pytest.mark.parametrize("mode", ["nc", "ro"])
def test_store_without_a_datadir_for_new_images_is_full(open_store: OpenStore, tmp_path: Path, mode: str) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageFull):
        open_store([{"path": "a", "mode": mode}]).add("x", [b"x"])


def test_images_of_an_nc_datadir_can_be_changed_and_removed(open_store: OpenStore, tmp_path: Path) -> None:
    (tmp_path / "nc").mkdir()
    (tmp_path / "nc/x").write_bytes(b"old")
    store = open_store([{"path": "nc", "mode": "nc"}])
    handle = store.open("x", os.O_WRONLY)
    handle.write(b"new", 0)
    store.close_handle(handle)
    store.rename("x", "y")
    assert content(store, "y") == b"new"
    assert store.digests("y").checksum == hashlib.md5(b"new").hexdigest()
    store.delete("y")
    assert files(tmp_path / "nc") == []


def test_images_of_a_ro_datadir_are_read_and_nothing_else(open_store: OpenStore, tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    (tmp_path / "ro/x").write_bytes(CONTENT)
    store = open_store([{"path": "ro", "mode": "ro"}, "rw"], file_perm="0640")
    store.add("y", [b"y"])
    assert content(store, "x") == CONTENT
    assert store.digests("x").checksum == hashlib.md5(CONTENT).hexdigest()
    for change in (
        lambda: store.delete("x"),
        lambda: store.rename("x", "z"),
        lambda: store.rename("y", "x"),
        lambda: store.open("x", os.O_RDWR),
        lambda: store.open("x", os.O_RDONLY | os.O_TRUNC),
    ):
        with pytest.raises(WriteDenied) as caught:
            change()
        assert caught.value.errno == errno.EACCES
    assert (tmp_path / "ro/x").read_bytes() == CONTENT
    assert os.listdir(tmp_path / "ro") == ["x"]


# --- renaming ---


@pytest.fixture
def placed(store: ImageStore, tmp_path: Path) -> Callable[[str, str, bytes], None]:
    """Call it with a datadir, a name and bytes to have a sealed image there."""

    def place(where: str, name: str, data: bytes) -> None:
        (tmp_path / where / name).write_bytes(data)
        store.digests(name)

    return place


Placed = Callable[[str, str, bytes], None]


@pytest.mark.parametrize("where", ["high", "low"])
def test_renamed_image_keeps_its_datadir_and_its_record(store: ImageStore, placed: Placed, where: str) -> None:
    placed(where, "x", b"x")
    store.rename("x", "y")
    assert list(store.names()) == ["y"]
    assert datadir_of(store, "y") == where
    assert store.state("y") is State.ACTIVE
    assert store.location("y").endswith(f"/{where}/y")


@pytest.mark.parametrize("target", ["high", "low"])
@pytest.mark.parametrize("source", ["high", "low"])
def test_renaming_replaces_an_image_in_whatever_datadir_each_lies(
    store: ImageStore, placed: Placed, tmp_path: Path, source: str, target: str
) -> None:
    placed(source, "x", b"new")
    placed(target, "y", b"old")
    reader = store.open("y")
    store.rename("x", "y")
    assert files(tmp_path / "high", tmp_path / "low") == ["y"]
    assert content(store, "y") == b"new"
    assert store.state("y") is State.ACTIVE
    assert datadir_of(store, "y") == source
    assert reader.read(10, 0) == b"old"
    store.close_handle(reader)
    assert notes(tmp_path / target) == []


def test_renaming_to_its_own_name_changes_nothing(store: ImageStore) -> None:
    store.add("x", [b"x"])
    store.rename("x", "x")
    assert content(store, "x") == b"x"


def test_renaming_an_absent_image_leaves_the_other(store: ImageStore) -> None:
    store.add("y", [b"y"])
    with pytest.raises(ImageNotFound):
        store.rename("x", "y")
    assert content(store, "y") == b"y"


def test_image_renamed_while_it_is_written_is_sealed_under_its_new_name(store: ImageStore) -> None:
    handle = store.create("x")
    handle.write(b"abc", 0)
    store.rename("x", "y")
    handle.write(b"def", 3)
    store.close_handle(handle)
    assert store.digests("y").checksum == hashlib.md5(b"abcdef").hexdigest()
    assert list(store.names()) == ["y"]


def test_renames_over_each_other_at_once_lose_nothing_but_the_replaced(store: ImageStore, placed: Placed) -> None:
    placed("high", "a", b"A")
    placed("low", "b", b"B")
    barrier = threading.Barrier(2)

    def to_and_fro(old: str, new: str) -> None:
        for _ in range(50):
            barrier.wait()
            with contextlib.suppress(ImageNotFound):
                store.rename(old, new)

    threads = [threading.Thread(target=to_and_fro, args=pair) for pair in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (name,) = store.names()
    assert content(store, name) in (b"A", b"B")


def test_steps_of_a_replacement_are_durable_one_after_the_other(
    store: ImageStore, placed: Placed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash may then lose a step only with all that follow it."""
    placed("high", "x", b"new")
    placed("low", "y", b"old")
    steps: list[str] = []

    def watch(step: str) -> None:
        call = getattr(Datadir, step)

        def watched(datadir: Datadir, *arguments: object) -> object:
            steps.append(f"{step} {Path(datadir.path).name}")
            return call(datadir, *arguments)

        monkeypatch.setattr(Datadir, step, watched)

    for step in ("note_replaced", "rename", "sync", "unlink", "forget_replaced"):
        watch(step)
    store.rename("x", "y")
    assert steps == ["note_replaced low", "rename high", "sync high", "unlink low", "sync low", "forget_replaced low"]


@pytest.mark.parametrize("step", ["sync", "unlink"])
def test_replacement_that_fails_changes_nothing(
    open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with open_store() as store:
        (tmp_path / "high/x").write_bytes(b"new")
        (tmp_path / "low/y").write_bytes(b"old")
        failing = tmp_path / ("high" if step == "sync" else "low")
        call = getattr(Datadir, step)

        def failing_call(datadir: Datadir, *arguments: object) -> object:
            if datadir.path == str(failing):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(datadir, *arguments)

        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
            patch.setattr(Datadir, step, failing_call)
            store.rename("x", "y")
        assert (content(store, "x"), content(store, "y")) == (b"new", b"old")
        assert (files(tmp_path / "high"), files(tmp_path / "low")) == (["x"], ["y"])
        assert notes(tmp_path / "low") == []
        (tmp_path / "low/y").write_bytes(b"changed later")
    assert content(open_store(), "y") == b"changed later"


def cut_replacement_short(open_store: OpenStore, tmp_path: Path, *, renamed: bool) -> None:
    """Leave what a crash leaves in the middle of renaming `high/x` over `low/y`: before its own rename, or after."""
    with open_store() as store:
        (tmp_path / "high/x").write_bytes(b"new")
        (tmp_path / "low/y").write_bytes(b"old")
        high, low = store.datadirs
        note_replaced(low, "y", high, "x")
        if renamed:
            high.rename("x", "y")


def test_interrupted_replacement_is_completed_at_the_next_start(
    open_store: OpenStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut_replacement_short(open_store, tmp_path, renamed=True)
    again = open_store()
    assert files(tmp_path / "high", tmp_path / "low") == ["y"]
    assert content(again, "y") == b"new"
    assert notes(tmp_path / "low") == []
    assert "the replacement of image 'y' was cut short" in caplog.text


def crash_in_replacement(config: Path) -> None:
    """What a process of its own does: rename `high/x` over `low/y`, whose last writer goes meanwhile, and end."""
    sync = Datadir.sync
    with ImageStore(load(config)) as store:
        (config.parent / "high/x").write_bytes(b"new")
        (config.parent / "low/y").write_bytes(b"old")
        handle = store.open("y", os.O_RDWR)
        store.write(handle, b"OLD", 0)

        def sync_beside_a_seal(datadir: Datadir) -> None:
            sync(datadir)
            if datadir is store.datadirs[0]:  # right before the old image is to go
                seal = threading.Thread(target=store.close_handle, args=(handle,), daemon=True)
                seal.start()
                seal.join(0.3)
                time.sleep(0.3)  # the seal itself is another thread's

        setattr(Datadir, "sync", sync_beside_a_seal)  # noqa: B010
        setattr(Datadir, "unlink", lambda *_: os._exit(7))  # noqa: B010
        store.rename("x", "y")


def test_image_that_gives_way_is_not_sealed_meanwhile(open_store: OpenStore, tmp_path: Path) -> None:
    config = write_config(tmp_path, file_perm="0640")
    call = f"from tests.test_store import *; crash_in_replacement(Path({str(config)!r}))"
    assert run(sys.executable, "-c", call, check=False, cwd=Path(__file__).parents[1]).returncode == 7
    assert files(tmp_path / "high", tmp_path / "low") == ["y", "y"]
    again = open_store()
    assert files(tmp_path / "high", tmp_path / "low") == ["y"]
    assert content(again, "y") == b"new"
    assert notes(tmp_path / "low") == []


def test_rename_waits_for_the_writes_of_what_gives_way_elsewhere(store: ImageStore, placed: Placed) -> None:
    """And finds what has the name by then."""
    placed("high", "x", b"new")
    placed("low", "y", b"old")
    with store.image("y") as image:
        with image.change_lock:
            rename = threading.Thread(target=store.rename, args=("x", "y"))
            rename.start()
            rename.join(0.2)
            assert rename.is_alive()
            store.rename("y", "z")
        rename.join()
    assert {name: content(store, name) for name in store.names()} == {"y": b"new", "z": b"old"}


def test_replacement_that_was_never_begun_changes_nothing(open_store: OpenStore, tmp_path: Path) -> None:
    cut_replacement_short(open_store, tmp_path, renamed=False)
    again = open_store()
    assert (content(again, "x"), content(again, "y")) == (b"new", b"old")
    assert notes(tmp_path / "low") == []


@pytest.mark.parametrize(("where", "how"), [("low", "another"), ("low", "changed"), ("high", "another")])
def test_note_of_a_replacement_means_two_files_exactly(
    open_store: OpenStore, tmp_path: Path, where: str, how: str
) -> None:
    cut_replacement_short(open_store, tmp_path, renamed=True)
    changed = tmp_path / where / "y"
    if how == "another":
        os.link(changed, tmp_path / "kept")  # so that its inode number is not used again
        changed.unlink()
    changed.write_bytes(b"other")
    open_store()
    assert changed.read_bytes() == b"other"
    assert files(tmp_path / "high", tmp_path / "low") == ["y", "y"]
    assert notes(tmp_path / "low") == []


@pytest.mark.parametrize("renamed", [False, True])
def test_disks_that_changed_places_after_a_crash_lose_nothing(
    open_store: OpenStore, tmp_path: Path, renamed: bool
) -> None:
    cut_replacement_short(open_store, tmp_path, renamed=renamed)
    for old, new in ("high", "away"), ("low", "high"), ("away", "low"):
        (tmp_path / old).rename(tmp_path / new)
    again = open_store()
    assert {name: content(again, name) for name in again.names()} == (
        {"y": b"new"} if renamed else {"x": b"new", "y": b"old"}
    )
    assert notes(tmp_path / "high") == []


@pytest.mark.parametrize("content", [b"", b"{", b"7", b'{"name": "79"}', b'{"name": "..", "ino": 1}', b"[" * 100_000])
def test_damaged_note_of_a_replacement_keeps_no_store_from_opening(
    open_store: OpenStore, tmp_path: Path, content: bytes
) -> None:
    open_store().close()
    (tmp_path / "low/y").write_bytes(b"kept")
    (tmp_path / "low/.imgfs/replaced-0123456789abcdef").write_bytes(content)
    store = open_store()
    assert list(store.names()) == ["y"]
    assert notes(tmp_path / "low") == []


# --- states and digests ---


def test_image_goes_from_saving_to_active(store: ImageStore) -> None:
    handle = store.create("x")
    assert store.state("x") is State.SAVING
    handle.write(CONTENT, 0)
    assert store.state("x") is State.SAVING
    store.close_handle(handle)
    assert store.digests("x").checksum == hashlib.md5(CONTENT).hexdigest()
    assert store.state("x") is State.ACTIVE


def test_digests_wait_for_the_writer(store: ImageStore) -> None:
    handle = store.create("x")
    handle.write(b"abc", 0)
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(store.digests("x").checksum))
    asking.start()
    with store.image("x") as image:
        wait_until(lambda: image.references >= 3, "somebody asking")
    assert found == []
    handle.write(b"def", 3)
    store.close_handle(handle)
    asking.join()
    assert found == [hashlib.md5(b"abcdef").hexdigest()]


def test_waiting_for_digests_can_be_interrupted(store: ImageStore) -> None:
    handle = store.create("x")
    answers = iter([False, True])
    with pytest.raises(OSError) as caught:
        store.digests("x", interrupted=lambda: next(answers))
    assert caught.value.errno == errno.EINTR
    store.close_handle(handle)


@pytest.mark.parametrize(
    "writes",
    [
        [(0, b"abc"), (3, b"def")],
        [(3, b"def"), (0, b"abc")],
        [(0, b"abc"), (0, b"xyz")],
        [(0, b"abc"), (MIB, b"def")],
        [(5 * MIB, b"x")],
        [],
    ],
    ids=["in order", "backwards", "twice", "gap", "hole first", "none"],
)
def test_digests_are_right_in_whatever_order_bytes_come(
    store: ImageStore, tmp_path: Path, writes: list[tuple[int, bytes]]
) -> None:
    handle = store.create("x")
    for offset, data in writes:
        assert handle.write(data, offset) == len(data)
    store.close_handle(handle)
    digests = store.digests("x")
    written = (tmp_path / "high/x").read_bytes()
    assert digests.size == len(written)
    assert digests.os_hash_value == hashlib.sha512(written).hexdigest()


@pytest.mark.parametrize("size", [0, 2, 3, 5, MIB])
def test_digests_are_right_after_a_truncate(store: ImageStore, tmp_path: Path, size: int) -> None:
    handle = store.create("x")
    handle.write(b"abc", 0)
    store.truncate(handle, size)
    handle.write(b"tail", size)
    store.close_handle(handle)
    assert store.digests("x").checksum == hashlib.md5(b"abc"[:size].ljust(size, b"\0") + b"tail").hexdigest()


def test_image_that_never_had_a_record_is_stale_until_its_digests_are_asked_for(
    store: ImageStore, tmp_path: Path
) -> None:
    (tmp_path / "low/x").write_bytes(CONTENT)
    assert store.state("x") is State.STALE
    assert store.digests("x").checksum == hashlib.md5(CONTENT).hexdigest()
    assert store.state("x") is State.ACTIVE


def overwrite(path: Path) -> None:
    path.write_bytes(b"changed")


def same_size(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"changed")


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"changed")


def replace(path: Path) -> None:
    path.with_suffix(".new").write_bytes(b"changed")
    path.with_suffix(".new").rename(path)


def shorten(path: Path) -> None:
    os.truncate(path, 10)


def shorten_keeping_times(path: Path) -> None:
    status = path.stat()
    os.truncate(path, 10)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [overwrite, same_size, append, replace, shorten, shorten_keeping_times])
@pytest.mark.parametrize("held_open", [False, True])
def test_image_changed_behind_the_store_is_stale_and_sealed_anew(
    store: ImageStore, tmp_path: Path, change: Callable[[Path], None], held_open: bool
) -> None:
    store.add("x", [CONTENT])
    handle = store.open("x") if held_open else None
    change(tmp_path / "high/x")
    assert store.state("x") is State.STALE
    now = (tmp_path / "high/x").read_bytes()
    assert content(store, "x") == now
    assert store.digests("x").checksum == hashlib.md5(now).hexdigest()
    assert store.state("x") is State.ACTIVE
    if handle is not None:
        store.close_handle(handle)


def test_image_copied_with_its_record_does_not_pass_for_active(store: ImageStore, tmp_path: Path) -> None:
    """As cp -a into a datadir does: the record is copied, but size and mtime may be, too; other bytes are not."""
    store.add("x", [CONTENT])
    run("cp", "-a", tmp_path / "high/x", tmp_path / "high/y")
    os.truncate(tmp_path / "high/y", 10)
    assert store.state("y") is State.STALE


def test_opening_for_writing_makes_stale_at_the_first_change_only(store: ImageStore) -> None:
    store.add("x", [b"abc"])
    handle = store.open("x", os.O_RDWR)
    assert store.state("x") is State.ACTIVE
    handle.write(b"X", 1)
    assert store.state("x") is State.SAVING
    store.close_handle(handle)
    assert store.digests("x").checksum == hashlib.md5(b"aXc").hexdigest()


def test_record_is_gone_before_the_first_changed_byte(store: ImageStore, tmp_path: Path) -> None:
    """A crash right after a change must leave nothing that vouches for the old bytes."""
    store.add("x", [b"abc"])
    assert "user.imgfs.record" in os.listxattr(tmp_path / "high/x")
    handle = store.open("x", os.O_RDWR)
    handle.write(b"X", 1)
    assert "user.imgfs.record" not in os.listxattr(tmp_path / "high/x")
    store.close_handle(handle)


def test_truncating_open_starts_a_new_life(store: ImageStore) -> None:
    store.add("x", [CONTENT])
    handle = store.open("x", os.O_WRONLY | os.O_TRUNC)
    assert store.size("x") == 0
    handle.write(b"new", 0)
    store.close_handle(handle)
    assert store.digests("x").checksum == hashlib.md5(b"new").hexdigest()


def test_two_writers_of_one_image_seal_it_with_the_last(store: ImageStore) -> None:
    first = store.create("x")
    second = store.open("x", os.O_WRONLY)
    first.write(b"abc", 0)
    store.close_handle(first)
    assert store.state("x") is State.SAVING
    second.write(b"def", 3)
    store.close_handle(second)
    assert store.digests("x").checksum == hashlib.md5(b"abcdef").hexdigest()


def test_read_only_handle_refuses_to_write(store: ImageStore) -> None:
    store.add("x", [b"abc"])
    handle = store.open("x")
    for change in (lambda: handle.write(b"x", 0), lambda: handle.truncate(0)):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EBADF
    store.close_handle(handle)
    assert content(store, "x") == b"abc"


# --- expectations ---


def written(store: ImageStore, data: bytes = b"abc", **expected: Any) -> Image:
    """Write an image `x` of which something is expected; gives it when it is sealed."""
    handle = store.create("x")
    if "size" in expected:
        store.expect_size(handle.image, expected.pop("size"))
    if expected:
        handle.image.expect(**expected)
    handle.write(data, 0)
    image = handle.image
    store.close_handle(handle)
    wait_until(lambda: sealed(store, "x"), "the seal")
    return image


MET = {"size": 3, "checksum": hashlib.md5(b"abc").hexdigest(), "os_hash_value": hashlib.sha512(b"abc").hexdigest()}
UNMET = [{"size": 4}, {"size": 2}, {"checksum": "0" * 32}, {"os_hash_value": "0" * 128}, MET | {"checksum": "0" * 32}]


def test_expectations_that_are_met_end_in_an_active_image(store: ImageStore) -> None:
    written(store, **MET)
    assert store.state("x") is State.ACTIVE
    assert content(store, "x") == b"abc"


@pytest.mark.parametrize("expected", UNMET)
def test_unmet_expectation_is_a_failed_image_that_is_not_served(
    store: ImageStore, caplog: pytest.LogCaptureFixture, expected: dict[str, Any]
) -> None:
    written(store, **expected)
    assert store.state("x") is State.FAILED
    with pytest.raises(ImageFailed) as caught:
        store.read("x")
    assert caught.value.errno == errno.EIO
    assert ["failed: its" in message and "expected" in message for message in caplog.messages] == [True]


def test_failed_image_stays_failed_in_the_next_store(open_store: OpenStore) -> None:
    with open_store() as store:
        written(store, size=4)
    again = open_store()
    assert again.state("x") is State.FAILED
    with pytest.raises(ImageFailed):
        again.open("x")


def test_reader_who_has_a_failed_image_open_gets_nothing_more(store: ImageStore) -> None:
    handle = store.create("x")
    reader = store.open("x")
    handle.image.expect(checksum="0" * 32)
    handle.write(b"abc", 0)
    assert reader.read(3, 0) == b"abc"
    store.close_handle(handle)
    wait_until(lambda: store.state("x") is State.FAILED, "the verdict")
    with pytest.raises(OSError) as caught:
        reader.read(3, 0)
    assert caught.value.errno == errno.EIO
    store.close_handle(reader)


def test_failed_image_can_be_removed_or_written_again(store: ImageStore) -> None:
    written(store, size=4)
    handle = store.open("x", os.O_RDWR | os.O_TRUNC)
    handle.write(b"good", 0)
    store.close_handle(handle)
    assert store.digests("x").checksum == hashlib.md5(b"good").hexdigest()
    assert store.state("x") is State.ACTIVE
    store.delete("x")
    written(store, size=4)
    store.delete("x")
    assert list(store.names()) == []


def test_nothing_can_be_expected_of_a_sealed_image(store: ImageStore) -> None:
    store.add("x", [b"x"])
    with store.image("x") as image:
        with pytest.raises(NotPermitted):
            store.expect_size(image, 1)
        with pytest.raises(NotPermitted):
            image.expect(checksum="0" * 32)


def test_expectation_outlasts_a_crash(open_store: OpenStore, tmp_path: Path) -> None:
    """The writer's store goes away with the image half written; the next one does not take it for good."""
    with open_store() as store:
        handle = store.create("x")
        store.expect_size(handle.image, 6)
        handle.write(b"abc", 0)
    again = open_store()
    assert again.state("x") is State.STALE
    again.digests("x")
    assert again.state("x") is State.FAILED


# --- write once, thin provisioning ---


def test_active_image_of_a_write_once_store_can_not_be_changed(open_store: OpenStore) -> None:
    store = open_store(write_once=True)
    store.add("x", [CONTENT])
    store.add("y", [b"y"])
    for change in (
        lambda: store.open("x", os.O_WRONLY),
        lambda: store.open("x", os.O_RDWR),
        lambda: store.open("x", os.O_RDONLY | os.O_TRUNC),
        lambda: store.rename("y", "x"),
    ):
        with pytest.raises(NotPermitted) as caught:
            change()
        assert caught.value.errno == errno.EPERM
    assert content(store, "x") == CONTENT
    assert content(store, "y") == b"y"


def test_write_once_image_can_be_renamed_and_removed(open_store: OpenStore) -> None:
    store = open_store(write_once=True)
    store.add("x", [b"x"])
    store.rename("x", "y")
    store.delete("y")
    assert list(store.names()) == []


def test_write_once_image_can_be_written_until_it_is_complete(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store(write_once=True)
    first = store.create("x")
    second = store.open("x", os.O_RDWR)
    for handle in (first, second):
        handle.write(b"abc", 0)
        store.close_handle(handle)
    store.digests("x")
    with pytest.raises(NotPermitted):
        store.open("x", os.O_RDWR)
    (tmp_path / "high/stale").write_bytes(b"x")
    store.close_handle(store.open("stale", os.O_RDWR))


@pytest.mark.parametrize("chunk_size", ["64KiB", "4MiB"])
def test_thin_provisioning_stores_runs_of_zeros_as_holes(
    open_store: OpenStore, tmp_path: Path, chunk_size: str
) -> None:
    data = bytes(8 * MIB) + b"x" * 65536 + bytes(8 * MIB - 65536)
    store = open_store(thin_provisioning=True, chunk_size=chunk_size)
    added = store.add("x", io.BytesIO(data))
    assert added.checksum == hashlib.md5(data).hexdigest()
    assert (tmp_path / "high/x").read_bytes() == data
    assert (tmp_path / "high/x").stat().st_blocks * 512 < 5 * MIB


@pytest.mark.parametrize("size", [1, 65536, 65537, 3 * MIB + 1])
@pytest.mark.parametrize("declared", [False, True])
def test_thin_image_that_ends_in_zeros_has_its_size(open_store: OpenStore, size: int, declared: bool) -> None:
    store = open_store(thin_provisioning=True)
    added = store.add("x", io.BytesIO(bytes(size)), size if declared else None)
    assert (store.size("x"), added.bytes_written) == (size, size)
    assert added.checksum == hashlib.md5(bytes(size)).hexdigest()


def test_thin_provisioning_overwrites_data_with_zeros(open_store: OpenStore) -> None:
    store = open_store(thin_provisioning=True)
    store.add("x", [b"x" * 100_000])
    handle = store.open("x", os.O_RDWR)
    handle.write(bytes(50_000), 20_000)
    store.close_handle(handle)
    assert content(store, "x") == b"x" * 20_000 + bytes(50_000) + b"x" * 30_000


def test_without_thin_provisioning_zeros_are_stored(open_store: OpenStore, tmp_path: Path) -> None:
    open_store().add("x", io.BytesIO(bytes(8 * MIB)))
    assert (tmp_path / "high/x").stat().st_blocks * 512 >= 8 * MIB


# --- several stores, sealing by itself, closing ---


def test_several_stores_have_their_own_ids_and_images(open_store: OpenStore, tmp_path: Path) -> None:
    first = open_store(["a"], store_id="one", hashing_algo="sha256")
    second = open_store(["b"], store_id="two")
    added = [store.add("x", [data]) for store, data in ((first, b"1"), (second, b"2"))]
    assert [a.metadata for a in added] == [{"store": "one"}, {"store": "two"}]
    assert (content(first, "x"), content(second, "x")) == (b"1", b"2")
    assert [len(a.os_hash_value) for a in added] == [64, 128]
    with pytest.raises(OSError):
        first.resolve(added[1].location)


def old_image(path: Path, data: bytes) -> None:
    """A file as it lies in a Glance datadir, not written a moment ago."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (1e9, 1e9))


def test_stale_images_are_sealed_in_the_background_where_configured(open_store: OpenStore, tmp_path: Path) -> None:
    contents = {f"{where}{n}": b"%d" % n * 1000 for where in ("high", "low") for n in range(5)}
    for name, data in contents.items():
        old_image(tmp_path / name.rstrip("01234") / name, data)
    store = open_store(reseal="background")
    wait_until(lambda: {store.state(name) for name in contents} == {State.ACTIVE}, "all sealed")
    assert {n: store.digests(n).checksum for n in contents} == {
        n: hashlib.md5(data).hexdigest() for n, data in contents.items()
    }


def test_stale_images_are_left_alone_otherwise(open_store: OpenStore, tmp_path: Path) -> None:
    old_image(tmp_path / "high/x", b"x")
    store = open_store()
    store.add("y", [b"y"])
    assert (store.state("x"), store.state("y")) == (State.STALE, State.ACTIVE)
    assert "user.imgfs.record" not in os.listxattr(tmp_path / "high/x")


def test_image_changed_later_is_sealed_in_the_background_once_it_rests(
    open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resealing, "PAUSE_SECONDS", 0.05)
    store = open_store(reseal="background")
    store.add("x", [b"x"])
    old_image(tmp_path / "high/x", b"changed")
    wait_until(lambda: store.state("x") is State.ACTIVE, "the new seal")
    assert store.digests("x").checksum == hashlib.md5(b"changed").hexdigest()


def test_image_being_copied_into_a_datadir_is_not_sealed_yet(
    open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resealing, "PAUSE_SECONDS", 0.01)
    store = open_store(reseal="background")
    (tmp_path / "high/x").write_bytes(b"x")
    old_image(tmp_path / "high/y", b"y")
    (tmp_path / "high/x").write_bytes(b"xx")
    wait_until(lambda: store.state("y") is State.ACTIVE, "the one that rests")
    young = (tmp_path / "high/x").stat().st_mtime + resealing.REST_SECONDS - 0.1  # the clock of files is coarse
    wait_until(lambda: store.state("x") is State.ACTIVE, "the one that did not")
    assert (tmp_path / "high/x").stat().st_ctime >= young


def test_image_that_can_not_be_sealed_is_told_once_by_the_background(
    open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resealing, "PAUSE_SECONDS", 0.01)
    old_image(tmp_path / "high/x", b"x")
    run("chattr", "+i", tmp_path / "high/x")
    try:
        store = open_store(reseal="background")
        for number in range(3):
            old_image(tmp_path / "high" / f"y{number}", b"y")
            name = f"y{number}"
            wait_until(lambda name=name: store.state(name) is State.ACTIVE, "a round of the background")  # type: ignore[misc]
        store.close()
    finally:
        run("chattr", "-i", tmp_path / "high/x")
    assert len([r for r in caplog.records if "'x'" in r.getMessage()]) == 1


def descriptors() -> list[str]:
    """What this process has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(found)


def test_closed_store_leaves_no_descriptor_and_no_thread(open_store: OpenStore) -> None:
    before, threads = descriptors(), threading.active_count()
    with open_store(reseal="background") as store:
        store.add("x", [CONTENT])
        content(store, "x")
        store.rename("x", "y")
        with contextlib.suppress(SizeMismatch):
            store.add("z", [b"z"], size=2)
        store.delete("y")
    assert descriptors() == before
    assert threading.active_count() == threads


def test_one_of_two_names_of_a_file_is_removed_by_itself(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store(["high"])
    store.add("x", io.BytesIO(b"content"))
    os.link(tmp_path / "high" / "x", tmp_path / "high" / "y")
    handle = store.open("x")
    store.delete("y")
    assert list(store.names()) == ["x"]
    assert handle.image.name == "x"
    store.close_handle(handle)
