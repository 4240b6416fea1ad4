"""Digests of a stream of writes and of a whole file.

A `DigestStream` is fed with the bytes of one image as they arrive. Each algorithm has a lane of its own, worked off
by the threads of the shared `HashPool`; hashlib releases the GIL, so md5 and the configured algorithm run beside
each other and beside the writes. Bytes that arrive out of order break the stream; the file must then be read again.

Threading: `write`, `truncate` and `finish` of one stream are called by one thread at a time (the image's change
lock sees to that). Lanes and byte counts are guarded by the pool's lock. Queued bytes are bounded, for each stream
and for all together; a writer that is ahead of the hashes waits.
"""

import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from imgfs.errors import ImageChanging, Interrupted
from imgfs.linux import take_short_turns
from imgfs.sparse import data_spans

CHECKSUM_ALGO = "md5"
READ_BYTES = 1 << 20
WINDOW_BYTES = 16 << 20  # what is read is taken out of the page cache again in windows; far more than a readahead
STREAM_QUEUE_BYTES = 16 << 20
POOL_QUEUE_BYTES = 64 << 20
REFILL_BYTES = 8 << 20  # who waited for room goes on when there is so much, and so waits less often
BATCH_BYTES = 1 << 20  # small against a queue: its room is free again by whole batches
STOP_SECONDS = 0.1  # how often a wait asks whether it is still wanted
PIECE_BYTES = 256 << 10  # takes md5(1) a third of a millisecond
_ZEROS = bytes(PIECE_BYTES)


class Verifier(Protocol):
    """What `add()` feeds with every chunk: a signature verifier in the manner of Glance (behaviour 8)."""

    def update(self, chunk: bytes, /) -> object: ...

    def verify(self) -> object: ...


@dataclass(frozen=True, slots=True)
class Digests:
    """What was computed over `size` bytes: md5 and the configured algorithm, both in lower-case hex."""

    size: int
    checksum: str
    os_hash_algo: str
    os_hash_value: str


@dataclass(frozen=True, slots=True)
class Hole:
    """A run of zeros that nobody has to keep in memory."""

    length: int

    def __len__(self) -> int:
        return self.length


Chunk = bytes | memoryview | Hole
Stop = Callable[[], bool]
Pread = Callable[[int, int, int], bytes]


def never() -> bool:
    """A `Stop` that lets everything be finished."""
    return False


def usable_algorithm(name: str) -> bool:
    """Whether hashlib has `name` here, with a digest of fixed size (the shake family has none)."""
    try:
        return _new(name).digest_size > 0
    except (ValueError, TypeError):
        return False


def hex_digits(algo: str) -> int:
    """The length of a hex digest of `algo`."""
    return _new(algo).digest_size * 2


def _new(algo: str) -> "hashlib._Hash":
    # md5 serves as a checksum here; FIPS systems allow it only when told so (Glance behaviour 8).
    return hashlib.new(algo, usedforsecurity=False)


def _update(state: "hashlib._Hash", chunk: Chunk) -> None:
    """Piece by piece: in between, requests that wait for the CPU get it, long before the scheduler would say so."""
    for piece in _pieces(chunk):
        state.update(piece)
        os.sched_yield()


def _pieces(chunk: Chunk) -> Iterator[memoryview]:
    for start in range(0, len(chunk), PIECE_BYTES):
        if isinstance(chunk, Hole):
            yield memoryview(_ZEROS)[: len(chunk) - start]
        else:
            yield memoryview(chunk)[start : start + PIECE_BYTES]


def _queue_bytes(chunk: Chunk) -> int:
    return 0 if isinstance(chunk, Hole) else len(chunk)


