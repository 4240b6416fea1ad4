"""Waiting for what a lock guards to change, as with threading.Condition, at little cost where hardly anybody waits.

A Condition costs several calls of Python to make and to enter. Here the lock is a plain one, and the condition is
made for the first who has to wait.
"""

import threading
from collections.abc import Callable


class Waiters:
    """Those who wait for a change of what `lock` guards. Every method is called while that is held."""

    __slots__ = ("_condition", "_lock")

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._condition: threading.Condition | None = None

    def wait(self, timeout_s: float) -> bool:
        """Wait until somebody calls `wake`; False where the time was over before (Condition.wait)."""
        return self._made().wait(timeout_s)

    def wait_for(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until `holds()`, asked at first and whenever somebody calls `wake`; whether it does at the end."""
        return holds() or self._made().wait_for(holds, timeout_s)

    def wake(self) -> None:
        """Something has changed: those who wait look again."""
        if self._condition is not None:
            self._condition.notify_all()

    def _made(self) -> threading.Condition:
        if self._condition is None:
            self._condition = threading.Condition(self._lock)
        return self._condition
