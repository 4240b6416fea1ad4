"""The threads that read requests: one at a time waits on the descriptor, the others wait for its place.

A thread that reads a request which may take long gives its place up before it answers; one that is quick is answered
on the spot and the thread reads on, which spares a wake-up for each request. So are the writes of one image as long
as nothing else is asked for; who has to wait for more than the disk then calls `step_aside`. Should a request that is
answered on the spot hang all the same, a watchdog gives the place away after `PATIENCE_S`. Threads are made when no
other is left to take the place, up to `MAX_THREADS`, and go when more than `MAX_WAITING` wait. Each reads a
descriptor of its own and answers there.

`_changed` guards the set of threads. That the place is given away twice, in a race with the watchdog, does no harm:
two threads read then, until one of them finds that the place is no longer its own.
"""

import logging
import os
import threading
import time
from collections.abc import Callable

from imgfs.kernel import abi
from imgfs.kernel.device import Device

log = logging.getLogger(__name__)

MAX_THREADS = 256
MAX_WAITING = 8
PATIENCE_S = 0.005
LOOKOUT_S = 0.0001
MAX_MISSES = 8
ALONE_S = 0.1
END_POLL_S = 0.05
SEVERAL_CPUS = len(os.sched_getaffinity(0)) > 1
# Requests that move data, or wait for a disk or a digest.
LONG = frozenset(
    {
        abi.FUSE_READ,
        abi.FUSE_WRITE,
        abi.FUSE_FSYNC,
        abi.FUSE_FSYNCDIR,
        abi.FUSE_GETXATTR,
        abi.FUSE_SETXATTR,
        abi.FUSE_FALLOCATE,
        abi.FUSE_COPY_FILE_RANGE,
        abi.FUSE_COPY_FILE_RANGE_64,
    }
)
# As they are in a request, so that a look at one costs little: struct fuse_in_header.
_OPCODE, _NODEID = slice(4, 8), slice(16, 24)
_LONG = frozenset(opcode.to_bytes(4, "little") for opcode in LONG)
_WRITE = abi.FUSE_WRITE.to_bytes(4, "little")

Answer = Callable[[Device, bytes], None]


