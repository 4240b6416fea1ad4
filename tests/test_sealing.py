"""Sealing: the record comes last and only for what is on stable storage; whoever changes the image wins."""

import contextlib
import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imgfs import Handle, ImageStore, State, hashing, record, sealing
from imgfs.errors import Interrupted, NotPermitted
from imgfs.image import WRITEBACK_BYTES, Image
from imgfs.times import UTIME_NOW, UTIME_OMIT
from imgfs.workers import Workers
from imgfs.xattrs import NativeXattrs
from tests.conftest import run, wait_until

MIB = 1 << 20
CONTENT = random.Random(13).randbytes(4 * MIB)
CLOSE_SECONDS = 10.0

OpenStore = Callable[..., ImageStore]


def md5(data: bytes) -> str:
    """The checksum these bytes must have."""
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def store(open_store: OpenStore) -> ImageStore:
    """A store over one datadir, `high`."""
    return open_store(["high"])


def write(store: ImageStore, name: str, *writes: tuple[int, bytes]) -> None:
    """Create an image, write (offset, bytes) and close it."""
    handle = store.create(name)
    for offset, data in writes:
        handle.write(data, offset)
    store.close_handle(handle)


def write_out_of_order(store: ImageStore, name: str, data: bytes = CONTENT) -> None:
    """The same, so that it must be read again to be sealed."""
    write(store, name, (1, data[1:]), (0, data[:1]))


class Gate:
    """Holds sealing up at its readings of files until `open` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._opened = threading.Event()
        self.reached = 0
        pread = os.pread

        def held_up(fd: int, size: int, offset: int) -> bytes:
            if threading.current_thread().name.startswith("imgfs-seal"):
                self.reached += 1
                self._opened.wait()
            return pread(fd, size, offset)

        monkeypatch.setattr(os, "pread", held_up)

    def wait(self, times: int = 1) -> None:
        """Wait until a seal stands at the gate."""
        wait_until(lambda: self.reached >= times, "the reading for a seal")

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate before the readings of seals; opened at the end."""
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


