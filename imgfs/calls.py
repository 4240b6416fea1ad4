"""The system calls under way in one datadir, and since when: what shows that its filesystem does not answer.

A call stuck in a hung filesystem can't be taken back: its thread is lost until the filesystem answers. So each call
is entered before it is made, and others look at how old the oldest is. Used only where a `timeout` is configured.

Threading: all methods may be called from any thread; single dictionary operations need no lock of their own.
"""

import itertools
import threading
import time
from dataclasses import dataclass

SLOW_FACTOR = 10
"""How much longer than others a call may take that waits for all that was written (fsync(2), unlink(2), close(2))."""
MOST_STUCK = 64
"""Calls that may be under way in a datadir that answers none; further ones are refused, which spares threads."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a thread; as long as it is under way, the thread does nothing else."""

    calls: "Calls"
    number: int
    thread: int
    started: float
    slow: bool

    def is_under_way(self) -> bool:
        """Whether it still is."""
        return self.calls.has(self.number)

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.calls.is_given_up(self.number)

    def give_up(self) -> None:
        """Whoever asked is told that there is no answer: from now on it comes too late."""
        self.calls.give_up(self.number)

    def lose(self) -> None:
        """It will never come back: it counts no more; should it, that is too late."""
        self.calls.lose(self.number)


class Calls:
    """The calls under way in one datadir."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._under_way: dict[int, tuple[int, float, bool]] = {}  # number -> thread, start (monotonic), slow
        self._given_up: set[int] = set()
        self._ended = 0  # a count that may miss some
        self._ended_before = -1
        self._progress_at = time.monotonic()
        self.stalled = False  # many are under way, and for some time none has ended

    def begin(self, slow: bool = False) -> int:
        """The calling thread makes a call; `end` takes its number."""
        number = next(self._numbers)
        self._under_way[number] = threading.get_ident(), time.monotonic(), slow
        return number

    def end(self, number: int) -> bool:
        """The call has come back; whether that is in time."""
        self._under_way.pop(number, None)
        self._ended += 1
        if not self._given_up or number not in self._given_up:
            return True
        self._given_up.discard(number)
        return False

    def give_up(self, number: int) -> None:
        """Nobody waits for this call any more."""
        self._given_up.add(number)
        if number not in self._under_way:  # it has come back meanwhile, and may or may not have seen this
            self._given_up.discard(number)

    def lose(self, number: int) -> None:
        """The call is not under way any more, and never comes back in time."""
        self._given_up.add(number)
        self._under_way.pop(number, None)
        self._ended += 1

    def is_given_up(self, number: int) -> bool:
        """Whether `give_up` was called for a call that is under way."""
        return number in self._given_up

    def has(self, number: int) -> bool:
        """Whether a call is under way."""
        return number in self._under_way

    def has_of(self, thread: int) -> bool:
        """Whether a thread is in a call."""
        return any(owner == thread for owner, *_ in list(self._under_way.values()))

    def all(self) -> list[Call]:
        """The calls under way, oldest first."""
        return [Call(self, number, *call) for number, call in sorted(self._under_way.copy().items())]

    def overdue(self, timeout_s: float) -> list[Call]:
        """Those that have been under way for longer than they may."""
        now = time.monotonic()
        return [call for call in self.all() if now - call.started > timeout_s * (SLOW_FACTOR if call.slow else 1)]

    def look_for_progress(self, patience_s: float) -> None:
        """Called now and then by whoever watches: sets `stalled`."""
        now = time.monotonic()
        if self._ended != self._ended_before or not self._under_way:
            self._ended_before, self._progress_at = self._ended, now
        self.stalled = now - self._progress_at > patience_s and len(self._under_way) > MOST_STUCK
