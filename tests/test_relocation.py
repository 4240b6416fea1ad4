"""An image that finds no room in the middle of a write goes on in the next datadir; its writer notices a pause."""

import contextlib
import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgfs import ImageStore, load, relocation, sealing, transit
from imgfs.datadir import Datadir
from imgfs.errors import StorageFull
from imgfs.image import Image
from imgfs.linux import is_dying
from tests.clients import (
    MIB,
    assert_sealed,
    backing_file,
    crash,
    digest,
    fails_with,
    fill,
    md5,
    new_image,
    opened,
    run_as,
)
from tests.conftest import FaultyMaker, Mounted, Mounter, attribute, run, wait_until, write_config

Filesystem = Callable[..., Path]
OpenStore = Callable[..., ImageStore]
KIB = 1 << 10


def images_in(datadir: Path) -> list[str]:
    """What lies in a datadir, what is in transit included."""
    own = os.listdir(datadir / ".imgfs") if (datadir / ".imgfs").exists() else []
    return sorted(name for name in os.listdir(datadir) if not name.startswith(".")) + [
        name for name in own if name.startswith("transit")
    ]


def datadir_of(image: Path) -> str:
    return Path(attribute(image, "datadir")).name


@pytest.fixture
def places(filesystem: Filesystem) -> list[str]:
    """A small datadir that is preferred, and a larger one."""
    return [f"{filesystem('tmpfs', 8)}:200", f"{filesystem('tmpfs', 64)}:100"]


def take_all_room(datadir: Path) -> None:
    """Leave not even a block of a filesystem."""
    fill(datadir, 64 * KIB)
    with contextlib.suppress(OSError), open(datadir / ".filled/rest", "wb", buffering=0) as rest:
        while True:
            rest.write(bytes(KIB))


# --- real programs ---


COPIES = {
    "cp": ("cp", "{source}", "{target}"),
    "dd": ("dd", "if={source}", "of={target}", "bs=300k", "status=none"),
    "rsync": ("rsync", "--inplace", "{source}", "{target}"),
    "qemu-img": ("qemu-img", "convert", "-O", "qcow2", "{source}", "{target}"),
}


@pytest.mark.parametrize("program", COPIES)
def test_program_that_fills_the_first_datadir_ends_well_in_the_next(
    places: list[str], mount: Mounter, tmp_path: Path, program: str
) -> None:
    images = mount(places)
    new_image(tmp_path / "source", 12 * MIB)
    new_image(images / "other", MIB)
    target = images / "target"
    run(*(word.format(source=tmp_path / "source", target=target) for word in COPIES[program]))
    assert_sealed(target)
    assert datadir_of(target) == "fs1"
    assert attribute(target, "location").endswith("/fs1/target")
    assert [images_in(d) for d in images.datadirs] == [["other"], ["target"]]
    if program == "qemu-img":
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", tmp_path / "source", target)
    else:
        assert attribute(target, "checksum") == digest(tmp_path / "source")
    assert "moves from" in images.log.read_text()


def test_image_keeps_owner_mode_attributes_and_what_is_expected_of_it(
    filesystem: Filesystem, mount: Mounter, second_user: int
) -> None:
    images = mount([f"{filesystem('ext4', 8)}:200", f"{filesystem('ext4', 64)}:100"])
    content = os.urandom(12 * MIB)
    with open(images / "x", "wb", buffering=0) as file:
        os.chown(images / "x", second_user, second_user)
        os.chmod(images / "x", 0o604)
        os.setxattr(images / "x", "user.note", b"kept")
        os.setxattr(images / "x", "user.imgfs.expect.checksum", md5(content).encode())
        for at in range(0, len(content), MIB):
            assert file.write(content[at : at + MIB]) == MIB
        assert datadir_of(images / "x") == "fs1"
        assert os.getxattr(images / "x", "user.imgfs.expect.checksum") == md5(content).encode()
    assert_sealed(images / "x", md5(content))
    status = backing_file(images / "x").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (second_user, second_user, 0o604)
    assert os.getxattr(images / "x", "user.note") == b"kept"


def test_image_that_misses_its_expectation_fails_though_it_was_relocated(
    filesystem: Filesystem, mount: Mounter
) -> None:
    images = mount([f"{filesystem('ext4', 8)}:200", f"{filesystem('ext4', 64)}:100"])
    images.expect_warning("image 'x' .* failed: its checksum")
    with open(images / "x", "wb", buffering=0) as file:
        os.setxattr(images / "x", "user.imgfs.expect.checksum", b"0" * 32)
        for _ in range(12):
            file.write(os.urandom(MIB))
    attribute(images / "x", "checksum")
    assert attribute(images / "x", "state") == "failed"
    assert datadir_of(images / "x") == "fs1"


