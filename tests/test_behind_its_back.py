"""What others do to a datadir, a mapping or a descriptor never makes a wrong digest active, nor loses an image."""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs import ImageStore, State
from imgfs.errors import NameDoubled, NotPermitted
from imgfs.image import Handle
from tests.clients import crash
from tests.conftest import WAIT_SECONDS, Mounter, attribute, run, wait_until, write_config

OpenStore = Callable[..., ImageStore]
ON_KERNEL = pytest.mark.parametrize("mount", ["kernel"], indirect=True)


@pytest.fixture
def store(open_store: OpenStore) -> ImageStore:
    return open_store(["one"])


def changed(path: Path, change: Callable[[], object]) -> None:
    """Do something to a file that must move its mtime."""
    before = path.stat().st_mtime_ns
    change()
    while path.stat().st_mtime_ns == before:
        os.utime(path)


def put(path: Path, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(data)


def digest_is_true(store: ImageStore, name: str, path: Path) -> bool:
    return store.digests(name).checksum == hashlib.md5(path.read_bytes()).hexdigest()


def test_direct_change_between_two_writes_is_hashed(store: ImageStore, tmp_path: Path) -> None:
    handle = store.create("x")
    handle.write(b"A" * 4096, 0)
    changed(tmp_path / "one/x", lambda: put(tmp_path / "one/x", b"ZZZZ"))
    handle.write(b"B" * 4096, 4096)
    store.close_handle(handle)
    assert digest_is_true(store, "x", tmp_path / "one/x")


@ON_KERNEL
def test_bytes_stored_through_a_mapping_while_they_are_hashed_never_get_a_wrong_digest(mount: Mounter) -> None:
    images = mount(["one"])
    backing = images.datadirs[0] / "x"
    backing.write_bytes(os.urandom(32 << 20))
    wait_until((images / "x").exists)
    reader, writer = (os.open(images / "x", flags) for flags in (os.O_RDONLY, os.O_RDWR))
    os.pread(reader, 1, 0)
    with contextlib.closing(mmap.mmap(writer, 32 << 20)) as mapping:
        for _ in range(4):
            mapping[0] = (mapping[0] + 1) % 256
            ended = time.monotonic() + 0.1
            storing = threading.Thread(target=_store_until, args=(mapping, ended))
            storing.start()
            with contextlib.suppress(OSError):  # EAGAIN while it keeps changing
                attribute(images / "x", "checksum")
            storing.join()
            if attribute(images / "x", "state") == "active":
                assert attribute(images / "x", "checksum") == hashlib.md5(backing.read_bytes()).hexdigest()
    os.close(writer)
    os.close(reader)
    assert attribute(images / "x", "checksum") == hashlib.md5(backing.read_bytes()).hexdigest()
    images.expect_warning("keeps changing behind imgfs")


def _store_until(mapping: mmap.mmap, ended: float) -> None:
    while time.monotonic() < ended:
        mapping[0] = (mapping[0] + 1) % 256


@ON_KERNEL
def test_image_that_the_kernel_reads_itself_is_not_placed_anew(mount: Mounter) -> None:
    images = mount(["low:1", {"path": "high", "priority": 2, "mode": "nc"}])
    (images / "x").touch()
    attribute(images / "x", "checksum")
    images.unmount()
    images.config.write_text(json.dumps({"datadirs": ["low:1", "high:2"]}))
    images = mount.mount(images.config, images.path)
    with open(images / "x", "rb", buffering=0) as reader:
        reader.read(1)
        with open(images / "x", "wb", buffering=0) as writer:
            writer.truncate(8192)
            writer.write(b"N" * 8192)
        assert os.pread(reader.fileno(), 9999, 0) == b"N" * 8192
    assert (images / "x").read_bytes() == b"N" * 8192


def test_removing_one_name_spares_what_took_its_place(store: ImageStore, tmp_path: Path) -> None:
    store.add("x", [b"old"])
    handle = store.open("x")
    (tmp_path / "one/x").rename(tmp_path / "one/x.bak")
    (tmp_path / "one/x").write_bytes(b"new")
    store.delete("x.bak")
    assert {name: (tmp_path / "one" / name).read_bytes() for name in store.names()} == {"x": b"new"}
    store.close_handle(handle)


def test_removing_one_of_two_hard_links_keeps_the_other(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "one/x").write_bytes(b"x")
    (tmp_path / "one/y").hardlink_to(tmp_path / "one/x")
    handle = store.open("x")
    store.delete("y")
    assert list(store.names()) == ["x"]
    store.close_handle(handle)


def test_expectation_that_was_met_does_not_judge_later_bytes(store: ImageStore, tmp_path: Path) -> None:
    handle = store.create("x")
    store.expect_size(handle.image, 3)
    handle.write(b"abc", 0)
    store.close_handle(handle)
    reader = store.open("x")
    assert store.digests("x").size == 3
    changed(tmp_path / "one/x", lambda: (tmp_path / "one/x").write_bytes(b"abcmore"))
    assert digest_is_true(store, "x", tmp_path / "one/x")
    assert store.state("x") is State.ACTIVE
    assert reader.read(10, 0) == b"abcmore"
    store.close_handle(reader)


def test_question_for_a_digest_does_not_seal_under_a_writer_at_work(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one/x").write_bytes(b"old")
    handle = store.open("x", os.O_WRONLY)
    with store.image("x") as image:
        assert image.valid_record() is None
        # The writer begins after the look at the record, before the seal.
        handle.truncate(0)
        handle.write(b"first half", 0)
        image.expect(checksum="0" * 32)
        assert not image.begin_sealing()
        handle.write(b", and the rest", 10)
    store.close_handle(handle)
    store.digests("x")
    assert store.state("x") is State.FAILED


def test_copy_that_finds_no_room_is_removed(
    filesystem: Callable[..., Path], open_store: OpenStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store([filesystem("tmpfs", 8)])
    store.add("source", [os.urandom(5 << 20)])
    source, target = store.open("source"), store.create("target")
    with pytest.raises(OSError) as caught:
        _copy(source, target, 5 << 20)
    assert caught.value.errno == errno.ENOSPC
    store.close_handle(target)
    store.close_handle(source)
    assert list(store.names()) == ["source"]
    store.close()


def _copy(source: Handle, target: Handle, size: int) -> None:
    offset = 0
    while offset < size:
        offset += target.copy_from(source, offset, offset, size - offset)


@pytest.mark.parametrize("kind", ["file", "number", "directory", "symlink", "pipe"])
def test_hostile_note_leads_nowhere_and_keeps_no_store_from_opening(
    open_store: OpenStore, tmp_path: Path, kind: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    own = tmp_path / "one/.imgfs"
    own.mkdir(parents=True)
    note = own / "replaced-x"
    fields = {"name": os.fsencode(victim).hex(), "ino": victim.stat().st_ino, "by": str(tmp_path / "two")}
    {
        "file": lambda: note.write_text(json.dumps(fields)),
        "number": lambda: note.write_text('{"name": "78", "ino": 1e400, "by": ""}'),
        "directory": note.mkdir,
        "symlink": lambda: note.symlink_to(victim),
        "pipe": lambda: os.mkfifo(note),
    }[kind]()
    store = open_store(["one", "two"])
    assert list(store.names()) == []
    assert victim.read_text() == "precious"


@ON_KERNEL
def test_many_who_wait_for_a_digest_do_not_hold_up_the_mount(mount: Mounter) -> None:
    images = mount()
    images.expect_warning("threads are busy")
    answers: list[int] = []

    def ask() -> None:
        try:
            attribute(images / "x", "checksum")
            answers.append(0)
        except OSError as error:
            answers.append(error.errno or 0)

    with open(images / "x", "wb", buffering=0) as writer:
        writer.write(b"1")
        asking = [threading.Thread(target=ask) for _ in range(300)]
        for thread in asking:
            thread.start()
        wait_until(lambda: len(answers) == 300 - 128, "those that are too many")
        assert set(answers) == {errno.EAGAIN}
        writer.write(b"2")
        assert os.statvfs(images.path).f_namemax == 255
    for thread in asking:
        thread.join()
    assert answers.count(0) == 128


def test_write_once_image_that_became_active_under_a_writer_is_not_changed(
    open_store: OpenStore, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/x").write_bytes(b"x")
    store = open_store(["one"], write_once=True)
    handle = store.open("x", os.O_WRONLY)
    store.digests("x")
    with pytest.raises(NotPermitted):
        handle.write(b"y", 0)
    store.close_handle(handle)
    assert store.state("x") is State.ACTIVE


def test_name_in_more_than_one_datadir_is_not_renamed_over(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store(["a:3", "b:2", "c:1"])
    for place, name in (("a", "new"), ("c", "new"), ("b", "old")):
        (tmp_path / place / name).write_bytes(place.encode())
    with pytest.raises(NameDoubled):
        store.rename("old", "new")
    assert (tmp_path / "b/old").read_bytes() == b"b"
    assert (tmp_path / "a/new").read_bytes() == b"a"


def test_size_declared_where_a_better_datadir_fails_leaves_the_image_where_it_is(
    filesystem: Callable[..., Path], open_store: OpenStore, caplog: pytest.LogCaptureFixture
) -> None:
    better = filesystem("tmpfs", 16, "rw,nr_inodes=6")
    store = open_store([f"{better}:2", "here:1"])
    with contextlib.suppress(OSError):
        for number in range(9):
            (better / f"f{number}").touch()
    handle = store.create("x")
    assert handle.image.datadir.priority == 1
    store.truncate(handle, 1 << 20)
    assert handle.status().st_size == 1 << 20
    store.close_handle(handle)
    store.digests("x")
    store.close()


def test_daemon_that_may_not_give_files_away_makes_none_setuid(tmp_path: Path, second_user: int) -> None:
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)
    (tmp_path / "one").mkdir()
    os.chown(tmp_path / "one", second_user, second_user)
    config = write_config(tmp_path, ["one"])
    script = (
        "import sys; from imgfs import ImageStore, load; from imgfs.namespace import Owner\n"
        "with ImageStore(load(sys.argv[1])) as s: s.close_handle(s.create('x', 0o4777, Owner(1234, 1234)))"
    )
    python_path = os.pathsep.join([str(Path(__file__).parents[1]), *_site_packages()])
    run("/usr/bin/python3", "-c", script, config, user=second_user, group=second_user, extra_groups=[],
        env={"PYTHONPATH": python_path})  # fmt: skip
    assert (tmp_path / "one/x").stat().st_mode & 0o7777 == 0o777


def _site_packages() -> list[str]:
    return [str(Path(pytest.__file__).parents[1])]


KILLS = 6
RESTLESS = """
import os, random, sys
while True:
    one, other = (f"{sys.argv[1]}/x{random.randrange(30)}" for _ in range(2))
    try:
        random.choice([lambda: open(one, "w").close(), lambda: os.rename(one, other), lambda: os.unlink(one)])()
    except FileNotFoundError:
        pass
    except OSError:
        break
"""


@ON_KERNEL
def test_a_daemon_killed_while_names_change_everywhere_is_gone_at_once(mount: Mounter) -> None:
    """A thread that waits for a lock of the kernel can't be killed; the daemon must never be in such a place."""
    mounted = mount()
    for _ in range(KILLS):
        mounted.expect_warning("more than one datadir|copies|no longer")
        clients = [subprocess.Popen([sys.executable, "-c", RESTLESS, str(mounted.path)]) for _ in range(3)]
        try:
            until = time.monotonic() + random.uniform(0.2, 0.6)
            while time.monotonic() < until:
                path = random.choice(mounted.datadirs) / f"x{random.randrange(30)}"
                with contextlib.suppress(FileNotFoundError):
                    random.choice([path.touch, path.unlink])()
            crash(mount, mounted)
        finally:
            for client in clients:
                client.kill()
                client.wait(WAIT_SECONDS)
        mounted = mount.mount(mounted.config, mounted.path)
    mounted.expect_warning("more than one datadir|copies|no longer")
