"""Real mounts for the tests: each in its own process, checked for leftovers when it ends."""

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"  # one that every user may run


def wait_until(condition: Callable[[], Any], timeout_s: float = 10) -> None:
    """Wait for a condition; fail if it does not come true."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def is_mounted(path: Path) -> bool:
    """Whether something is mounted there, without asking it."""
    escaped = str(path).replace("\\", "\\134").replace(" ", "\\040")
    return f" {escaped} fuse.imgfs " in Path("/proc/self/mounts").read_text(errors="replace")


class Mount:
    """A mounted loopback: `path` is the mount, `backing` the directory behind it."""

    def __init__(self, backing: Path, path: Path, options: dict[str, Any], user: int | None = None) -> None:
        self.backing, self.path = backing, path
        self.expected_log: tuple[str, ...] = ("INFO",)
        self.process = subprocess.Popen(
            [
                sys.executable if user is None else SYSTEM_PYTHON,
                "-m",
                "tests.kernel.server",
                str(backing),
                str(path),
                json.dumps(options),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")},
            user=user,
        )
        ready = self._line()
        assert ready == "ready", ready + self.process.communicate()[1]

    def _line(self) -> str:
        """One line, and no byte more: `communicate` is to get what follows, and knows nothing of buffers."""
        assert self.process.stdout
        line = bytearray()
        while (byte := os.read(self.process.stdout.fileno(), 1)) not in {b"", b"\n"}:
            line += byte
        return line.decode()

    def ask(self, command: str) -> Any:
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def calls(self, operation: str) -> int:
        count: int = self.ask("state")["calls"].get(operation, 0)
        return count

    def expect(self, *words: str) -> None:
        """Log lines with one of these words are no failure."""
        self.expected_log += words

    def end(self) -> dict[str, Any]:
        """Unmount if need be, and give the final state."""
        if is_mounted(self.path):
            subprocess.run(["umount", self.path], check=False, capture_output=True)
        out, log = self.process.communicate(timeout=20)
        assert not is_mounted(self.path)
        assert self.process.returncode == 0, log
        unexpected = [line for line in log.splitlines() if not any(w in line for w in self.expected_log)]
        assert not unexpected, log
        state: dict[str, Any] = json.loads(out.splitlines()[-1])
        return state


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Mount]]:
    """A function that mounts a fresh loopback; options are those of `KernelSession`."""
    mounts: list[Mount] = []

    def mount(user: int | None = None, at: str = "mount", **options: Any) -> Mount:
        backing, path = tmp_path / f"backing{len(mounts)}", tmp_path / f"{at}{len(mounts)}"
        for directory in (backing, path):
            directory.mkdir()
            if user is not None:
                os.chown(directory, user, -1)
        mounts.append(Mount(backing, path, options, user))
        return mounts[-1]

    yield mount
    try:
        for one in mounts:
            if one.process.poll() is None:
                state = one.end()
                assert (state["handles"], state["open_files"], state["backing_ids"]) == (0, 0, [])
            assert not is_mounted(one.path)
    finally:
        for one in mounts:
            with contextlib.suppress(OSError):
                subprocess.run(["umount", "-l", one.path], check=False, capture_output=True)
            one.process.kill()
            one.process.communicate()


@pytest.fixture
def image(mounted: Callable[..., Mount]) -> Mount:
    """A mount with one image at rest, called "image"."""
    mount = mounted(entry_timeout=600, attr_timeout=600)
    (mount.backing / "image").write_bytes(os.urandom(1 << 20))
    return mount
