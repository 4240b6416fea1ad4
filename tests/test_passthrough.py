"""Passthrough on a real store: images at rest are read without the daemon, and whatever happens to them meanwhile.

Whether a request reached the daemon is told by its count of ended read(2) calls (`syscr` in /proc/PID/io, proc(5)):
it takes one for each request it receives, and none while it waits.
"""

import errno
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients import MIB, assert_sealed, digest, md5, new_image, opened
from tests.conftest import WAIT_SECONDS, Mounted, attribute, run, wait_until

Mount = Callable[..., Mounted]
READ_BYTES = int(os.environ.get("IMGFS_TEST_READ_MIB", "256")) * MIB
RANDOM_READS = 20_000

kernel_only = pytest.mark.parametrize("mount", ["kernel"], indirect=True)


def requests(mounted: Mounted) -> int:
    """How many requests the daemon has taken, and some more reads of its own."""
    lines = Path(f"/proc/{mounted.daemon.pid}/io").read_text("ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["syscr"])


def descriptors(mounted: Mounted) -> list[str]:
    """What of the datadirs' images the daemon has open, one entry for each descriptor."""
    found = []
    for link in Path(f"/proc/{mounted.daemon.pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:
            continue
        if any(target.startswith(f"{datadir}/") for datadir in mounted.datadirs) and "/.imgfs" not in target:
            found.append(target)
    return found


def wait_for_rest(mounted: Mounted) -> None:
    """Wait until the daemon has no image open: the last release has come, the last seal is done."""
    wait_until(lambda: not descriptors(mounted), "the end of all descriptors")


def wait_for_quiet(mounted: Mounted) -> None:
    """Wait until the daemon reads nothing any more: it has heard of all that was written to its datadirs directly."""
    counts: list[int] = []

    def quiet() -> bool:
        counts.append(requests(mounted))
        return counts[-30:].count(counts[-1]) == 30

    wait_until(quiet, "the daemon's rest")


@contextmanager
def resting(mounted: Mounted, path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of an image that nobody else has open."""
    wait_for_rest(mounted)
    with opened(path, flags) as fd:
        os.fstat(fd)
        yield fd


def requests_to_read(mounted: Mounted, name: str, block: bytes) -> int:
    """Read an image of READ_BYTES in equal blocks from start to end, at random places, and through a mapping.

    Each byte is checked. Gives how many requests that took.
    """
    buffer, twice = bytearray(len(block)), block + block
    with resting(mounted, mounted / name) as fd, mmap.mmap(fd, READ_BYTES, prot=mmap.PROT_READ) as mapped:
        wait_for_quiet(mounted)
        before = requests(mounted)
        for _ in range(READ_BYTES // len(block)):
            assert os.readv(fd, [buffer]) == len(block)
            assert buffer == block
        for _ in range(RANDOM_READS):
            offset = random.randrange(READ_BYTES - 4096)
            start = offset % len(block)
            assert os.pread(fd, 4096, offset) == twice[start : start + 4096]
        assert mapped[5 * len(block) : 6 * len(block)] == block
        return requests(mounted) - before


@kernel_only
def test_reads_of_an_image_at_rest_never_reach_the_daemon(mount: Mount) -> None:
    """The same reads are seen to reach a daemon that passes nothing through."""
    images = mount()
    block = os.urandom(MIB)
    with open(images.datadirs[0] / "a", "wb") as file:
        for _ in range(READ_BYTES // MIB):
            file.write(block)
    assert requests_to_read(images, "a", block) == 0

    images.unmount()
    without = mount(images.datadirs, options=("--no-passthrough",))
    assert requests_to_read(without, "a", block) >= READ_BYTES // MIB


@kernel_only
@pytest.mark.parametrize("options", [(), ("--no-passthrough",)], ids=["on", "off"])
def test_mount_says_whether_it_passes_through(mount: Mount, options: tuple[str, ...]) -> None:
    images = mount(options=options)
    said = f"kernel, passthrough {'off' if options else 'on'}"
    assert attribute(images.path, "transport") == said
    images.wait_for_log(f"is served by transport {said}")


@kernel_only
def test_image_that_was_just_written_is_passed_through(mount: Mount) -> None:
    images = mount()
    content = new_image(images / "a", 8 * MIB)
    assert attribute(images / "a", "checksum") == md5(content)
    with resting(images, images / "a") as fd:
        before = requests(images)
        assert os.pread(fd, 8 * MIB, 0) == content
        assert requests(images) == before


@kernel_only
def test_image_that_is_being_written_is_read_from_the_daemon(mount: Mount) -> None:
    images = mount()
    content = os.urandom(8 * MIB)
    with open(images / "a", "wb", buffering=0) as writer, open(images / "a", "rb", buffering=0) as reader:
        writer.write(content)
        before = requests(images)
        assert reader.read(8 * MIB) == content
        assert requests(images) > before
    assert_sealed(images / "a", md5(content))


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "O_DIRECT"])
def test_every_way_to_read_gives_the_same_bytes(mount: Mount, flags: int) -> None:
    images = mount()
    content = new_image(images / "a", 3 * MIB)
    assert_sealed(images / "a", md5(content))
    with resting(images, images / "a", os.O_RDONLY | flags) as fd:
        buffer = mmap.mmap(-1, MIB)
        for offset in (0, 4096, 2 * MIB):
            assert os.preadv(fd, [buffer], offset) == MIB
            assert buffer[:] == content[offset : offset + MIB]
        assert os.preadv(fd, [buffer], 3 * MIB) == 0
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == content
    assert digest(images / "a") == md5(content)


# Readers and writers of one image


@pytest.mark.parametrize("first", ["reader", "writer"])
def test_readers_of_every_kind_see_a_writer_at_once(mount: Mount, first: str) -> None:
    """A reader that came first is passed through, one that came after the writer is not; all see the same."""
    images = mount()
    content = bytearray(new_image(images / "a", MIB))
    assert_sealed(images / "a", md5(content))
    wait_for_rest(images)
    flags = [os.O_RDONLY, os.O_RDONLY | os.O_DIRECT]
    readers = [os.open(images / "a", flag) for flag in flags if first == "reader"]
    writer = os.open(images / "a", os.O_RDWR)
    readers += [os.open(images / "a", flag) for flag in flags]
    page = mmap.mmap(-1, 8192)
    for number in range(1, 60):
        piece = bytes([number]) * 8192
        content[number * 4096 : number * 4096 + 8192] = piece
        assert os.pwrite(writer, piece, number * 4096) == 8192
        for fd in (*readers, writer):
            assert os.preadv(fd, [page], number * 4096) == 8192
            assert page[:] == piece
    assert os.pwrite(writer, b"end", MIB) == 3
    for fd in readers:
        assert os.fstat(fd).st_size == MIB + 3
        assert os.preadv(fd, [page], MIB) == 3
        assert page[:3] == b"end"
    for fd in (*readers, writer):
        os.close(fd)
    assert_sealed(images / "a", md5(bytes(content) + b"end"))


@pytest.mark.parametrize("size", [MIB, MIB + 1234])
def test_shared_mapping_is_written_beside_readers_and_hashed(mount: Mount, size: int) -> None:
    images = mount()
    content = bytearray(new_image(images / "a", size))
    assert_sealed(images / "a", md5(content))
    with open(images / "a", "rb", buffering=0) as reader, open(images / "a", "r+b", buffering=0) as writer:
        assert reader.read(4096) == content[:4096]
        with mmap.mmap(writer.fileno(), size) as mapped:
            for offset in (0, 5000, size - 100):
                mapped[offset : offset + 100] = b"m" * 100
                content[offset : offset + 100] = b"m" * 100
            mapped.flush()
            assert os.pread(reader.fileno(), size, 0) == content
            assert digest(images / "a") == md5(content)
    assert_sealed(images / "a", md5(content))


def test_mapping_of_a_reader_shows_what_a_writer_writes(mount: Mount) -> None:
    images = mount()
    content = bytearray(new_image(images / "a", MIB))
    assert_sealed(images / "a", md5(content))
    with open(images / "a", "rb") as reader, mmap.mmap(reader.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[4096:8192] == content[4096:8192]
        content[5000:5004] = b"seen"
        with open(images / "a", "r+b", buffering=0) as writer:
            os.pwrite(writer.fileno(), b"seen", 5000)
            wait_until(lambda: mapped[5000:5004] == b"seen", "the written bytes in the mapping")
        assert mapped[:] == content
    assert_sealed(images / "a", md5(content))


# Images that go while they are read


class SteadyReaders:
    """Threads that read one open image over and over, and check each byte, while something happens to its name."""

    def __init__(self, path: Path, content: bytes, count: int = 4) -> None:
        self._fds = [os.open(path, os.O_RDONLY) for _ in range(count)]
        self._content = content
        self._done = threading.Event()
        self._rounds = [0] * count
        self._pool = ThreadPoolExecutor(count)
        self._futures = [self._pool.submit(self._read, number) for number in range(count)]

    def _read(self, number: int) -> None:
        while not self._done.is_set():
            assert os.pread(self._fds[number], len(self._content) + 1, 0) == self._content
            assert os.fstat(self._fds[number]).st_size == len(self._content)
            self._rounds[number] += 1

    def go_on(self) -> None:
        """Wait until each has read everything once more."""
        seen = list(self._rounds)
        wait_until(
            lambda: (
                any(future.done() for future in self._futures)
                or all(now > then + 1 for now, then in zip(self._rounds, seen, strict=True))
            ),
            "another round of every reader",
        )

    def finish(self) -> None:
        """End them; raises what one of them found wrong."""
        self._done.set()
        for future in self._futures:
            future.result(WAIT_SECONDS)
        self._pool.shutdown()
        for fd in self._fds:
            os.close(fd)


def test_image_unlinked_renamed_and_replaced_keeps_its_bytes_for_its_readers(mount: Mount) -> None:
    images = mount()
    contents = {name: new_image(images / name, 200_000 + number) for number, name in enumerate("abc")}
    for name, content in contents.items():
        assert_sealed(images / name, md5(content))
    wait_for_rest(images)
    readers = [SteadyReaders(images / name, content) for name, content in contents.items()]
    for reader in readers:
        reader.go_on()
    (images / "a").unlink()
    (images / "b").rename(images / "d")
    new = new_image(images / "new", 1000)
    (images / "new").rename(images / "c")
    again = new_image(images / "a", 2000)
    for reader in readers:
        reader.go_on()
    assert (images / "a").read_bytes() == again
    assert (images / "c").read_bytes() == new
    assert (images / "d").read_bytes() == contents["b"]
    for reader in readers:
        reader.finish()
    assert sorted(os.listdir(images.path)) == ["a", "c", "d"]
    for name, content in {"a": again, "c": new, "d": contents["b"]}.items():
        assert_sealed(images / name, md5(content))


@kernel_only
def test_name_that_is_replaced_again_and_again_never_gives_mixed_bytes(mount: Mount) -> None:
    images = mount()
    contents = {md5(content): content for content in (os.urandom(50_000 + number) for number in range(5))}
    (images / "a").write_bytes(next(iter(contents.values())))
    done = threading.Event()

    def read() -> int:
        turns = 0
        while not done.is_set() or not turns:
            with open(images / "a", "rb", buffering=0) as image:
                data = image.read(100_000)
                assert md5(data) in contents
                assert os.fstat(image.fileno()).st_size == len(data)
            turns += 1
        return turns

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        try:
            for turn in range(60):
                content = list(contents.values())[turn % 5]
                (images / "new").write_bytes(content)
                (images / "new").rename(images / "a")
        finally:
            done.set()
        assert all(reader.result(WAIT_SECONDS) for reader in readers)
    assert_sealed(images / "a", md5(content))


# What is left behind


@kernel_only
def test_fifty_threads_leave_no_descriptor_and_no_backing_id(filesystem: Callable[..., Path], mount: Mount) -> None:
    """A backing id that is not given back keeps its file, so the space of a removed image would not come back."""
    below = filesystem("tmpfs", 64)
    images = mount([below])
    free_blocks = os.statvfs(below).f_bfree
    content = new_image(images / "shared", 4 * MIB)
    assert_sealed(images / "shared", md5(content))
    wait_for_rest(images)
    links = len(os.listdir(f"/proc/{images.daemon.pid}/fd"))

    def read(_number: int) -> None:
        for turn in range(20):
            with open(images / "shared", "rb", buffering=0) as image:
                assert os.pread(image.fileno(), 8192, turn * 50_000) == content[turn * 50_000 :][:8192]

    def churn(number: int) -> None:
        for turn in range(20):
            path = images / f"{number}-{turn}"
            data = content[: turn * 1000]
            path.write_bytes(data)
            assert path.read_bytes() == data
            path.unlink()

    def rewrite(_number: int) -> None:
        for turn in range(20):
            with open(images / "shared", "r+b", buffering=0) as image:
                image.write(content[: turn * 100 + 1])

    with ThreadPoolExecutor(60) as pool:
        jobs = [*[(read, n) for n in range(50)], *[(churn, n) for n in range(8)], (rewrite, 0), (rewrite, 1)]
        for future in [pool.submit(*job) for job in jobs]:
            future.result(WAIT_SECONDS)
    assert os.listdir(images.path) == ["shared"]
    assert_sealed(images / "shared", md5(content))
    wait_for_rest(images)
    with open(images / "shared", "rb") as image:
        assert image.read() == content
        (images / "shared").unlink()
        assert os.statvfs(below).f_bfree < free_blocks - 900
    wait_until(lambda: os.statvfs(below).f_bfree >= free_blocks - 2, "the space of all images")
    # Reader threads come and go with their descriptors; images have none.
    assert len(os.listdir(f"/proc/{images.daemon.pid}/fd")) <= links + 20


@pytest.fixture
def overlay(filesystem: Callable[..., Path]) -> Iterator[Path]:
    """A filesystem stacked upon another, as a container has it."""
    layers = filesystem("tmpfs", 32)
    for name in ("lower", "upper", "work", "merged"):
        (layers / name).mkdir()
    options = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
    run("mount", "-t", "overlay", "-o", options, "overlay", layers / "merged")
    yield layers / "merged"
    run("umount", layers / "merged")


@kernel_only
def test_datadir_that_can_not_be_passed_through_is_read_all_the_same(
    overlay: Path, filesystem: Callable[..., Path], mount: Mount
) -> None:
    """A file of a stacked filesystem may not be a backing file (fs/fuse/backing.c); only its own opens fall back."""
    plain = filesystem("tmpfs", 32)
    images = mount([f"{overlay}:2", f"{plain}:1"])
    for datadir, name, passed_through in ((overlay, "a", False), (plain, "b", True)):
        content = new_image(datadir / name, MIB)
        assert attribute(images / name, "checksum") == md5(content)
        with resting(images, images / name) as fd:
            before = requests(images)
            assert os.pread(fd, MIB, 0) == content
            assert (requests(images) == before) is passed_through
    assert attribute(images.path, "transport") == "kernel, passthrough on"


@kernel_only
def test_image_that_failed_an_expectation_is_not_passed_through(mount: Mount) -> None:
    images = mount()
    images.expect_warning("image 'a' .*failed: its")
    with open(images / "a", "wb", buffering=0) as image:
        image.write(b"other bytes")
        os.setxattr(image.fileno(), "user.imgfs.expect.checksum", md5(b"these bytes").encode())
    wait_until(lambda: attribute(images / "a", "state") == "failed", "the failed seal")
    with pytest.raises(OSError) as caught:
        (images / "a").read_bytes()
    assert caught.value.errno == errno.EIO
