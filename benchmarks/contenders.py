"""Who is measured. To add a contender, add an entry to CONTENDERS.

A contender serves one directory (or joins two) at a mountpoint, by a command that stays in the foreground until it is
unmounted; or it adds images with digests; or both.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import adding
from benchmarks.programs import Failed
from imgfs.mount_table import mounted_at

MOUNT_SECONDS = 30.0

Command = Callable[[list[Path], Path], list[str]]


@dataclass(frozen=True)
class Contender:
    """Who is measured: how many directories it joins, the command that serves them, how it adds an image."""

    name: str
    summary: str
    directories: int = 1
    command: Command | None = None
    add: adding.Add | None = None
    only_adds: bool = False
    needs: str = ""  # a program

    def is_installed(self) -> bool:
        """Whether it can be measured here."""
        return not self.needs or shutil.which(self.needs) is not None


@dataclass(frozen=True)
class Mounted:
    """A directory to work in; who serves it (None: nobody), and when that was started (time.perf_counter)."""

    directory: Path
    daemon: int | None = None
    started: float = 0.0


def imgfs(*options: str) -> Command:
    """imgfs by its command line, the first datadir preferred."""

    def command(directories: list[Path], mountpoint: Path) -> list[str]:
        config = mountpoint.with_suffix(".json")  # JSON is YAML
        priorities = zip(directories, (200, 100), strict=True)
        config.write_text(json.dumps({"datadirs": [f"{path}:{priority}" for path, priority in priorities]}))
        return [sys.executable, "-m", "imgfs", "mount", "--foreground", *options, str(config), str(mountpoint)]

    return command


def mergerfs(directories: list[Path], mountpoint: Path) -> list[str]:
    """mergerfs with its page cache on, and the first directory preferred, as imgfs does."""
    options = "allow_other,use_ino,cache.files=auto-full,category.create=ff,minfreespace=1M"
    return ["mergerfs", "-f", "-o", options, ":".join(map(str, directories)), str(mountpoint)]


def loopback(module: str) -> Command:
    """A loopback in Python."""

    def command(directories: list[Path], mountpoint: Path) -> list[str]:
        return [sys.executable, "-m", "benchmarks.loopback", module, str(directories[0]), str(mountpoint)]

    return command


CONTENDERS = (
    Contender("bare", "the bare directory"),
    Contender("imgfs", "imgfs, kernel transport, passthrough", 2, imgfs("--transport", "kernel"), adding.by_cp),
    Contender(  # adds as the one before does
        "imgfs-no-passthrough",
        "imgfs, kernel transport, every read by the daemon",
        2,
        imgfs("--transport", "kernel", "--no-passthrough"),
    ),
    Contender("imgfs-fusepy", "imgfs, fusepy transport", 2, imgfs("--transport", "fusepy"), adding.by_cp),
    Contender("mergerfs", "mergerfs (C++), as Debian has it", 2, mergerfs, needs="mergerfs"),
    Contender("fusepy", "a loopback on fusepy (Python, libfuse 2)", 1, loopback("fusepy")),
    Contender("mfusepy", "a loopback on mfusepy (Python, libfuse 3)", 1, loopback("mfusepy")),
    Contender("limit", "two threads that hash beside one that copies", add=adding.by_bare_threads, only_adds=True),
    Contender("glance_store", "the filesystem driver of Glance", add=adding.by_glance_store, only_adds=True),
)


@contextlib.contextmanager
def serving(contender: Contender, directories: list[Path], mountpoint: Path) -> Iterator[Mounted]:
    """A contender at work, from the moment its mountpoint answers until it has ended."""
    if contender.command is None:
        yield Mounted(directories[0])
        return
    mountpoint.mkdir(parents=True, exist_ok=True)
    command = contender.command(directories, mountpoint)
    environment = os.environ | {"FUSE_LIBRARY_NAME": "fuse3"}  # mfusepy takes libfuse 2 else
    started = time.perf_counter()
    # In a session of its own: Ctrl-C is for the benchmark, which unmounts in order.
    log = mountpoint.with_suffix(".log")
    with log.open("wb") as file:
        daemon = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    try:
        if not _answers(mountpoint, daemon):
            raise Failed(f"nothing is mounted by {shlex.join(command)}: {log.read_text().strip()}")
        yield Mounted(mountpoint, daemon.pid, started)
    finally:
        _end(mountpoint, daemon)


def _answers(mountpoint: Path, daemon: subprocess.Popen[bytes]) -> bool:
    """Wait until something is mounted; whether that came."""
    deadline = time.monotonic() + MOUNT_SECONDS
    while not os.path.ismount(mountpoint):
        if daemon.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def _end(mountpoint: Path, daemon: subprocess.Popen[bytes]) -> None:
    """Unmount and wait for the daemon; one that has not mounted yet, or does not end, is ended. Nothing stays."""
    with _uninterrupted():
        if mounted_at(str(mountpoint)) is None or not _unmount(mountpoint):
            daemon.terminate()
        try:
            daemon.wait(MOUNT_SECONDS)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        if mounted_at(str(mountpoint)) is not None:
            _unmount(mountpoint, "--lazy")


def _unmount(mountpoint: Path, *options: str) -> bool:
    return subprocess.run(["umount", *options, mountpoint], check=False).returncode == 0


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
