"""Locks for single names, so that one of two racing creators, renamers or removers of a name goes first."""

import threading


class NameLocks:
    """A lock for each name in use; names nobody holds cost nothing."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._held: set[str] = set()  # guarded by _changed

    def held(self, *names: str) -> "HeldNames":
        """Hold the locks of all `names` at once in a `with`, so that two holders of several can't deadlock."""
        return HeldNames(self._changed, self._held, set(names))


class HeldNames:
    """The locks of some names, held in a `with` block."""

    __slots__ = ("_changed", "_held", "_wanted")

    def __init__(self, changed: threading.Condition, held: set[str], wanted: set[str]) -> None:
        self._changed, self._held, self._wanted = changed, held, wanted

    def __enter__(self) -> None:
        with self._changed:
            while self._wanted & self._held:
                self._changed.wait()
            self._held |= self._wanted

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._held -= self._wanted
            self._changed.notify_all()
