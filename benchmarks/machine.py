"""What a run was measured on and with, as a few lines of facts."""

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from imgfs.version import VERSION

_PROGRAMS = {"mergerfs": "mergerfs --version", "fio": "fio --version", "qemu-img": "qemu-img --version"}
_PACKAGES = ("fusepy", "mfusepy", "glance_store")


def facts(where: Path) -> dict[str, str]:
    """Name to value, in the order in which they should be read."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    commit = _said("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    return {
        "command": f"python -m benchmarks {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB of memory",
        "kernel": f"{platform.system()} {platform.release()}",
        "filesystem": _said("findmnt", "-no", "FSTYPE,OPTIONS", "-T", str(where)),
        "imgfs": f"{VERSION}, commit {commit}",
        "python": platform.python_version(),
        **{name: _said(*command.split()) for name, command in _PROGRAMS.items()},
        **{name: _version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _said(*command: str) -> str:
    """The first line a program prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not here"
    return done.stdout.strip().partition("\n")[0]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not here"
