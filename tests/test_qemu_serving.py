"""qemu at work on images of a mount: images served by qemu-nbd to real clients, and the lock between two qemu."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import MIB, assert_sealed, backing_file, digest, md5, new_image
from tests.conftest import WAIT_SECONDS, Mounted, attribute, run, wait_until

SIZE = 16 * MIB


@pytest.fixture
def images(mount: Callable[..., Mounted]) -> Mounted:
    """A mount with two datadirs."""
    return mount()


def answers(path: str) -> bool:
    """Whether an NBD server greets; it listens before it has opened its image, but greets after that."""
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
        client.settimeout(1)
        client.connect(path)
        return client.recv(8) == b"NBDMAGIC"
    return False


class Server:
    """qemu-nbd, serving an image at `uri`; ended with its `with` block."""

    def __init__(self, image: Path, form: str, *options: str) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._socket = f"{self._directory.name}/nbd"
        self.uri = f"nbd+unix:///?socket={self._socket}"
        command = ["qemu-nbd", "-k", self._socket, "-f", form, "--persistent", "--shared=4", *options, str(image)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> "Server":
        try:
            wait_until(lambda: self._process.poll() is not None or answers(self._socket), "the server")
            assert self._process.poll() is None, f"qemu-nbd: {self._process.communicate()[1]}"
        except BaseException:
            self.end(signal.SIGKILL)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGTERM)

    def end(self, how: signal.Signals) -> None:
        """Signal it, wait for it."""
        if self._process.poll() is None:
            self._process.send_signal(how)
        self._process.communicate(timeout=WAIT_SECONDS)
        self._directory.cleanup()


class Opened:
    """qemu-io with an image open for writing, waiting for commands; killed at the end of its `with` block."""

    def __init__(self, *options: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._process = subprocess.Popen(["qemu-io", *options], bufsize=0, **pipes)

    def __enter__(self) -> "Opened":
        try:
            self._wait_for_prompt()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def do(self, command: str) -> None:
        """Have a command done."""
        assert self._process.stdin
        self._process.stdin.write(f"{command}\n".encode())
        self._wait_for_prompt()

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate(timeout=WAIT_SECONDS)

    def _wait_for_prompt(self) -> None:
        assert self._process.stdout
        said = b""
        while not said.endswith(b"qemu-io> "):
            some = self._process.stdout.read(4096)
            assert some, f"qemu-io ended: {said.decode()}"
            said += some
        assert said == b"qemu-io> "


# Images served


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_served_image_is_read_by_a_real_client(images: Mounted, tmp_path: Path, form: str, cache: str) -> None:
    source = tmp_path / "source"
    new_image(source, SIZE)
    run("qemu-img", "convert", "-f", "raw", "-O", form, source, images / "a")
    assert_sealed(images / "a")
    with Server(images / "a", form, "--read-only", f"--cache={cache}") as server:
        found = json.loads(run("qemu-img", "info", "--output=json", server.uri).stdout)
        assert found["virtual-size"] == SIZE
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, server.uri)
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri, tmp_path / "out")
        assert attribute(images / "a", "state") == "active"
    assert digest(tmp_path / "out") == digest(source)


def test_one_image_is_served_by_several_to_several(images: Mounted, tmp_path: Path) -> None:
    content = new_image(images / "a", SIZE)
    assert_sealed(images / "a")
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(images / "a", "raw", "--read-only")) for _ in range(2)]
        clients = [
            subprocess.Popen(["qemu-img", "convert", "-f", "raw", "-O", "raw", server.uri, tmp_path / f"{n}"])
            for n, server in enumerate(servers * 2)
        ]
        assert [client.wait(WAIT_SECONDS) for client in clients] == [0] * 4
    for number in range(4):
        assert digest(tmp_path / f"{number}") == md5(content)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_served_image_is_written_by_a_real_client_and_hashed(images: Mounted, form: str, cache: str) -> None:
    run("qemu-img", "create", "-q", "-f", form, images / "a", str(SIZE))
    chance = random.Random(form + cache)
    blocks = {chance.randrange(256): chance.randrange(1, 256) for _ in range(60)}
    writes = [f"write -q -P {value} {block * 65536} 65536" for block, value in blocks.items()]
    reads = [f"read -q -P {blocks.get(block, 0)} {block * 65536} 65536" for block in range(256)]
    with Server(images / "a", form, f"--cache={cache}", "--discard=unmap") as server:
        for commands in ([*writes, "flush"], reads):
            arguments = [part for command in commands for part in ("-c", command)]
            done = run("qemu-io", "-f", "raw", *arguments, server.uri)
            assert done.stdout + done.stderr == ""
        assert attribute(images / "a", "state") == "saving"
    assert_sealed(images / "a")
    assert digest(images / "a") == digest(backing_file(images / "a"))
    arguments = [part for command in reads for part in ("-c", command)]
    assert run("qemu-io", "-r", "-f", form, *arguments, images / "a").stdout == ""


def test_overlay_is_served_over_a_base_that_stays_active(images: Mounted, tmp_path: Path) -> None:
    """What a virtual machine does with its disk: reads from the base image, writes to its own overlay."""
    source = tmp_path / "source"
    content = bytearray(new_image(source, SIZE))
    run("cp", source, images / "base")
    assert_sealed(images / "base", md5(content))
    overlay = tmp_path / "overlay"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", images / "base", "-F", "raw", overlay)
    with Server(overlay, "qcow2") as server:
        run("qemu-io", "-f", "raw", "-c", "write -q -P 7 1M 64k", server.uri)
        content[MIB : MIB + 65536] = b"\x07" * 65536
        source.write_bytes(content)
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, server.uri)
    assert attribute(images / "base", "state") == "active"


def test_image_that_is_served_may_be_removed(images: Mounted, tmp_path: Path) -> None:
    new_image(tmp_path / "source", SIZE)
    run("cp", tmp_path / "source", images / "a")
    assert_sealed(images / "a")
    with Server(images / "a", "raw", "--read-only") as server:
        (images / "a").unlink()
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "source", server.uri)
    assert os.listdir(images.path) == []


# The lock of an image that is in use


def as_a_disk(image: Path, form: str) -> list[str]:
    """Options of qemu-io to open an image as a virtual machine opens its disk: nobody else may write to it.

    For raw images qemu-io lets others write; a filter node asks for what a virtual disk does.
    """
    if form == "qcow2":
        return ["-f", "qcow2", str(image)]
    permissions = "take-child-perms.0=write,unshare-child-perms.0=write,unshare-child-perms.1=resize"
    node = f"driver=blkdebug,{permissions},image.driver=raw,image.file.driver=file,image.file.filename={image}"
    return ["--image-opts", node]


def assert_locked_out(*command: object) -> None:
    """A qemu program is refused the lock of an image."""
    done = run(*command, check=False)
    assert done.returncode != 0
    assert "Failed to get" in done.stderr
    assert "lock" in done.stderr


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_second_qemu_gets_the_lock_once_the_first_is_killed(images: Mounted, form: str) -> None:
    run("qemu-img", "create", "-q", "-f", form, images / "a", str(SIZE))
    write = ["qemu-io", "-c", "write -q -P 2 64k 64k", *as_a_disk(images / "a", form)]
    with Opened(*as_a_disk(images / "a", form)) as first:
        first.do("write -q -P 1 0 64k")
        assert_locked_out(*write)
        first.do("flush")
        first.kill()
        run(*write)
    run("qemu-io", "-r", "-f", form, "-c", "read -q -P 1 0 64k", "-c", "read -q -P 2 64k 64k", images / "a")
    assert_sealed(images / "a")


def test_server_of_an_image_keeps_others_out_until_it_is_killed(images: Mounted) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", images / "a", str(SIZE))
    with Server(images / "a", "qcow2") as first:
        for command in ("info", "check", "map"):
            assert_locked_out("qemu-img", command, images / "a")
        assert_locked_out("qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", images / "a")
        first.end(signal.SIGKILL)
        with Server(images / "a", "qcow2") as second:
            run("qemu-io", "-f", "raw", "-c", "write -q -P 3 0 64k", second.uri)
    run("qemu-img", "check", "-q", images / "a")
    assert_sealed(images / "a")


def test_readers_share_an_image_and_keep_a_writer_out(images: Mounted) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", images / "a", str(SIZE))
    assert_sealed(images / "a")
    with Server(images / "a", "qcow2", "--read-only"), Server(images / "a", "qcow2", "--read-only"):
        assert_locked_out("qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", images / "a")
        assert attribute(images / "a", "state") == "active"
    run("qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", images / "a")
    assert_sealed(images / "a")
