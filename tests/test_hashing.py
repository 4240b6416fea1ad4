"""Digests of streams and files, compared with what hashlib says of the same bytes."""

import ctypes
import hashlib
import itertools
import mmap
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgfs import hashing
from imgfs.errors import ImageChanging, Interrupted
from imgfs.hashing import Digests, DigestStream, HashPool, digest_file, hex_digits, usable_algorithm
from imgfs.sparse import data_spans
from tests.conftest import wait_until

MIB = 1 << 20
CONTENT = random.Random(7).randbytes(5 * MIB + 123)

MIB_OF_GAPS = 32 << 20


def digests_by_hashlib(content: bytes, algo: str = "sha512") -> Digests:
    """What the digests of these bytes must be."""
    value = hashlib.new(algo, content).hexdigest()
    return Digests(len(content), hashlib.md5(content).hexdigest(), algo, value)


@pytest.fixture
def pool() -> Iterator[HashPool]:
    """A pool of two threads, which are gone at the end."""
    before = threading.active_count()
    pool = HashPool(2)
    yield pool
    pool.close()
    assert threading.active_count() == before


@pytest.fixture
def stream(pool: HashPool) -> DigestStream:
    """A stream of md5 and sha512."""
    return DigestStream(pool, "sha512")


# --- streams ---


@pytest.mark.parametrize("piece", [1 << 10, 65536, 100_001, MIB, len(CONTENT)])
def test_stream_in_order_gives_the_digests(stream: DigestStream, piece: int) -> None:
    for offset in range(0, len(CONTENT), piece):
        stream.write(offset, CONTENT[offset : offset + piece])
    assert stream.finish(len(CONTENT)) == digests_by_hashlib(CONTENT)


def test_empty_stream_gives_the_digests_of_nothing(stream: DigestStream) -> None:
    assert stream.finish(0) == digests_by_hashlib(b"")


@pytest.mark.parametrize("algo", ["md5", "sha1", "sha256", "sha3_256", "blake2b"])
def test_any_algorithm_runs_beside_md5(pool: HashPool, algo: str) -> None:
    stream = DigestStream(pool, algo)
    stream.write(0, CONTENT)
    assert stream.finish(len(CONTENT)) == digests_by_hashlib(CONTENT, algo)


def test_gaps_count_as_zeros(stream: DigestStream) -> None:
    stream.write(10, b"one")
    stream.write(3 * MIB + 7, b"two")
    content = bytes(10) + b"one" + bytes(3 * MIB + 7 - 13) + b"two" + bytes(99)
    assert stream.finish(len(content)) == digests_by_hashlib(content)


def test_empty_write_is_nothing(stream: DigestStream) -> None:
    stream.write(0, b"x")
    stream.write(0, b"")
    stream.write(500, b"")
    assert stream.finish(1) == digests_by_hashlib(b"x")


@pytest.mark.parametrize("offset", [0, 99])
def test_step_back_breaks_the_stream(stream: DigestStream, offset: int) -> None:
    stream.write(0, bytes(100))
    stream.write(offset, b"x")
    assert stream.broken
    assert stream.finish(100) is None


def test_broken_stream_stays_broken(stream: DigestStream) -> None:
    stream.break_off()
    stream.write(0, b"x")
    assert stream.finish(1) is None


def test_file_shorter_than_what_was_hashed_has_no_digests(stream: DigestStream) -> None:
    stream.write(0, bytes(100))
    assert stream.finish(99) is None


def test_truncating_below_what_was_hashed_breaks_the_stream(stream: DigestStream) -> None:
    stream.write(0, bytes(100))
    stream.truncate(99)
    assert stream.broken


def test_truncating_beyond_counts_as_zeros(stream: DigestStream) -> None:
    stream.write(0, b"x" * 100)
    stream.truncate(200)
    assert stream.finish(200) == digests_by_hashlib(b"x" * 100 + bytes(100))


@pytest.mark.parametrize("broken", [False, True])
def test_truncating_to_zero_starts_anew(stream: DigestStream, broken: bool) -> None:
    stream.write(0, b"old" * MIB)
    if broken:
        stream.write(0, b"x")
    stream.truncate(0)
    stream.write(0, b"new")
    assert stream.finish(3) == digests_by_hashlib(b"new")