class Lookout:
    """Reads from a device, and stays awake for the next request where that pays.

    To be woken for a request takes longer than to answer most of them, and a program that lists or creates many files
    sends one after the other. So while requests come soon after each other, the thread looks out for the next one
    for a moment before it sleeps. If none came in that moment, it does so again only after some more have come soon.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pays = False
        self._misses = 0
        self._owed = 0  # requests that must come soon before it is tried again

    def next_request(self) -> bytes | None:
        """What `Device.read` gives."""
        if self._pays:
            if self._device.comes_within(LOOKOUT_S):
                self._misses = 0
            else:
                self._pays = False
                self._misses = min(self._misses + 1, MAX_MISSES)
                self._owed = 1 << self._misses
        began = time.monotonic()
        data = self._device.read()
        if not self._pays and SEVERAL_CPUS and time.monotonic() - began < LOOKOUT_S:
            self._owed -= 1
            self._pays = self._owed <= 0
        return data


class Readers:
    """The threads of one connection; `answer` is called with each request, on whichever thread read it."""

    def __init__(self, device: Device, answer: Answer) -> None:
        self._device = device
        self._answer = answer
        self._place = threading.Lock()
        self._holder: Device | None = None
        self._holding = 0  # the thread that has the place
        self._waiting: set[Device] = set()
        self._changed = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._kept: list[Device] = []  # of lost threads that have come back
        self._ended = threading.Event()
        self._broken_off = False
        self._busy: Device | None = None  # the holder of the place, while it answers
        self._requests = 0
        self._written = b""  # the inode that the latest write was for
        self._shared_at = 0.0  # when something else was asked for
        self._active = threading.Event()

    def __len__(self) -> int:
        return len(self._threads)

    def close(self) -> None:
        """Close what lost threads have left open; nothing is answered any more."""
        while self._kept:
            if (device := self._kept.pop()) is not self._device:
                device.close()

    def lose(self, ident: int) -> None:
        """A thread is stuck: it counts no more, neither among those there may be nor among those that must end.

        Should it come back, it ends.
        """
        with self._changed:
            lost = {thread for thread in self._threads if thread.ident == ident}
            self._threads -= lost
            self._changed.notify_all()
        if lost and self._holder is None and not self._waiting and not self._ended.is_set():
            self._grow()

    def step_aside(self) -> None:
        """The calling thread is about to wait: if it has the place, another one is to read on."""
        holder = self._holder
        if holder is not None and self._holding == threading.get_ident():
            self._give_place_away(holder)

    def break_off(self) -> None:
        """Answer nothing more, though the connection lasts; it ends with the process, as the last descriptor goes."""
        self._broken_off = True
        self._ended.set()

    def has_ended(self, timeout_s: float) -> bool:
        """Whether the connection has ended, now or within some time."""
        return self._ended.wait(timeout_s)

    def answering(self) -> int:
        """How many threads are still at work on a request, after the end."""
        if not self._broken_off:
            return len(self._threads)
        reading = self._holder is not None and self._busy is not self._holder
        return len(self._threads) - len(self._waiting) - reading

    def run(self, ready: Callable[[], None], on_end: Callable[[], None], end_wait_s: float) -> None:
        """Serve until the connection ends; call `on_end`, and give answers under way `end_wait_s` to finish."""
        watchdog = threading.Thread(target=self._watch, name="fuse-watchdog", daemon=True)
        watchdog.start()
        self._start(self._device)
        ready()
        self._ended.wait()
        on_end()
        self._active.set()
        watchdog.join()
        deadline = time.monotonic() + end_wait_s
        with self._changed:
            while self.answering() and time.monotonic() < deadline:
                self._changed.wait(END_POLL_S)

    def _start(self, device: Device) -> None:
        thread = threading.Thread(target=self._serve, args=(device,), name="fuse-reader", daemon=True)
        with self._changed:
            self._threads.add(thread)
        self._waiting.add(device)
        try:
            thread.start()
        except RuntimeError:
            self._waiting.discard(device)
            with self._changed:
                self._threads.discard(thread)
            raise

    def _serve(self, device: Device) -> None:
        """Wait for the place, read until it is gone, and again."""
        try:
            while self._take_place(device):
                self._read(device)
                if threading.current_thread() not in self._threads:
                    break
                if len(self._waiting) >= MAX_WAITING and device is not self._device:
                    break
        finally:
            self._give_place_away(device)
            with self._changed:
                lost = threading.current_thread() not in self._threads
                self._threads.discard(threading.current_thread())
                self._changed.notify_all()
            if lost:
                self._kept.append(device)  # its request may still be answered there, in place of this thread
            elif device is not self._device:
                device.close()

    def _take_place(self, device: Device) -> bool:
        self._waiting.add(device)
        self._place.acquire()
        self._waiting.discard(device)
        if self._ended.is_set():
            self._place.release()
            return False
        self._holding = threading.get_ident()
        self._holder = device
        return True

    def _read(self, device: Device) -> None:
        """Read and answer as long as the place is ours."""
        lookout = Lookout(device)
        while self._holder is device:
            data = lookout.next_request()
            if data is None or self._broken_off:
                self._ended.set()
                self._give_place_away(device)
            elif self._takes_long(data):
                self._give_place_away(device)
                self._answer(device, data)
            else:
                self._answer_at_once(device, data)

    def _takes_long(self, data: bytes) -> bool:
        """Whether somebody else may have to wait too long for the answer to this request."""
        now = time.monotonic()
        is_long = data[_OPCODE] in _LONG
        if is_long and data[_OPCODE] == _WRITE:
            if data[_NODEID] == self._written:
                return now - self._shared_at < ALONE_S
            self._written = data[_NODEID]
        self._shared_at = now
        return is_long

    def _answer_at_once(self, device: Device, data: bytes) -> None:
        self._requests += 1
        if self._holder is device:
            self._busy = device
        if not self._active.is_set():
            self._active.set()
        self._answer(device, data)
        if self._busy is device:
            self._busy = None

    def _give_place_away(self, device: Device) -> None:
        """Let another thread read, a new one if none waits."""
        with self._changed:
            if self._holder is not device:
                return
            self._holder = None
        if not self._waiting and not self._ended.is_set():
            self._grow()
        self._place.release()

    def _grow(self) -> None:
        if len(self._threads) >= MAX_THREADS:
            log.warning("all %d threads are busy; requests wait", MAX_THREADS)
            return
        try:
            device = self._device.clone()
        except OSError as error:
            log.warning("no further thread for requests: %s", error)
            return
        try:
            self._start(device)
        except RuntimeError as error:
            device.close()
            log.warning("no further thread for requests: %s", error)

    def _watch(self) -> None:
        """While requests come, look now and then whether one hangs."""
        while not self._ended.is_set():
            self._active.wait()
            holder, seen = self._holder, self._requests
            if self._ended.wait(PATIENCE_S) or self._requests != seen:
                continue
            if holder is not None and self._busy is holder:
                self._busy = None
                self._give_place_away(holder)
            else:
                self._active.clear()
                if self._busy:
                    self._active.set()
