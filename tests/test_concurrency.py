"""Many at once: creators of one name, writers of many images, and whoever reads or waits meanwhile."""

import errno
import hashlib
import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.clients import MIB, assert_sealed, md5, new_image
from tests.conftest import WAIT_SECONDS, Mounted, attribute, wait_until

Mount = Callable[..., Mounted]


def at_once(commands: list[list[str]]) -> list[int]:
    """Run programs that all start at one moment; gives their exit codes."""
    read_end, write_end = os.pipe()
    waiting = ["sh", "-c", 'echo; read _; exec "$@"', "sh"]
    pipes = {"stdin": read_end, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    programs = [subprocess.Popen([*waiting, *command], **pipes) for command in commands]
    os.close(read_end)
    for program in programs:
        assert program.stdout
        program.stdout.readline()
    os.close(write_end)
    codes = [program.wait(WAIT_SECONDS) for program in programs]
    for program in programs:
        assert program.stdout
        program.stdout.close()
    return codes


def test_one_of_twenty_processes_that_create_a_name_wins(mount: Mount, tmp_path: Path) -> None:
    images = mount()
    contents = [new_image(tmp_path / f"source{number}", 200_000) for number in range(20)]
    commands = [
        ["dd", f"if={tmp_path / f'source{number}'}", f"of={images / 'a'}", "conv=excl", "bs=64k"]
        for number in range(20)
    ]
    codes = at_once(commands)
    assert codes.count(0) == 1
    assert_sealed(images / "a", md5(contents[codes.index(0)]))
    assert [p.name for d in images.datadirs for p in d.glob("[!.]*")] == ["a"]


def test_fifty_images_written_at_once_have_the_right_digests(mount: Mount) -> None:
    images = mount()
    contents = {f"image{number}": os.urandom(500_000 + 4321 * number) for number in range(50)}
    start = threading.Barrier(50, timeout=WAIT_SECONDS)

    def write(name: str) -> None:
        start.wait()
        with open(images / name, "wb", buffering=0) as image:
            for offset in range(0, len(contents[name]), 100_000):
                image.write(contents[name][offset : offset + 100_000])

    with ThreadPoolExecutor(50) as pool:
        list(pool.map(write, contents))
        digests = dict(
            zip(contents, pool.map(lambda name: attribute(images / name, "checksum"), contents), strict=True)
        )
    assert digests == {name: md5(content) for name, content in contents.items()}
    assert sorted(os.listdir(images.path)) == sorted(contents)
    assert {attribute(images / name, "state") for name in contents} == {"active"}


def test_many_writers_of_one_image_give_the_digest_of_its_bytes(mount: Mount) -> None:
    images = mount()
    size, writers = 64_000, 16
    content = os.urandom(size * writers)
    (images / "a").touch()

    def write(part: int) -> None:
        with open(images / "a", "r+b") as image:
            image.seek(part * size)
            image.write(content[part * size : (part + 1) * size])

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    assert_sealed(images / "a", md5(content))


def test_digest_waits_for_the_last_writer(mount: Mount) -> None:
    images = mount()
    content = os.urandom(2 * MIB)
    with ThreadPoolExecutor(4) as pool:
        with open(images / "a", "wb", buffering=0) as image:
            image.write(content[:MIB])
            answers = [pool.submit(attribute, images / "a", "checksum") for _ in range(4)]
            assert attribute(images / "a", "state") == "saving"
            image.write(content[MIB:])
            assert not any(answer.done() for answer in answers)
        assert {answer.result(WAIT_SECONDS) for answer in answers} == {md5(content)}


def test_wait_for_a_digest_can_be_interrupted(mount: Mount) -> None:
    images = mount()
    command = ["getfattr", "-n", "user.imgfs.checksum", str(images / "a")]
    with open(images / "a", "wb", buffering=0) as image:
        image.write(b"begun")
        waiting = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        task = Path(f"/proc/{waiting.pid}/stat")
        wait_until(lambda: "(getfattr) S" in task.read_text(), "the wait")
        waiting.terminate()
        assert waiting.wait(WAIT_SECONDS) != 0
        assert attribute(images / "a", "state") == "saving"
    assert_sealed(images / "a", md5(b"begun"))


def test_readers_see_the_bytes_of_a_writer_at_once(mount: Mount) -> None:
    images = mount()
    with open(images / "a", "wb", buffering=0) as image, open(images / "a", "rb", buffering=0) as reader:
        for number in range(20):
            piece = f"piece {number};".encode()
            image.write(piece)
            assert reader.read(100) == piece


def test_names_created_and_removed_by_many_leave_nothing_behind(mount: Mount) -> None:
    images = mount()

    def work(worker: int) -> None:
        for turn in range(10):
            path = images / f"{(worker + turn) % 4}"
            try:
                with open(path, "xb") as image:
                    image.write(bytes(10_000))
                path.rename(images / f"{worker}-{turn}")
                (images / f"{worker}-{turn}").unlink()
            except (FileExistsError, FileNotFoundError):
                continue

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert set(os.listdir(images.path)) <= {"0", "1", "2", "3"}
    for name in os.listdir(images.path):
        assert_sealed(images / name)


def test_renames_onto_one_name_leave_one_whole_image(mount: Mount) -> None:
    images = mount()
    contents = {f"{number}": new_image(images / f"{number}", 50_000) for number in range(16)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: (images / name).rename(images / "target"), contents))
    assert os.listdir(images.path) == ["target"]
    assert attribute(images / "target", "checksum") in {md5(content) for content in contents.values()}
    assert_sealed(images / "target")


