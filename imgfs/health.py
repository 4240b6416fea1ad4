"""Whether the datadirs of a store answer: who takes too long, or whose root fails, is offline until it answers again.

A monitor looks at the oldest call of each datadir (calls.py) and has each datadir's root looked at now and then, by a
thread of its own for each, so that one that hangs holds up itself alone. A datadir that was offline from the start
is none of its business.

Threading: the callbacks come from the monitor's threads, one at a time for each datadir.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable

from imgfs.calls import Call
from imgfs.datadir import LOST_ERRNOS, Datadir
from imgfs.timed import TimedDatadir

log = logging.getLogger(__name__)

PROBE_SECONDS = 2.0
"""How often the root of a datadir is looked at."""
OFFLINE_PROBE_SECONDS = 1.0
STALL_SECONDS = 2.0
END_SECONDS = 0.5
LOST_FACTOR = 20
"""After how many timeouts a call that never came back counts as lost, and no longer keeps its datadir offline."""


class Health:
    """Watches datadirs until it is closed."""

    def __init__(
        self,
        datadirs: Iterable[Datadir],
        timeout_s: float,
        changed: Callable[[Datadir], None],
        stuck: Callable[[list[Call]], None],
    ) -> None:
        """`changed` is told a datadir that went offline or came back.

        `stuck` is told calls that do not come back for a while, or that are given up, perhaps more than once.
        """
        self._timeout_s = timeout_s
        self._changed = changed
        self._stuck = stuck
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._timed: list[TimedDatadir] = []
        for datadir in datadirs:
            if datadir.offline is None:
                self.watch(datadir)
        if self._timed:
            self._start(self._watch, self._timed)

    def watch(self, datadir: Datadir) -> None:
        """Watch a datadir, too, that has come online."""
        if isinstance(datadir, TimedDatadir):
            self._timed.append(datadir)
        self._start(self._probe, datadir)

    def _start(self, job: Callable[..., None], argument: object) -> None:
        thread = threading.Thread(target=job, args=(argument,), name="imgfs-health", daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """End the threads; one that is stuck is not waited for."""
        self._closing.set()
        for thread in self._threads:
            thread.join(END_SECONDS)

    # --- calls that take too long ---

    def _watch(self, datadirs: list[TimedDatadir]) -> None:
        pause = min(self._timeout_s / 4, 0.5)
        while not self._closing.wait(pause):
            for datadir in datadirs:
                try:
                    self._look_at_calls(datadir)
                except Exception:  # as where no thread is to be had: the next look does what this one could not
                    log.exception("looking after the calls to datadir %s failed", datadir.path)

    def _look_at_calls(self, datadir: TimedDatadir) -> None:
        datadir.calls.look_for_progress(min(STALL_SECONDS, self._timeout_s / 2))
        if datadir.offline is None and not datadir.calls.overdue(self._timeout_s):
            if datadir.calls.stalled:
                self._stuck(datadir.calls.all())
            return
        if datadir.offline is None:
            datadir.go_offline(f"it has not answered for {self._timeout_s:g} s")
            self._tell(datadir)
        calls = datadir.calls.all()
        for call in calls:
            call.give_up()
        if calls:
            self._stuck(calls)

    # --- the root ---

    def _probe(self, datadir: Datadir) -> None:
        told_offline = False  # who finds it lost in the middle of a call does not tell
        while not self._closing.wait(self._probe_pause(datadir)):
            error = _error_of_root(datadir)
            if self._closing.is_set():
                return
            if datadir.offline is None and error is not None and error.errno in LOST_ERRNOS:
                datadir.go_offline(f"its root gives: {error.strerror}")
            elif datadir.offline is not None and error is None and not self._has_overdue(datadir):
                datadir.come_back()
                told_offline = False
                self._tell(datadir)
            if datadir.offline is not None and not told_offline:
                told_offline = True
                self._tell(datadir)

    def _probe_pause(self, datadir: Datadir) -> float:
        if datadir.offline is not None:
            return OFFLINE_PROBE_SECONDS
        return min(PROBE_SECONDS, self._timeout_s / 2) if self._timeout_s else PROBE_SECONDS

    def _has_overdue(self, datadir: Datadir) -> bool:
        """Whether calls got stuck that have not come back; those that never do are lost."""
        if not isinstance(datadir, TimedDatadir):
            return False
        calls = datadir.calls.overdue(self._timeout_s)
        lost = [call for call in calls if time.monotonic() - call.started > LOST_FACTOR * self._timeout_s]
        for call in lost:
            log.warning("datadir %s answers, but a call made %d s ago never came back; it is given up",
                        datadir.path, time.monotonic() - call.started)  # fmt: skip
            call.lose()
        return len(calls) > len(lost)

    def _tell(self, datadir: Datadir) -> None:
        try:
            self._changed(datadir)
        except Exception:
            log.exception("following the change of datadir %s failed", datadir.path)


def _error_of_root(datadir: Datadir) -> OSError | None:
    try:
        datadir.check_root()
    except OSError as error:
        return error
    return None
