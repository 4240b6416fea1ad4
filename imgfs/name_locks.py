"""Locks for single names, so that one of two racing creators, renamers or removers of a name goes first."""

import threading
from collections.abc import Callable, Collection

from imgfs.waiters import Waiters

POLL_SECONDS = 0.5


def _never(_thread: int) -> None:
    """Nobody who holds a name is stuck."""


class NameLocks:
    """A lock for each name in use; names nobody holds cost nothing.

    Who waits asks `require_alive` now and then about the thread that holds a name; it raises where that is stuck.
    """

    def __init__(self, require_alive: Callable[[int], None] = _never) -> None:
        self._lock = threading.Lock()
        self._waiters = Waiters(self._lock)
        self._holders: dict[str, int] = {}  # guarded by _lock: name -> the thread that holds it
        self._require_alive = require_alive

    def held(self, *names: str) -> "HeldNames":
        """Hold the locks of all `names` at once in a `with`, so that two holders of several can't deadlock."""
        return HeldNames(self, names if len(names) < 2 else tuple(set(names)))

    def take(self, names: tuple[str, ...]) -> None:
        """Take the locks of different names, once all are free."""
        holders, thread = self._holders, threading.get_ident()
        with self._lock:
            while taken := [name for name in names if name in holders]:
                if not self._waiters.wait(POLL_SECONDS):
                    for name in taken:
                        if name in holders:
                            self._require_alive(holders[name])
            for name in names:
                holders[name] = thread

    def give_back(self, names: tuple[str, ...]) -> None:
        """Give up what was taken."""
        with self._lock:
            for name in names:
                del self._holders[name]
            self._waiters.wake()


class HeldNames:
    """The locks of some names, held in a `with` block."""

    __slots__ = ("_locks", "_names")

    def __init__(self, locks: NameLocks, names: tuple[str, ...]) -> None:
        self._locks, self._names = locks, names

    def __enter__(self) -> None:
        self._locks.take(self._names)

    def __exit__(self, *_: object) -> None:
        self._locks.give_back(self._names)


class Turn:
    """One thread at a time, as a lock; a thread that is stuck somewhere loses its turn."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._holder: int | None = None  # guarded by _changed: the thread whose turn it is

    def __enter__(self) -> None:
        with self._changed:
            while self._holder is not None:
                self._changed.wait()
            self._holder = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            if self._holder == threading.get_ident():
                self._holder = None
                self._changed.notify()

    def take_from(self, threads: Collection[int]) -> None:
        """If it is the turn of one of these, it is the next one's."""
        with self._changed:
            if self._holder in threads:
                self._holder = None
                self._changed.notify()
