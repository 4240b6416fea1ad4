"""qemu-img and qemu-io on images in a mount: what qemu does with images when virtual machines use them."""

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import MIB, assert_sealed, backing_file, digest, new_image
from tests.conftest import Mounted, attribute, run, wait_until

CACHES = ["writeback", "none", "directsync"]


@pytest.fixture
def images(mount: Callable[..., Mounted]) -> Mounted:
    """A mount with two datadirs."""
    return mount()


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_create_gives_an_image_that_info_and_check_accept(images: Mounted, form: str) -> None:
    run("qemu-img", "create", "-q", "-f", form, images / "a", "64M")
    found = json.loads(run("qemu-img", "info", "--output=json", images / "a").stdout)
    assert (found["format"], found["virtual-size"]) == (form, 64 * MIB)
    assert found["actual-size"] < MIB
    if form == "qcow2":
        assert json.loads(run("qemu-img", "check", "--output=json", images / "a").stdout)["check-errors"] == 0
    assert_sealed(images / "a")


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("cache", CACHES)
def test_convert_in_and_out_keeps_the_content(images: Mounted, tmp_path: Path, form: str, cache: str) -> None:
    source = tmp_path / "source"
    new_image(source, 3 * MIB)
    with open(source, "r+b") as file:
        file.seek(5 * MIB)
        file.write(b"tail")
        file.truncate(8 * MIB)
    run("qemu-img", "convert", "-t", cache, "-f", "raw", "-O", form, source, images / "a")
    assert_sealed(images / "a")
    assert (images / "a").stat().st_blocks * 512 < 5 * MIB
    run("qemu-img", "compare", "-f", "raw", "-F", form, source, images / "a")
    run("qemu-img", "convert", "-T", cache, "-f", form, "-O", "raw", images / "a", tmp_path / "out")
    assert digest(tmp_path / "out") == digest(source)


def test_convert_within_a_mount_gives_a_sealed_qcow2(images: Mounted) -> None:
    new_image(images / "a.raw", 2 * MIB)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", images / "a.raw", images / "a.qcow2")
    run("qemu-img", "check", "-q", images / "a.qcow2")
    run("qemu-img", "compare", images / "a.raw", images / "a.qcow2", "-f", "raw", "-F", "qcow2")
    assert_sealed(images / "a.qcow2")


def test_backing_chain_reads_through_the_mount(images: Mounted) -> None:
    new_image(images / "base", 2 * MIB)
    assert_sealed(images / "base")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", images / "base", "-F", "raw", images / "overlay")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", images / "overlay")
    run("qemu-io", "-f", "qcow2", "-c", "read -P 7 1M 64k", images / "overlay")
    run("qemu-img", "check", "-q", images / "overlay")
    assert attribute(images / "base", "state") == "active"
    assert_sealed(images / "overlay")


def test_map_agrees_with_the_content(images: Mounted) -> None:
    content = new_image(images / "a", 2 * MIB)
    (images / "b").write_bytes(content)
    with open(images / "b", "r+b") as file:
        file.truncate(4 * MIB)
    extents = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", images / "b").stdout)
    assert sum(extent["length"] for extent in extents) == 4 * MIB
    assert all(extent["data"] for extent in extents if extent["start"] < 2 * MIB)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("cache", CACHES)
def test_random_writes_are_read_back_and_hashed(images: Mounted, form: str, cache: str) -> None:
    run("qemu-img", "create", "-q", "-f", form, images / "a", "8M")
    chance = random.Random(cache + form)
    blocks = {chance.randrange(0, 128): chance.randrange(1, 256) for _ in range(40)}
    writes = [f"write -P {value} {block * 65536} 65536" for block, value in blocks.items()]
    reads = [f"read -P {blocks.get(block, 0)} {block * 65536} 65536" for block in range(128)]
    for commands in (writes, reads):
        arguments = [part for command in commands for part in ("-c", command)]
        said = run("qemu-io", "-t", cache, "-f", form, *arguments, images / "a").stdout
        assert "failed" not in said
        assert "error" not in said
    assert_sealed(images / "a")
    assert digest(images / "a") == digest(backing_file(images / "a"))


def test_discard_and_zeroes_are_read_back_and_hashed(images: Mounted) -> None:
    new_image(images / "a", 4 * MIB)
    assert_sealed(images / "a")
    commands = [
        "-c",
        "write -z 1M 1M",
        "-c",
        "write -z -u 2M 512k",
        "-c",
        "discard 3M 64k",
        "-c",
        "read -P 0 1M 1536k",
    ]
    said = run("qemu-io", "-d", "unmap", "-f", "raw", *commands, images / "a")
    assert "failed" not in said.stdout
    assert said.stderr == ""
    assert_sealed(images / "a")


def test_image_is_saving_while_qemu_has_it_open_for_writing(images: Mounted) -> None:
    new_image(images / "a", MIB)
    assert_sealed(images / "a")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(["qemu-io", "-f", "raw", str(images / "a")], **pipes) as qemu:
        assert qemu.stdin
        print("write -q -P 1 0 64k", file=qemu.stdin, flush=True)
        wait_until(lambda: attribute(images / "a", "state") == "saving", "the write")
    assert_sealed(images / "a")


def test_image_that_qemu_only_reads_stays_active(images: Mounted) -> None:
    new_image(images / "a", MIB)
    assert_sealed(images / "a")
    record = backing_file(images / "a").stat().st_ctime_ns
    run("qemu-io", "-r", "-f", "raw", "-c", "read 0 1M", images / "a")
    assert attribute(images / "a", "state") == "active"
    assert backing_file(images / "a").stat().st_ctime_ns == record
