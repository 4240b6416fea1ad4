"""Workloads that read images at rest: in order, at random, several at once, sparse ones by qemu-img."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import fio, programs
from benchmarks.figures import Row
from benchmarks.measuring import Seat, Workload, share
from benchmarks.memory import MIB, warm, write_image


@dataclass(frozen=True)
class Read(Workload):
    """One process reads one image."""

    size_mib: int = 512
    random_seconds: float = 0.5
    name = "read"

    @property
    def summary(self) -> str:
        return (
            f"Read images of {self.size_mib:,} MiB on a fresh mount, the files below in the page cache: one in order "
            f"(1 MiB a read), once more, another one at random for {self.random_seconds:g} s (fio, psync)"
        )

    def prepare(self, shared: Path) -> None:
        share(shared, ["random", "ordered"], lambda path: write_image(path, self.size_mib * MIB), link=True)

    def measure(self, seat: Seat) -> dict[Row, float]:
        warm(seat.shared / "all" / "random")
        warm(seat.shared / "all" / "ordered")
        with seat.shared_images() as mounted:
            return {
                Row("random 4 KiB reads", "thousand/s"): fio.random_reads(
                    mounted.directory / "random", self.random_seconds
                )
                / 1000,
                Row("sequential read", "MiB/s"): fio.sequential([mounted.directory / "ordered"]) / MIB,
                Row("sequential read once more", "MiB/s"): fio.sequential([mounted.directory / "ordered"]) / MIB,
            }


@dataclass(frozen=True)
class ReadAtOnce(Workload):
    """Several processes read, each its own image."""

    size_mib: int = 64
    processes: tuple[int, ...] = (1, 2, 4, 8)
    name = "readers"
    rounds = 3

    @property
    def summary(self) -> str:
        return (
            f"Read images of {self.size_mib:,} MiB in order, each by a process of its own, the files below in memory"
        )

    def prepare(self, shared: Path) -> None:
        names = [name for count in self.processes for name in self._names(count)]
        share(shared, names, lambda path: write_image(path, self.size_mib * MIB), link=True)

    def measure(self, seat: Seat) -> dict[Row, float]:
        measured = {}
        with seat.shared_images() as mounted:
            for count in self.processes:
                for name in self._names(count):
                    warm(seat.shared / "all" / name)
                row = Row(f"{count} reading at once", "MiB/s", "readers", count)
                measured[row] = fio.sequential([mounted.directory / name for name in self._names(count)]) / MIB
        return measured

    def _names(self, count: int) -> list[str]:
        return [f"image-{count}-{number}" for number in range(count)]


@dataclass(frozen=True)
class ConvertSparse(Workload):
    """qemu-img reads an image that is mostly hole."""

    size_mib: int = 1024
    data_mib: int = 64
    name = "sparse"
    rounds = 3

    @property
    def summary(self) -> str:
        return f"qemu-img convert of a raw image of {self.size_mib:,} MiB with {self.data_mib:,} MiB of data to qcow2"

    def prepare(self, shared: Path) -> None:
        share(shared, ["sparse"], self._make, link=True)

    def _make(self, path: Path) -> None:
        write_image(path, self.data_mib * MIB)
        os.truncate(path, self.size_mib * MIB)

    def measure(self, seat: Seat) -> dict[Row, float]:
        warm(seat.shared / "all" / "sparse")
        with seat.shared_images() as mounted:
            start = time.perf_counter()
            source, target = mounted.directory / "sparse", seat.scratch / "converted"
            programs.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, target)
            return {Row("convert a sparse image", "s"): time.perf_counter() - start}