# --- the record comes last ---


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was synced and recorded, in order, as it happens."""
    seen: list[str] = []
    fsync, set_record = os.fsync, NativeXattrs.set

    def watched_fsync(fd: int) -> None:
        fsync(fd)
        seen.append(f"sync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")

    def watched_set(xattrs: NativeXattrs, fd: int, name: str, value: bytes, flags: int = 0) -> None:
        if name == record.XATTR:
            state = record.decode(value)
            seen.append(f"record {Path(os.readlink(f'/proc/self/fd/{fd}')).name} {state and state.state}")
        set_record(xattrs, fd, name, value, flags)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(NativeXattrs, "set", watched_set)
    return seen


@pytest.mark.parametrize("writing", [lambda s, n: write(s, n, (0, CONTENT)), write_out_of_order])
def test_record_comes_after_bytes_and_is_on_stable_storage_with_the_name(
    store: ImageStore, order: list[str], writing: Callable[[ImageStore, str], None]
) -> None:
    writing(store, "x")
    store.digests("x")
    # What is read again is synced before, too: a mapping moves the mtime only of what is clean.
    assert order[-4:] == ["sync x", "record x active", "sync x", "sync high"]
    assert set(order[:-4]) <= {"sync x"}


def test_name_of_an_image_that_is_there_already_is_not_synced_again(
    store: ImageStore, tmp_path: Path, order: list[str]
) -> None:
    (tmp_path / "high/x").write_bytes(b"x")
    store.digests("x")
    assert order == ["sync x", "sync x", "record x active", "sync x"]


def test_failed_verdict_is_put_on_stable_storage(store: ImageStore, order: list[str]) -> None:
    handle = store.create("x")
    handle.image.expect(checksum="0" * 32)
    handle.write(b"x", 0)
    store.close_handle(handle)
    wait_until(lambda: store.state("x") is State.FAILED, "the verdict")
    wait_until(lambda: order[-1] == "sync high", "the last sync")
    assert order == ["record x saving", "sync x", "record x failed", "sync x", "sync high"]


def test_image_written_again_loses_its_old_record_before_the_first_byte(
    store: ImageStore, tmp_path: Path, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add("x", [b"abc"])
    remove, pwrite = NativeXattrs.remove, os.pwrite
    order.clear()
    monkeypatch.setattr(NativeXattrs, "remove", lambda self, fd, name: (remove(self, fd, name), order.append("gone")))
    monkeypatch.setattr(os, "pwrite", lambda *call: (order.append("write"), pwrite(*call))[1])
    handle = store.open("x", os.O_RDWR)
    handle.write(b"X", 0)
    handle.write(b"Y", 1)
    assert order == ["gone", "sync x", "write", "write"]
    store.close_handle(handle)
    store.digests("x")


def test_image_whose_bytes_can_not_be_synced_gets_no_record(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    write(store, "x", (0, b"x"))
    with pytest.raises(OSError, match="Input/output error"):
        store.digests("x")
    assert store.state("x") is State.STALE
    assert "image 'x'" in caplog.text
    assert "sealing failed: " in caplog.text


@pytest.mark.parametrize("piece", [MIB, 1_000_003])
def test_disk_is_at_work_while_an_image_is_still_being_written(
    filesystem: Callable[..., Path], open_store: OpenStore, piece: int
) -> None:
    """So that a seal need not wait for all bytes; left alone, Linux begins after 30 s (dirty_expire_centisecs)."""
    place = filesystem("ext4", 64)
    store = open_store([place])
    disk = place.with_name(place.name.replace("fs", "disk"))
    before = disk.stat().st_blocks * 512
    handle = store.create("x")
    for offset in range(0, 40 * MIB, piece):
        handle.write(CONTENT[:piece], offset)
    deadline = time.monotonic() + 10
    while disk.stat().st_blocks * 512 < before + 2 * WRITEBACK_BYTES:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    store.close_handle(handle)


def test_disk_that_can_not_begin_early_is_told_to_nobody(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise OSError(errno.EIO, "no early writing here")

    monkeypatch.setattr("imgfs.image.start_writeback", fail)
    content = bytes(WRITEBACK_BYTES + 1)
    write(store, "x", (0, content))
    assert store.digests("x").checksum == md5(content)


# --- what was hashed is what is there ---


def test_bytes_that_did_not_pass_the_store_are_read_again(store: ImageStore, tmp_path: Path) -> None:
    """As those of a shared mapping of the backing file: size the same, the stream never saw them."""
    handle = store.create("x")
    handle.write(b"abcdef", 0)
    before = handle.status().st_mtime_ns
    wait_until(lambda: _changed_behind(tmp_path / "high/x") != before, "a later mtime")
    store.close_handle(handle)
    assert store.digests("x").checksum == md5(b"aXcdef")


def _changed_behind(path: Path) -> int:
    with open(path, "r+b") as file:
        file.seek(1)
        file.write(b"X")
    return path.stat().st_mtime_ns


def test_file_in_order_is_not_read_again(store: ImageStore, gate: Gate) -> None:
    """The gate would hold the seal up."""
    write(store, "x", (0, CONTENT[:MIB]), (MIB, CONTENT[MIB:]))
    assert store.digests("x").checksum == md5(CONTENT)
    assert gate.reached == 0


def test_image_changed_behind_while_it_is_read_is_read_again(store: ImageStore, tmp_path: Path, gate: Gate) -> None:
    write_out_of_order(store, "x")
    gate.wait()
    (tmp_path / "high/x").write_bytes(b"changed")
    gate.open()
    assert store.digests("x").checksum == md5(b"changed")
    assert store.state("x") is State.ACTIVE


def test_image_that_keeps_changing_behind_is_given_up_as_stale(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "high/x").write_bytes(b"x" * 10)
    pread = os.pread

    def changing(fd: int, size: int, offset: int) -> bytes:
        data = pread(fd, size, offset)
        os.utime(tmp_path / "high/x", ns=(0, time.time_ns()))
        return data

    monkeypatch.setattr(os, "pread", changing)
    with pytest.raises(OSError, match="keeps changing"):
        store.digests("x")
    assert store.state("x") is State.STALE
    monkeypatch.undo()
    assert store.digests("x").checksum == md5(b"x" * 10)


# --- times ---


@pytest.mark.parametrize("mtime_ns", [0, 1, 1_234_567_890_123_456_789, -(10**9)])
def test_times_set_on_a_sealed_image_leave_it_active(store: ImageStore, tmp_path: Path, mtime_ns: int) -> None:
    store.add("x", [CONTENT])
    with store.image("x") as image:
        image.set_times((mtime_ns, mtime_ns))
    assert store.state("x") is State.ACTIVE
    assert (tmp_path / "high/x").stat().st_mtime_ns == mtime_ns


@pytest.mark.parametrize(
    "times", [(UTIME_NOW, UTIME_NOW), (UTIME_OMIT, UTIME_NOW), (UTIME_OMIT, UTIME_OMIT), (5, UTIME_OMIT)]
)
def test_now_and_omit_leave_it_active(store: ImageStore, tmp_path: Path, times: tuple[int, int]) -> None:
    store.add("x", [CONTENT])
    os_before = (tmp_path / "high/x").stat().st_mtime_ns
    with store.image("x") as image:
        image.set_times(times)
    assert store.state("x") is State.ACTIVE
    assert ((tmp_path / "high/x").stat().st_mtime_ns == os_before) == (times[1] == UTIME_OMIT)


def test_times_set_while_it_is_sealed_end_in_an_active_image_with_them(
    store: ImageStore, tmp_path: Path, gate: Gate
) -> None:
    """As cp -p and rsync do, right after the close."""
    write_out_of_order(store, "x")
    gate.wait()
    with store.image("x") as image:
        image.set_times((10**18, 10**18 + 7))
    gate.open()
    assert store.digests("x").checksum == md5(CONTENT)
    assert store.state("x") is State.ACTIVE
    assert (tmp_path / "high/x").stat().st_mtime_ns == 10**18 + 7
    assert gate.reached <= len(CONTENT) // MIB  # nothing was read twice for it


def test_times_set_before_the_close_do_not_make_the_stream_be_read_again(store: ImageStore, gate: Gate) -> None:
    handle = store.create("x")
    handle.write(CONTENT, 0)
    handle.image.set_times((5, 5))
    store.close_handle(handle)
    assert store.digests("x").checksum == md5(CONTENT)
    assert gate.reached == 0


def test_times_set_on_a_stale_image_do_not_make_it_active(store: ImageStore, tmp_path: Path) -> None:
    store.add("x", [b"abc"])
    (tmp_path / "high/x").write_bytes(b"xyz")
    with store.image("x") as image:
        image.set_times((5, 5))
    assert store.state("x") is State.STALE
    assert store.digests("x").checksum == md5(b"xyz")


def test_times_are_re_stamped_across_stores(open_store: OpenStore) -> None:
    with open_store() as store:
        store.add("x", [CONTENT])
    with open_store() as store, store.image("x") as image:
        image.set_times((7, 7))
    assert open_store().state("x") is State.ACTIVE


# --- writers that come back ---


def test_writer_that_comes_back_while_it_is_sealed_gets_the_last_word(store: ImageStore, gate: Gate) -> None:
    write_out_of_order(store, "x")
    gate.wait()
    handle = store.open("x", os.O_RDWR)
    handle.write(b"new", 0)
    assert store.state("x") is State.SAVING
    gate.open()
    handle.write(b"er", 3)
    store.close_handle(handle)
    assert store.digests("x").checksum == md5(b"newer" + CONTENT[5:])
    assert store.state("x") is State.ACTIVE


def test_writer_that_came_and_went_while_it_was_sealed_has_it_sealed_again(store: ImageStore, gate: Gate) -> None:
    write_out_of_order(store, "x")
    gate.wait()
    handle = store.open("x", os.O_RDWR)
    handle.write(b"new", 0)
    store.close_handle(handle)
    gate.open()
    wait_until(lambda: store.state("x") is State.ACTIVE, "the second seal, unasked for")
    assert store.digests("x").checksum == md5(b"new" + CONTENT[3:])


def test_writer_that_came_and_went_as_sealing_ended_has_it_sealed_again(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_sealing, once = Image.end_sealing, iter([True])

    def writer_in_between(image: Image, **how: bool) -> bool:
        if next(once, False):
            handle = store.open("x", os.O_RDWR)
            handle.write(b"new", 0)
            store.close_handle(handle)
        return end_sealing(image, **how)

    monkeypatch.setattr(Image, "end_sealing", writer_in_between)
    write(store, "x", (0, CONTENT))
    wait_until(lambda: store.state("x") is State.ACTIVE, "a seal, unasked for")
    assert store.digests("x").checksum == md5(b"new" + CONTENT[3:])


class Watched:
    """A lock that has a look taken whenever it is given up."""

    def __init__(self, lock: threading.Lock, look: Callable[[], None]) -> None:
        self._lock, self._look = lock, look

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._look()
        self._lock.release()


def test_nobody_finds_an_image_between_its_last_writer_and_its_seal(store: ImageStore) -> None:
    """Who waits for the seal would begin one of their own, of an image that may be about to be removed."""
    handle = store.create("a")
    store.write(handle, CONTENT, 0)
    image, seen = handle.image, []

    def look() -> None:
        seen.append((image.writers > 0, image.sealing, image.unsealed))

    image.lock = Watched(image.lock, look)  # type: ignore[assignment]
    store.close_handle(handle)
    assert (False, False, True) not in seen
    assert (False, True, True) in seen


def test_whoever_asks_for_a_digest_may_ask_the_store_whether_to_wait_on(store: ImageStore) -> None:
    handle = store.create("a")
    store.write(handle, CONTENT, 0)
    asked: list[State] = []

    def interrupted() -> bool:
        asked.append(store.state("a"))
        return len(asked) > 1

    with pytest.raises(Interrupted):
        store.digests("a", interrupted)
    assert asked == [State.SAVING] * 2
    store.close_handle(handle)
    assert store.digests("a").checksum == md5(CONTENT)


def test_writer_that_changes_nothing_leaves_the_seal_alone(store: ImageStore, gate: Gate) -> None:
    write_out_of_order(store, "x")
    gate.wait()
    store.close_handle(store.open("x", os.O_RDWR))
    gate.open()
    wait_until(lambda: store.state("x") is State.ACTIVE, "the seal")
    assert store.digests("x").checksum == md5(CONTENT)


def test_image_removed_while_it_is_sealed_is_let_go(store: ImageStore, tmp_path: Path, gate: Gate) -> None:
    write_out_of_order(store, "x")
    gate.wait()
    store.delete("x")
    gate.open()
    wait_until(lambda: store._namespace.live_images() == [], "its descriptors closed")
    assert list(store.names()) == []


def test_image_renamed_while_it_is_sealed_is_sealed_under_its_new_name(store: ImageStore, gate: Gate) -> None:
    write_out_of_order(store, "x")
    gate.wait()
    store.rename("x", "y")
    gate.open()
    wait_until(lambda: store.state("y") is State.ACTIVE, "the seal")


def test_write_once_image_can_not_be_opened_for_writing_while_it_is_sealed(open_store: OpenStore, gate: Gate) -> None:
    store = open_store(write_once=True)
    write_out_of_order(store, "x")
    gate.wait()
    with pytest.raises(NotPermitted):
        store.open("x", os.O_RDWR)
    gate.open()
    assert store.digests("x").checksum == md5(CONTENT)


def test_image_that_needs_no_reading_does_not_wait_for_those_that_do(store: ImageStore, gate: Gate) -> None:
    for number in range(4):
        write_out_of_order(store, f"slow{number}")
    gate.wait()
    write(store, "quick", (0, CONTENT))
    assert store.digests("quick").checksum == md5(CONTENT)


def test_many_writers_at_once_end_in_the_right_digests(store: ImageStore, tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    store.add("x", [bytes(len(CONTENT))])

    def write_part(number: int) -> None:
        barrier.wait()
        for _ in range(10):
            handle = store.open("x", os.O_RDWR)
            start = number * MIB // 2
            handle.write(CONTENT[start : start + MIB // 2], start)
            store.close_handle(handle)
            with contextlib.suppress(OSError):
                store.digests("x")

    threads = [threading.Thread(target=write_part, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: store.state("x") is State.ACTIVE, "the last seal")
    assert store.digests("x").checksum == md5(CONTENT) == md5((tmp_path / "high/x").read_bytes())


# --- closing the store ---


def closed_in_time(store: ImageStore) -> bool:
    """Close a store in a thread; whether that took less than CLOSE_SECONDS."""
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(CLOSE_SECONDS)
    return not closing.is_alive()


def test_closing_finishes_seals_that_need_no_reading(open_store: OpenStore) -> None:
    with open_store() as store:
        for number in range(30):
            write(store, f"x{number}", (0, CONTENT[number:]))
    again = open_store()
    assert {again.state(f"x{number}") for number in range(30)} == {State.ACTIVE}
    assert again.digests("x29").checksum == md5(CONTENT[29:])


@pytest.fixture
def closing_begun(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a store waits for its seals to end."""
    begun = threading.Event()
    close = Workers.close

    def watched(workers: Workers, **how: Callable[[], bool]) -> None:
        begun.set()
        close(workers, **how)

    monkeypatch.setattr(Workers, "close", watched)
    return begun


