"""How long creating, removing, looking up, listing and reading take: imgfs beside a bare directory and its peers.

Run as root from a checkout, with a directory on the filesystem to measure (a real disk, not tmpfs):

    python benchmarks/metadata.py /var/tmp/bench
    python benchmarks/metadata.py /var/tmp/bench --contender 'loopback=python loopback.py {first} {mountpoint}'

imgfs is mounted by its command line over two datadirs; mergerfs, where it is installed, over two like them; further
contenders by a command that serves `{mountpoint}` in the foreground from `{first}` and `{second}`. An absolute time
means little on a shared machine, so the contenders take turns: every round measures each of them once, on a fresh
mount and in fresh directories. Shown are medians and, behind them, the fastest and the slowest round.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CREATED = 1_000
LISTED = 5_000
READ_BYTES = 1 << 30
RANDOM_READ_SECONDS = 3
MOUNT_SECONDS = 20.0

Mount = Callable[[list[Path], Path], contextlib.AbstractContextManager[Path]]
Measure = Callable[[Path], dict[str, float]]


@dataclass(frozen=True)
class Contender:
    """Who is measured: `mount` serves some directories on a mountpoint, and gives the directory to work in."""

    name: str
    directories: int
    mount: Mount


@dataclass(frozen=True)
class Workload:
    """What is measured: `prepare` fills the directories below, `measure` gives a figure for each of its rows."""

    prepare: Callable[[list[Path]], None]
    measure: Measure


# --- contenders ---


@contextlib.contextmanager
def bare(directories: list[Path], _mountpoint: Path) -> Iterator[Path]:
    """No filesystem between."""
    yield directories[0]


@contextlib.contextmanager
def imgfs(directories: list[Path], mountpoint: Path) -> Iterator[Path]:
    """imgfs by its command line, the first datadir preferred."""
    config = mountpoint.with_suffix(".json")  # JSON is YAML
    datadirs = [f"{path}:{priority}" for path, priority in zip(directories, (200, 100), strict=True)]
    config.write_text(json.dumps({"datadirs": datadirs}))
    command = [sys.executable, "-m", "imgfs"]
    with serving(
        [*command, "mount", "--foreground", "--transport", "kernel", str(config), str(mountpoint)], mountpoint
    ):
        yield mountpoint


def by_command(template: str) -> Mount:
    """Whoever is started by a command and serves until it is unmounted."""

    @contextlib.contextmanager
    def mount(directories: list[Path], mountpoint: Path) -> Iterator[Path]:
        first, second = directories[0], directories[-1]
        command = [word.format(first=first, second=second, mountpoint=mountpoint) for word in shlex.split(template)]
        with serving(command, mountpoint):
            yield mountpoint

    return mount


@contextlib.contextmanager
def serving(command: list[str], mountpoint: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that serves a mountpoint, from the moment it answers until it has ended."""
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + MOUNT_SECONDS
        while not os.path.ismount(mountpoint):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{shlex.join(command)} does not mount")
            time.sleep(0.02)
        yield process
    finally:
        subprocess.run(["umount", str(mountpoint)], check=False)
        process.wait(MOUNT_SECONDS)


def contenders(further: list[str]) -> list[Contender]:
    """Those that are installed here."""
    found = [Contender("bare", 1, bare), Contender("imgfs", 2, imgfs)]
    if shutil.which("mergerfs"):
        options = "allow_other,use_ino,cache.files=auto-full,category.create=ff,minfreespace=1M"
        found.append(
            Contender("mergerfs", 2, by_command(f"mergerfs -f -o {options} {{first}}:{{second}} {{mountpoint}}"))
        )
    for name, _, template in (item.partition("=") for item in further):
        found.append(Contender(name, 2 if "{second}" in template else 1, by_command(template)))
    return found


# --- workloads ---


def nothing(_directories: list[Path]) -> None:
    """Start with empty directories."""


def fill(count: int) -> Callable[[list[Path]], None]:
    """Spread `count` empty files evenly."""

    def prepare(directories: list[Path]) -> None:
        for number in range(count):
            (directories[number % len(directories)] / f"image-{number:06d}").touch()

    return prepare


def create_and_unlink(directory: Path) -> dict[str, float]:
    """Each file is removed as soon as it is closed."""
    names = [str(directory / f"image-{number:06d}") for number in range(CREATED)]
    start = time.perf_counter()
    for name in names:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        os.unlink(name)
    return {f"create and unlink, {CREATED:,} times, ms": milliseconds_since(start)}


def create_then_unlink(directory: Path) -> dict[str, float]:
    """All files are created before the first is removed."""
    names = [str(directory / f"image-{number:06d}") for number in range(CREATED)]
    start = time.perf_counter()
    for name in names:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    created = milliseconds_since(start)
    start = time.perf_counter()
    for name in names:
        os.unlink(name)
    unlinked = milliseconds_since(start)
    return {
        f"create {CREATED:,}, ms": created,
        "then unlink them, ms": unlinked,
        "both, ms": created + unlinked,
    }


def stat_cold(directory: Path) -> dict[str, float]:
    """Every name is looked up for the first time."""
    names = [str(directory / f"image-{number:06d}") for number in range(LISTED)]
    start = time.perf_counter()
    for name in names:
        os.stat(name)
    return {f"stat {LISTED:,} names, cold, ms": milliseconds_since(start)}


def list_twice(directory: Path) -> dict[str, float]:
    """`ls -l` on a fresh mount, and once more at once."""
    return {
        f"`ls -l` of {LISTED:,}, cold, ms": _ls(directory),
        "`ls -l` once more, ms": _ls(directory),
    }


