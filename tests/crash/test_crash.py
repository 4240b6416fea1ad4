"""Whatever ends the daemon or the machine, at whatever moment: no image that was complete is lost or wrong.

A workload runs over two datadirs on disks that remember every write, until the daemon is killed; the store is opened
again, and looked at; so it goes on for several lives. Afterwards power cuts are made up at random moments of all of
it, and the store is opened over what they leave. IMGFS_CRASH_POINTS says how many, IMGFS_CRASH_SEED repeats the
choices, IMGFS_CRASH_SECONDS is how long a life lasts at most, IMGFS_CRASH_LIVES how many there are; `make crash` does
hundreds.
"""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgfs import ImageStore, catalogue, load, mounts
from imgfs.names import OWN_DIRECTORY
from tests.conftest import IMGFS, run, wait_until, write_config
from tests.crash.disks import PowerCuts, attached, make_disk, recording
from tests.crash.history import NOW, Crash, Found, History

POINTS = int(os.environ.get("IMGFS_CRASH_POINTS", "30"))
LIVES = int(os.environ.get("IMGFS_CRASH_LIVES", "2"))
SECONDS = float(os.environ.get("IMGFS_CRASH_SECONDS", "1.5"))
SEED = os.environ.get("IMGFS_CRASH_SEED") or str(random.SystemRandom().getrandbits(32))
LEAST_PROMISES = 10
SMALL = {"ext4": 16, "xfs": 300}  # MiB; xfs has no smaller ones
LARGE = {"ext4": 64, "xfs": 320}
OWN_FILES = {"xattrs", "marker"}
"""What may be in `DATADIR/.imgfs/` while nothing is under way."""


class Machine:
    """Two disks with a datadir each, and what was noted of their use.

    The preferred one is small, so that it is full now and then and images are relocated.
    """

    def __init__(self, place: Path, filesystem: str) -> None:
        self.place = place
        self.disks = [place / f"disk{number}" for number in range(2)]
        self.datadirs = [place / f"datadir{number}" for number in range(2)]
        for disk, datadir, size in zip(
            self.disks, self.datadirs, (SMALL[filesystem], LARGE[filesystem]), strict=True
        ):
            make_disk(disk, filesystem, size)
            datadir.mkdir()
        self.log, self.notes = place / "log", place / "notes"
        self.notes.touch()
        places = [f"{datadir}:{priority}" for datadir, priority in zip(self.datadirs, (2, 1), strict=True)]
        self.config = write_config(place, places, hashing_algo="sha256", file_perm="0640")
        self.mountpoint = place / "images"
        self.mountpoint.mkdir()

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """The datadirs are on the disks, and every write is remembered."""
        with recording(self.disks, self.log, self.place / "disks") as files, self.mounted(files):
            yield

    @contextlib.contextmanager
    def mounted(self, disks: list[Path]) -> Iterator[None]:
        """The datadirs are on some disks."""
        with attached(disks[0], self.datadirs[0]), attached(disks[1], self.datadirs[1]):
            yield

    def command(self, seed: str, life: int, *where: object) -> list[object]:
        """The command line of a workload."""
        command = [sys.executable, "-m", "tests.crash.workload", "--seed", seed, "--life", f"life{life}-"]
        return [*command, "--notes", self.notes, "--log", self.log, *where]

    def noted(self) -> int:
        return self.notes.stat().st_size

    def judged(self, crash: Crash) -> list[str]:
        """Open the store after a crash; everything that is wrong with it."""
        with ImageStore(load(self.config)) as store:
            found = {name: _found(store, name) for name in store.names()}
            return crash.problems(found) + list(self._untidy())

    def use(self) -> None:
        """What is not active can be removed or sealed, and images can be added again."""
        with ImageStore(load(self.config)) as store:
            for number, name in enumerate([name for name in store.names() if store.state(name) != "active"]):
                if number % 2:
                    store.delete(name)
                else:
                    store.digests(name)
            assert store.add("afterwards", iter([b"it goes on"])).bytes_written == 10

    def _untidy(self) -> Iterator[str]:
        """What a crash left behind, and opening the store did not clean up."""
        held = [{entry.name for entry in os.scandir(datadir)} for datadir in self.datadirs]
        for name in held[0] & held[1] - {OWN_DIRECTORY}:
            yield f"{name} is in both datadirs"
        for datadir in self.datadirs:
            for name in set(os.listdir(datadir / OWN_DIRECTORY)) - OWN_FILES:
                if not name.startswith(catalogue.PREFIX):
                    yield f"{name} is left in {datadir / OWN_DIRECTORY}"