def test_closing_gives_readings_up_and_leaves_the_image_stale(
    open_store: OpenStore, gate: Gate, closing_begun: threading.Event
) -> None:
    store = open_store()
    for number in range(5):
        write_out_of_order(store, f"x{number}")
    gate.wait()
    closing = threading.Thread(target=store.close)
    closing.start()
    wait_until(closing_begun.is_set, "closing begun")
    reached = gate.reached
    gate.open()
    closing.join(CLOSE_SECONDS)
    assert not closing.is_alive()
    assert gate.reached <= reached + 2
    again = open_store()
    assert {again.state(f"x{number}") for number in range(5)} == {State.STALE}
    assert again.digests("x4").checksum == md5(CONTENT)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.timeout(60)
def test_closing_gives_up_the_digests_of_a_long_hole(open_store: OpenStore, in_order: bool) -> None:
    store = open_store(["high"])
    handle = store.create("x")
    if not in_order:
        handle.write(b"xy", 4096)
        handle.write(b"x", 0)
    handle.truncate(1 << 40)
    store.close_handle(handle)
    assert closed_in_time(store)
    again = open_store(["high"])
    assert again.state("x") is State.STALE
    assert again.size("x") == 1 << 40


@pytest.mark.timeout(60)
def test_long_hole_is_given_up_when_the_image_is_removed_or_changed(store: ImageStore) -> None:
    for name in ("x", "y"):
        handle = store.create(name)
        handle.truncate(1 << 40)
        store.close_handle(handle)
    store.delete("x")
    store.close_handle(store.open("y", os.O_WRONLY | os.O_TRUNC))
    assert store.digests("y").checksum == md5(b"")
    wait_until(lambda: store._namespace.live_images() == [], "everything let go")