def test_many_streams_at_once_do_not_mix(pool: HashPool) -> None:
    contents = [random.Random(seed).randbytes(3 * MIB + seed) for seed in range(12)]
    found: dict[int, Digests | None] = {}

    def hash_one(number: int) -> None:
        stream = DigestStream(pool, "sha256")
        for offset in range(0, len(contents[number]), 70_000):
            stream.write(offset, contents[number][offset : offset + 70_000])
        found[number] = stream.finish(len(contents[number]))

    threads = [threading.Thread(target=hash_one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: digests_by_hashlib(content, "sha256") for number, content in enumerate(contents)}


# --- memory ---


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hashing stands still until this is set."""
    opened = threading.Event()
    update = hashing._update

    def wait_and_update(*arguments: object) -> None:
        opened.wait()
        update(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(hashing, "_update", wait_and_update)
    yield opened
    opened.set()


class Writers:
    """Threads that write 256 KiB at a time into streams of their own; `taken` counts what was let in."""

    PIECE = bytes(256 << 10)

    def __init__(self, pool: HashPool, number: int, pieces: int) -> None:
        self.streams = [DigestStream(pool, "sha512") for _ in range(number)]
        self.taken = [0] * number
        self._pieces = pieces
        self._threads = [threading.Thread(target=self._write, args=(n,)) for n in range(number)]
        for thread in self._threads:
            thread.start()

    def _write(self, number: int) -> None:
        for piece in range(self._pieces):
            self.streams[number].write(piece * len(self.PIECE), self.PIECE)
            self.taken[number] += len(self.PIECE)

    def wait_until_held_up(self, least: int) -> None:
        """Wait until no writer gets on any more, all having been let in with `least` bytes together."""
        seen: list[int] = []

        def at_rest() -> bool:
            seen.append(sum(self.taken))
            return len(seen) > 20 and seen[-1] >= least and len(set(seen[-20:])) == 1

        wait_until(at_rest, "writers at rest")

    @property
    def thread(self) -> int | None:
        """The first of the threads."""
        return self._threads[0].ident

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


def test_writer_ahead_of_slow_hashing_waits_instead_of_filling_memory(pool: HashPool, gate: threading.Event) -> None:
    writers = Writers(pool, 1, pieces=256)
    writers.wait_until_held_up(hashing.STREAM_QUEUE_BYTES // 2)
    assert writers.taken[0] <= hashing.STREAM_QUEUE_BYTES
    gate.set()
    writers.join()
    assert writers.streams[0].finish(64 * MIB) == digests_by_hashlib(bytes(64 * MIB))


def test_writer_says_that_it_waits_and_then_goes_on_with_room_for_more(pool: HashPool, gate: threading.Event) -> None:
    waits: list[int] = []
    pool.before_wait = lambda: waits.append(threading.get_ident())
    writers = Writers(pool, 1, pieces=256)
    writers.wait_until_held_up(hashing.STREAM_QUEUE_BYTES // 2)
    assert len(waits) == 1
    gate.set()
    writers.join()
    most = 64 * MIB // hashing.REFILL_BYTES
    assert len(waits) <= most
    assert set(waits) == {writers.thread}


def test_many_writers_together_stay_within_the_bound_of_the_pool(
    pool: HashPool, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "POOL_QUEUE_BYTES", 16 * MIB)
    writers = Writers(pool, 8, pieces=64)
    writers.wait_until_held_up(4 * MIB)
    # Each chunk waits for two algorithms; a stream with nothing queued is always let in with one.
    assert sum(writers.taken) <= (16 * MIB) // 2 + 8 * len(Writers.PIECE)
    gate.set()
    writers.join()
    expected = digests_by_hashlib(bytes(16 * MIB))
    assert [stream.finish(16 * MIB) for stream in writers.streams] == [expected] * 8


def test_dropping_one_stream_lets_others_go_on(
    pool: HashPool, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "POOL_QUEUE_BYTES", 8 * MIB)
    greedy = DigestStream(pool, "sha512")
    greedy.write(0, bytes(8 * MIB))
    patient = DigestStream(pool, "sha512")
    patient.write(0, b"a" * MIB)
    held_up = threading.Thread(target=patient.write, args=(MIB, b"b" * MIB))
    held_up.start()
    greedy.break_off()
    held_up.join(20)
    assert not held_up.is_alive()
    gate.set()
    assert patient.finish(2 * MIB) == digests_by_hashlib(b"a" * MIB + b"b" * MIB)


@pytest.mark.parametrize("in_one", [True, False])
def test_hashing_gives_way_every_few_hundred_kib(
    stream: DigestStream, monkeypatch: pytest.MonkeyPatch, in_one: bool
) -> None:
    yields = itertools.count()
    monkeypatch.setattr(os, "sched_yield", lambda: next(yields))
    if in_one:
        stream.write(0, CONTENT)
    assert stream.finish(len(CONTENT)) == digests_by_hashlib(CONTENT if in_one else bytes(len(CONTENT)))
    assert next(yields) == 2 * (len(CONTENT) // hashing.PIECE_BYTES + 1)


def test_hash_threads_take_short_turns(pool: HashPool) -> None:
    """So that giving way does not cost them their share of the CPU (Linux 6.12)."""
    shown = [Path(f"/proc/self/task/{thread.native_id}/sched") for thread in pool._threads]
    if "se.slice" not in shown[0].read_text():
        pytest.skip("this kernel shows no slices")
    wait_until(lambda: all(re.search(r"se.slice *: *100000\n", path.read_text()) for path in shown), "short turns")


def test_long_hole_takes_no_memory_and_no_turn_of_others(pool: HashPool) -> None:
    one, other = DigestStream(pool, "sha512"), DigestStream(pool, "sha512")
    one.write(1 << 40, b"x")
    one.write((1 << 40) + 1, b"y")
    other.write(0, b"z")
    assert other.finish(1) == digests_by_hashlib(b"z")
    one.break_off()


def test_long_hole_and_data_take_turns_of_the_same_length(pool: HashPool) -> None:
    hole, data = DigestStream(pool, "sha512"), DigestStream(pool, "sha512")
    hole.write(1 << 40, b"x")
    data.write(0, CONTENT)
    assert data.finish(len(CONTENT)) == digests_by_hashlib(CONTENT)
    hashed_meanwhile = (1 << 40) - pool.queued_hole_bytes(hole._lanes)
    assert hashed_meanwhile < 8 * len(CONTENT)
    hole.break_off()


def test_failure_of_an_algorithm_gives_no_digests(stream: DigestStream) -> None:
    stream.write(0, b"x")
    stream._by_algo["sha512"].state = None  # type: ignore[assignment]
    stream.write(1, b"x")
    assert stream.finish(2) is None


# --- files ---


def file_of(path: Path, size: int, **data: bytes) -> bytes:
    """A sparse file with bytes at `atOFFSET` keywords; gives its content."""
    content = bytearray(size)
    with open(path, "wb") as file:
        file.truncate(size)
        for key, piece in data.items():
            offset = int(key.removeprefix("at"))
            file.seek(offset)
            file.write(piece)
            content[offset : offset + len(piece)] = piece
    return bytes(content)


@pytest.mark.parametrize(
    ("size", "data"),
    [
        (0, {}),
        (1, {"at0": b"x"}),
        (len(CONTENT), {"at0": CONTENT}),
        (20 * MIB, {}),
        (20 * MIB, {"at0": b"first", "at8388608": CONTENT, "at20971519": b"."}),
        (20 * MIB + 17, {"at5000000": b"x"}),
    ],
)
def test_digests_of_a_file_count_its_holes_as_zeros(
    pool: HashPool, tmp_path: Path, size: int, data: dict[str, bytes]
) -> None:
    content = file_of(tmp_path / "x", size, **data)
    with open(tmp_path / "x", "rb") as file:
        assert digest_file(file.fileno(), size, pool, "sha512") == digests_by_hashlib(content)


def test_digests_of_a_file_without_holes_known(pool: HashPool, filesystem: object) -> None:
    place = filesystem("ramfs")  # type: ignore[operator]
    content = file_of(place / "x", 3 * MIB, at100=b"x", at2000000=b"y")
    with open(place / "x", "rb") as file:
        assert digest_file(file.fileno(), len(content), pool, "sha512") == digests_by_hashlib(content)


def test_holes_are_not_read(pool: HashPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file_of(tmp_path / "x", 160 * MIB, at104857600=b"x")
    pread, read_bytes = os.pread, 0

    def counting(fd: int, size: int, offset: int) -> bytes:
        nonlocal read_bytes
        data = pread(fd, size, offset)
        read_bytes += len(data)
        return data

    monkeypatch.setattr(os, "pread", counting)
    with open(tmp_path / "x", "rb") as file:
        digest_file(file.fileno(), 160 * MIB, pool, "md5")
    assert 1 <= read_bytes <= MIB


def test_spans_cover_all_data_and_end_with_the_size(tmp_path: Path) -> None:
    content = file_of(tmp_path / "x", 9 * MIB, at1048576=b"x" * 4096, at8388608=b"y" * 4096)
    with open(tmp_path / "x", "rb") as file:
        spans = list(data_spans(file.fileno(), 8 * MIB + 100))
    assert spans[-1][1] == 8 * MIB + 100
    assert all(start < end for start, end in spans)
    covered = b"".join(content[start:end].replace(b"\0", b"") for start, end in spans)
    assert covered == content[: 8 * MIB + 100].replace(b"\0", b"")


def test_reading_is_given_up_when_asked(pool: HashPool, tmp_path: Path) -> None:
    file_of(tmp_path / "x", 4 * MIB, at0=bytes(range(1, 256)) * 16_448)
    asked = iter([False, True])
    with open(tmp_path / "x", "rb") as file, pytest.raises(Interrupted):
        digest_file(file.fileno(), 4 * MIB, pool, "sha512", lambda: next(asked))


@pytest.mark.timeout(20)
def test_reading_of_a_huge_hole_is_given_up_when_asked(pool: HashPool, tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as file:
        file.truncate(1 << 40)
    with open(tmp_path / "x", "rb") as file, pytest.raises(Interrupted):
        digest_file(file.fileno(), 1 << 40, pool, "sha512", lambda: True)


@pytest.mark.parametrize("shorter", [0, 1000, MIB - 1])
def test_file_that_turns_out_shorter_has_no_digests(pool: HashPool, tmp_path: Path, shorter: int) -> None:
    file_of(tmp_path / "x", shorter, at0=b"x" * shorter)
    with open(tmp_path / "x", "rb") as file, pytest.raises(ImageChanging):
        digest_file(file.fileno(), MIB, pool, "sha512")


def test_short_reads_of_a_filesystem_do_not_count_as_zeros(
    pool: HashPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pread(2) may give less than there is, on network filesystems."""
    content = file_of(tmp_path / "x", 3 * MIB, at0=b"x" * 3 * MIB)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 700_000), offset))
    with open(tmp_path / "x", "rb") as file:
        assert digest_file(file.fileno(), 3 * MIB, pool, "sha512") == digests_by_hashlib(content)