def holes(path: Path) -> list[tuple[int, int]]:
    """The ranges of a file that hold data, for a filesystem that tells."""
    spans = []
    with opened(path, os.O_RDONLY) as fd:
        size, end = os.fstat(fd).st_size, 0
        while end < size:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(fd, start, os.SEEK_HOLE)
            spans.append((start, end))
    return spans


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_sparse_image_stays_sparse(filesystem: Filesystem, mount: Mounter, kind: str) -> None:
    images = mount([f"{filesystem(kind, 8)}:200", f"{filesystem(kind, 64)}:100"])
    spots = {at * 100 * MIB: os.urandom(128 * KIB) for at in range(80)}  # 10 MiB in 8 GB
    with opened(images / "x", os.O_RDWR | os.O_CREAT) as fd:
        for at, data in spots.items():
            assert os.pwrite(fd, data, at) == len(data)
        os.ftruncate(fd, 8000 * MIB)
        assert all(os.pread(fd, len(data), at) == data for at, data in spots.items())
    assert datadir_of(images / "x") == "fs1"
    status = backing_file(images / "x").stat()
    assert status.st_size == 8000 * MIB
    assert status.st_blocks * 512 <= 10 * MIB + 80 * 8 * KIB
    assert holes(backing_file(images / "x")) == [(at, at + len(data)) for at, data in spots.items()]


def test_sparse_image_stays_sparse_where_the_filesystem_hides_its_holes(faulty: FaultyMaker, mount: Mounter) -> None:
    hiding = faulty()
    images = mount([f"{hiding.path}:200", "low:100"])
    hiding.fault("ENOSYS", "lseek")
    head, tail = os.urandom(300 * KIB), os.urandom(300 * KIB)
    with opened(images / "x", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, head, 0)
        os.ftruncate(fd, 200 * MIB)
        hiding.fault("ENOSPC", "write")
        os.pwrite(fd, tail, 199 * MIB)
        assert (os.pread(fd, len(head), 0), os.pread(fd, len(tail), 199 * MIB)) == (head, tail)
    assert datadir_of(images / "x") == "low"
    assert backing_file(images / "x").stat().st_size == 200 * MIB
    assert backing_file(images / "x").stat().st_blocks * 512 < 2 * MIB


def test_image_that_can_not_be_read_stays_where_it_is(faulty: FaultyMaker, mount: Mounter) -> None:
    failing = faulty()
    images = mount([f"{failing.path}:200", "low:100"])
    images.expect_warning("image 'x' can't move to ")
    images.expect_warning("is removed: .* was full")
    with open(images / "x", "wb", buffering=0) as file:
        file.write(os.urandom(MIB))
        failing.fault("EIO", "read", "copy_file_range")
        failing.fault("ENOSPC", "write")
        with fails_with(errno.ENOSPC):
            file.write(os.urandom(MIB))
        assert datadir_of(images / "x") == failing.path.name
    wait_until(lambda: os.listdir(images.path) == [], "the removal")
    assert images_in(images.datadirs[1]) == []


def test_two_writers_fill_one_disk_and_both_end_well(filesystem: Filesystem, mount: Mounter) -> None:
    images = mount([f"{filesystem('tmpfs', 8)}:200", *(f"{filesystem('tmpfs', 16)}:100" for _ in range(2))])
    contents = {name: os.urandom(10 * MIB) for name in "ab"}
    together = threading.Barrier(2, timeout=30)

    def write(name: str) -> None:
        with open(images / name, "wb", buffering=0) as file:
            together.wait()
            for at in range(0, 10 * MIB, 64 * KIB):
                assert file.write(contents[name][at : at + 64 * KIB]) == 64 * KIB

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, content in contents.items():
        assert_sealed(images / name, md5(content))
    assert sorted(name for datadir in images.datadirs for name in images_in(datadir)) == ["a", "b"]


def test_two_writers_of_one_image_lose_no_byte(places: list[str], mount: Mounter) -> None:
    images = mount(places)
    content = os.urandom(12 * MIB)
    (images / "x").touch()

    def write(first: int) -> None:
        with open(images / "x", "r+b", buffering=0) as file:
            for at in range(first * 128 * KIB, len(content), 256 * KIB):
                assert os.pwrite(file.fileno(), content[at : at + 128 * KIB], at) == 128 * KIB

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_sealed(images / "x", md5(content))
    assert datadir_of(images / "x") == "fs1"


def test_readers_see_right_bytes_before_during_and_after(places: list[str], mount: Mounter) -> None:
    images = mount(places)
    content = os.urandom(12 * MIB)
    written, wrong, done = 0, [], threading.Event()

    def read(again: bool) -> None:
        with contextlib.ExitStack() as stack:
            fd = stack.enter_context(opened(images / "x", os.O_RDONLY))
            while not done.is_set():
                if again:
                    fd = stack.enter_context(opened(images / "x", os.O_RDONLY))
                there = written
                for at in range(0, there, 1 * MIB):
                    length = min(MIB, there - at)
                    if os.pread(fd, length, at) != content[at : at + length]:
                        wrong.append(at)
                if os.stat(images / "x").st_size < there:
                    wrong.append(-1)

    with open(images / "x", "wb", buffering=0) as file:
        threads = [threading.Thread(target=read, args=(again,)) for again in (True, False)]
        for thread in threads:
            thread.start()
        for at in range(0, len(content), 128 * KIB):
            written += file.write(content[at : at + 128 * KIB])
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert_sealed(images / "x", md5(content))


