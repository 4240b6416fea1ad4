"""Workloads that write new images: until their digests are known, without waiting for that, several at once.

Before each, memory is touched (see memory.py), the same for every contender.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import fio, programs
from benchmarks.adding import NAME
from benchmarks.figures import Row
from benchmarks.measuring import Seat, Workload
from benchmarks.memory import MIB, touch, warm, write_image


@dataclass(frozen=True)
class Add(Workload):
    """Images are added, until their digests can be read."""

    sizes_mib: tuple[int, ...] = (16, 128, 1024)
    name = "add"
    rounds = 4
    reference = "limit"
    only_adding = True

    @property
    def summary(self) -> str:
        return (
            "Add an image, until its md5 and sha512 can be read: by cp into imgfs, by the driver of Glance, and "
            "by a bare script with two threads that hash and one that copies (the limit)"
        )

    def prepare(self, shared: Path) -> None:
        for size in self.sizes_mib:
            write_image(shared / f"source-{size}", size * MIB)

    def measure(self, seat: Seat) -> dict[Row, float]:
        assert seat.contender.add is not None
        measured = {}
        with seat.empty() as mounted:
            for size in self.sizes_mib:
                touch(size * MIB)
                warm(seat.shared / f"source-{size}")
                row = Row(f"add {size:,} MiB", "s", "adding", size)
                measured[row] = seat.contender.add(seat.shared / f"source-{size}", mounted.directory)
                (mounted.directory / NAME).unlink()
        return measured


@dataclass(frozen=True)
class Write(Workload):
    """cp, as long as cp takes."""

    size_mib: int = 512
    name = "write"

    @property
    def summary(self) -> str:
        return f"cp an image of {self.size_mib:,} MiB, until cp ends; nothing is synced, no digest awaited"

    def prepare(self, shared: Path) -> None:
        write_image(shared / "source", self.size_mib * MIB)

    def measure(self, seat: Seat) -> dict[Row, float]:
        with seat.empty() as mounted:
            touch(self.size_mib * MIB)
            warm(seat.shared / "source")
            start = time.perf_counter()
            programs.run("cp", seat.shared / "source", mounted.directory / "copy")
            seconds = time.perf_counter() - start
            (mounted.directory / "copy").unlink()
        return {Row("write with cp", "MiB/s"): self.size_mib / seconds}


@dataclass(frozen=True)
class WriteAtOnce(Workload):
    """Several processes write, each its own image."""

    size_mib: int = 32
    processes: tuple[int, ...] = (1, 2, 4, 8)
    name = "writers"
    rounds = 3

    @property
    def summary(self) -> str:
        return f"Write images of {self.size_mib:,} MiB, each by a process of its own (1 MiB a write; fio, psync)"

    def measure(self, seat: Seat) -> dict[Row, float]:
        measured = {}
        with seat.empty() as mounted:
            for count in self.processes:
                paths = [mounted.directory / f"image-{count}-{number}" for number in range(count)]
                touch(count * self.size_mib * MIB)
                row = Row(f"{count} writing at once", "MiB/s", "writers", count)
                measured[row] = fio.writes(paths, self.size_mib * MIB) / MIB
                _remove(paths)
        return measured


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink()
