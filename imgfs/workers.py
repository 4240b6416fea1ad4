"""Threads that do jobs in turn, and of which some may be lost in a filesystem that does not answer.

Unlike those of concurrent.futures they keep no process from ending. Threading: all methods may be called from any.
"""

import logging
import queue
import threading
from collections.abc import Callable, Collection
from typing import Any

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
Job = tuple[Callable[..., object], tuple[Any, ...]]


class Workers:
    """At most `most` threads, made when there is work for them."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()  # guarded by _lock
        self._closed = False  # guarded by _lock

    def submit(self, job: Callable[..., object], *arguments: Any) -> None:
        """Have `job(*arguments)` called by one of the threads. Raises RuntimeError after `close`, and
        where not a single thread can be had."""
        with self._lock:
            if self._closed:
                raise RuntimeError("no jobs are taken any more")
            self._jobs.put((job, arguments))
            if self._idle.acquire(blocking=False) or len(self._threads) >= self._most:
                return
            try:
                self._start()
            except RuntimeError:
                if not self._threads:  # else one of them comes to it
                    self._jobs.get_nowait()
                    raise

    def replace(self, lost: Collection[int]) -> None:
        """Do without these threads (get_ident), should they be of these; others take their places."""
        with self._lock:
            gone = {thread for thread in self._threads if thread.ident in lost}
            self._threads -= gone
            for _ in gone if not self._closed else ():
                self._start()

    def close(self, give_up: Callable[[], bool]) -> None:
        """Wait until all jobs are done, or until `give_up()` is true."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        self._jobs.put(None)
        for thread in threads:
            while thread.is_alive() and not give_up():
                thread.join(_POLL_SECONDS)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            self._threads.discard(thread)
            raise

    def _run(self) -> None:
        while (job := self._next()) is not None:
            call, arguments = job
            try:
                call(*arguments)
            except Exception:
                log.exception("a job of %s failed unexpectedly", self._name)
            if threading.current_thread() not in self._threads:
                return  # it was taken for lost
        self._jobs.put(None)  # for the next one

    def _next(self) -> Job | None:
        try:
            return self._jobs.get_nowait()
        except queue.Empty:
            self._idle.release()
            return self._jobs.get()