def _ls(directory: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["ls", "-l", str(directory)], stdout=subprocess.DEVNULL, check=True)
    return milliseconds_since(start)


def one_big(directories: list[Path]) -> None:
    """One file of READ_BYTES, in the page cache and on the disk."""
    block = random.randbytes(1 << 20)
    with (directories[0] / "big").open("wb", buffering=0) as file:
        for _ in range(READ_BYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())


def read_big(directory: Path) -> dict[str, float]:
    """Warm reads by one thread, in order and at random."""
    path = str(directory / "big")
    _read_through(path)
    buffer = bytearray(1 << 20)
    start = time.perf_counter()
    for _ in range(4):
        _read_through(path, buffer)
    seconds = (time.perf_counter() - start) / 4
    return {
        "sequential read of 1 GiB, warm, MiB/s": READ_BYTES / (1 << 20) / seconds,
        "random reads of 4 KiB, warm, thousand/s": _random_reads(path) / 1000,
    }


def _read_through(path: str, buffer: bytearray | None = None) -> None:
    buffer = buffer or bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _random_reads(path: str) -> float:
    """By fio, since an interpreter would be slower than the reads."""
    if not shutil.which("fio"):
        return float("nan")
    command = ["fio", "--name=random", f"--filename={path}", "--readwrite=randread", "--bs=4k", "--ioengine=psync"]
    command += ["--invalidate=0", "--fadvise_hint=0", "--readonly", f"--runtime={RANDOM_READ_SECONDS}"]
    command += ["--time_based", "--output-format=json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    iops: float = json.loads(done.stdout)["jobs"][0]["read"]["iops"]
    return iops


def milliseconds_since(start: float) -> float:
    """Of time.perf_counter()."""
    return (time.perf_counter() - start) * 1000


WORKLOADS = {
    "create-and-unlink": Workload(nothing, create_and_unlink),
    "create-then-unlink": Workload(nothing, create_then_unlink),
    "stat": Workload(fill(LISTED), stat_cold),
    "list": Workload(fill(LISTED), list_twice),
    "read": Workload(one_big, read_big),
}


# --- measuring ---

Figures = dict[str, dict[str, list[float]]]  # row -> contender -> one figure for each round


def measure(where: Path, rounds: int, workloads: list[Workload], found: list[Contender]) -> Figures:
    """Every contender takes its turn in every round."""
    figures: Figures = {}
    for workload in workloads:
        for _ in range(rounds):
            for contender in found:
                for row, value in measure_once(where, workload, contender).items():
                    figures.setdefault(row, {}).setdefault(contender.name, []).append(value)
    return figures


def spread(where: Path) -> None:
    """Have ext4 put each subdirectory into another block group (chattr(1), T).

    In a group with many inodes that were removed a short while ago it searches long for a free one.
    """
    subprocess.run(["chattr", "+T", str(where)], check=False, stderr=subprocess.DEVNULL)


def measure_once(where: Path, workload: Workload, contender: Contender) -> dict[str, float]:
    """One workload, on a fresh mount and in fresh directories."""
    with tempfile.TemporaryDirectory(dir=where) as scratch:
        directories = [Path(scratch, f"datadir{number}") for number in range(contender.directories)]
        mountpoint = Path(scratch, "mount")
        for path in [*directories, mountpoint]:
            path.mkdir()
        workload.prepare(directories)
        os.sync()
        with contender.mount(directories, mountpoint) as directory:
            return workload.measure(directory)


def resident_bytes(where: Path, images: int) -> int:
    """What the daemon holds in memory after `ls -l` of so many images (VmRSS, proc(5))."""
    with tempfile.TemporaryDirectory(dir=where) as scratch:
        datadirs, mountpoint = [Path(scratch, "one"), Path(scratch, "two")], Path(scratch, "mount")
        for path in [*datadirs, mountpoint]:
            path.mkdir()
        fill(images)(datadirs)
        with imgfs(datadirs, mountpoint):
            _ls(mountpoint)
            daemon = subprocess.run(
                ["pgrep", "-f", f"imgfs mount.*{mountpoint}"], stdout=subprocess.PIPE, text=True, check=True
            )
            status = Path("/proc", daemon.stdout.split()[0], "status").read_text()
            return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS"))


def table(figures: Figures, found: list[Contender]) -> str:
    """In Markdown: a row for each measurement, a column for each contender."""
    names = [contender.name for contender in found]
    lines = [f"| | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    lines += [f"| {row} | {' | '.join(_cell(by_name[name]) for name in names)} |" for row, by_name in figures.items()]
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def main() -> None:
    """Measure what the arguments ask for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("where", type=Path, help="a directory on the filesystem to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", choices=WORKLOADS, help="a workload (default: all)")
    parser.add_argument("--contender", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument(
        "--images", type=int, default=0, help="also show the memory in use with so many images listed"
    )
    parsed = parser.parse_args()
    parsed.where.mkdir(parents=True, exist_ok=True)
    spread(parsed.where)
    found = contenders(parsed.contender)
    chosen = [WORKLOADS[name] for name in parsed.only or WORKLOADS]
    figures = measure(parsed.where, parsed.rounds, chosen, found)
    print(f"Linux {platform.release()}, {os.cpu_count()} cores, Python {platform.python_version()}; ", end="")
    print(f"medians of {parsed.rounds} rounds (fastest to slowest)\n")
    print(table(figures, found))
    if parsed.images:
        resident = resident_bytes(parsed.where, parsed.images) >> 20
        print(f"\nResident with {parsed.images:,} images listed: {resident} MiB")


if __name__ == "__main__":
    main()
