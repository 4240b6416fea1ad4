"""Whoever waits for a digest can be interrupted, and whoever else waits for it gets it all the same."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients import assert_sealed, md5, opened
from tests.conftest import WAIT_SECONDS, Mounted, attribute, wait_until

Mount = Callable[..., Mounted]
END_SECONDS = 5.0
LONG_BYTES = 1 << 40  # takes minutes to hash, hole that it is
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]


@contextmanager
def waiting(image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that waits for the digest of an image."""
    command = ["getfattr", "-n", "user.imgfs.checksum", str(image)]
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        syscall = Path(f"/proc/{program.pid}/wchan")
        wait_until(lambda: "request_wait_answer" in syscall.read_text("ascii"), "the wait")
        yield program
    finally:
        program.kill()
        program.wait(WAIT_SECONDS)


def assert_ends_at_once(program: subprocess.Popen[bytes]) -> None:
    """A program that was sent a signal ends without an answer to what it waits for."""
    began = time.monotonic()
    assert program.wait(WAIT_SECONDS) != 0
    assert time.monotonic() - began < END_SECONDS


@pytest.mark.parametrize("how", SIGNALS, ids=lambda how: how.name)
def test_wait_for_a_writer_ends_at_once(mount: Mount, how: signal.Signals) -> None:
    images = mount()
    with open(images / "a", "wb", buffering=0) as image:
        image.write(b"begun")
        with waiting(images / "a") as program, waiting(images / "a") as other:
            program.send_signal(how)
            assert_ends_at_once(program)
            assert other.poll() is None
            assert attribute(images / "a", "state") == "saving"
            image.write(b" and done")
            image.close()
            assert other.wait(WAIT_SECONDS) == 0
    assert_sealed(images / "a", md5(b"begun and done"))


@pytest.mark.parametrize("how", SIGNALS, ids=lambda how: how.name)
def test_wait_for_a_long_seal_ends_at_once(mount: Mount, how: signal.Signals) -> None:
    images = mount()
    with open(images.datadirs[0] / "a", "wb") as file:
        file.truncate(LONG_BYTES)
    with waiting(images / "a") as program:
        program.send_signal(how)
        assert_ends_at_once(program)
    (images / "b").write_bytes(b"another image")
    assert_sealed(images / "b", md5(b"another image"))


@pytest.mark.parametrize("why", ["writer", "seal"])
def test_wait_for_a_digest_ends_with_the_daemon(mount: Mount, why: str) -> None:
    images = mount()
    images.expect_warning("can't be unmounted|it ends all the same|still being worked on")
    with opened(images / "a", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"begun")
        if why == "seal":
            os.ftruncate(fd, LONG_BYTES)
            os.close(fd)
        with waiting(images / "a") as program:
            images.daemon.terminate()
            assert_ends_at_once(program)
            assert images.daemon.wait(WAIT_SECONDS) == 0
