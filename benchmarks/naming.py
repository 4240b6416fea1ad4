"""Workloads about names rather than bytes: creating and removing images, looking up and listing few and many."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import programs
from benchmarks.figures import Row
from benchmarks.measuring import Seat, Workload, share
from benchmarks.memory import MIB

LOOKED_UP = 1_000
LISTED_TWICE = 10_000  # more take some contenders half a minute


@dataclass(frozen=True)
class CreateAndUnlink(Workload):
    """Many empty images are created, then all are removed."""

    count: int = 1_000
    name = "create"

    @property
    def summary(self) -> str:
        return f"Create {self.count:,} empty images, then remove them, in fresh directories"

    def measure(self, seat: Seat) -> dict[Row, float]:
        with seat.empty() as mounted:
            paths = [str(mounted.directory / f"image-{number:06}") for number in range(self.count)]
            start = time.perf_counter()
            for path in paths:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            created = time.perf_counter()
            for path in paths:
                os.unlink(path)
            unlinked = time.perf_counter()
        return {
            Row(f"create {self.count:,} images", "ms"): (created - start) * 1000,
            Row(f"remove {self.count:,} images", "ms"): (unlinked - created) * 1000,
        }


@dataclass(frozen=True)
class Names(Workload):
    """A mount over a number of images: its start, lookups, listings, memory."""

    count: int = 1_000
    rounds: int = 5

    @property
    def name(self) -> str:
        return f"names-{self.count}"

    @property
    def summary(self) -> str:
        return (
            f"With {self.count:,} images: from the start of the command until one name answers; stat of at most "
            f"{LOOKED_UP:,} names, none asked for before; on another fresh mount `ls -l`, and what the daemon then "
            "holds in memory"
        )

    def prepare(self, shared: Path) -> None:
        share(shared, [_name(number) for number in range(self.count)], Path.touch, link=False)

    def measure(self, seat: Seat) -> dict[Row, float]:
        return self._start_and_look_up(seat) | self._list(seat)

    def _start_and_look_up(self, seat: Seat) -> dict[Row, float]:
        step = max(self.count // LOOKED_UP, 1)
        measured = {}
        with seat.shared_images() as mounted:
            paths = [str(mounted.directory / _name(number)) for number in range(0, self.count, step)]
            programs.run("ls", paths.pop())
            if mounted.daemon is not None:
                measured[self._row("start", "ms")] = (time.perf_counter() - mounted.started) * 1000
            start = time.perf_counter()
            for path in paths:
                os.stat(path)
            measured[self._row("stat of a name", "µs")] = (time.perf_counter() - start) * 1e6 / len(paths)
        return measured

    def _list(self, seat: Seat) -> dict[Row, float]:
        with seat.shared_images() as mounted:
            measured = {self._row("ls -l", "ms"): _list(mounted.directory)}
            if self.count <= LISTED_TWICE:
                measured[self._row("ls -l once more", "ms")] = _list(mounted.directory)
            if mounted.daemon is not None:
                measured[self._row("resident memory", "MiB")] = _resident_bytes(mounted.daemon) / MIB
        return measured

    def _row(self, what: str, unit: str) -> Row:
        return Row(f"{what}, {self.count:,} images", unit, what, self.count)


def _name(number: int) -> str:
    return f"image-{number:06}"


def _list(directory: Path) -> float:
    """The milliseconds of one `ls -l`."""
    start = time.perf_counter()
    programs.run("ls", "-l", directory)
    return (time.perf_counter() - start) * 1000


def _resident_bytes(pid: int) -> int:
    """VmRSS of proc(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))
