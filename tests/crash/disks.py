"""Disks that remember every write, so that a power cut at any moment can be looked at afterwards.

A small FUSE filesystem, in a process of its own, holds the disks as files; loop devices make block devices of them.
Each write and each flush that reaches a disk is appended to one log before it is answered, whichever disk it is for,
so a position in the log is a moment of all of them. What a power cut at that moment leaves on a disk is what was
flushed by then, and any choice of what was written since: disks keep unflushed writes in a volatile cache.
"""

import argparse
import contextlib
import errno
import mmap
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuse

from tests.conftest import run, wait_until

ENTRY = struct.Struct("<BxHIQ")  # kind, disk, length in bytes, offset in bytes; the data of a write follows
WRITE, FLUSH = 1, 2


class RecordingDisks(fuse.Operations):  # type: ignore[misc]
    """The disks `0`, `1`, ... as files; fusepy calls the methods, from several threads."""

    def __init__(self, disks: list[Path], log: Path) -> None:
        self._bytes = [_loaded(disk) for disk in disks]
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        self._lock = threading.Lock()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        try:
            return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": len(self._bytes[int(path[1:])])}
        except (ValueError, IndexError):
            raise fuse.FuseOSError(errno.ENOENT) from None

    def open(self, path: str, flags: int) -> int:
        return int(path[1:])

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return self._bytes[fh][offset : offset + size]

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        with self._lock:
            os.writev(self._log, [ENTRY.pack(WRITE, fh, len(data), offset), data])
            self._bytes[fh][offset : offset + len(data)] = data
        return len(data)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        with self._lock:
            os.write(self._log, ENTRY.pack(FLUSH, fh, 0, 0))
        return 0


def _loaded(disk: Path) -> mmap.mmap:
    """A copy in memory; what are zeros takes no room."""
    memory = mmap.mmap(-1, disk.stat().st_size)
    with open(disk, "rb") as file:
        for at in range(0, len(memory), 1 << 16):
            block = file.read(1 << 16)
            if any(block):
                memory[at : at + len(block)] = block
    return memory


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log: a write, or a flush (no data), that was there from `end` on."""

    end: int
    kind: int
    disk: int
    offset: int
    data: bytes


def entries(log: Path) -> Iterator[Entry]:
    """What reached the disks, in order."""
    with open(log, "rb") as file:
        while len(head := file.read(ENTRY.size)) == ENTRY.size:
            kind, disk, length, offset = ENTRY.unpack(head)
            data = file.read(length)
            yield Entry(file.tell(), kind, disk, offset, data)


class PowerCuts:
    """The disks as a power cut would have left them, at positions of the log that only go up."""

    def __init__(self, disks: list[Path], log: Path, place: Path) -> None:
        self._flushed = [place / f"flushed{number}" for number in range(len(disks))]
        for disk, flushed in zip(disks, self._flushed, strict=True):
            _copy(disk, flushed)
        self._files = [os.open(flushed, os.O_WRONLY) for flushed in self._flushed]
        self._entries = entries(log)
        self._next = next(self._entries, None)
        self._cached: list[list[Entry]] = [[] for _ in disks]  # written, not flushed

    def close(self) -> None:
        for fd in self._files:
            os.close(fd)

    def at(self, position: int, chance: random.Random, targets: list[Path]) -> None:
        """Make the files `targets` the disks after a power cut at a position."""
        while self._next is not None and self._next.end <= position:
            self._take(self._next)
            self._next = next(self._entries, None)
        for number, target in enumerate(targets):
            _copy(self._flushed[number], target)
            keeps = chance.choice([0.0, 0.5, 0.9, 1.0])
            with open(target, "r+b") as file:
                for entry in self._cached[number]:
                    if chance.random() < keeps:
                        file.seek(entry.offset)
                        file.write(entry.data)

    def _take(self, entry: Entry) -> None:
        if entry.kind == WRITE:
            self._cached[entry.disk].append(entry)
            return
        for written in self._cached[entry.disk]:
            os.pwrite(self._files[entry.disk], written.data, written.offset)
        self._cached[entry.disk].clear()


def _copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    run("cp", "--sparse=always", source, target)


def make_disk(path: Path, kind: str, mib: int) -> None:
    """A disk with an empty filesystem."""
    with open(path, "wb") as file:
        file.truncate(mib << 20)
    run(f"mkfs.{kind}", "-q", path)


@contextlib.contextmanager
def attached(disk: Path, place: Path, options: str = "rw") -> Iterator[None]:
    """Have the filesystem of a disk mounted at a place."""
    device = run("losetup", "--find", "--show", "--direct-io=on", disk).stdout.strip()
    try:
        run("mount", "-o", options, device, place)
        shutil.rmtree(place / "lost+found", ignore_errors=True)
        try:
            yield
        finally:
            if run("umount", place, check=False).returncode != 0:
                run("umount", "--lazy", place)
                raise AssertionError(f"{place} was still in use:\n{run('fuser', '-vm', place, check=False).stderr}")
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def recording(disks: list[Path], log: Path, place: Path) -> Iterator[list[Path]]:
    """Serve copies of some disks that remember, in a process of its own; gives the files that are the disks."""
    place.mkdir()
    command = [sys.executable, "-m", "tests.crash.disks", log, place, *disks]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: server.poll() is not None or place.is_mount(), "the disks")
        assert server.poll() is None, "the disks are not served"
        yield [place / str(number) for number in range(len(disks))]
    finally:
        run("umount", "--lazy", place, check=False)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve disks that remember every write.")
    parser.add_argument("log", type=Path)
    parser.add_argument("place")
    parser.add_argument("disks", nargs="+", type=Path)
    arguments = parser.parse_args()
    settings: dict[str, Any] = {"foreground": True, "big_writes": True, "max_write": 1 << 17, "max_read": 1 << 17}
    fuse.FUSE(RecordingDisks(arguments.disks, arguments.log), arguments.place, fsname="disks", **settings)


if __name__ == "__main__":
    main()
