"""How many requests fixed work sends to the daemon: speed that does not depend on the machine.

Each request is a round trip between two processes, which costs more than most handlers. A workload that sends more
than is written here has become slower for everybody; one that sends fewer is a reason to lower the number.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import MIB, assert_sealed, new_image
from tests.conftest import Mounted, Mounter, run, wait_until

IMAGES = 50
CP_BYTES = MIB  # what cp(1) writes at a time: st_blksize, if that is more than its own 128 KiB
QEMU_BYTES = 2 * MIB

pytestmark = pytest.mark.parametrize("mount", ["kernel"], indirect=True)


class Requests:
    """The requests that the daemon of a mount logs (`-vv`), by name. Those that nobody waits for are left out."""

    UNAWAITED = frozenset({"forget", "batch_forget", "release", "releasedir", "interrupt", "destroy"})

    def __init__(self, mounted: Mounted) -> None:
        self._mounted = mounted

    def _all(self) -> Counter[str]:
        return Counter(re.findall(r"request \d+: (\w+)", self._mounted.log.read_text()))

    def of(self, work: Callable[[], object]) -> dict[str, int]:
        """What the work sends, once all that was sent before has been answered."""
        self._settle()
        before = self._all()
        work()
        self._settle()
        return {name: n for name, n in (self._all() - before).items() if name not in self.UNAWAITED}

    def _settle(self) -> None:
        """Wait until nothing more comes: releases, and what the kernel is told of changes."""
        seen: list[int] = []

        def settled() -> bool:
            seen.append(self._all().total())
            return seen[-20:].count(seen[-1]) == 20

        wait_until(settled, "the end of the requests")


@pytest.fixture
def mounted(mount: Mounter) -> Mounted:
    mount.verbosity = "-vv"
    return mount()


@pytest.fixture
def requests(mounted: Mounted) -> Requests:
    return Requests(mounted)


def assert_at_most(counts: dict[str, int], most: dict[str, int]) -> None:
    more = {name: (n, most.get(name, 0)) for name, n in counts.items() if n > most.get(name, 0)}
    assert not more, f"more requests than there were: {more} (sent, known); all: {counts}"
    assert counts, "no request was logged at all"


def test_cp_into_the_mount(mounted: Mounted, requests: Requests, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * (8 * MIB // 256))
    sent = requests.of(lambda: run("cp", source, mounted / "a"))
    assert_at_most(sent, {"getattr": 1, "lookup": 2, "create": 1, "write": 8 * MIB // CP_BYTES, "flush": 1})


def test_cat_of_an_image_at_rest(mounted: Mounted, requests: Requests) -> None:
    new_image(mounted / "a", 8 * MIB)
    assert_sealed(mounted / "a")
    sent = requests.of(lambda: run("sha256sum", mounted / "a"))
    assert_at_most(sent, {"lookup": 1, "open": 1})


def test_ls_twice(mounted: Mounted, requests: Requests) -> None:
    for number in range(IMAGES):
        (mounted.datadirs[number % 2] / f"image-{number:03d}").touch()
    first = requests.of(lambda: run("ls", "-l", mounted.path))
    assert_at_most(first, {"getattr": 1, "getxattr": 2, "opendir": 1, "readdirplus": 2})
    second = requests.of(lambda: run("ls", "-l", mounted.path))
    assert_at_most(second, {"getattr": 1, "getxattr": 2, "opendir": 1})


def test_qemu_convert_into_the_mount(mounted: Mounted, requests: Requests, tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    with open(source, "wb") as file:
        file.write(b"data" * (QEMU_BYTES // 4))
        file.truncate(64 * MIB)
    sent = requests.of(lambda: run("qemu-img", "convert", "-O", "raw", source, mounted / "a.raw"))
    known = {"lookup": 5, "getattr": 3, "create": 1, "open": 3, "setattr": 2, "getxattr": 2, "flush": 2}
    assert_at_most(sent, known | {"write": QEMU_BYTES // MIB + 1})


def test_create_and_unlink(mounted: Mounted, requests: Requests) -> None:
    def work() -> None:
        for number in range(IMAGES):
            with open(mounted / f"image-{number:03d}", "xb"):
                pass
            (mounted / f"image-{number:03d}").unlink()

    known = dict.fromkeys(("lookup", "create", "flush", "unlink"), IMAGES)
    # The kernel asks for the directory's permissions after each change of it, and when it hears that it changed.
    assert_at_most(requests.of(work), known | {"getattr": 5 * IMAGES // 2})


def test_writes_use_memory_that_the_daemon_has(mounted: Mounted, tmp_path: Path) -> None:
    """What the system gives it has to be cleared first, which takes longer than to copy a request into it.

    A daemon that keeps its memory is soon given no more, as what it has waiting at once is bounded; which of the
    copies takes the most depends on how busy the machine is. One that does not keep it is given some for every copy.
    """

    def page_faults() -> int:
        return int(Path(f"/proc/{mounted.daemon.pid}/stat").read_text().rpartition(")")[2].split()[7])

    def given_for_a_copy(number: int) -> int:
        before = page_faults()
        run("cp", source, mounted / f"copy-{number}")
        assert_sealed(mounted / f"copy-{number}")
        (mounted / f"copy-{number}").unlink()
        return page_faults() - before

    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * (64 * MIB // 256))
    assert min(given_for_a_copy(number) for number in range(12)) < MIB // os.sysconf("SC_PAGE_SIZE")
