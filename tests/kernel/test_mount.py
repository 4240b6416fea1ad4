"""Real mounts: what programs see, and what the daemon is asked for it."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernel.conftest import SYSTEM_PYTHON, Mount, is_mounted, wait_until

pytestmark = pytest.mark.mount
Mounted = Callable[..., Mount]
SIZE = int(os.environ.get("IMGFS_TEST_READ_MIB", "256")) << 20


def read_all(path: Path, flags: int = 0) -> bytes:
    with open(os.open(path, os.O_RDONLY | flags), "rb", buffering=0) as file:
        return file.read()


def write_all(path: Path, data: bytes, flags: int = os.O_CREAT) -> None:
    with open(os.open(path, os.O_WRONLY | flags, 0o644), "wb", buffering=0) as file:
        assert file.write(data) == len(data)


def at_rest(mount: Mount) -> None:
    wait_until(lambda: mount.ask("state")["handles"] == 0)


def passthrough(mount: Mount) -> None:
    assert mount.ask("state")["passthrough"], (
        "this kernel has no passthrough: Linux 6.9 or newer is needed to test it"
    )


# Passthrough


def test_reads_of_an_image_at_rest_never_reach_the_daemon(mounted: Mounted) -> None:
    mount = mounted()
    passthrough(mount)
    block = os.urandom(1 << 20)
    with (mount.backing / "big").open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(block)
    fd = os.open(mount.path / "big", os.O_RDONLY)
    got = bytearray(1 << 20)
    for _ in range(SIZE >> 20):
        assert os.readv(fd, [got]) == 1 << 20
        assert got == block
    for _ in range(5000):
        offset = random.randrange(SIZE - 4096)
        start = offset % (1 << 20)
        assert os.pread(fd, 4096, offset) == (block + block)[start : start + 4096]
    os.close(fd)
    assert mount.calls("read") == 0


def test_direct_and_mapped_reads_give_the_right_bytes(image: Mount) -> None:
    expected = (image.backing / "image").read_bytes()
    fd = os.open(image.path / "image", os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, 1 << 20)
    assert os.preadv(fd, [buffer], 0) == 1 << 20
    assert buffer[:] == expected
    os.close(fd)
    with (image.path / "image").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as map_:
        assert map_[:] == expected


def test_readers_see_a_writer_at_once(image: Mount) -> None:
    early = os.open(image.path / "image", os.O_RDONLY)
    writer = os.open(image.path / "image", os.O_RDWR)
    late = os.open(image.path / "image", os.O_RDONLY)
    for number in range(50):
        data = bytes([number]) * 8192
        assert os.pwrite(writer, data, number * 4096) == 8192
        assert os.pread(early, 8192, number * 4096) == data
        assert os.pread(late, 8192, number * 4096) == data
        assert os.pread(writer, 8192, number * 4096) == data
    assert os.pwrite(writer, b"end", 1 << 20) == 3
    assert os.fstat(early).st_size == (1 << 20) + 3
    assert os.pread(early, 10, 1 << 20) == b"end"
    for fd in (early, writer, late):
        os.close(fd)


def test_every_write_reaches_the_daemon_beside_passed_through_readers(image: Mount) -> None:
    passthrough(image)
    reader = os.open(image.path / "image", os.O_RDONLY)
    writer = os.open(image.path / "image", os.O_WRONLY)
    os.pwrite(writer, b"x" * 4096, 0)
    assert image.calls("write") == 1
    assert len(image.ask("state")["backing_ids"]) == 1
    os.pread(reader, 4096, 0)
    assert image.calls("read") == 0
    os.close(writer)
    os.close(reader)


def test_a_shared_mapping_can_be_written(image: Mount) -> None:
    fd = os.open(image.path / "image", os.O_RDWR)
    with mmap.mmap(fd, 1 << 20) as map_:
        map_[4096:8192] = b"m" * 4096
        map_.flush()
    os.close(fd)
    at_rest(image)
    assert (image.backing / "image").read_bytes()[4096:8192] == b"m" * 4096


def test_a_mapped_writer_does_not_break_later_readers(image: Mount) -> None:
    """A shared mapping of a direct open forbids passthrough (fs/fuse/file.c); nobody may get EIO for it."""
    fd = os.open(image.path / "image", os.O_RDWR)
    with mmap.mmap(fd, 1 << 20) as map_:
        map_[:4] = b"mmap"
        map_.flush()
        for _ in range(5):
            assert read_all(image.path / "image")[:4] == b"mmap"
    os.close(fd)
    at_rest(image)
    assert read_all(image.path / "image")[:4] == b"mmap"


def test_reader_right_after_the_writer_is_passed_through(mounted: Mounted) -> None:
    mount = mounted()
    passthrough(mount)
    for number in range(30):
        write_all(mount.path / f"image{number}", b"x" * 100_000)
        assert read_all(mount.path / f"image{number}") == b"x" * 100_000
    assert mount.calls("read") == 0


def test_unlinked_renamed_and_replaced_images_keep_their_bytes_for_who_reads_them(mounted: Mounted) -> None:
    mount = mounted(entry_timeout=600, attr_timeout=600)
    for name in "abc":
        (mount.backing / name).write_bytes(name.encode() * 100_000)
    fds = {name: os.open(mount.path / name, os.O_RDONLY) for name in "abc"}
    (mount.path / "a").unlink()
    (mount.path / "b").rename(mount.path / "d")
    write_all(mount.path / "new", b"N" * 100_000)
    (mount.path / "new").rename(mount.path / "c")
    for name, fd in fds.items():
        assert os.pread(fd, 200_000, 0) == name.encode() * 100_000
        assert os.fstat(fd).st_size == 100_000
    assert read_all(mount.path / "c") == b"N" * 100_000
    assert read_all(mount.path / "d") == b"b" * 100_000
    assert sorted(path.name for path in mount.path.iterdir()) == ["c", "d"]
    for fd in fds.values():
        os.close(fd)


def test_unlinked_image_can_still_be_written_and_measured(mounted: Mounted) -> None:
    mount = mounted()
    fd = os.open(mount.path / "gone", os.O_RDWR | os.O_CREAT)
    (mount.path / "gone").unlink()
    os.write(fd, b"12345")
    os.ftruncate(fd, 3)
    os.fchmod(fd, 0o600)
    assert os.pread(fd, 10, 0) == b"123"
    assert os.fstat(fd).st_size == 3
    os.close(fd)


def test_exchange_swaps_two_images_under_open_handles(mounted: Mounted) -> None:
    mount = mounted(entry_timeout=600, attr_timeout=600)
    for name in "ab":
        (mount.backing / name).write_bytes(name.encode() * (1000 if name == "a" else 2000))
    fd = os.open(mount.path / "a", os.O_RDONLY)
    assert (
        ctypes.CDLL(None).renameat2(-100, os.fsencode(mount.path / "a"), -100, os.fsencode(mount.path / "b"), 2) == 0
    )
    assert os.pread(fd, 3000, 0) == b"a" * 1000
    assert read_all(mount.path / "a") == b"b" * 2000
    assert (mount.path / "b").stat().st_size == 1000
    os.close(fd)


def test_opens_never_get_another_images_bytes_while_names_are_exchanged(mounted: Mounted) -> None:
    mount = mounted(entry_timeout=600, attr_timeout=600)
    sizes = {b"a": 1000, b"b": 2000}
    for name, size in sizes.items():
        (mount.backing / name.decode()).write_bytes(name * size)
    libc, paths = ctypes.CDLL(None), [os.fsencode(mount.path / name) for name in "ab"]
    done = threading.Event()

    def exchange() -> None:
        while not done.is_set():
            assert libc.renameat2(-100, paths[0], -100, paths[1], 2) == 0

    def read(name: str) -> None:
        for _ in range(150):
            with (mount.path / name).open("rb", buffering=0) as file:
                data = file.read(5000)
                assert data == data[:1] * sizes[data[:1]]
                assert os.fstat(file.fileno()).st_size == len(data)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(read, name) for name in "abab"]:
                future.result()
    finally:
        done.set()
        thread.join()


def test_noreplace_keeps_what_is_there(mounted: Mounted) -> None:
    mount = mounted()
    for name in "ab":
        (mount.backing / name).write_text(name)
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(mount.path / "a"), os.fsencode(mount.path / "b")
    assert libc.renameat2(-100, paths[0], -100, paths[1], 1) == -1
    assert ctypes.get_errno() == errno.EEXIST
    assert read_all(mount.path / "b") == b"b"


@pytest.mark.parametrize("options", [{"passthrough": False}, {"refuse_backing": True}])
def test_without_passthrough_everything_still_reads_right(mounted: Mounted, options: dict[str, bool]) -> None:
    mount = mounted(**options)
    data = os.urandom(3 << 20)
    write_all(mount.path / "image", data)
    reader = os.open(mount.path / "image", os.O_RDONLY)
    assert os.pread(reader, len(data), 0) == data
    writer = os.open(mount.path / "image", os.O_RDWR)
    os.pwrite(writer, b"w" * 10_000, 5000)
    assert os.pread(reader, 10_000, 5000) == b"w" * 10_000
    os.close(writer)
    os.close(reader)
    assert read_all(mount.path / "image")[4999:15_001] == data[4999:5000] + b"w" * 10_000 + data[15_000:15_001]
    assert mount.calls("read") > 0
    assert mount.ask("state")["backing_ids"] == []


def test_fifty_threads_leave_no_descriptor_and_no_backing_id(mounted: Mounted) -> None:
    mount = mounted()
    data = os.urandom(1 << 18)
    (mount.backing / "shared").write_bytes(data)
    read_all(mount.path / "shared")

    def read(_number: int) -> None:
        for _ in range(20):
            assert read_all(mount.path / "shared") == data

    def churn(number: int) -> None:
        for turn in range(20):
            path = mount.path / f"t{number}-{turn}"
            write_all(path, data[: turn * 100])
            assert read_all(path) == data[: turn * 100]
            path.unlink()

    def rewrite(_number: int) -> None:
        for _ in range(20):
            write_all(mount.path / "shared", data[:4096], 0)

    with ThreadPoolExecutor(60) as pool:
        jobs = [*[(read, n) for n in range(50)], *[(churn, n) for n in range(8)], (rewrite, 0), (rewrite, 1)]
        for future in [pool.submit(*job) for job in jobs]:
            future.result()
    at_rest(mount)
    state = mount.ask("state")
    assert (state["open_files"], state["backing_ids"]) == (0, [])
    assert [path.name for path in mount.path.iterdir()] == ["shared"]


# Metadata


def test_names_that_are_no_text_survive(mounted: Mounted) -> None:
    mount = mounted()
    name = b"\xff\xfe image"
    write_all(Path(os.fsdecode(os.fsencode(mount.path) + b"/" + name)), b"x")
    assert os.listdir(os.fsencode(mount.path)) == [name]


def test_listing_of_many_names_is_complete_and_follows_changes(mounted: Mounted) -> None:
    mount = mounted(entry_timeout=600, attr_timeout=600)
    names = {f"image-{number:05}" for number in range(3000)}
    for name in names:
        (mount.backing / name).touch()
    assert set(os.listdir(mount.path)) == names
    assert {entry.name for entry in os.scandir(mount.path) if entry.is_file()} == names
    write_all(mount.path / "another", b"")
    (mount.path / "image-00000").unlink()
    assert set(os.listdir(mount.path)) == names - {"image-00000"} | {"another"}


def test_second_long_listing_asks_for_no_name_again(mounted: Mounted) -> None:
    mount = mounted(entry_timeout=600, attr_timeout=600)
    for number in range(500):
        (mount.backing / f"image{number}").touch()
    for _ in range(2):
        before = mount.calls("find")
        assert sum(entry.stat().st_nlink for entry in os.scandir(mount.path)) == 500
        asked = mount.calls("find") - before
    assert asked < 10


def test_ls_asks_for_access_control_lists_once(mounted: Mounted) -> None:
    mount = mounted()
    for number in range(50):
        (mount.backing / f"image{number}").touch()
    subprocess.run(["ls", "-l", mount.path], check=True, capture_output=True)
    assert mount.calls("getxattr") == 0
    with pytest.raises(OSError) as caught:
        os.getxattr(mount.path / "image0", "system.posix_acl_access")
    assert caught.value.errno == errno.EOPNOTSUPP


def test_attributes_change_as_asked_with_nanoseconds(image: Mount) -> None:
    path = image.path / "image"
    os.chmod(path, 0o640)
    os.chown(path, 12, 34)
    os.utime(path, ns=(1_000_000_001, -1_000_000_001))
    seen, real = path.stat(), (image.backing / "image").stat()
    for name in ("st_mode", "st_uid", "st_gid", "st_atime_ns", "st_mtime_ns", "st_size", "st_ino"):
        assert getattr(seen, name) == getattr(real, name)
    assert (seen.st_uid, stat.S_IMODE(seen.st_mode), seen.st_mtime_ns) == (12, 0o640, -1_000_000_001)


def test_extended_attributes_are_carried(image: Mount) -> None:
    path = image.path / "image"
    os.setxattr(path, "user.note", b"v" * 1000)
    assert os.getxattr(path, "user.note") == b"v" * 1000
    assert "user.note" in os.listxattr(path)
    os.removexattr(path, "user.note")
    with pytest.raises(OSError) as caught:
        os.getxattr(path, "user.note")
    assert caught.value.errno == errno.ENODATA


def test_the_operations_know_who_asks(image: Mount) -> None:
    script = f"import os; print(os.getxattr({str(image.path / 'image')!r}, 'user.caller').decode())"
    image.path.parent.parent.chmod(0o755)
    for parent in image.path.parents:
        if parent.stat().st_uid == 0 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    done = subprocess.run([SYSTEM_PYTHON, "-c", script], user=65534, capture_output=True, text=True, check=False)
    assert done.stdout == "65534\n", done.stderr


def test_an_ordinary_users_write_takes_setuid_away(image: Mount) -> None:
    path = image.path / "image"
    path.chmod(0o6777)
    for parent in image.path.parents:
        if parent.stat().st_uid == 0 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    script = f"import os; os.write(os.open({str(path)!r}, os.O_WRONLY), b'x')"
    subprocess.run([SYSTEM_PYTHON, "-c", script], user=65534, check=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777
    assert stat.S_IMODE((image.backing / "image").stat().st_mode) == 0o777


def test_no_capability_is_asked_for_while_writing(mounted: Mounted) -> None:
    mount = mounted()
    fd = os.open(mount.path / "image", os.O_WRONLY | os.O_CREAT)
    for _ in range(50):
        os.write(fd, b"x" * 4096)
    os.close(fd)
    assert mount.calls("getxattr") <= 1


# Sparse images


def test_holes_are_seen_and_made(mounted: Mounted) -> None:
    mount = mounted()
    fd = os.open(mount.path / "sparse", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 10 << 20)
    os.pwrite(fd, b"x" * 65536, 4 << 20)
    assert os.lseek(fd, 0, os.SEEK_DATA) == 4 << 20
    assert os.lseek(fd, 4 << 20, os.SEEK_HOLE) == (4 << 20) + 65536
    with pytest.raises(OSError) as caught:
        os.lseek(fd, 5 << 20, os.SEEK_DATA)
    assert caught.value.errno == errno.ENXIO
    libc = ctypes.CDLL(None, use_errno=True)
    keep_size, punch = 1, 2
    assert libc.fallocate(fd, keep_size | punch, ctypes.c_long(4 << 20), ctypes.c_long(65536)) == 0
    assert os.pread(fd, 65536, 4 << 20) == bytes(65536)
    os.posix_fallocate(fd, 0, 1 << 20)
    assert os.fstat(fd).st_blocks * 512 >= 1 << 20
    os.close(fd)


def test_copy_file_range_is_done_by_the_daemon(image: Mount) -> None:
    source = os.open(image.path / "image", os.O_RDONLY)
    target = os.open(image.path / "copy", os.O_RDWR | os.O_CREAT)
    assert os.copy_file_range(source, target, 1 << 20) == 1 << 20
    os.close(source)
    os.close(target)
    assert image.calls("copy_file_range") == 1
    assert read_all(image.path / "copy") == read_all(image.path / "image")


def test_large_writes_come_in_requests_of_one_mebibyte(mounted: Mounted) -> None:
    mount = mounted()
    write_all(mount.path / "image", os.urandom(8 << 20))
    assert mount.calls("write") <= 9
    assert (mount.path / "image").stat().st_size == 8 << 20


def test_truncating_open_is_one_request(image: Mount) -> None:
    write_all(image.path / "image", b"short", os.O_TRUNC)
    assert image.calls("truncate") == 0
    assert read_all(image.path / "image") == b"short"


def test_locks_work_between_processes(image: Mount) -> None:
    fd = os.open(image.path / "image", os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX)
    path = str(image.path / "image")
    script = f"import fcntl; f = open({path!r}, 'r+'); fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    refused = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert refused.returncode == 1 and b"BlockingIOError" in refused.stderr
    os.close(fd)
    subprocess.run([sys.executable, "-c", script], check=True)


# Caches


def test_invalidation_shows_what_changed_behind_the_mount(image: Mount) -> None:
    path = image.path / "image"
    size = path.stat().st_size
    (image.backing / "image").write_bytes(b"short")
    assert path.stat().st_size == size
    image.ask("call invalidate image")
    wait_until(lambda: path.stat().st_size == 5)


def test_names_added_and_removed_behind_the_mount_are_seen(mounted: Mounted) -> None:
    mount = mounted(entry_timeout=600, attr_timeout=600, negative_timeout=600)
    assert not (mount.path / "later").exists()
    assert os.listdir(mount.path) == []
    (mount.backing / "later").write_text("x")
    assert not (mount.path / "later").exists()
    mount.ask("call name_added later")
    wait_until(lambda: (mount.path / "later").exists() and os.listdir(mount.path) == ["later"])
    (mount.backing / "later").unlink()
    mount.ask("call name_removed later")
    wait_until(lambda: not (mount.path / "later").exists() and os.listdir(mount.path) == [])


def test_create_opens_what_somebody_else_made_meanwhile(mounted: Mounted) -> None:
    mount = mounted(negative_timeout=600)
    assert not (mount.path / "image").exists()
    (mount.backing / "image").write_text("theirs")
    fd = os.open(mount.path / "image", os.O_RDWR | os.O_CREAT)
    assert os.pread(fd, 10, 0) == b"theirs"
    os.close(fd)


# Trouble


def test_a_waiting_request_is_interrupted_by_a_signal(image: Mount) -> None:
    image.ask("block getxattr")
    waiting = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.getxattr({str(image.path / 'image')!r}, 'user.x')"],
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: image.calls("getxattr") == 1)
    waiting.kill()
    waiting.wait(10)
    wait_until(lambda: image.ask("state")["interrupts"] == 1)
    image.ask("unblock getxattr")


def test_requests_are_answered_while_many_others_wait(image: Mount) -> None:
    image.ask("block getxattr")
    path = image.path / "image"

    def ask() -> None:
        with pytest.raises(OSError):
            os.getxattr(path, "user.nothing")

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    wait_until(lambda: image.calls("getxattr") == 40)
    write_all(image.path / "other", b"served")
    assert read_all(image.path / "other") == b"served"
    image.ask("unblock getxattr")
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_requests_are_answered_while_quick_ones_hang(image: Mount) -> None:
    image.ask("block statfs")

    def ask() -> None:
        os.statvfs(image.path)

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    wait_until(lambda: image.calls("statfs") == 5)
    write_all(image.path / "other", b"served")
    assert read_all(image.path / "other") == b"served"
    image.ask("unblock statfs")
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_notification_asked_for_within_a_request_does_not_deadlock(mounted: Mounted) -> None:
    mount = mounted(entry_timeout=600, attr_timeout=600)
    mount.ask("notify create")
    mount.ask("notify unlink")
    for turn in range(20):
        write_all(mount.path / f"image{turn}", b"x")
        (mount.path / f"image{turn}").unlink()
    assert os.listdir(mount.path) == []


def test_mount_point_may_have_any_name(mounted: Mounted) -> None:
    mount = mounted(at="odd \\ name")
    write_all(mount.path / "image", b"x")
    mount.ask("stop")
    assert mount.end()["handles"] == 0


def test_a_bug_in_the_operations_is_eio_and_the_mount_lives(image: Mount) -> None:
    image.expect("statfs", "Traceback", "  ", "RuntimeError")
    image.ask("fail statfs")
    with pytest.raises(OSError) as caught:
        os.statvfs(image.path)
    assert caught.value.errno == errno.EIO
    image.ask("unblock statfs")
    assert os.statvfs(image.path).f_bsize


def test_unknown_requests_are_refused_and_the_mount_lives(image: Mount) -> None:
    with (image.path / "image").open("rb") as file, pytest.raises(OSError) as caught:
        fcntl.ioctl(file, 0x12345)
    assert caught.value.errno == errno.ENOTTY
    for refused in (lambda: os.mkdir(image.path / "d"), lambda: os.symlink("x", image.path / "s")):
        with pytest.raises(PermissionError):
            refused()
    assert os.listdir(image.path) == ["image"]


CONNECTIONS = Path("/sys/fs/fuse/connections")


@pytest.fixture
def fusectl() -> Iterator[None]:
    """The control filesystem of FUSE, which systemd mounts and a container may lack."""
    mounted_here = not is_mounted(CONNECTIONS)
    if mounted_here:
        subprocess.run(["mount", "-t", "fusectl", "none", CONNECTIONS], check=True)
    try:
        yield
    finally:
        if mounted_here:
            subprocess.run(["umount", CONNECTIONS], check=True)


@pytest.mark.usefixtures("fusectl")
def test_session_aborts_itself_through_fusectl(image: Mount) -> None:
    test_session_ends_cleanly_after_abort(image)


@pytest.mark.usefixtures("fusectl")
def test_an_administrator_aborts_the_connection(image: Mount) -> None:
    fd = os.open(image.path / "image", os.O_RDONLY)
    (CONNECTIONS / str(os.minor(image.path.stat().st_dev)) / "abort").write_text("1")
    image.process.wait(10)
    assert not is_mounted(image.path)
    with pytest.raises(OSError) as caught:
        os.fsync(fd)
    assert caught.value.errno == errno.ENOTCONN
    os.close(fd)
    assert image.end()["open_files"] == 0


def test_session_ends_cleanly_after_abort(image: Mount) -> None:
    fd = os.open(image.path / "image", os.O_RDWR)
    image.ask("abort")
    image.process.wait(10)
    with pytest.raises(OSError) as caught:
        os.pwrite(fd, b"x", 0)
    assert caught.value.errno == errno.ENOTCONN
    with pytest.raises(OSError):
        os.close(fd)
    assert image.end()["open_files"] == 0


def test_abort_ends_requests_that_wait(image: Mount) -> None:
    image.ask("block getxattr")

    def ask() -> None:
        with pytest.raises(OSError):
            os.getxattr(image.path / "image", "user.x")

    waiting = threading.Thread(target=ask)
    waiting.start()
    wait_until(lambda: image.calls("getxattr") == 1)
    image.ask("abort")
    waiting.join(10)
    assert not waiting.is_alive()
    image.end()


def test_stop_ends_the_mount_though_an_image_is_open(image: Mount) -> None:
    image.expect("is in use; it ends all the same")
    fd = os.open(image.path / "image", os.O_RDWR)
    os.pwrite(fd, b"before", 0)
    image.ask("stop")
    wait_until(lambda: not is_mounted(image.path))
    with pytest.raises(OSError) as caught:
        os.pwrite(fd, b"after", 0)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    with contextlib.suppress(OSError):
        os.close(fd)
    assert image.end()["open_files"] == 0
    assert (image.backing / "image").read_bytes()[:6] == b"before"


@pytest.fixture(params=["bind mount", "namespace"])
def used_elsewhere(image: Mount, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A path that shows the mount, though it goes from its own mount point."""
    if request.param == "bind mount":
        other = tmp_path / "elsewhere"
        other.mkdir()
        subprocess.run(["mount", "--bind", image.path, other], check=True)
        yield other
        subprocess.run(["umount", "--lazy", other], check=True)
        return
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield Path(f"/proc/{process.pid}/root{image.path}")
        process.kill()


