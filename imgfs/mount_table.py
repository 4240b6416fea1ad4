"""The mount table: what is mounted where, from /proc/self/mountinfo (proc_pid_mountinfo(5))."""

import os
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the mount table."""

    mountpoint: str
    fstype: str
    source: str
    device: str
    """MAJOR:MINOR"""


def table() -> list[Mount]:
    """All mounts, in the order they were made."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        return [parse(line) for line in lines]


def parse(line: str) -> Mount:
    """One line of mountinfo: the optional fields end at a lone hyphen."""
    before, _, after = line.rstrip("\n").partition(" - ")
    fstype, source = after.split(" ")[:2]
    fields = before.split(" ")
    return Mount(_unescaped(fields[4]), fstype, _unescaped(source), fields[2])


def _unescaped(field: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), field)


def mounted_at(mountpoint: str) -> Mount | None:
    """What is mounted on top at an absolute path."""
    found = [mount for mount in table() if mount.mountpoint == mountpoint]
    return found[-1] if found else None


def holding(path: str) -> Mount | None:
    """The mount that a path lies on."""
    real = PurePosixPath(os.path.realpath(path))
    found = [mount for mount in table() if real.is_relative_to(mount.mountpoint)]
    return max(found, key=lambda mount: len(PurePosixPath(mount.mountpoint).parts), default=None)