def test_waiter_for_digests_is_told_when_the_store_closes(
    open_store: OpenStore, gate: Gate, closing_begun: threading.Event
) -> None:
    store = open_store()
    write_out_of_order(store, "x")
    gate.wait()
    told: list[OSError] = []

    def ask() -> None:
        try:
            store.digests("x")
        except OSError as error:
            told.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    with store.image("x") as image:
        wait_until(lambda: image.references >= 3, "somebody asking")
    closing = threading.Thread(target=store.close)
    closing.start()
    wait_until(closing_begun.is_set, "closing begun")
    gate.open()
    asking.join(CLOSE_SECONDS)
    closing.join(CLOSE_SECONDS)
    assert not asking.is_alive()
    assert not closing.is_alive()
    assert len(told) == 1


def test_image_still_open_when_the_store_closes_is_stale_in_the_next(open_store: OpenStore) -> None:
    store = open_store()
    handle: Handle = store.create("x")
    handle.write(CONTENT, 0)
    store.close()
    again = open_store()
    assert again.state("x") is State.STALE
    assert again.digests("x").checksum == md5(CONTENT)


# --- errors ---


def test_image_that_can_not_be_sealed_stays_stale_and_says_why(
    store: ImageStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "high/x").write_bytes(b"x")
    run("chattr", "+i", tmp_path / "high/x")
    try:
        with pytest.raises(PermissionError):
            store.digests("x")
        assert store.state("x") is State.STALE
    finally:
        run("chattr", "-i", tmp_path / "high/x")
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert message.startswith(f"image 'x' in {tmp_path}/high stays stale: sealing failed: ")
    assert "Operation not permitted" in message
    assert store.digests("x").checksum == md5(b"x")