def test_stop_ends_the_daemon_though_the_mount_is_used_elsewhere(image: Mount, used_elsewhere: Path) -> None:
    image.expect("is in use; it ends all the same")
    assert (used_elsewhere / "image").exists()
    image.ask("stop")
    assert image.process.wait(10) == 0
    assert not is_mounted(image.path)
    with pytest.raises(OSError) as caught:
        os.statvfs(used_elsewhere)
    assert caught.value.errno == errno.ENOTCONN
    assert image.end()["open_files"] == 0


@pytest.mark.usefixtures("fuse_for_everybody")
def test_an_ordinary_user_mounts_writes_and_reads(mounted: Mounted, tmp_path: Path) -> None:
    for parent in tmp_path.parents:
        if parent.stat().st_uid == 0 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    tmp_path.chmod(0o755)
    mount = mounted(user=65534)
    mount.expect("WARNING no passthrough: it takes CAP_SYS_ADMIN")
    script = f"""if True:
        from pathlib import Path
        image = Path({str(mount.path)!r}) / "image"
        image.write_bytes(b"mine" * 1000)
        assert image.read_bytes() == b"mine" * 1000
        image.unlink()
    """
    subprocess.run([SYSTEM_PYTHON, "-c", script], user=65534, check=True)
    with pytest.raises(PermissionError):
        os.listdir(mount.path)
    subprocess.run(["fusermount3", "-u", mount.path], user=65534, check=True)
    assert mount.end()["passthrough"] is False


def test_read_only_mount_refuses_writers(mounted: Mounted) -> None:
    mount = mounted(mount={"read_only": True})
    with pytest.raises(OSError) as caught:
        write_all(mount.path / "image", b"")
    assert caught.value.errno == errno.EROFS
