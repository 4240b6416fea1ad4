"""Everything at once for a while: no wrong byte, and nothing left afterwards.

Random changes, fio, rsync, renames, removals and seals go on side by side; then every image is compared with its
digest, and what the daemon holds (descriptors, threads, reservations, memory, room on the disks) with what it held
before. IMGFS_STRESS_SECONDS is how long it takes for each transport, IMGFS_STRESS_SEED repeats the choices;
`make stress DURATION=3600` does it for an hour.
"""

import contextlib
import json
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from imgfs import catalogue
from tests.clients import assert_sealed
from tests.conftest import Mounted, Mounter, attribute, wait_until
from tests.stress.workers import WORKERS, Worker

SECONDS = float(os.environ.get("IMGFS_STRESS_SECONDS", "12"))
SEED = os.environ.get("IMGFS_STRESS_SEED") or str(random.SystemRandom().getrandbits(32))
MORE_MEMORY_KIB = 48 << 10
MORE_THREADS = 16  # pools grow to what they may have as it is needed
LEAST_STEPS = 1
IDLE_THREADS = 10  # that wait for requests; more come and go with the load
DISK_SLACK_BYTES = 1 << 20  # journals and directories keep what they have grown to


@dataclass(frozen=True)
class Held:
    """What a daemon holds while nobody uses the mount."""

    images_open: int
    descriptors: int
    threads: int
    reserved: list[int]
    own_files: list[list[str]]
    used_bytes: list[int]

    @classmethod
    def by(cls, mounted: Mounted) -> "Held":
        process = Path(f"/proc/{mounted.daemon.pid}")
        links = [os.readlink(fd) for fd in (process / "fd").iterdir() if os.path.lexists(fd)]
        inside = [link for link in links if any(link.startswith(f"{datadir}/") for datadir in mounted.datadirs)]
        return cls(
            len([link for link in inside if "/.imgfs" not in link]),
            len([link for link in links if not link.startswith("/dev/fuse")]),
            len(list((process / "task").iterdir())),
            [datadir["reserved"] for datadir in json.loads(attribute(mounted.path, "datadirs"))],
            [_own_files(datadir) for datadir in mounted.datadirs],
            [_used_bytes(datadir) for datadir in mounted.datadirs],
        )

    @property
    def idle(self) -> bool:
        """Whether it is done with all images."""
        return not self.images_open and not any(self.reserved)

    def exceeds(self, before: "Held") -> bool:
        """Whether more is held than before."""
        more = [
            self.images_open,
            self.descriptors - before.descriptors,
            self.threads - before.threads - IDLE_THREADS,
            *self.reserved,
        ]
        room = [now - then - DISK_SLACK_BYTES for now, then in zip(self.used_bytes, before.used_bytes, strict=True)]
        return max(more + room) > 0 or not self.idle or self.own_files != before.own_files


def _own_files(datadir: Path) -> list[str]:
    """What lies in imgfs's own room, but for the lists of the siblings, which come and grow in the background."""
    return sorted(name for name in os.listdir(datadir / ".imgfs") if not name.startswith(catalogue.PREFIX))


def _used_bytes(path: Path) -> int:
    numbers = os.statvfs(path)
    return (numbers.f_blocks - numbers.f_bfree) * numbers.f_frsize


def resident_kib(mounted: Mounted) -> int:
    """The memory of the daemon."""
    status = Path(f"/proc/{mounted.daemon.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


class Crowd:
    """The workers of a run, each in its thread."""

    def __init__(self, mounted: Mounted, scratch: Path, seed: str, transport: str) -> None:
        scratch.mkdir()
        names = [f"{worker.__name__.lower()}{number}" for number, worker in enumerate(WORKERS)]
        self.workers: list[Worker] = [
            make(mounted.path, scratch, name, seed, transport) for make, name in zip(WORKERS, names, strict=True)
        ]
        self.failures: list[str] = []
        self._ending = threading.Event()

    def work(self, seconds: float) -> None:
        """Have all of them work for a while, or until one fails."""
        self._ending.clear()
        threads = [threading.Thread(target=self._run, args=(worker,)) for worker in self.workers]
        for thread in threads:
            thread.start()
        self._ending.wait(seconds)
        self._ending.set()
        for thread in threads:
            thread.join()
        assert self.failures == [], f"IMGFS_STRESS_SEED={SEED}: {self.failures}"

    def _run(self, worker: Worker) -> None:
        try:
            while not self._ending.is_set():
                worker.step()
                worker.steps += 1
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - told by the thread of the test
            self.failures.append(f"{worker.name}, step {worker.steps}: {error!r}")
            self._ending.set()


@pytest.mark.timeout(0)
def test_nothing_is_wrong_or_left_after_everything_at_once(
    filesystem: Callable[..., Path], mount: Mounter, tmp_path: Path
) -> None:
    print(f"IMGFS_STRESS_SEED={SEED}")  # noqa: T201 - shown where the test fails, and by `make stress`
    mounted = mount([f"{filesystem('ext4', 200)}:1", f"{filesystem('ext4', 400)}:1"])
    run_all(mounted, tmp_path / "warm", mount.transport, SECONDS / 3)
    wait_until(lambda: Held.by(mounted).idle)
    before, before_kib = Held.by(mounted), resident_kib(mounted)
    run_all(mounted, tmp_path / "scratch", mount.transport, SECONDS * 2 / 3)
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not Held.by(mounted).exceeds(before))
    after, after_kib = Held.by(mounted), resident_kib(mounted)
    assert not after.exceeds(before), f"IMGFS_STRESS_SEED={SEED}: it holds {after}, before {before}"
    assert after_kib - before_kib < MORE_MEMORY_KIB, f"{after_kib} KiB, {before_kib} before"


def run_all(mounted: Mounted, scratch: Path, transport: str, seconds: float) -> None:
    """Let the crowd work, compare every image with its digest, and remove them all."""
    crowd = Crowd(mounted, scratch, f"{SEED} {scratch.name}", transport)
    crowd.work(seconds)
    print({worker.name: worker.steps for worker in crowd.workers})  # noqa: T201
    for worker in crowd.workers:
        worker.finish()
        assert worker.steps >= LEAST_STEPS, f"{worker.name} took {worker.steps} steps"
    for name in os.listdir(mounted.path):
        assert_sealed(mounted / name)
        (mounted / name).unlink()