def test_what_is_written_after_the_relocation_is_seen_by_all_at_once(places: list[str], mount: Mounter) -> None:
    images = mount(places)
    with open(images / "x", "wb", buffering=0) as file, open(images / "x", "rb", buffering=0) as early:
        for _ in range(10):
            file.write(os.urandom(MIB))
        assert datadir_of(images / "x") == "fs1"
        assert len(os.listdir(images.path)) == 1
        with open(images / "x", "rb", buffering=0) as late:
            for reader in (early, late):
                assert os.pread(reader.fileno(), 4, 10 * MIB) == b""
            file.write(b"more")
            for reader in (early, late):
                assert os.fstat(reader.fileno()).st_size == 10 * MIB + 4
                assert os.pread(reader.fileno(), 4, 10 * MIB) == b"more"
            assert (images / "x").stat().st_size == 10 * MIB + 4
            assert os.fstat(file.fileno()).st_ino == (images / "x").stat().st_ino
            file.truncate(2)
            assert (images / "x").stat().st_size == 2
    assert (images / "x").read_bytes() == backing_file(images / "x").read_bytes()


def test_image_that_was_complete_is_relocated_when_it_grows(places: list[str], mount: Mounter) -> None:
    images = mount(places)
    content = new_image(images / "x", 4 * MIB)
    assert_sealed(images / "x", md5(content))
    more = os.urandom(8 * MIB)
    with open(images / "x", "ab", buffering=0) as file:
        for at in range(0, len(more), MIB):
            file.write(more[at : at + MIB])
    assert_sealed(images / "x", md5(content + more))
    assert datadir_of(images / "x") == "fs1"


def test_ordinary_user_notices_nothing(places: list[str], mount: Mounter, tmp_path: Path, second_user: int) -> None:
    images = mount(places, options=("--allow-other",))
    for datadir in images.datadirs:
        datadir.chmod(0o777)
    new_image(tmp_path / "source", 12 * MIB, mode=0o644)
    run_as(second_user, "cp", tmp_path / "source", images / "x")
    assert_sealed(images / "x", digest(tmp_path / "source"))
    assert (images / "x").stat().st_uid == second_user


# --- nobody can take it ---


