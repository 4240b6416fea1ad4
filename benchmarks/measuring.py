"""Who takes their turn when: workload after workload, in each everybody, and the same again for the next round.

Each workload wants a number of rounds. They are given until the time is up: a turn that would not end in time, judged
by the longest one of its workload, is left out, but for the first of each. Everything lies in one directory that is
removed at the end, however that comes.
"""

import contextlib
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders import Contender, Mounted, serving
from benchmarks.figures import Results, Row
from benchmarks.programs import Failed

Say = Callable[[str], None]


@dataclass(frozen=True)
class Seat:
    """Where a contender works during its turn: what all share, prepared once, and room of its own, empty at first."""

    contender: Contender
    shared: Path
    scratch: Path

    def shared_images(self) -> contextlib.AbstractContextManager[Mounted]:
        """A fresh mount of the images that all share: in one directory, or half of them in each of two."""
        return serving(self.contender, shared_directories(self.shared, self.contender), self.scratch / "mount")

    @contextlib.contextmanager
    def empty(self) -> Iterator[Mounted]:
        """A fresh mount of empty directories."""
        directories = [self.scratch / f"directory{number}" for number in range(self.contender.directories)]
        for path in directories:
            path.mkdir()
        with serving(self.contender, directories, self.scratch / "mount") as mounted:
            yield mounted


def shared_directories(shared: Path, contender: Contender) -> list[Path]:
    """The directories in which `share` put the images."""
    return [shared / "all"] if contender.directories == 1 else [shared / "first", shared / "second"]


def share(shared: Path, names: list[str], make: Callable[[Path], None], *, link: bool) -> None:
    """Make images that each contender sees, be they in one directory or spread over two.

    With `link` they are the same files, so that all find the same in the page cache.
    """
    everything, halves = shared / "all", (shared / "first", shared / "second")
    for path in (everything, *halves):
        path.mkdir()
    for number, name in enumerate(names):
        make(everything / name)
        if link:
            (halves[number % 2] / name).hardlink_to(everything / name)
        else:
            make(halves[number % 2] / name)


class Workload(ABC):
    """What is measured; `rounds` is how often everybody should have their turn."""

    rounds = 5
    reference = "bare"
    only_adding = False  # whether it is about adding with digests, and so for those that can

    @property
    @abstractmethod
    def name(self) -> str:
        """One word, for --only."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """One line: what is done, with which sizes and in which state of the caches."""

    def prepare(self, shared: Path) -> None:  # noqa: B027  # most need nothing
        """Make what all contenders share."""

    @abstractmethod
    def measure(self, seat: Seat) -> dict[Row, float]:
        """Have one contender do the work."""

    def is_for(self, contender: Contender) -> bool:
        """Whether a contender can do the work."""
        return contender.add is not None if self.only_adding else not contender.only_adds


@dataclass(frozen=True)
class Turn:
    """One round of one workload."""

    number: int
    workload: Workload


def turns(workloads: list[Workload], rounds: int | None) -> list[Turn]:
    """All turns, the rounds of each workload spread over the whole run; when time is up, everybody lacks the last."""
    found = [Turn(number, each) for each in workloads for number in range(rounds or each.rounds)]
    return sorted(found, key=lambda turn: (turn.number + 1) / (rounds or turn.workload.rounds))


class Run:
    """The turns of one run, with the directory in which they happen."""

    def __init__(self, contenders: list[Contender], seconds: float, say: Say) -> None:
        self.results = Results(contenders={each.name: each.summary for each in contenders})
        self._contenders = contenders
        self._say = say
        self._started = time.monotonic()
        self._deadline = self._started + seconds
        self.failed: set[tuple[str, str]] = set()  # workload, contender
        self._cost: dict[str, float] = {}  # workload -> seconds of its longest turn

    def measure(self, workloads: list[Workload], rounds: int | None, where: Path) -> Results:
        """Have all turns that the time allows."""
        planned = turns(workloads, rounds)
        with _scratch(where) as base:
            for number, turn in enumerate(planned):
                if turn.number and time.monotonic() + self._cost[turn.workload.name] > self._deadline:
                    self._say(f"no time left for round {turn.number + 1} of {turn.workload.name}")
                    continue
                self._take(turn, base)
                self._report(number + 1, planned)
            self._say("removing what was measured with")
        return self.results

    def _take(self, turn: Turn, base: Path) -> None:
        workload = turn.workload
        shared = base / workload.name
        if turn.number == 0:
            shared.mkdir()
            workload.prepare(shared)
            subprocess.run(["sync", "--file-system", shared], check=True)  # nobody pays for writing it back
            self.results.workloads[workload.name] = workload.summary
            self.results.references[workload.name] = workload.reference
        started = time.monotonic()
        found = [contender for contender in self._contenders if workload.is_for(contender)]
        for contender in found if turn.number % 2 == 0 else reversed(found):
            self._measure(workload, contender, shared, base)
        self._cost[workload.name] = max(time.monotonic() - started, self._cost.get(workload.name, 0))

    def _measure(self, workload: Workload, contender: Contender, shared: Path, base: Path) -> None:
        """Have one contender do the work; one that fails sits out the rest, so that rounds stay comparable."""
        if (workload.name, contender.name) in self.failed:
            return
        try:
            self.results.add(workload.name, contender.name, _measure_once(workload, contender, shared, base))
        except (Failed, OSError) as error:
            self.failed.add((workload.name, contender.name))
            self._say(f"{contender.name} is left out of {workload.name} from here on: {error}")

    def _report(self, done: int, planned: list[Turn]) -> None:
        turn = planned[done - 1]
        left = [self._cost.get(each.workload.name) for each in planned[done:]]
        at_most = max(self._deadline - time.monotonic(), 0)
        estimate = f", about {_minutes(min(sum(c or 0 for c in left), at_most))} left" if None not in left else ""
        gone = _minutes(time.monotonic() - self._started)
        self._say(f"{done}/{len(planned)} {turn.workload.name}, round {turn.number + 1} ({gone} gone{estimate})")


def _measure_once(workload: Workload, contender: Contender, shared: Path, base: Path) -> dict[Row, float]:
    scratch = Path(tempfile.mkdtemp(dir=base))
    measured = workload.measure(Seat(contender, shared, scratch))
    shutil.rmtree(scratch)
    return measured


@contextlib.contextmanager
def _scratch(where: Path) -> Iterator[Path]:
    """A directory for the run.

    ext4 searches long for a free inode in a group where many were removed a short while ago, so it is told to put
    each subdirectory into another group (chattr(1), T).
    """
    with tempfile.TemporaryDirectory(prefix="imgfs-benchmarks-", dir=where) as base:
        subprocess.run(["chattr", "+T", base], check=False, stderr=subprocess.DEVNULL)
        yield Path(base)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
