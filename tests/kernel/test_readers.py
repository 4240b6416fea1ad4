"""How the threads that read requests spend their time: awake where that pays, asleep otherwise."""

import os
import time
from pathlib import Path

import pytest

from imgfs.kernel import readers
from imgfs.kernel.readers import MAX_MISSES, Lookout


class Requests:
    """A device whose requests come as told: each some seconds after the one before was taken."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.lookouts = 0

    def comes_within(self, seconds: float) -> bool:
        self.lookouts += 1
        return self.delay_s < seconds

    def read(self) -> bytes:
        time.sleep(self.delay_s)
        return b"request"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    monkeypatch.setattr(readers, "SEVERAL_CPUS", True)
    monkeypatch.setattr(readers, "LOOKOUT_S", 0.05)  # so that a slow machine does not matter
    return Requests()


def taken(lookout: Lookout, count: int) -> None:
    for _ in range(count):
        assert lookout.next_request() == b"request"


def test_requests_that_come_soon_are_looked_out_for(requests):
    taken(Lookout(requests), 10)
    assert requests.lookouts == 9  # the first shows that they do


def test_requests_that_come_late_are_not(requests):
    requests.delay_s = 0.1
    taken(Lookout(requests), 5)
    assert requests.lookouts == 0


def test_each_miss_asks_for_more_requests_in_a_row_before_the_next_lookout(requests):
    lookout = Lookout(requests)
    taken(lookout, 2)
    requests.comes_within = lambda _seconds: False  # they come when it has gone to sleep
    gaps = []
    for _ in range(MAX_MISSES):
        lookout.next_request()
        taken_before = 1
        while not lookout._pays:
            lookout.next_request()
            taken_before += 1
        gaps.append(taken_before)
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 1 << MAX_MISSES


def test_with_one_cpu_nobody_is_kept_from_it(requests, monkeypatch):
    monkeypatch.setattr(readers, "SEVERAL_CPUS", False)
    taken(Lookout(requests), 10)
    assert requests.lookouts == 0


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_mount_uses_no_cpu(mount):
    mounted = mount()
    for number in range(300):
        assert not (mounted / f"absent-{number}").exists()
    time.sleep(0.2)
    before = cpu_seconds(mounted.daemon.pid)
    time.sleep(2)
    assert cpu_seconds(mounted.daemon.pid) - before < 0.2