def test_no_datadir_can_take_it(filesystem: Filesystem, mount: Mounter, tmp_path: Path) -> None:
    images = mount([f"{filesystem('tmpfs', 8)}:200", f"{filesystem('tmpfs', 16)}:100"])
    images.expect_warning("is removed: .* was full")
    others = {name: new_image(images / name, 5 * MIB) for name in "ab"}
    new_image(tmp_path / "source", 20 * MIB)
    done = run("cp", tmp_path / "source", images / "x", check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    wait_until(lambda: os.listdir(images.path) == ["a", "b"], "the removal")
    for name, content in others.items():
        assert_sealed(images / name, md5(content))
    assert '"reserved": 0' in attribute(images.path, "datadirs")
    wait_until(lambda: [images_in(d) for d in images.datadirs] in ([["a"], ["b"]], [["a", "b"], []]), "the clean-up")
    wait_until(lambda: sum(os.statvfs(d).f_bavail for d in images.datadirs) * 4096 > 13 * MIB, "the room")


def test_declared_size_that_fits_nowhere_fails_before_any_byte(filesystem: Filesystem, mount: Mounter) -> None:
    images = mount([f"{filesystem('tmpfs', 8)}:200", f"{filesystem('tmpfs', 16)}:100"])
    with open(images / "x", "wb", buffering=0) as file:
        with fails_with(errno.ENOSPC):
            os.setxattr(file.fileno(), "user.imgfs.expect.size", str(20 * MIB).encode())
        assert os.fstat(file.fileno()).st_size == 0
        assert '"reserved": 0' in attribute(images.path, "datadirs")
        file.write(b"small after all")
    assert_sealed(images / "x", md5(b"small after all"))


def test_size_declared_late_moves_what_is_there(places: list[str], mount: Mounter) -> None:
    images = mount(places)
    content = os.urandom(12 * MIB)
    with open(images / "x", "wb", buffering=0) as file:
        file.write(content[:MIB])
        os.setxattr(file.fileno(), "user.imgfs.expect.size", str(len(content)).encode())
        assert datadir_of(images / "x") == "fs1"
        assert f'"reserved": {11 * MIB}' in attribute(images.path, "datadirs")
        for at in range(MIB, len(content), MIB):
            file.write(content[at : at + MIB])
    assert_sealed(images / "x", md5(content))


# --- how a datadir says that it is full ---


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_datadir_that_says_it_is_full_in_whatever_way(faulty: FaultyMaker, mount: Mounter, code: str) -> None:
    """Its statvfs(2) tells of room enough, as with quotas."""
    full = faulty()
    images = mount([f"{full.path}:200", "low:100"])
    content = os.urandom(3 * MIB)
    with open(images / "x", "wb", buffering=0) as file:
        file.write(content[:MIB])
        full.fault(code, "write", "truncate", "fallocate", "copy_file_range")
        for at in range(MIB, len(content), MIB):
            assert file.write(content[at : at + MIB]) == MIB
    assert_sealed(images / "x", md5(content))
    assert datadir_of(images / "x") == "low"
    assert images_in(full.below) == []


@pytest.mark.parametrize("code", ["EDQUOT", "EIO"])
def test_target_that_fails_in_the_middle_is_passed_over(
    faulty: FaultyMaker, filesystem: Filesystem, mount: Mounter, code: str
) -> None:
    second = faulty()
    images = mount([f"{filesystem('tmpfs', 8)}:200", f"{second.path}:100", f"{filesystem('tmpfs', 32)}:50"])
    if code == "EIO":
        images.expect_warning("image 'x' can't move to ")
    second.fault(code, "write", "copy_file_range")
    content = os.urandom(12 * MIB)
    with open(images / "x", "wb", buffering=0) as file:
        for at in range(0, len(content), MIB):
            assert file.write(content[at : at + MIB]) == MIB
    assert_sealed(images / "x", md5(content))
    assert datadir_of(images / "x") == "fs1"
    assert images_in(second.below) == []


def test_target_without_room_for_the_note_is_passed_over(
    faulty: FaultyMaker, filesystem: Filesystem, mount: Mounter
) -> None:
    second = faulty()
    images = mount([f"{filesystem('tmpfs', 8)}:200", f"{second.path}:100", f"{filesystem('tmpfs', 32)}:50"])
    second.fault("ENOSPC", "write", name="replaced-*")
    new_image(images / "x", 12 * MIB)
    assert_sealed(images / "x")
    assert datadir_of(images / "x") == "fs1"
    assert images_in(second.below) == []


def test_image_too_long_for_a_filesystem_goes_to_one_without_that_limit(
    filesystem: Filesystem, mount: Mounter, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    short.mkdir()
    with open(tmp_path / "short.disk", "wb") as disk:
        disk.truncate(16 * MIB)
    run("mkfs.ext4", "-q", "-b", "1024", "-O", "^extent,^64bit,^has_journal", tmp_path / "short.disk")
    run("mount", "-o", "loop", tmp_path / "short.disk", short)
    try:
        images = mount([f"{short}:200", f"{filesystem('tmpfs', 8)}:100"])
        with opened(images / "x", os.O_RDWR | os.O_CREAT) as fd:
            assert os.pwrite(fd, b"head", 0) == 4
            assert os.pwrite(fd, b"tail", 100 << 30) == 4
            assert os.pread(fd, 4, 0) + os.pread(fd, 4, 100 << 30) == b"headtail"
            os.ftruncate(fd, 4)
        assert datadir_of(images / "x") == "fs0"
        assert_sealed(images / "x", md5(b"head"))
        images.unmount()
    finally:
        run("umount", "--lazy", short)


def test_no_room_for_preallocation_moves_the_image(places: list[str], open_store: OpenStore) -> None:
    store = open_store(places)
    handle = store.create("x")
    store.write(handle, b"head", 0)
    store.allocate(handle, 0, 0, 12 * MIB)
    assert Path(handle.image.datadir.path).name == "fs1"
    assert handle.status().st_blocks * 512 >= 12 * MIB
    assert handle.read(8, 0) == b"head" + bytes(4)
    store.close_handle(handle)
    assert store.digests("x").checksum == md5(b"head" + bytes(12 * MIB - 4))


def test_no_room_for_a_copy_within_the_store_moves_the_image(places: list[str], mount: Mounter) -> None:
    images = mount(places)
    content = new_image(images / "a", 5 * MIB)
    assert_sealed(images / "a", md5(content))
    run("cp", images / "a", images / "b")
    assert_sealed(images / "b", md5(content))
    assert (datadir_of(images / "a"), datadir_of(images / "b")) == ("fs0", "fs1")


# --- as if nothing had happened ---


def test_relocated_image_is_sealed_without_a_second_reading(
    places: list[str], open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it is read again")

    monkeypatch.setattr(sealing, "digest_file", refuse)
    store = open_store(places)
    content = os.urandom(12 * MIB)
    added = store.add("x", (content[at : at + MIB] for at in range(0, len(content), MIB)))
    assert (added.checksum, added.location) == (md5(content), store.location("x"))
    assert added.location.endswith("/fs1/x")


@pytest.mark.parametrize("options", [(), ("--no-passthrough",)])
def test_program_that_has_the_image_open_by_passthrough_keeps_it_in_its_datadir(
    places: list[str], mount: Mounter, options: tuple[str, ...]
) -> None:
    images = mount(places, options)
    content = new_image(images / "x", 4 * MIB)
    assert_sealed(images / "x", md5(content))
    pinned = "passthrough on" in attribute(images.path, "transport")
    with opened(images / "x", os.O_RDONLY) as reader, opened(images / "x", os.O_WRONLY | os.O_APPEND) as writer:
        with fails_with(errno.ENOSPC) if pinned else contextlib.nullcontext():
            for _ in range(8):
                os.write(writer, bytes(MIB))
        assert os.pread(reader, 4 * MIB, 0) == content
    assert_sealed(images / "x")
    assert datadir_of(images / "x") == ("fs0" if pinned else "fs1")


def test_complete_image_whose_record_finds_no_room_is_relocated(filesystem: Filesystem, mount: Mounter) -> None:
    images = mount([f"{filesystem('ext4', 8)}:200", f"{filesystem('ext4', 16)}:100"])
    content = os.urandom(MIB)
    with open(images / "x", "wb", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())
        take_all_room(images.datadirs[0])
    assert_sealed(images / "x", md5(content))
    assert datadir_of(images / "x") == "fs1"


class Held:
    """A relocation that stands still in the middle of its copying."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        copy = relocation.sparse.copy

        def held(*arguments: object) -> None:
            self.begun.set()
            assert self.go_on.wait(60)
            copy(*arguments)

        monkeypatch.setattr(relocation.sparse, "copy", held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch)
    yield held
    held.go_on.set()


@contextlib.contextmanager
def writing(store: ImageStore, name: str, content: bytes) -> Iterator[list[BaseException]]:
    """Another thread writes an image; gives what it fails with. It is done at the end."""
    failures: list[BaseException] = []

    def write() -> None:
        handle = store.create(name)
        try:
            at = 0
            while at < len(content):
                at += store.write(handle, content[at : at + 300_000], at)
        except OSError as error:
            failures.append(error)
        finally:
            store.close_handle(handle)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield failures
    finally:
        thread.join(60)


def test_nothing_else_waits_for_a_relocation(places: list[str], open_store: OpenStore, held: Held) -> None:
    store = open_store(places)
    store.add("other", [b"other"])
    content = os.urandom(12 * MIB)
    with writing(store, "x", content) as failures:
        assert held.begun.wait(60)
        assert store.reserved_bytes(store.datadirs[1]) >= 7 * MIB
        assert b"".join(store.read("x", 0, MIB)) == content[:MIB]
        assert store.state("x") == "saving"
        store.add("new", [b"new"])
        store.rename("new", "newer")
        store.rename("x", "y")
        store.delete("newer")
        assert sorted(store.names()) == ["other", "y"]
        held.go_on.set()
    assert failures == []
    assert store.digests("y").checksum == md5(content)
    assert store.location("y").endswith("/fs1/y")


def test_image_removed_during_its_relocation_is_gone(places: list[str], open_store: OpenStore, held: Held) -> None:
    store = open_store(places)
    with writing(store, "x", os.urandom(12 * MIB)) as failures:
        assert held.begun.wait(60)
        store.delete("x")
        assert list(store.names()) == []
        held.go_on.set()
    assert [type(failure) for failure in failures] == [StorageFull]
    assert [images_in(Path(datadir.path)) for datadir in store.datadirs] == [[], []]
    assert store.reserved_bytes(store.datadirs[1]) == 0


def test_image_removed_at_the_end_of_its_relocation_is_gone(
    places: list[str], open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(places)
    handle = store.create("x")
    follow = relocation._follow

    def removing(image: Image, file: transit.Transit) -> None:
        follow(image, file)
        store.delete("x")

    monkeypatch.setattr(relocation, "_follow", removing)
    with pytest.raises(StorageFull, match="it was removed"):
        store.allocate(handle, 0, 0, 16 * MIB)
    store.close_handle(handle)
    assert [images_in(Path(datadir.path)) for datadir in store.datadirs] == [[], []]
    assert "another file by now" not in caplog.text


def test_kernel_does_not_begin_to_read_a_file_that_is_being_left(
    filesystem: Filesystem, open_store: OpenStore, held: Held
) -> None:
    places = [filesystem("ext4", 8), filesystem("ext4", 16)]
    store = open_store([f"{places[0]}:200", f"{places[1]}:100"])
    handle = store.create("x")
    store.write(handle, bytes(MIB), 0)
    handle.sync()
    take_all_room(places[0])
    store.close_handle(handle)
    assert held.begun.wait(60)  # for want of room for the record
    reader = store.open("x")
    assert reader.resting_fd() is None
    held.go_on.set()
    assert store.digests("x").size == MIB
    assert store.location("x").endswith("/fs1/x")
    assert reader.resting_fd() is not None
    store.close_handle(reader)


def test_image_opened_during_its_relocation_goes_along(places: list[str], open_store: OpenStore, held: Held) -> None:
    store = open_store(places)
    content = os.urandom(12 * MIB)
    with writing(store, "x", content):
        assert held.begun.wait(60)
        late = store.open("x", os.O_RDWR)
        held.go_on.set()
    assert late.read(13 * MIB, 0) == content
    assert late.write(b"late", 0) == 4
    store.close_handle(late)
    assert store.digests("x").checksum == md5(b"late" + content[4:])


@pytest.mark.parametrize("late", [False, True])
def test_owner_mode_and_attributes_set_meanwhile_go_along(
    places: list[str], open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """As another program sets them, during the copy, or when that is about to take the name."""
    store = open_store(places)
    handle = store.create("x")
    owner, method = (transit.Transit, "announce") if late else (relocation.sparse, "copy")
    call = getattr(owner, method)
    file = Path(store.datadirs[0].path, "x")
    os.setxattr(file, "user.gone", b"1")

    def changing(*arguments: object) -> object:
        os.chown(file, 1234, 1235)
        os.chmod(file, 0o4604)
        os.setxattr(file, "user.note", b"new")
        os.removexattr(file, "user.gone")
        return call(*arguments)

    monkeypatch.setattr(owner, method, changing)
    store.allocate(handle, 0, 0, 1)
    with handle.image.change_lock:
        store._relocator.relocate(handle.image, 0, MIB, {store.datadirs[0]})
    store.close_handle(handle)
    moved = Path(store.datadirs[1].path, "x")
    status = moved.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1234, 1235, 0o4604)
    assert os.getxattr(moved, "user.note") == b"new"
    assert "user.gone" not in os.listxattr(moved)


def test_name_taken_in_the_target_meanwhile_is_left_alone(
    places: list[str], open_store: OpenStore, held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(places)
    with writing(store, "x", os.urandom(12 * MIB)) as failures:
        assert held.begun.wait(60)
        target = Path(store.datadirs[1].path)
        (target / "x").write_bytes(b"put there directly")
        held.go_on.set()
    assert [type(failure) for failure in failures] == [StorageFull]
    assert (target / "x").read_bytes() == b"put there directly"
    assert images_in(target) == ["x"]
    assert "can't move to" in caplog.text


def test_target_that_can_not_be_synced_keeps_nothing(
    places: list[str], open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(places)
    high, low = store.datadirs
    call = Datadir.sync

    def sync(datadir: Datadir) -> None:
        if datadir is low:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        call(datadir)

    store.add("x", [b"old"])
    handle = store.open("x", os.O_RDWR)
    with monkeypatch.context() as patch, pytest.raises(StorageFull):
        patch.setattr(Datadir, "sync", sync)
        store.allocate(handle, 0, 0, 16 * MIB)
    assert images_in(Path(low.path)) == []
    store.close_handle(handle)
    assert images_in(Path(high.path)) == ["x"]
    assert b"".join(store.read("x"))[:3] == b"old"


def test_file_put_in_the_place_of_one_that_is_relocated_stays(
    places: list[str], open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(places)
    high, low = (Path(datadir.path) for datadir in store.datadirs)
    handle = store.create("x")
    arrive = transit.Transit.arrive

    def arriving(file: transit.Transit, name: str) -> None:
        (high / ".other").write_bytes(b"other")
        (high / ".other").rename(high / "x")
        arrive(file, name)

    monkeypatch.setattr(transit.Transit, "arrive", arriving)
    with pytest.raises(StorageFull):
        store.allocate(handle, 0, 0, 16 * MIB)
    store.close_handle(handle)
    assert (high / "x").read_bytes() == b"other"
    assert images_in(low) == []


def test_closing_the_store_gives_a_relocation_up(places: list[str], open_store: OpenStore, held: Held) -> None:
    store = open_store(places)
    with writing(store, "x", os.urandom(12 * MIB)) as failures:
        assert held.begun.wait(60)
        closing = threading.Thread(target=store._relocator.close)
        closing.start()
        wait_until(lambda: store._relocator._closing)
        held.go_on.set()
        closing.join()
    assert [type(failure) for failure in failures] == [StorageFull]
    assert [images_in(Path(datadir.path)) for datadir in store.datadirs] == [[], []]


def test_writer_that_is_killed_does_not_wait_for_the_relocation(
    faulty: FaultyMaker, filesystem: Filesystem, mount: Mounter, tmp_path: Path
) -> None:
    slow = faulty()
    images = mount([f"{filesystem('tmpfs', 64)}:200", f"{slow.path}:100"])
    images.expect_warning("is removed: .* was full")
    new_image(tmp_path / "source", 80 * MIB)
    slow.fault("hang", "write", "copy_file_range", "copy_file_range_64")
    with subprocess.Popen(["cp", tmp_path / "source", images / "x"]) as writer:
        wait_until(lambda: relocating(images) and slow.hanging(), "the relocation")
        writer.send_signal(signal.SIGINT)
        wait_until(lambda: is_dying(writer.pid) or writer.poll() is not None, "the signal")
        time.sleep(1)  # the daemon is to hear of it, too
        slow.heal()
    assert writer.returncode == -signal.SIGINT
    wait_until(lambda: os.listdir(images.path) == [], "the removal")
    assert "was given up: its writer was ended" in images.log.read_text()
    assert [images_in(images.datadirs[0]), images_in(slow.below)] == [[], []]


def test_signal_that_ends_no_writer_ends_no_relocation(
    faulty: FaultyMaker, filesystem: Filesystem, mount: Mounter
) -> None:
    slow = faulty()
    images = mount([f"{filesystem('tmpfs', 8)}:200", f"{slow.path}:100"])
    slow.fault("hang", "write", "copy_file_range", "copy_file_range_64")
    writing = ["dd", "if=/dev/urandom", f"of={images / 'x'}", "bs=1M", "count=12"]
    with subprocess.Popen(writing, stderr=subprocess.PIPE) as writer:
        wait_until(lambda: relocating(images) and slow.hanging(), "the relocation")
        for _ in range(3):
            writer.send_signal(signal.SIGUSR1)
        slow.heal()
        _, told = writer.communicate()
    assert writer.returncode == 0, told
    assert_sealed(images / "x")
    assert (images / "x").stat().st_size == 12 * MIB


def relocating(images: Mounted) -> bool:
    """Whether a relocation has begun: other writes to a datadir may hang, too, such as those of its lists."""
    return "moves from" in images.log.read_text()


def pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process has yet to take a signal."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(fields["ShdPnd"], 16) >> (number - 1) & 1)


def test_unmounting_gives_a_relocation_up(faulty: FaultyMaker, filesystem: Filesystem, mount: Mounter) -> None:
    slow = faulty()
    images = mount([f"{filesystem('tmpfs', 64)}:200", f"{slow.path}:100"])
    images.expect_warning("is in use|still being worked on|ends all the same|is removed")
    slow.fault("hang", "write", "copy_file_range", "copy_file_range_64")
    with subprocess.Popen(["dd", "if=/dev/urandom", f"of={images / 'x'}", "bs=1M", "status=none"]) as writer:
        wait_until(lambda: relocating(images) and slow.hanging(), "the relocation")
        images.daemon.send_signal(signal.SIGTERM)
        if "kernel" in images.daemon.args:
            writer.wait(30)
        else:
            wait_until(lambda: not pending(images.daemon.pid, signal.SIGTERM), "the signal")
        slow.heal()
        assert images.daemon.wait(30) == 0
        writer.kill()
    assert "was given up" in images.log.read_text()
    assert images_in(slow.below) == []


# --- many at once ---


class Writers:
    """Write, rename and remove images until the time is over; `kept` are those that must be there in the end."""

    def __init__(self, images: Path, seconds: float) -> None:
        self.images, self.end = images, time.monotonic() + seconds
        self.kept: dict[str, str] = {}
        self.wrong: list[str] = []

    def run(self, count: int) -> None:
        threads = [threading.Thread(target=self._write_many, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _write_many(self, number: int) -> None:
        choose = random.Random(number)
        for count in itertools.count():
            if time.monotonic() > self.end:
                return
            image = self.images / f"{number}-{count}"
            try:
                self._write(image, choose)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    self.wrong.append(f"{image.name}: {error}")
                image.unlink(missing_ok=True)
                for name in [name for name in list(self.kept) if name.startswith(f"{number}-")][:3]:
                    del self.kept[name]
                    (self.images / name).unlink()

    def _write(self, image: Path, choose: random.Random) -> None:
        content = choose.randbytes(choose.randrange(1, 12 * MIB))
        places = list(range(0, len(content), 256 * KIB))
        if choose.random() < 0.4:
            choose.shuffle(places)
        with open(image, "w+b", buffering=0) as file:
            for at in places:
                piece = memoryview(content)[at : at + 256 * KIB]
                while piece:
                    written = os.pwrite(file.fileno(), piece, at)
                    piece, at = piece[written:], at + written  # noqa: PLW2901
            at = choose.choice(places)
            if os.pread(file.fileno(), 1000, at) != content[at : at + 1000]:
                self.wrong.append(f"{image.name} at {at}")
        if choose.random() < 0.3:
            image = image.rename(image.with_name(image.name + "r"))
        if choose.random() < 0.5:
            image.unlink()
        else:
            self.kept[image.name] = md5(content)


def test_many_writers_on_disks_that_fill_up_lose_nothing(filesystem: Filesystem, mount: Mounter) -> None:
    places = [filesystem("tmpfs", 24), filesystem("ext4", 32), filesystem("tmpfs", 40), filesystem("ext4", 64)]
    images = mount([f"{place}:{priority}" for place, priority in zip(places, (300, 200, 200, 100), strict=True)])
    images.expect_warning("is removed: .* was full|stays stale: sealing failed: (no other datadir|.Errno 28)")
    writers = Writers(images.path, float(os.environ.get("IMGFS_STRESS_SECONDS", "4")))
    writers.run(5)
    assert writers.wrong == []
    for name, checksum in writers.kept.items():
        assert_sealed(images / name, checksum)
    assert sorted(os.listdir(images.path)) == sorted(writers.kept)
    assert sorted(name for place in places for name in images_in(place)) == sorted(writers.kept)
    assert attribute(images.path, "datadirs").count('"reserved": 0') == len(places)
    assert "moves from" in images.log.read_text()


# --- crashes ---


@pytest.mark.parametrize("change", ["delete", "rename", "exchange"])
def test_what_had_the_name_before_does_not_come_back_beside_a_relocated_image(
    filesystem: Filesystem, open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """By a power cut: so the change of the name is durable before it appears in another datadir."""
    places = [filesystem("tmpfs", 8), filesystem("tmpfs", 32)]
    store = open_store([f"{places[0]}:200", f"{places[1]}:100"])
    store.add("x", [b"before"])
    store.add("y", [b"after"])
    steps: list[str] = []
    sync, arrive = Datadir.sync, transit.Transit.arrive
    if change == "delete":
        store.delete("x")
        handle = store.create("x")
    else:
        (store.rename if change == "rename" else store.exchange)("y", "x")
        handle = store.open("x", os.O_RDWR)

    def watched_sync(datadir: Datadir) -> None:
        sync(datadir)
        steps.append(datadir.path)

    def watched_arrive(self: transit.Transit, name: str) -> None:
        steps.append("arrival")
        arrive(self, name)

    monkeypatch.setattr(Datadir, "sync", watched_sync)
    monkeypatch.setattr(transit.Transit, "arrive", watched_arrive)
    for at in range(12):
        store.write(handle, b"n" * MIB, at * MIB)
    assert steps[:2] == [str(places[0]), "arrival"]
    store.close_handle(handle)


STEPS = {
    "announce": (transit.Transit, "announce"),
    "arrive": (transit.Transit, "arrive"),
    "move": (Image, "move_to"),
    "unlink": (Datadir, "unlink"),
    "sync": (Datadir, "sync"),
    "forget": (transit.Transit, "forget_note"),
}


def crash_in_relocation(config: Path, step: str, when: str) -> None:
    """What a process of its own does: relocate an image that was complete, and end before or after one step."""
    owner, method = STEPS[step]
    call = getattr(owner, method)

    def crashing(*arguments: object) -> object:
        if when == "before":
            os._exit(7)
        call(*arguments)
        os._exit(7)

    store = ImageStore(load(config))
    store.add("x", [b"old" * MIB])
    setattr(owner, method, crashing)
    handle = store.open("x", os.O_RDWR)
    at = 3 * MIB
    while True:
        at += store.write(handle, b"n" * MIB, at)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_crash_at_any_step_leaves_one_copy(
    filesystem: Filesystem, open_store: OpenStore, tmp_path: Path, step: str, when: str
) -> None:
    places = [filesystem("tmpfs", 8), filesystem("tmpfs", 32)]
    config = write_config(tmp_path, [f"{places[0]}:200", f"{places[1]}:100"])
    call = f"from tests.test_relocation import *; crash_in_relocation(Path({str(config)!r}), {step!r}, {when!r})"
    assert run(sys.executable, "-c", call, check=False, cwd=Path(__file__).parents[1]).returncode == 7
    store = open_store([f"{places[0]}:200", f"{places[1]}:100"])
    assert sorted(images_in(places[0]) + images_in(places[1])) == ["x"]
    assert store.state("x") == "stale"
    content = b"".join(store.read("x"))
    assert content[: 3 * MIB] == b"old" * MIB
    assert len(content) >= 6 * MIB
    assert set(content[3 * MIB :]) == set(b"n")
    assert store.digests("x").checksum == md5(content)
    assert not [
        name
        for place in places
        for name in os.listdir(place / ".imgfs")
        if name.startswith(("transit-", "replaced-"))
    ]


@pytest.mark.parametrize("content", [b"", b"{", b"7", b'{"name": "78"}', b'{"name": "..", "ino": 1}', b"[" * 100_000])
def test_damaged_leftovers_keep_no_store_from_opening(open_store: OpenStore, tmp_path: Path, content: bytes) -> None:
    open_store().close()
    (tmp_path / "high/.imgfs/replaced-1").write_bytes(content)
    (tmp_path / "high/.imgfs/transit-1").write_bytes(b"half an image")
    (tmp_path / "high/.imgfs/transit-2").symlink_to(tmp_path / "elsewhere")
    open_store()
    assert os.listdir(tmp_path / "high/.imgfs") == ["marker"]


def test_note_spares_another_file_of_that_name(open_store: OpenStore, tmp_path: Path) -> None:
    open_store().close()
    (tmp_path / "high/x").write_bytes(b"moved")
    (tmp_path / "low/x").write_bytes(b"another")
    with open_store() as store:
        high, low = store.datadirs
        moved = high.inode("x")
        assert moved
        high.note_replaced("x", low, moved, high, moved)
    open_store()
    assert ((tmp_path / "high/x").read_bytes(), (tmp_path / "low/x").read_bytes()) == (b"moved", b"another")


def test_killed_daemon_leaves_one_copy(filesystem: Filesystem, mount: Mounter) -> None:
    images = mount([f"{filesystem('tmpfs', 64)}:200", f"{filesystem('tmpfs', 128)}:100"])
    kept = new_image(images / "kept", MIB)
    assert_sealed(images / "kept", md5(kept))
    in_transit = images.datadirs[1] / ".imgfs"

    def write() -> None:
        with contextlib.suppress(OSError), open(images / "x", "wb", buffering=0) as file:
            while True:
                file.write(os.urandom(MIB))

    writer = threading.Thread(target=write)
    writer.start()
    wait_until(lambda: any(name.startswith("transit") for name in os.listdir(in_transit)), "the relocation")
    crash(mount, images)
    writer.join()
    again = mount.mount(images.config, images.path)
    again.expect_warning("cut short")
    assert sorted(os.listdir(again.path)) == ["kept", "x"]
    assert sorted(name for datadir in again.datadirs for name in images_in(datadir)) == ["kept", "x"]
    assert attribute(again / "x", "state") == "stale"
    assert_sealed(again / "kept", md5(kept))
    assert_sealed(again / "x")


def test_target_that_hangs_holds_up_nobody_else(faulty: FaultyMaker, filesystem: Filesystem, mount: Mounter) -> None:
    hung = faulty()
    places = [f"{filesystem('tmpfs', 16)}:200", f"{hung.path}:100", f"{filesystem('tmpfs', 8)}:50"]
    images = mount(places, timeout=1)
    images.expect_warning("faulty0 is offline|faulty0 is online|never came back|is removed: .* was full|still being")
    content = new_image(images / "other", MIB)
    hung.fault("hang", "write", name="transit-*")
    failures: list[OSError] = []

    def write() -> None:
        try:
            (images / "x").write_bytes(os.urandom(24 * MIB))
        except OSError as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    wait_until(hung.hanging, "the relocation")
    assert_sealed(images / "other", md5(content))
    images.wait_for_log("faulty0 is offline")
    assert attribute(images.path, "datadirs").count('"online": true') == 2
    assert_sealed(images / "new", md5(new_image(images / "new", 1000)))
    hung.heal()
    writer.join(60)
    assert {error.errno for error in failures} <= {errno.EIO, errno.ENOSPC}  # by then it may be passed over
