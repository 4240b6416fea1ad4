"""Locks for single names, so that one of two racing creators, renamers or removers of a name goes first."""

import contextlib
import threading
from collections.abc import Iterator


class NameLocks:
    """A lock for each name in use; names nobody holds cost nothing."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held: set[str] = set()  # guarded by _changed

    @contextlib.contextmanager
    def held(self, *names: str) -> Iterator[None]:
        """Hold the locks of all `names` at once, so that two holders of several can't wait for each other."""
        wanted = set(names)
        with self._changed:
            while wanted & self._held:
                self._changed.wait()
            self._held |= wanted
        try:
            yield
        finally:
            with self._changed:
                self._held -= wanted
                self._changed.notify_all()
