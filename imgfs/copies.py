"""Names that lie in more than one datadir: which copy is served, by a fixed rule, and that nobody removes one unseen.

Lookups stop at the first datadir that has a name; only for a name that is known to be doubled all are asked. Such
names are found by listings, by a look at the start and whenever a datadir comes back, and as inotify tells names.
The rule: a copy whose record holds (one that is being written counts so) before one without, then priority, then the
newest mtime. A doubled name is neither removed nor renamed: the other copy would rise in its place.

Threading: any thread may ask and `suspect`; one thread of its own looks. It holds the lock of a name while it finds
out whether that is doubled, so that a rename in the middle is not taken for it.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from imgfs.datadir import Datadir, answers, any_hangs
from imgfs.errors import NameDoubled
from imgfs.pacing import Breathe, hold_breath, paced
from imgfs.record import State

log = logging.getLogger(__name__)

MOST_TOLD = 20
SETTLE_SECONDS = 0.2
_END_SECONDS = 5.0
_STUCK_SECONDS = 0.5
_SLICE = 32
_BREATH_SECONDS = 0.005
_PACE = 512  # names that are only listed

IsSaving = Callable[[os.stat_result], bool]
Held = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Copy:
    """One of the files that have a name."""

    datadir: Datadir
    status: os.stat_result
    state: State

    @property
    def rank(self) -> tuple[bool, int, int]:
        """The greatest is served."""
        return self.state in (State.ACTIVE, State.SAVING), self.datadir.priority, self.status.st_mtime_ns


def copies_of(name: str, datadirs: Iterable[Datadir], is_saving: IsSaving = lambda _: False) -> list[Copy]:
    """The files that have a name in datadirs that can be asked, the one to be served first."""
    found = answers(datadirs, lambda datadir: _copies_in(datadir, name, is_saving))
    return sorted((copy for copies in found for copy in copies), key=lambda copy: copy.rank, reverse=True)


def _copies_in(datadir: Datadir, name: str, is_saving: IsSaving) -> list[Copy]:
    """The one, or none."""
    found = datadir.inspect(name)
    if found is None:
        return []
    status, held = found
    state = State.SAVING if is_saving(status) else held.state if held is not None else State.STALE
    return [Copy(datadir, status, state)]


def doubled(datadirs: Iterable[Datadir], breathe: Breathe = hold_breath) -> set[str]:
    """The names that lie in more than one of the datadirs that can be asked."""
    seen: set[str] = set()
    found: set[str] = set()
    for datadir in datadirs:
        for here in answers([datadir], lambda datadir: [e.name for e in paced(datadir.entries(), _PACE, breathe)]):
            for name in paced(here, _PACE, breathe):
                (found if name in seen else seen).add(name)
    return found


class Copies:
    """The names of a store that are known to be doubled."""

    def __init__(self, datadirs: Sequence[Datadir], is_saving: IsSaving, held: Held) -> None:
        """`held` gives the lock of a name."""
        self._datadirs = datadirs
        self._is_saving = is_saving
        self._held = held
        self._lock = threading.Lock()
        self._suspects: set[str] = set()  # guarded by _lock
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._found: Callable[[str], None] = lambda _name: None
        self.names: set[str] = set()  # changed under _lock, read without

    def watch(self, found: Callable[[str], None]) -> None:
        """Start to look, first through all datadirs; `found` is told each doubled name, as another copy may count."""
        self._found = found
        if len(self._datadirs) > 1:
            self._thread = threading.Thread(target=self._run, name="imgfs-copies", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread, but wait for no disk that hangs."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_STUCK_SECONDS if any_hangs(self._datadirs) else _END_SECONDS)

    def suspect(self, names: Iterable[str]) -> None:
        """Have somebody look soon whether names are doubled."""
        with self._lock:
            self._suspects.update(names)
        if not self._wake.is_set():
            self._wake.set()

    def look(self) -> None:
        """Look through all datadirs now."""
        self._settle(doubled(self._datadirs))

    def _run(self) -> None:
        suspects = self._found_in_all()
        while not self._closing.is_set():
            try:
                self._settle(suspects)
            except OSError as error:
                log.info("looking for images that lie in more than one datadir failed: %s", error)
            self._wake.wait()
            self._closing.wait(SETTLE_SECONDS)
            self._wake.clear()
            with self._lock:
                suspects, self._suspects = self._suspects, set()

    def _found_in_all(self) -> set[str]:
        try:
            return doubled(self._datadirs, lambda: self._closing.wait(_BREATH_SECONDS))
        except OSError as error:
            log.info("looking for images that lie in more than one datadir failed: %s", error)
            return set()

    def _settle(self, suspects: Iterable[str]) -> None:
        """Find out which names are doubled indeed; each is told once."""
        seen_twice = []
        for number, name in enumerate(suspects, 1):
            if name not in self.names and self._has_two(name):
                seen_twice.append(name)
            if number % _SLICE == 0 and self._closing.wait(_BREATH_SECONDS):  # most of the time is for requests
                return
        told = 0
        for name in () if self._closing.is_set() else sorted(seen_twice):
            with self._held(name):
                found = copies_of(name, self._datadirs, self._is_saving)
            if len(found) > 1:
                with self._lock:
                    self.names.add(name)
                self._found(name)
                told += 1
                if told <= MOST_TOLD:
                    log.warning("image %r lies in more than one datadir: %s; remove what is not wanted there",
                                name, described(found))  # fmt: skip
        if told > MOST_TOLD:
            log.warning("%d more images lie in more than one datadir; imgfs check names them", told - MOST_TOLD)

    def _has_two(self, name: str) -> bool:
        return sum(answers(self._datadirs, lambda datadir: datadir.find(name) is not None)) > 1

    def of(self, name: str) -> list[Copy]:
        """The copies of a doubled name, the served one first; a name that is doubled no more is forgotten."""
        found = copies_of(name, self._datadirs, self._is_saving)
        if len(found) < 2:
            with self._lock:
                self.names.discard(name)
        return found

    def require_single(self, name: str) -> None:
        """Raise NameDoubled for a name that would rise again if one copy went."""
        if name not in self.names:
            return
        found = self.of(name)
        if len(found) > 1:
            message = f"image {name!r} lies in more than one datadir: {described(found)}"
            log.warning("%s; it is neither removed nor renamed until what is not wanted is removed there", message)
            raise NameDoubled(f"{message}; remove what is not wanted there first")


def described(found: Sequence[Copy]) -> str:
    """Copies in one line, the served one first."""
    shown = [f"{copy.datadir.path} ({copy.state}, {copy.status.st_size} bytes)" for copy in found]
    return f"{shown[0]} is served, not {' and '.join(shown[1:])}"
