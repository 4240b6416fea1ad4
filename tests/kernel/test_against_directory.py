"""A mount and a plain directory, given the same system calls in any order, show the same."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.kernel.conftest import Mount

pytestmark = pytest.mark.mount
NAMES = st.sampled_from(["a", "b", "c"])
OFFSETS = st.integers(0, 20_000)
MOST_OPEN = 6


class Programs(RuleBasedStateMachine):
    """Each rule does one thing on both sides and compares the outcome, errno included."""

    mount: Mount
    where: Callable[[], "contextlib.AbstractContextManager[tuple[Path, Path]]"]

    def __init__(self) -> None:
        super().__init__()
        self.exit = contextlib.ExitStack()
        self.sides = self.exit.enter_context(type(self).where())
        self.open_files: list[tuple[int, int]] = []

    def teardown(self) -> None:
        for pair in self.open_files:
            for fd in pair:
                os.close(fd)
        for name in os.listdir(self.sides[0]):
            (self.sides[0] / name).unlink()
        self.exit.close()

    def both(self, act: Callable[[Any], Any], targets: tuple[Any, Any] | None = None) -> Any:
        outcomes = []
        for target in targets or self.sides:
            try:
                outcomes.append((act(target), None))
            except OSError as error:
                outcomes.append((None, error.errno))
        return outcomes

    def same(self, act: Callable[[Any], Any], targets: tuple[Any, Any] | None = None) -> None:
        ours, theirs = self.both(act, targets)
        assert ours == theirs

    @rule(name=NAMES, flags=st.sampled_from([os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND]),
          more=st.sampled_from([0, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_CREAT | os.O_TRUNC]))  # fmt: skip
    def open(self, name: str, flags: int, more: int) -> None:
        ours, theirs = self.both(lambda side: os.open(side / name, flags | more, 0o644))
        assert ours[1] == theirs[1]
        if ours[1] is None:
            self.open_files.append((ours[0], theirs[0]))
        if len(self.open_files) > MOST_OPEN:
            self.close(0)

    @rule(which=st.integers(0, MOST_OPEN))
    def close(self, which: int) -> None:
        if self.open_files:
            for fd in self.open_files.pop(which % len(self.open_files)):
                os.close(fd)

    def on_open(self, which: int, act: Callable[[int], Any]) -> None:
        if self.open_files:
            self.same(act, self.open_files[which % len(self.open_files)])

    @rule(which=st.integers(0, MOST_OPEN), offset=OFFSETS, data=st.binary(min_size=1, max_size=9000))
    def pwrite(self, which: int, offset: int, data: bytes) -> None:
        self.on_open(which, lambda fd: os.pwrite(fd, data, offset))

    @rule(which=st.integers(0, MOST_OPEN), offset=OFFSETS, size=st.integers(1, 30_000))
    def pread(self, which: int, offset: int, size: int) -> None:
        self.on_open(which, lambda fd: os.pread(fd, size, offset))

    @rule(which=st.integers(0, MOST_OPEN), size=OFFSETS)
    def ftruncate(self, which: int, size: int) -> None:
        self.on_open(which, lambda fd: os.ftruncate(fd, size))

    @rule(which=st.integers(0, MOST_OPEN))
    def fstat(self, which: int) -> None:
        self.on_open(which, lambda fd: (os.fstat(fd).st_size, os.fstat(fd).st_nlink))

    @rule(name=NAMES, size=OFFSETS)
    def truncate(self, name: str, size: int) -> None:
        self.same(lambda side: os.truncate(side / name, size))

    @rule(name=NAMES)
    def unlink(self, name: str) -> None:
        self.same(lambda side: os.unlink(side / name))

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        self.same(lambda side: os.rename(side / old, side / new))

    @rule(name=NAMES, mode=st.integers(0, 0o777))
    def chmod(self, name: str, mode: int) -> None:
        self.same(lambda side: os.chmod(side / name, mode))

    @rule(name=NAMES, value=st.binary(max_size=20))
    def setxattr(self, name: str, value: bytes) -> None:
        self.same(lambda side: os.setxattr(side / name, "user.x", value))

    @rule(name=NAMES)
    def getxattr(self, name: str) -> None:
        self.same(lambda side: os.getxattr(side / name, "user.x"))

    @invariant()
    def shows_the_same(self) -> None:
        def shown(side: Path) -> Any:
            return {
                name: ((side / name).stat().st_size, (side / name).stat().st_mode, (side / name).read_bytes())
                for name in sorted(os.listdir(side))
            }

        assert shown(self.sides[0]) == shown(self.sides[1])


@pytest.mark.parametrize("passthrough", [True, False])
def test_a_mount_behaves_like_a_directory(mounted: Callable[..., Mount], tmp_path: Path, passthrough: bool) -> None:
    mount = mounted(passthrough=passthrough, entry_timeout=600, attr_timeout=600)

    @contextlib.contextmanager
    def where() -> Iterator[tuple[Path, Path]]:
        with tempfile.TemporaryDirectory(dir=tmp_path) as plain:
            yield mount.path, Path(plain)

    machine = type("Machine", (Programs,), {"where": staticmethod(where)})
    few = settings(max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=few)
