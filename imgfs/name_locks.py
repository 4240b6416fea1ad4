"""Locks for single names, so that one of two racing creators, renamers or removers of a name goes first."""

import threading
from collections.abc import Callable, Collection

POLL_SECONDS = 0.5


def _never(_thread: int) -> None:
    """Nobody who holds a name is stuck."""


class NameLocks:
    """A lock for each name in use; names nobody holds cost nothing.

    Who waits asks `require_alive` now and then about the thread that holds a name; it raises where that is stuck.
    """

    def __init__(self, require_alive: Callable[[int], None] = _never) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._held: dict[str, int] = {}  # guarded by _changed: name -> the thread that holds it
        self._require_alive = require_alive

    def held(self, *names: str) -> "HeldNames":
        """Hold the locks of all `names` at once in a `with`, so that two holders of several can't deadlock."""
        return HeldNames(self._changed, self._held, set(names), self._require_alive)


class HeldNames:
    """The locks of some names, held in a `with` block."""

    __slots__ = ("_changed", "_held", "_require_alive", "_wanted")

    def __init__(
        self,
        changed: threading.Condition,
        held: dict[str, int],
        wanted: set[str],
        require_alive: Callable[[int], None],
    ) -> None:
        self._changed, self._held, self._wanted, self._require_alive = changed, held, wanted, require_alive

    def __enter__(self) -> None:
        with self._changed:
            while taken := self._wanted & self._held.keys():
                if not self._changed.wait(POLL_SECONDS):
                    for name in taken & self._held.keys():
                        self._require_alive(self._held[name])
            thread = threading.get_ident()
            for name in self._wanted:
                self._held[name] = thread

    def __exit__(self, *_: object) -> None:
        with self._changed:
            for name in self._wanted:
                del self._held[name]
            self._changed.notify_all()


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
