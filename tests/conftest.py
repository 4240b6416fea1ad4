"""Fixtures: stores, real mounts, small real filesystems to be datadirs, a second user.

A test that needs root, /dev/fuse or a client program fails where it has none; nothing is skipped. At the end of each
test no mount, no process and no loop device of its own may be left, and the daemon's log may hold no warning that
the test did not expect.
"""

import contextlib
import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from imgfs import ImageStore, load, mounts
from tests.faulty import Faulty

IMGFS = [sys.executable, "-m", "imgfs"]
WAIT_SECONDS = 30.0


def wait_until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Wait for something to become true; fail where it does not within WAIT_SECONDS."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {WAIT_SECONDS} s"
        time.sleep(0.01)


def run(*command: object, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a client program; it must succeed (unless `check` is False) and is shown with what it said otherwise."""
    done = subprocess.run([os.fspath(c) if isinstance(c, Path) else str(c) for c in command],
                          capture_output=True, text=True, timeout=100, check=False, **options)  # fmt: skip
    if check:
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def attribute(path: os.PathLike[str] | str, name: str) -> str:
    """An attribute `user.imgfs.NAME` of an image on a mount."""
    return os.fsdecode(os.getxattr(path, f"user.imgfs.{name}"))


@dataclass
class Mounted:
    """An imgfs that is mounted at `path`, served by `daemon`, with its datadirs and log at hand."""

    path: Path
    datadirs: list[Path]
    config: Path
    log: Path
    daemon: subprocess.Popen[bytes]
    expected_warnings: list[str] = field(default_factory=list)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def expect_warning(self, pattern: str) -> None:
        """A warning or error in the log that matches is part of the test."""
        self.expected_warnings.append(pattern)

    def wait_for_log(self, text: str) -> None:
        """Until the log has it: the daemon may say so a moment after what can be seen from outside."""
        wait_until(lambda: text in self.log.read_text(), f"{text!r} in the log")

    def unmount(self) -> int:
        """Unmount, wait for the daemon; its exit code."""
        if self.daemon.poll() is None:
            if mounts.is_imgfs(self.path):
                mounts.unmount(str(self.path))
            return self.daemon.wait(WAIT_SECONDS)
        return self.daemon.returncode

    def unexpected_log_lines(self) -> list[str]:
        """Warnings and worse that no test asked for."""
        lines = self.log.read_text(errors="replace").splitlines()
        bad = [line for line in lines if re.search(r"WARNING|ERROR|CRITICAL|Traceback", line)]
        return [line for line in bad if not any(re.search(p, line) for p in self.expected_warnings)]


class Mounter:
    """Makes mounts and unmounts them at the end of the test."""

    def __init__(self, tmp_path: Path, transport: str) -> None:
        self._tmp_path = tmp_path
        self.transport = transport
        self.verbosity = "-v"
        self._mounted: list[Mounted] = []

    def __call__(
        self, datadirs: list[object] | None = None, options: tuple[str, ...] = (), **settings: object
    ) -> Mounted:
        """Mount a store; `datadirs` as in a configuration (default: two, of priority 200 and 100)."""
        number = len(self._mounted)
        base = self._tmp_path / f"store{number}"
        mountpoint = base / "images"
        mountpoint.mkdir(parents=True)
        base.chmod(0o755)
        config = write_config(base, datadirs, **settings)
        return self.mount(config, mountpoint, options)

    def mount(self, config: Path, mountpoint: Path, options: tuple[str, ...] = ()) -> Mounted:
        """Mount an existing configuration at an existing directory."""
        log = config.parent / f"log{len(self._mounted)}"
        with open(log, "wb") as output:
            daemon = subprocess.Popen(
                [*IMGFS, self.verbosity, "mount", "--foreground", "--transport", self.transport, *options, config,
                 mountpoint],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        wait_until(lambda: daemon.poll() is not None or mounts.is_imgfs(mountpoint), "the mount")
        assert daemon.poll() is None, f"the mount ended: {log.read_text(errors='replace')}"
        os.statvfs(mountpoint)
        paths = [Path(d.path) for d in load(config).datadirs]
        mounted = Mounted(mountpoint, paths, config, log, daemon)
        self._mounted.append(mounted)
        return mounted

    def finish(self) -> None:
        """Unmount everything; then look into the logs."""
        codes = [mounted.unmount() for mounted in reversed(self._mounted)]
        assert codes == [0] * len(codes), [mounted.log.read_text(errors="replace") for mounted in self._mounted]
        assert [line for mounted in self._mounted for line in mounted.unexpected_log_lines()] == []

    def clean_up(self) -> None:
        """Whatever happened: leave nothing."""
        for mounted in reversed(self._mounted):
            if mounted.daemon.poll() is None:
                mounted.daemon.kill()
                mounted.daemon.wait()
            if mounts.is_imgfs(mounted.path):
                mounts.detach(str(mounted.path))


def write_config(base: Path, datadirs: list[object] | None = None, **settings: object) -> Path:
    """Write `base/imgfs.yaml`; datadirs default to high:200 and low:100 below `base`."""
    config = base / "imgfs.yaml"
    places = [str(d) if isinstance(d, Path) else d for d in datadirs or ["high:200", "low:100"]]
    config.write_text(yaml.safe_dump({"datadirs": places, **settings}))
    return config


class FaultyMaker:
    """Makes directories that fail on command, and ends them at the end of the test."""

    def __init__(self, tmp_path: Path) -> None:
        self._tmp_path = tmp_path
        self.made: list[Faulty] = []

    def __call__(self) -> Faulty:
        """A directory that fails on command, to be a datadir."""
        number = len(self.made)
        self.made.append(Faulty(self._tmp_path / f"below{number}", self._tmp_path / f"faulty{number}"))
        return self.made[-1]

    def heal(self) -> None:
        """No fault any more: what uses them can end."""
        for made in self.made:
            if made.process.poll() is None:
                made.heal()


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyMaker]:
    """Call it to get a directory that fails on command, to be a datadir; see Faulty."""
    maker = FaultyMaker(tmp_path)
    try:
        yield maker
    finally:
        for made in maker.made:
            made.end()


@pytest.fixture(autouse=True)
def reachable(tmp_path: Path) -> None:
    """Let other users reach the files of a test."""
    for directory in (tmp_path, *tmp_path.parents):
        if not directory.stat().st_mode & stat.S_IXOTH:
            directory.chmod(0o755)


@pytest.fixture(params=["kernel", "fusepy"])
def mount(tmp_path: Path, faulty: FaultyMaker, request: pytest.FixtureRequest) -> Iterator[Mounter]:
    """Call it to get a mounted store, once for each transport; see Mounter."""
    mounter = Mounter(tmp_path, request.param)
    try:
        yield mounter
        faulty.heal()
        mounter.finish()
    finally:
        faulty.heal()
        mounter.clean_up()


@pytest.fixture
def open_store(tmp_path: Path, faulty: FaultyMaker) -> Iterator[Callable[..., ImageStore]]:
    """Call it with datadirs and settings to get an ImageStore without a mount, closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(datadirs: list[object] | None = None, **settings: object) -> ImageStore:
            return stack.enter_context(ImageStore(load(write_config(tmp_path, datadirs, **settings))))

        yield make
        faulty.heal()


@pytest.fixture
def filesystem(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Call it with a type (ext4, xfs, btrfs, tmpfs, ramfs) and a size in MiB to get one mounted for the test."""
    with contextlib.ExitStack() as stack:

        def make(kind: str = "ext4", mib: int = 16, options: str = "rw") -> Path:
            number = len(list(tmp_path.glob("fs*")))
            place = tmp_path / f"fs{number}"
            place.mkdir()
            if kind in ("tmpfs", "ramfs"):
                run("mount", "-t", kind, "-o", f"{options},size={mib}M", kind, place)
            else:
                disk = tmp_path / f"disk{number}"
                with open(disk, "wb") as file:
                    file.truncate(mib << 20)
                run(f"mkfs.{kind}", *(["-q", "-m", "0"] if kind == "ext4" else ["-q"]), disk)
                run("mount", "-o", f"loop,{options}", disk, place)
            stack.callback(_unmount_filesystem, place)
            shutil.rmtree(place / "lost+found", ignore_errors=True)
            place.chmod(0o755)
            return place

        yield make


def _unmount_filesystem(place: Path) -> None:
    """Unmount it; if somebody still uses it, the test fails, but nothing is left behind."""
    if run("umount", place, check=False).returncode != 0:
        run("umount", "--lazy", place)
        pytest.fail(f"{place} was still in use at the end")


@pytest.fixture
def fuse_for_everybody() -> Iterator[None]:
    """Let all users open /dev/fuse, as udev does and a container may not; for one test at a time."""
    device = Path("/dev/fuse")
    with open(Path(tempfile.gettempdir()) / "imgfs-tests.dev-fuse.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mode = stat.S_IMODE(device.stat().st_mode)
        device.chmod(0o666)
        yield
        device.chmod(mode)


@pytest.fixture(scope="session")
def second_user() -> int:
    """The uid of a real user who is not root (nobody)."""
    return 65534