@dataclass(slots=True, eq=False)
class _Lane:
    """One algorithm's share of a stream: the chunks that wait for it, in order. Guarded by the pool's lock."""

    state: "hashlib._Hash"
    chunks: deque[Chunk] = field(default_factory=deque)
    queued_bytes: int = 0
    busy: bool = False
    failed: bool = False

    def put(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.queued_bytes += _queue_bytes(chunk)

    def take(self) -> list[Chunk]:
        """At most a batch, holes cut to it: zeros take as long to hash as data, and streams take turns."""
        batch: list[Chunk] = []
        left = BATCH_BYTES
        while self.chunks and left > 0:
            chunk = self.chunks.popleft()
            if isinstance(chunk, Hole) and len(chunk) > left:
                self.chunks.appendleft(Hole(len(chunk) - left))
                chunk = Hole(left)
            batch.append(chunk)
            left -= len(chunk)
        return batch

    def clear(self) -> None:
        self.chunks.clear()
        self.queued_bytes = 0


class HashPool:
    """Worker threads that feed lanes to hashlib, a bounded batch at a time."""

    def __init__(self, threads: int | None = None) -> None:
        self.before_wait: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._progress = threading.Condition(self._lock)
        self._ready: deque[_Lane] = deque()
        self._queued_bytes = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"imgfs-hash-{number}", daemon=True)
            for number in range(threads or max(2, os.cpu_count() or 2))
        ]
        for thread in self._threads:
            thread.start()

    def feed(self, lanes: list[_Lane], chunk: Chunk, stop: Stop = never) -> None:
        """Queue a chunk for every lane of a stream; waits while there is no room for it, or until `stop()` is true.

        It calls `before_wait` first. After a stop the chunk is missing, so the stream is of no use any more.
        """
        length, wanted = _queue_bytes(chunk), 0
        if not self._has_room(lanes, length):
            self.before_wait()
            wanted = REFILL_BYTES
        with self._lock:
            while not self._has_room(lanes, length, wanted):
                if stop():
                    return
                self._progress.wait(STOP_SECONDS)
            for lane in lanes:
                lane.put(chunk)
                self._queued_bytes += length
                if not lane.busy:
                    lane.busy = True
                    self._ready.append(lane)
                    self._work.notify()

    def drain(self, lanes: list[_Lane], stop: Stop) -> bool:
        """Wait until the lanes are worked off, or `stop()` is true; whether all of it was hashed."""
        with self._lock:
            while any(lane.busy for lane in lanes):
                if stop():
                    return False
                self._progress.wait(STOP_SECONDS)
            return not any(lane.failed for lane in lanes)

    def queued_hole_bytes(self, lanes: list[_Lane]) -> int:
        """The length of the holes that wait to be hashed, in the lane that is furthest behind."""
        with self._lock:
            return max(sum(len(c) for c in lane.chunks if isinstance(c, Hole)) for lane in lanes)

    def drop(self, lanes: list[_Lane]) -> None:
        """Forget what is queued for the lanes."""
        with self._lock:
            for lane in lanes:
                self._queued_bytes -= lane.queued_bytes
                lane.clear()
            self._progress.notify_all()

    def close(self) -> None:
        """End the workers, after the batches they are at."""
        with self._lock:
            self._closed = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()

    def _has_room(self, lanes: list[_Lane], length: int, more: int = 0) -> bool:
        """Whether a stream may queue so many bytes, and could queue `more` of its own."""
        queued = max(lane.queued_bytes for lane in lanes)
        if queued == 0:
            return True
        return queued + length + more <= STREAM_QUEUE_BYTES and self._queued_bytes + length <= POOL_QUEUE_BYTES

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            take_short_turns()
        while (lane := self._next()) is not None:
            with self._lock:
                batch = lane.take()
            try:
                for chunk in batch:
                    _update(lane.state, chunk)
            except Exception:  # noqa: BLE001 - whoever finishes the stream is told
                lane.failed = True
            self._done(lane, batch)

    def _next(self) -> _Lane | None:
        with self._lock:
            while not self._ready and not self._closed:
                self._work.wait()
            return self._ready.popleft() if self._ready and not self._closed else None

    def _done(self, lane: _Lane, batch: list[Chunk]) -> None:
        """A batch counts as queued until it is hashed, so the bound holds for all the memory in use."""
        with self._lock:
            if lane.queued_bytes:
                hashed = min(sum(map(_queue_bytes, batch)), lane.queued_bytes)
                lane.queued_bytes -= hashed
                self._queued_bytes -= hashed
            if lane.chunks:
                self._ready.append(lane)
                self._work.notify()
            else:
                lane.busy = False
            self._progress.notify_all()


