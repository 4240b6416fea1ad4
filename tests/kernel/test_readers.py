"""How the threads that read requests spend their time: awake where that pays, asleep otherwise."""

import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgfs.kernel import abi, readers
from imgfs.kernel.readers import MAX_MISSES, Lookout, Readers
from tests.conftest import WAIT_SECONDS, wait_until


class Requests:
    """A device whose requests come as told: each some seconds after the one before was taken."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.lookouts = 0

    def comes_within(self, seconds: float) -> bool:
        self.lookouts += 1
        return self.delay_s < seconds

    def read(self) -> bytes:
        time.sleep(self.delay_s)
        return b"request"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    monkeypatch.setattr(readers, "SEVERAL_CPUS", True)
    monkeypatch.setattr(readers, "LOOKOUT_S", 0.05)  # so that a slow machine does not matter
    return Requests()


def taken(lookout: Lookout, count: int) -> None:
    for _ in range(count):
        assert lookout.next_request() == b"request"


def test_requests_that_come_soon_are_looked_out_for(requests):
    taken(Lookout(requests), 10)
    assert requests.lookouts == 9  # the first shows that they do


def test_requests_that_come_late_are_not(requests):
    requests.delay_s = 0.1
    taken(Lookout(requests), 5)
    assert requests.lookouts == 0


def test_each_miss_asks_for_more_requests_in_a_row_before_the_next_lookout(requests):
    lookout = Lookout(requests)
    taken(lookout, 2)
    requests.comes_within = lambda _seconds: False  # they come when it has gone to sleep
    gaps = []
    for _ in range(MAX_MISSES):
        lookout.next_request()
        taken_before = 1
        while not lookout._pays:
            lookout.next_request()
            taken_before += 1
        gaps.append(taken_before)
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 1 << MAX_MISSES


def test_with_one_cpu_nobody_is_kept_from_it(requests, monkeypatch):
    monkeypatch.setattr(readers, "SEVERAL_CPUS", False)
    taken(Lookout(requests), 10)
    assert requests.lookouts == 0


class Queued:
    """A device, or a clone of one, with requests from a queue; None ends the connection."""

    def __init__(self, queued: "queue.SimpleQueue[bytes | None]") -> None:
        self.queued = queued
        self.clones: list[Queued] = []
        self.closed = False

    def clone(self) -> "Queued":
        self.clones.append(Queued(self.queued))
        return self.clones[-1]

    def comes_within(self, _seconds: float) -> bool:
        return not self.queued.empty()

    def read(self) -> bytes | None:
        return self.queued.get()

    def close(self) -> None:
        self.closed = True


def request(opcode: int, inode: int = 1) -> bytes:
    return bytes(4) + opcode.to_bytes(4, "little") + bytes(8) + inode.to_bytes(8, "little")


class Served:
    """Readers at work on a queue; each GETXATTR waits until `go` is set, and so does a WRITE once `writes_wait`."""

    def __init__(self) -> None:
        self.device = Queued(queue.SimpleQueue())
        self.answered: list[int] = []
        self.waiting: list[int] = []
        self.writers: list[int] = []
        self.go = threading.Event()
        self.writes_wait = self.steps_aside = False
        self.readers = Readers(self.device, self._answer)
        self._thread = threading.Thread(target=self.readers.run, args=(lambda: None, lambda: None, 10))
        self._thread.start()

    def _answer(self, _device: Queued, data: bytes) -> None:
        opcode = int.from_bytes(data[4:8], "little")
        if opcode == abi.FUSE_WRITE:
            self.writers.append(threading.get_ident())
            if self.steps_aside:
                self.readers.step_aside()
            if self.writes_wait:
                assert self.go.wait(WAIT_SECONDS)
        if opcode == abi.FUSE_GETXATTR:
            self.waiting.append(threading.get_ident())
            assert self.go.wait(WAIT_SECONDS)
        self.answered.append(opcode)

    def send(self, opcode: int, inode: int = 1) -> None:
        self.device.queued.put(request(opcode, inode))

    def write(self, count: int, inode: int = 1) -> None:
        """Send so many writes, each when the one before was answered."""
        for _ in range(count):
            sent = len(self.answered)
            self.send(abi.FUSE_WRITE, inode)
            wait_until(lambda sent=sent: len(self.answered) > sent)

    def end(self) -> None:
        self.go.set()
        for _ in range(10):  # each thread that reads takes one
            self.device.queued.put(None)
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.end()


def test_a_thread_that_could_not_be_started_is_made_up_for_later(served, monkeypatch, caplog):
    start, failures = threading.Thread.start, []

    def fail_once(thread: threading.Thread) -> None:
        if not failures:
            failures.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    served.send(abi.FUSE_STATFS)
    wait_until(lambda: served.answered == [abi.FUSE_STATFS])  # the first thread is at work
    served.answered.clear()
    monkeypatch.setattr(threading.Thread, "start", fail_once)
    served.send(abi.FUSE_GETXATTR)
    wait_until(lambda: failures and served.waiting)
    assert "no further thread" in caplog.text
    served.go.set()
    wait_until(lambda: served.answered == [abi.FUSE_GETXATTR])
    served.go.clear()
    served.send(abi.FUSE_GETXATTR)
    served.send(abi.FUSE_STATFS)
    wait_until(lambda: abi.FUSE_STATFS in served.answered)


def test_the_descriptor_of_a_lost_thread_stays_open_to_the_end(served):
    """Its request may be answered there by somebody else, at any time."""
    served.send(abi.FUSE_GETXATTR)
    wait_until(lambda: len(served.waiting) == 1)
    served.send(abi.FUSE_GETXATTR)  # read by the second thread, on a clone
    wait_until(lambda: len(served.waiting) == 2)
    clone = served.device.clones[0]
    served.readers.lose(served.waiting[1])
    served.go.set()
    wait_until(lambda: len(served.answered) == 2)
    wait_until(lambda: clone in served.readers._kept)
    assert not clone.closed
    served.readers.close()
    assert clone.closed


@pytest.fixture
def unwatched(served, monkeypatch) -> Served:
    """No watchdog sees to it that requests are read; and two writes of an image went before, and then a pause."""
    monkeypatch.setattr(readers, "PATIENCE_S", WAIT_SECONDS)
    served.write(2)
    time.sleep(readers.ALONE_S)
    return served


def test_writes_of_one_image_are_answered_by_the_thread_that_reads(unwatched):
    unwatched.writers.clear()
    unwatched.write(50)
    assert len(set(unwatched.writers)) == 1


def test_a_write_beside_other_requests_holds_up_none(unwatched):
    unwatched.send(abi.FUSE_STATFS)
    wait_until(lambda: abi.FUSE_STATFS in unwatched.answered)
    unwatched.writes_wait = True
    unwatched.send(abi.FUSE_WRITE)
    unwatched.send(abi.FUSE_LOOKUP)
    wait_until(lambda: abi.FUSE_LOOKUP in unwatched.answered)


def test_a_write_of_another_image_holds_up_none(unwatched):
    unwatched.writes_wait = True
    unwatched.send(abi.FUSE_WRITE, inode=2)
    unwatched.send(abi.FUSE_WRITE, inode=3)
    wait_until(lambda: len(unwatched.writers) == 4)


def test_a_write_that_waits_holds_up_none(unwatched):
    unwatched.writes_wait = unwatched.steps_aside = True
    unwatched.send(abi.FUSE_WRITE)
    unwatched.send(abi.FUSE_STATFS)
    wait_until(lambda: abi.FUSE_STATFS in unwatched.answered)
    assert len(unwatched.writers) == 3
    assert unwatched.answered.count(abi.FUSE_WRITE) == 2


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_mount_uses_no_cpu(mount):
    mounted = mount()
    for number in range(300):
        assert not (mounted / f"absent-{number}").exists()
    time.sleep(0.2)
    before = cpu_seconds(mounted.daemon.pid)
    time.sleep(2)
    assert cpu_seconds(mounted.daemon.pid) - before < 0.2