# --- algorithms ---


@pytest.mark.parametrize("algo", ["md5", "sha512", "sha3_512", "blake2s"])
def test_usable_algorithm_has_as_many_digits_as_its_digest(algo: str) -> None:
    assert usable_algorithm(algo)
    assert hex_digits(algo) == len(hashlib.new(algo).hexdigest())


@pytest.mark.parametrize("algo", ["", "sha13", "shake_128", "shake_256", "x" * 1_000_000])
def test_unknown_algorithm_or_one_of_no_fixed_size_is_not_usable(algo: str) -> None:
    assert not usable_algorithm(algo)


def test_algorithms_are_asked_for_as_checksums(stream: DigestStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """On FIPS systems md5 is there only for what is not security."""
    asked: list[object] = []
    new = hashlib.new

    def watched(name: str, *arguments: bytes, **options: bool) -> object:
        asked.append((name, options))
        return new(name, *arguments, **options)

    monkeypatch.setattr(hashlib, "new", watched)
    stream.write(0, b"x")
    assert asked == [("md5", {"usedforsecurity": False}), ("sha512", {"usedforsecurity": False})]


def test_writer_does_not_wait_for_many_long_gaps(pool: HashPool) -> None:
    stream = DigestStream(pool, "sha512", max_gap=MIB_OF_GAPS)
    for number in range(64):
        stream.write(number * MIB_OF_GAPS, b"data")
    assert stream.broken
    assert stream.finish(64 * MIB_OF_GAPS) is None


def test_short_gaps_do_not_break_a_stream(pool: HashPool) -> None:
    stream = DigestStream(pool, "sha512", max_gap=MIB_OF_GAPS)
    content = bytearray(4 * 8192)
    for number in range(4):
        stream.write(number * 8192, b"data")
        content[number * 8192 : number * 8192 + 4] = b"data"
    digests = stream.finish(len(content))
    assert digests is not None
    assert digests.checksum == hashlib.md5(content).hexdigest()


def cached_mib(path: Path) -> int:
    """How much of a file is in the page cache, rounded to MiB (mincore(2)); asking does not change it."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = (len(mapped) + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        resident = ctypes.create_string_buffer(pages)
        start = ctypes.c_char.from_buffer(mapped)
        assert ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), resident) == 0
        del start
        return round(sum(page & 1 for page in resident.raw) * mmap.PAGESIZE / MIB)


def test_reading_leaves_the_page_cache_as_it_was(filesystem: Callable[..., Path], pool: HashPool) -> None:
    content = random.Random(11).randbytes(40 * MIB + 5)
    path = filesystem("ext4", 64) / "image"
    path.write_bytes(content)
    with open(path, "rb", buffering=0) as file:
        fd = file.fileno()
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert cached_mib(path) == 0
        assert digest_file(fd, len(content), pool, "sha512") == digests_by_hashlib(content)
        assert cached_mib(path) <= 2  # what was read ahead of a window's end
        assert len(os.pread(fd, len(content), 0)) == len(content)
        assert cached_mib(path) == 40
        assert digest_file(fd, len(content), pool, "sha512") == digests_by_hashlib(content)
        assert cached_mib(path) == 40