class DigestStream:
    """The digests of one image while its bytes arrive; `broken` once they did not arrive in order.

    With `max_gap` (bytes), longer gaps break it, too: whoever writes would have to wait until they are hashed.
    """

    def __init__(self, pool: HashPool, algo: str, max_gap: int | None = None) -> None:
        self._pool = pool
        self._max_gap = max_gap
        self._algo = algo
        self._start()

    def _start(self) -> None:
        self._by_algo: dict[str, _Lane] = {}
        self._position = 0
        self.broken = False

    @property
    def _lanes(self) -> list[_Lane]:
        """Made when they are needed: an image that is removed while it is empty needs none."""
        if not self._by_algo:
            self._by_algo = {algo: _Lane(_new(algo)) for algo in (CHECKSUM_ALGO, self._algo)}
        return list(self._by_algo.values())

    def write(self, offset: int, data: bytes | memoryview, stop: Stop = never) -> None:
        """Take bytes written at `offset`; a gap before them counts as zeros.

        A step back breaks the stream, and so do gaps of more than `max_gap` bytes that are yet to be hashed.
        """
        if self.broken or not len(data):
            return
        if offset < self._position or self._too_long(offset - self._position):
            self.break_off()
            return
        self._skip_to(offset)
        self._pool.feed(self._lanes, data, stop)
        self._position += len(data)

    def truncate(self, size: int) -> None:
        """Follow a change of the file's size: to zero starts anew, below what was hashed breaks the stream."""
        if size < self._position or self.broken:
            self.break_off()
        if size == 0:
            self._start()

    def zero(self, offset: int) -> None:
        """Follow a run of bytes that became zeros: such bytes are nothing new unless they were hashed already."""
        if offset < self._position:
            self.break_off()

    def break_off(self) -> None:
        """Give the stream up; what is queued is dropped."""
        self.broken = True
        if self._by_algo:
            self._pool.drop(self._lanes)

    def finish(self, size: int, stop: Stop = never) -> Digests | None:
        """The digests of all `size` bytes, the rest up to there being zeros; None where it broke or was stopped."""
        if self.broken or size < self._position:
            return None
        self._skip_to(size)
        if not self._pool.drain(self._lanes, stop):
            return None
        checksum, value = (self._by_algo[algo].state.hexdigest() for algo in (CHECKSUM_ALGO, self._algo))
        return Digests(size, checksum, self._algo, value)

    def _too_long(self, gap: int) -> bool:
        if not gap or self._max_gap is None:
            return False
        return gap + self._pool.queued_hole_bytes(self._lanes) > self._max_gap

    def _skip_to(self, offset: int) -> None:
        if offset > self._position:
            self._pool.feed(self._lanes, Hole(offset - self._position))
            self._position = offset


def _read_gently(fd: int, start: int, end: int, stop: Stop, pread: Pread) -> Iterator[bytes]:
    """The bytes from `start` to `end`; what only this reading brings into the page cache goes out again.

    So sealing a large image does not push out what others read (posix_fadvise(2)). Whether a window was cached
    before is asked at its middle, where no readahead has been yet. Raises Interrupted once `stop()` is true.
    """
    for window in range(start, end, WINDOW_BYTES):
        window_end = min(window + WINDOW_BYTES, end)
        keep = _is_cached(fd, (window + window_end) // 2)
        offset = window
        while offset < window_end:
            if stop():
                raise Interrupted("the reading for digests was given up")
            chunk = pread(fd, min(READ_BYTES, window_end - offset), offset)
            if not chunk:
                raise ImageChanging("the file became shorter while it was read")
            yield chunk
            offset += len(chunk)
        if not keep:
            os.posix_fadvise(fd, window, window_end - window, os.POSIX_FADV_DONTNEED)


def _is_cached(fd: int, offset: int) -> bool:
    """Whether a byte can be read without the disk; True also where the filesystem can't tell (preadv2(2))."""
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:
        return True


def digest_file(  # noqa: PLR0917
    fd: int,
    size: int,
    pool: HashPool,
    algo: str,
    stop: Stop = never,
    pread: Pread | None = None,
) -> Digests:
    """Read `size` bytes of a file and give their digests; holes are not read, and the page cache stays as it was.

    `pread` stands for pread(2).

    Raises Interrupted once `stop()` is true, ImageChanging where the file turns out shorter, and the OSError of a
    failing read.
    """
    stream = DigestStream(pool, algo)
    try:
        for start, end in data_spans(fd, size):
            offset = start
            for chunk in _read_gently(fd, start, end, stop, pread or os.pread):
                stream.write(offset, chunk, stop)
                offset += len(chunk)
        if stop():
            raise Interrupted("the reading for digests was given up")
        if os.fstat(fd).st_size < size:
            raise ImageChanging("the file became shorter while it was read")
        digests = stream.finish(size, stop)
    finally:
        stream.break_off()
    if digests is None:
        raise Interrupted("the reading for digests was given up")
    return digests
