"""Reads and writes by fio(1): an interpreter would be slower than what is measured."""

import json
from pathlib import Path
from typing import Any

from benchmarks import programs

# What is in the page cache stays there, and the kernel is told nothing of what will be read.
WARM = ("--invalidate=0", "--fadvise_hint=0")


def sequential(paths: list[Path]) -> float:
    """Bytes per second at which one process for each file reads all of it, with requests of 1 MiB."""
    return _rate("read", ["--rw=read", "--bs=1M", *WARM], paths)


def writes(paths: list[Path], size_bytes: int) -> float:
    """Bytes per second at which one process for each file writes it, with requests of 1 MiB; nothing is synced."""
    new = ["--fallocate=none", "--create_on_open=1", f"--size={size_bytes}"]
    return _rate("write", ["--rw=write", "--bs=1M", *new, *WARM], paths)


def random_reads(path: Path, seconds: float) -> float:
    """Reads of 4 KiB in a second, by one process."""
    timed = ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
    jobs = _run(["--rw=randread", "--bs=4k", *WARM, *timed], [path])
    return float(jobs[0]["read"]["iops"])


def _rate(direction: str, options: list[str], paths: list[Path]) -> float:
    figures = [job[direction] for job in _run(options, paths)]
    seconds = max(figure["runtime"] for figure in figures) / 1000
    return float(sum(figure["io_bytes"] for figure in figures) / max(seconds, 0.001))


def _run(options: list[str], paths: list[Path]) -> list[dict[str, Any]]:
    command = ["fio", "--output-format=json", "--name=global", "--ioengine=psync", *options]
    for number, path in enumerate(paths):
        command += [f"--name=job{number}", f"--filename={path}"]
    jobs: list[dict[str, Any]] = json.loads(programs.run(*command))["jobs"]
    return jobs