def _found(store: ImageStore, name: str) -> Found:
    state = store.state(name)
    digest = hashlib.md5()
    for chunk in store.read(name):
        digest.update(chunk)
    with store.image(name) as image:
        held = image.valid_record()
    return Found(name, state, digest.hexdigest(), held.digests.checksum if held and held.digests else None)


def run_and_kill(machine: Machine, transport: str | None, seed: str, life: int) -> None:
    """Let a workload run for a while, through a mount or in the process of the store; kill whoever serves it."""
    with contextlib.ExitStack() as stack:
        if transport is None:
            where: list[object] = ["--config", machine.config]
        else:
            where = ["--mount", machine.mountpoint, "--transport", transport]
            daemon = stack.enter_context(_daemon(machine, transport))
        before = machine.noted()
        workload = subprocess.Popen([os.fspath(part) if isinstance(part, Path) else str(part) for part in
                                     machine.command(seed, life, *where)], stdin=subprocess.DEVNULL)  # fmt: skip
        stack.callback(workload.wait)
        stack.callback(workload.kill)
        wait_until(lambda: machine.noted() > before or workload.poll() is not None, "the workload")
        time.sleep(random.Random(f"{seed} {life}").uniform(SECONDS / 10, SECONDS))
        assert workload.poll() is None, "the workload ended"
        victim = workload if transport is None else daemon
        victim.send_signal(signal.SIGKILL)
        if transport is not None:
            _abort(machine.mountpoint)
        victim.wait(30)
        workload.wait(30)


def _abort(mountpoint: Path) -> None:
    """Take a mount away whose daemon was killed, and end what waits for it.

    By force: before Linux 6.16 a thread of the daemon may be waiting in the kernel for the directory's lock, which a
    client holds that waits for the daemon, and as long as it does, the kernel does not see that the daemon is gone.
    """
    run("umount", "--force", "--lazy", mountpoint)


@contextlib.contextmanager
def _daemon(machine: Machine, transport: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [*IMGFS, "-v", "mount", "--foreground", "--transport", transport, str(machine.config)]
    with open(machine.place / "daemon.log", "ab") as output:
        daemon = subprocess.Popen([*command, str(machine.mountpoint)], stdin=subprocess.DEVNULL, stderr=output)
    try:
        wait_until(lambda: daemon.poll() is not None or mounts.is_imgfs(machine.mountpoint), "the mount")
        assert daemon.poll() is None, (machine.place / "daemon.log").read_text()
        yield daemon
    finally:
        daemon.kill()
        if mounts.is_imgfs(machine.mountpoint):
            _abort(machine.mountpoint)
        daemon.wait(30)


def moments(history: History, end: int, chance: random.Random) -> list[int]:
    """Where to cut: anywhere in the log, in the middle of steps, and right after promises and replacements."""
    steps = [position for position in history.positions if position < end]
    chosen = [chance.randrange(end) for _ in range(POINTS // 4)]
    for places in (steps, history.promises, history.replacements):
        chosen += [chance.choice(places) + chance.choice([0, 0, 1, 100, 4096]) for _ in range(POINTS // 4)]
    return sorted(chosen)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("transport", ["kernel", "fusepy", None])
@pytest.mark.parametrize("filesystem", os.environ.get("IMGFS_CRASH_FILESYSTEMS", "ext4").split())
def test_what_was_complete_survives_kills_and_power_cuts(
    transport: str | None, filesystem: str, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, filesystem)
    print(f"IMGFS_CRASH_SEED={SEED}")  # noqa: T201 - shown where the test fails, and by `make crash`
    with machine.recorded():
        for life in range(LIVES):
            run_and_kill(machine, transport, SEED, life)
            history = History.read(machine.notes)
            accept(machine.judged(Crash(history, NOW, power_cut=False)), f"kill {life}")
    check_power_cuts(machine, History.read(machine.notes))


def check_power_cuts(machine: Machine, history: History) -> None:
    """Open the store over what power cuts at many moments of a history leave."""
    print(history.counts)  # noqa: T201
    assert len(history.promises) >= LEAST_PROMISES, f"too few digests were promised: {history.counts}"
    chance = random.Random(SEED)
    copies = [machine.place / f"copy{number}" for number in range(2)]
    with contextlib.closing(PowerCuts(machine.disks, machine.log, machine.place)) as cuts:
        for moment in moments(history, machine.log.stat().st_size, chance):
            cuts.at(moment, chance, copies)
            with machine.mounted(copies):
                problems = machine.judged(Crash(history, moment, power_cut=True))
                machine.use()
            accept(problems, f"a power cut at {moment}")


def accept(problems: list[str], crash: str) -> None:
    """Fail where there are any."""
    if problems:
        pytest.fail("\n".join([f"after {crash}, IMGFS_CRASH_SEED={SEED}:", *problems]), pytrace=False)