def test_image_without_room_for_its_record_stays_stale(
    filesystem: Callable[..., Path], open_store: OpenStore, caplog: pytest.LogCaptureFixture
) -> None:
    place = filesystem("ext4", 16)
    store = open_store([place])
    (place / "x").write_bytes(b"x")
    os.setxattr(place / "x", "user.large", bytes(900))
    with pytest.raises(OSError, match="No space left"):
        store.digests("x")
    assert store.state("x") is State.STALE
    assert b"".join(store.read("x")) == b"x"
    os.removexattr(place / "x", "user.large")
    assert store.digests("x").checksum == md5(b"x")


def test_image_removed_for_lack_of_room_for_its_record_is_no_failure(
    filesystem: Callable[..., Path], open_store: OpenStore, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its file is gone before the store knows."""
    place = filesystem("tmpfs", 16)
    store = open_store([place])
    set_record = NativeXattrs.set

    def full(xattrs: NativeXattrs, fd: int, name: str, value: bytes, flags: int = 0) -> None:
        if name != record.XATTR:
            set_record(xattrs, fd, name, value, flags)
            return
        (place / "fill").write_bytes(bytes(os.statvfs(place).f_bavail * os.statvfs(place).f_frsize))
        (place / "x").unlink(missing_ok=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(NativeXattrs, "set", full)
    write(store, "x", (0, b"x"))
    wait_until(lambda: store._namespace.live_images() == [], "the end of the seal")
    assert [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_failing_hash_leaves_the_image_stale_and_the_store_at_work(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object) -> None:
        raise MemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(hashing, "_update", failing)
        write(store, "x", (0, b"x"))
        with pytest.raises(OSError) as caught:
            store.digests("x")
        assert not isinstance(caught.value, Interrupted)
    assert store.state("x") is State.STALE
    assert store.digests("x").checksum == md5(b"x")


def test_unreadable_image_says_why(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "high/x").write_bytes(b"x")

    def failing(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(OSError, match="Input/output error"):
        store.digests("x")
    assert store.state("x") is State.STALE


def test_failing_to_set_permissions_is_a_warning(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(["high"], file_perm="0640")

    def refusing(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Image, "set_mode", refusing)
    write(store, "x", (0, b"x"))
    assert store.digests("x").checksum == md5(b"x")
    assert store.state("x") is State.ACTIVE
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "image 'x': can't set mode 640: Operation not permitted"
    ]


# --- the rest of an empty image ---


@pytest.fixture
def long_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty images rest longer than any test takes."""
    monkeypatch.setattr(sealing, "REST_SECONDS", 3600.0)
    monkeypatch.setattr(sealing, "LONGEST_REST_SECONDS", 3600.0)


def test_empty_image_is_sealed_after_a_rest(store: ImageStore) -> None:
    write(store, "x")
    wait_until(lambda: store.state("x") is State.ACTIVE, "the seal")
    assert store.digests("x").size == 0


def test_empty_images_stay_stale_where_no_thread_is_to_be_had_and_later_ones_are_sealed(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Workers) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(Workers, "_start", refuse)
        write(store, "x")
        wait_until(lambda: store.state("x") is State.STALE, "the end of its rest")
    write(store, "y")
    wait_until(lambda: store.state("y") is State.ACTIVE, "the seal")
    assert store.digests("x").checksum == md5(b"")


@pytest.mark.usefixtures("long_rest")
def test_digest_asked_for_ends_the_rest_of_an_empty_image(store: ImageStore) -> None:
    write(store, "x")
    write(store, "y")
    assert store.state("x") is State.SAVING
    assert store.digests("x").checksum == md5(b"")
    assert (store.state("x"), store.state("y")) == (State.ACTIVE, State.SAVING)


@pytest.mark.usefixtures("long_rest")
def test_digest_asked_for_while_an_empty_image_is_open_is_not_held_up_by_its_rest(store: ImageStore) -> None:
    handle = store.create("x")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(store.digests, "x")
        wait_until(lambda: handle.image.awaited > 0, "the question")
        store.close_handle(handle)
        assert asked.result(CLOSE_SECONDS).checksum == md5(b"")


@pytest.mark.usefixtures("long_rest")
def test_image_removed_while_it_rests_is_let_go_at_once(store: ImageStore) -> None:
    write(store, "x")
    store.delete("x")
    assert store._namespace.live_images() == []


@pytest.mark.usefixtures("long_rest")
def test_image_replaced_while_it_rests_is_let_go_at_once(store: ImageStore) -> None:
    write(store, "x")
    write(store, "y", (0, CONTENT))
    assert store.digests("y").checksum == md5(CONTENT)
    store.rename("y", "x")
    wait_until(lambda: store._namespace.live_images() == [], "its descriptors closed")


@pytest.mark.usefixtures("long_rest")
def test_expectation_of_an_empty_image_is_judged_without_a_rest(store: ImageStore) -> None:
    handle = store.create("x")
    store.expect_size(handle.image, 5)
    store.close_handle(handle)
    wait_until(lambda: store.state("x") is State.FAILED, "the verdict")


@pytest.mark.usefixtures("long_rest")
def test_closing_store_seals_what_rests(open_store: OpenStore) -> None:
    store = open_store(["high"])
    write(store, "x")
    store.close()
    with contextlib.closing(open_store(["high"])) as again:
        assert again.state("x") is State.ACTIVE