@pytest.mark.parametrize("pieces", [1, 37])
def test_writes_out_of_order_are_hashed_as_the_file_has_them(mount: Mount, pieces: int) -> None:
    images = mount()
    content = os.urandom(1_000_003)
    step = len(content) // pieces + 1
    with open(images / "a", "wb", buffering=0) as image:
        for number in sorted(range(pieces), key=lambda n: hashlib.md5(bytes([n])).digest()):
            os.pwrite(image.fileno(), content[number * step : (number + 1) * step], number * step)
    assert_sealed(images / "a", md5(content))


def test_exclusive_create_of_an_image_in_a_lower_datadir_fails(mount: Mount) -> None:
    images = mount()
    new_image(images.datadirs[1] / "a", 10)
    with pytest.raises(FileExistsError) as caught:
        os.open(images / "a", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    assert caught.value.errno == errno.EEXIST
    assert (images / "a").stat().st_size == 10


@pytest.mark.parametrize("mount", ["kernel"], indirect=True)
def test_a_name_that_is_renamed_over_again_and_again_never_fails(mount: Mount) -> None:
    """As rsync does it, while others open, read and ask; to them the name never is missing."""
    images = mount()
    path = images / "a"
    path.write_bytes(b"0" * 100)
    ending = threading.Event()

    def replace(writer: int) -> None:
        for number in range(150):
            new = images / f"new-{writer}"
            new.write_bytes(b"%d" % (number % 10) * 100)
            new.rename(path)

    def use(flags: int) -> int:
        rounds = 0
        while not ending.is_set():
            fd = os.open(path, flags)
            content = os.pread(fd, 200, 0)
            assert (len(content), len(set(content))) == (100, 1)
            os.fstat(fd)
            os.close(fd)
            path.stat()
            assert os.getxattr(path, "user.imgfs.state") in (b"saving", b"stale", b"active")
            rounds += 1
        return rounds

    with ThreadPoolExecutor(6) as pool:
        users = [pool.submit(use, flags) for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDONLY)]
        try:
            for writer in [pool.submit(replace, writer) for writer in range(3)]:
                writer.result()
        finally:
            ending.set()
        assert min(user.result() for user in users) > 10
    assert os.listdir(images.path) == ["a"]
