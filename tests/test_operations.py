"""ImageOperations over a real store, no mount: what each request answers, and with which errno it is refused."""

import errno
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgfs import ImageStore, fuse_ops, image
from imgfs.fuse_ops import ImageOperations
from imgfs.times import UTIME_NOW, UTIME_OMIT
from tests.conftest import wait_until

CONTENT = os.urandom(100_000)
HIDDEN = "/.fuse_hidden0000000100000001"
NOT_SUPPORTED = errno.errorcode[errno.EOPNOTSUPP]  # it has two names
CALLER = (1000, 1001, os.getpid())

OpenStore = Callable[..., ImageStore]


@pytest.fixture
def serve(open_store: OpenStore) -> Callable[..., ImageOperations]:
    """Call it with datadirs and settings to get the operations over such a store."""
    return lambda *datadirs, **settings: ImageOperations(
        open_store(list(datadirs) or None, **settings), caller=lambda: CALLER
    )


@pytest.fixture
def ops(serve: Callable[..., ImageOperations]) -> ImageOperations:
    """The operations over high (priority 200) and low (100)."""
    return serve()


def put(ops: ImageOperations, path: str = "/x", data: bytes = CONTENT) -> None:
    """Write an image, as cp does, and wait until it is sealed."""
    fh = ops("create", path, 0o640)
    ops("write", path, data, 0, fh)
    ops("flush", path, fh)
    ops("release", path, fh)
    ops("getxattr", path, "user.imgfs.checksum")


def get(ops: ImageOperations, path: str = "/x") -> bytes:
    """Read an image, as cat does."""
    fh = ops("open", path, os.O_RDONLY)
    try:
        return bytes(ops("read", path, 1 << 20, 0, fh))
    finally:
        ops("release", path, fh)


def attribute(ops: ImageOperations, name: str, path: str = "/x") -> str:
    """The attribute `user.imgfs.NAME` of an image."""
    return os.fsdecode(ops("getxattr", path, f"user.imgfs.{name}"))


def code(ops: ImageOperations, *request: Any) -> str:
    """The errno with which a request is refused, by its name."""
    with pytest.raises(OSError) as caught:
        ops(*request)
    assert caught.value.errno is not None
    return errno.errorcode[caught.value.errno]


def listed(ops: ImageOperations) -> list[str]:
    """What readdir shows besides the two directories."""
    entries = list(ops("readdir", "/", 0))
    assert entries[:2] == [".", ".."]
    return sorted(entry[0] for entry in entries[2:])


# --- what works ---


def test_written_image_is_read_back_with_its_attributes(ops: ImageOperations, tmp_path: Path) -> None:
    put(ops)
    assert get(ops) == CONTENT
    assert listed(ops) == ["x"]
    assert attribute(ops, "state") == "active"
    assert attribute(ops, "size") == str(len(CONTENT))
    assert attribute(ops, "checksum") == hashlib.md5(CONTENT).hexdigest()
    assert attribute(ops, "os_hash_algo") == "sha512"
    assert attribute(ops, "os_hash_value") == hashlib.sha512(CONTENT).hexdigest()
    assert attribute(ops, "location") == f"file://{tmp_path}/high/x"
    assert attribute(ops, "datadir") == f"{tmp_path}/high"
    assert attribute(ops, "metadata") == "{}"


def test_status_is_that_of_the_backing_file_and_of_the_caller(ops: ImageOperations, tmp_path: Path) -> None:
    put(ops)
    shown, below = ops("getattr", "/x"), (tmp_path / "high/x").stat()
    assert shown["st_mode"] == stat.S_IFREG | 0o640
    assert (shown["st_uid"], shown["st_gid"]) == CALLER[:2] == (below.st_uid, below.st_gid)
    assert (shown["st_size"], shown["st_blocks"], shown["st_nlink"]) == (below.st_size, below.st_blocks, 1)
    assert (shown["st_mtime"], shown["st_ctime"]) == (below.st_mtime_ns, below.st_ctime_ns)
    assert [(name, s["st_ino"]) for name, s, _ in list(ops("readdir", "/", 0))[2:]] == [("x", shown["st_ino"])]


def test_sparse_image_shows_the_blocks_it_has(ops: ImageOperations) -> None:
    fh = ops("create", "/x", 0o600)
    ops("truncate", None, 1 << 24, fh)
    assert ops("getattr", "/x")["st_size"] == 1 << 24
    assert ops("getattr", "/x")["st_blocks"] < 100
    ops("release", None, fh)


def test_root_is_a_directory_with_attributes(ops: ImageOperations, tmp_path: Path) -> None:
    put(ops)
    assert stat.S_ISDIR(ops("getattr", "/")["st_mode"])
    assert attribute(ops, "transport", "/") == "fusepy"
    high, low = json.loads(attribute(ops, "datadirs", "/"))
    assert (high["path"], high["priority"], high["mode"], high["online"]) == (f"{tmp_path}/high", 200, "rw", True)
    assert (high["images"], low["images"], high["reserved"]) == (1, 0, 0)
    assert 0 < high["free"] <= high["total"]
    assert "user.imgfs.version" in ops("listxattr", "/")


def test_truncate_by_path_is_sealed_anew(ops: ImageOperations) -> None:
    put(ops)
    ops("truncate", "/x", 10)
    assert get(ops) == CONTENT[:10]
    assert attribute(ops, "checksum") == hashlib.md5(CONTENT[:10]).hexdigest()


def test_rename_and_unlink_work_on_the_store(ops: ImageOperations) -> None:
    put(ops)
    put(ops, "/y", b"old")
    ops("rename", "/x", "/y")
    assert (listed(ops), get(ops, "/y")) == (["y"], CONTENT)
    ops("unlink", "/y")
    assert listed(ops) == []


def test_statfs_counts_each_filesystem_once(
    filesystem: Callable[..., Path], serve: Callable[..., ImageOperations]
) -> None:
    one, other = filesystem("tmpfs", 8), filesystem("tmpfs", 16)
    shown = serve(one / "a", one / "b", other)("statfs", "/")
    assert shown["f_blocks"] * shown["f_frsize"] == 24 << 20
    assert shown["f_namemax"] == 255


@pytest.mark.parametrize(
    ("times", "mtime_ns"),
    [((5, 1_234_567_890_123_456_789), 1_234_567_890_123_456_789), ((UTIME_OMIT, 7), 7), ((5, UTIME_OMIT), None)],
)
def test_times_are_set_to_the_nanosecond(ops: ImageOperations, times: tuple[int, int], mtime_ns: int | None) -> None:
    put(ops)
    before = ops("getattr", "/x")["st_mtime"]
    ops("utimens", "/x", times)
    assert ops("getattr", "/x")["st_mtime"] == (before if mtime_ns is None else mtime_ns)
    assert attribute(ops, "state") == "active"


@pytest.mark.parametrize("times", [None, (UTIME_NOW, UTIME_NOW), (UTIME_OMIT, UTIME_NOW)])
def test_now_is_now(ops: ImageOperations, times: tuple[int, int] | None) -> None:
    put(ops)
    ops("utimens", "/x", (0, 0))
    ops("utimens", "/x", times)
    assert ops("getattr", "/x")["st_mtime"] > 1e18
    assert (ops("getattr", "/x")["st_atime"] == 0) == (times is not None and times[0] == UTIME_OMIT)


def test_chmod_and_chown_work_without_file_perm(ops: ImageOperations) -> None:
    put(ops)
    ops("chmod", "/x", stat.S_IFREG | 0o604)
    ops("chown", "/x", 7, -1)
    shown = ops("getattr", "/x")
    assert (stat.S_IMODE(shown["st_mode"]), shown["st_uid"], shown["st_gid"]) == (0o604, 7, CALLER[1])
    assert attribute(ops, "state") == "active"


def test_chmod_has_no_effect_where_file_perm_is_set(serve: Callable[..., ImageOperations]) -> None:
    ops = serve(file_perm="0640")
    put(ops)
    ops("chmod", "/x", 0o600)
    assert stat.S_IMODE(ops("getattr", "/x")["st_mode"]) == 0o640


# --- errnos ---

REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "getattr of nothing": ("ENOENT", ("getattr", "/none")),
    "open of nothing": ("ENOENT", ("open", "/none", os.O_RDONLY)),
    "unlink of nothing": ("ENOENT", ("unlink", "/none")),
    "rename of nothing": ("ENOENT", ("rename", "/none", "/y")),
    "truncate of nothing": ("ENOENT", ("truncate", "/none", 0)),
    "chmod of nothing": ("ENOENT", ("chmod", "/none", 0o600)),
    "chown of nothing": ("ENOENT", ("chown", "/none", 0, 0)),
    "utimens of nothing": ("ENOENT", ("utimens", "/none", None)),
    "access to nothing": ("ENOENT", ("access", "/none", os.R_OK)),
    "getxattr of nothing": ("ENOENT", ("getxattr", "/none", "user.imgfs.state")),
    "setxattr of nothing": ("ENOENT", ("setxattr", "/none", "user.a", b"", 0)),
    "listxattr of nothing": ("ENOENT", ("listxattr", "/none")),
    "getattr of the room of imgfs": ("ENOENT", ("getattr", "/.imgfs")),
    "getattr of a long name": ("ENAMETOOLONG", ("getattr", "/" + "a" * 256)),
    "create of a taken name": ("EEXIST", ("create", "/x", 0o600)),
    "create of a long name": ("ENAMETOOLONG", ("create", "/" + "a" * 256, 0o600)),
    "create of a kept name": ("EPERM", ("create", "/.imgfs-x", 0o600)),
    "create of a name of libfuse": ("EPERM", ("create", HIDDEN, 0o600)),
    "create of a path": ("EINVAL", ("create", "/a/b", 0o600)),
    "create of ..": ("EINVAL", ("create", "/..", 0o600)),
    "rename to a kept name": ("EPERM", ("rename", "/x", "/.imgfs")),
    "rename to a name like libfuse's": ("EPERM", ("rename", "/x", "/.fuse_hidden-x")),
    "rename to a long name": ("ENAMETOOLONG", ("rename", "/x", "/" + "a" * 256)),
    "mkdir": ("EPERM", ("mkdir", "/d", 0o755)),
    "rmdir": ("ENOTDIR", ("rmdir", "/x")),
    "symlink": ("EPERM", ("symlink", "/l", "x")),
    "link": ("EPERM", ("link", "/l", "/x")),
    "mknod": ("EPERM", ("mknod", "/p", stat.S_IFIFO | 0o600, 0)),
    "negative size": ("EINVAL", ("truncate", "/x", -1)),
    "read without a handle": ("EBADF", ("read", "/x", 1, 0, 999)),
    "write without a handle": ("EBADF", ("write", "/x", b"x", 0, 999)),
    "flush without a handle": ("EBADF", ("flush", "/x", 999)),
    "fsync without a handle": ("EBADF", ("fsync", "/x", 0, 999)),
    "absent attribute": ("ENODATA", ("getxattr", "/x", "user.none")),
    "absent attribute of imgfs": ("ENODATA", ("getxattr", "/x", "user.imgfs.none")),
    "absent attribute of the root": ("ENODATA", ("getxattr", "/", "user.imgfs.none")),
    "store where none is configured": ("ENODATA", ("getxattr", "/x", "user.imgfs.store")),
    "the record itself": ("ENODATA", ("getxattr", "/x", "user.imgfs.record")),
    "expectation of a sealed image": ("ENODATA", ("getxattr", "/x", "user.imgfs.expect.size")),
    "capability": ("ENODATA", ("getxattr", "/x", "security.capability")),
    "access control list": ("ENODATA", ("getxattr", "/x", "system.posix_acl_access")),
    "removing an absent attribute": ("ENODATA", ("removexattr", "/x", "user.none")),
    "setting a capability": (NOT_SUPPORTED, ("setxattr", "/x", "security.capability", b"", 0)),
    "setting a trusted attribute": (NOT_SUPPORTED, ("setxattr", "/x", "trusted.a", b"", 0)),
    "replacing an absent attribute": ("ENODATA", ("setxattr", "/x", "user.a", b"", os.XATTR_REPLACE)),
    "expecting too late": ("EPERM", ("setxattr", "/x", "user.imgfs.expect.size", b"1", 0)),
    "expecting a digest too late": ("EPERM", ("setxattr", "/x", "user.imgfs.expect.checksum", b"0" * 32, 0)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_request_is_refused_with_its_errno(
    ops: ImageOperations, caplog: pytest.LogCaptureFixture, tmp_path: Path, case: str
) -> None:
    put(ops)
    expected, request = REFUSED[case]
    assert code(ops, *request) == expected
    assert caplog.records == []
    assert (listed(ops), get(ops)) == (["x"], CONTENT)
    assert sorted(os.listdir(tmp_path / "high")) == [".imgfs", "x"]


def test_large_write_reaches_the_datadir_in_pieces(ops: ImageOperations, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(1 << 20)
    lengths: list[int] = []
    pwrite = os.pwrite

    def watched(fd: int, piece: memoryview, offset: int) -> int:
        lengths.append(len(piece))
        return pwrite(fd, piece, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    put(ops, data=data)
    assert get(ops) == data
    assert lengths == [image.PIECE_BYTES] * 4


def test_write_whose_second_piece_fails_tells_what_was_written(
    ops: ImageOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(1 << 20)
    pwrite = os.pwrite

    def failing(fd: int, piece: memoryview, offset: int) -> int:
        if offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pwrite(fd, piece, offset)

    fh = ops("create", "/x", 0o640)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", failing)
        assert ops("write", "/x", data, 0, fh) == image.PIECE_BYTES
    rest = data[image.PIECE_BYTES :]
    assert ops("write", "/x", rest, image.PIECE_BYTES, fh) == len(rest)
    ops("release", "/x", fh)
    assert attribute(ops, "checksum") == hashlib.md5(data).hexdigest()


def test_handle_for_reading_refuses_to_write(ops: ImageOperations) -> None:
    put(ops)
    fh = ops("open", "/x", os.O_RDONLY)
    assert code(ops, "write", "/x", b"x", 0, fh) == "EBADF"
    assert code(ops, "truncate", "/x", 0, fh) == "EBADF"
    ops("release", "/x", fh)


def test_released_handle_is_no_handle(ops: ImageOperations) -> None:
    put(ops)
    fh = ops("open", "/x", os.O_RDONLY)
    ops("release", "/x", fh)
    assert code(ops, "read", "/x", 1, 0, fh) == "EBADF"
    assert ops("release", "/x", fh) == 0


@pytest.mark.parametrize(
    "request_",
    [("open", "/x", os.O_WRONLY), ("open", "/x", os.O_RDWR), ("truncate", "/x", 0), ("rename", "/y", "/x"),
     ("open", "/x", os.O_RDONLY | os.O_TRUNC)],
)  # fmt: skip
def test_write_once_image_is_eperm_to_change(
    serve: Callable[..., ImageOperations], request_: tuple[Any, ...]
) -> None:
    ops = serve(write_once=True)
    put(ops)
    put(ops, "/y")
    assert code(ops, *request_) == "EPERM"
    assert get(ops) == CONTENT
    ops("unlink", "/x")
    assert listed(ops) == ["y"]


@pytest.mark.parametrize(
    "request_",
    [("open", "/x", os.O_RDWR), ("truncate", "/x", 0), ("unlink", "/x"), ("rename", "/x", "/y"), ("chmod", "/x", 0),
     ("chown", "/x", 0, 0), ("utimens", "/x", None), ("setxattr", "/x", "user.a", b"", 0), ("access", "/x", os.W_OK),
     ("removexattr", "/x", "user.a")],
)  # fmt: skip
def test_image_of_a_read_only_datadir_is_eacces_to_change(
    serve: Callable[..., ImageOperations], tmp_path: Path, request_: tuple[Any, ...]
) -> None:
    (tmp_path / "ro").mkdir()
    (tmp_path / "ro/x").write_bytes(CONTENT)
    before = (tmp_path / "ro/x").stat()
    ops = serve({"path": "ro", "mode": "ro"}, "rw")
    assert code(ops, *request_) == "EACCES"
    assert (tmp_path / "ro/x").read_bytes() == CONTENT
    assert (tmp_path / "ro/x").stat().st_ctime_ns == before.st_ctime_ns
    assert ops("access", "/x", os.R_OK) == 0


def test_full_store_is_enospc(filesystem: Callable[..., Path], serve: Callable[..., ImageOperations]) -> None:
    ops = serve(filesystem("tmpfs", 4))
    fh = ops("create", "/x", 0o600)
    written = ops("write", "/x", bytes(8 << 20), 0, fh)
    assert written < 8 << 20
    assert code(ops, "write", "/x", bytes(1 << 20), written, fh) == "ENOSPC"
    assert code(ops, "create", "/y", 0o600) == "ENOSPC"
    ops("release", "/x", fh)
    assert code(ops, "getattr", "/x") == "ENOENT"


def test_image_that_failed_is_eio_to_read(ops: ImageOperations) -> None:
    fh = ops("create", "/x", 0o600)
    ops("setxattr", "/x", "user.imgfs.expect.checksum", b"0" * 32, 0)
    ops("write", "/x", b"x", 0, fh)
    ops("release", "/x", fh)
    wait_until(lambda: attribute(ops, "state") == "failed", "the verdict")
    assert code(ops, "open", "/x", os.O_RDONLY) == "EIO"
    ops("unlink", "/x")


# --- what nobody thought of ---


def test_unexpected_exception_is_logged_and_becomes_eio(
    ops: ImageOperations, caplog: pytest.LogCaptureFixture
) -> None:
    fh = ops("create", "/x", 0o600)
    assert code(ops, "write", "/x", "text", 0, fh) == "EIO"
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == ("ERROR", "write failed unexpectedly")
    assert record.exc_info is not None
    assert record.exc_info[0] is TypeError
    assert ops("write", "/x", b"good", 0, fh) == 4
    ops("release", "/x", fh)
    assert get(ops) == b"good"


@pytest.mark.parametrize("number", [None, 0])
def test_error_without_an_errno_becomes_eio(
    ops: ImageOperations, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    def failing(*_: object) -> None:
        raise OSError("no number") if number is None else OSError(number, "no number")

    monkeypatch.setattr(ImageStore, "status", failing)
    assert code(ops, "getattr", "/x") == "EIO"
    assert "without an errno" in caplog.text


# --- attributes ---


def test_stored_attributes_are_kept_as_set(ops: ImageOperations) -> None:
    put(ops)
    ops("setxattr", "/x", "user.note", b"\x00\xff", 0)
    assert ops("getxattr", "/x", "user.note") == b"\x00\xff"
    assert "user.note" in ops("listxattr", "/x")
    assert attribute(ops, "state") == "active"
    ops("removexattr", "/x", "user.note")
    assert "user.note" not in ops("listxattr", "/x")


COMPUTED = ["state", "size", "checksum", "os_hash_algo", "os_hash_value", "location", "datadir", "metadata"]


def test_computed_attributes_are_listed_and_readable(ops: ImageOperations) -> None:
    put(ops)
    assert sorted(ops("listxattr", "/x")) == sorted(f"user.imgfs.{name}" for name in COMPUTED)
    assert all(attribute(ops, name) for name in COMPUTED)


@pytest.mark.parametrize("name", [*COMPUTED, "store", "record", "unheard-of"])
def test_setting_or_removing_a_computed_attribute_has_no_effect(
    ops: ImageOperations, tmp_path: Path, name: str
) -> None:
    put(ops)
    before = {shown: ops("getxattr", "/x", shown) for shown in ops("listxattr", "/x")}
    stored = os.getxattr(tmp_path / "high/x", "user.imgfs.record")
    ops("setxattr", "/x", f"user.imgfs.{name}", b"forged", 0)
    ops("removexattr", "/x", f"user.imgfs.{name}")
    assert {shown: ops("getxattr", "/x", shown) for shown in ops("listxattr", "/x")} == before
    assert os.getxattr(tmp_path / "high/x", "user.imgfs.record") == stored
    assert attribute(ops, "state") == "active"


def test_expectations_can_be_read_back_until_sealed_and_are_not_listed(ops: ImageOperations) -> None:
    fh = ops("create", "/x", 0o600)
    assert code(ops, "getxattr", "/x", "user.imgfs.expect.size") == "ENODATA"
    checksum = hashlib.md5(b"abc").hexdigest()
    for name, value in (("size", b"3"), ("checksum", checksum.upper().encode())):
        ops("setxattr", "/x", f"user.imgfs.expect.{name}", value, 0)
    assert (attribute(ops, "expect.size"), attribute(ops, "expect.checksum")) == ("3", checksum)
    assert not [name for name in ops("listxattr", "/x") if "expect" in name]
    ops("write", "/x", b"abc", 0, fh)
    ops("release", "/x", fh)
    assert attribute(ops, "checksum") == checksum
    assert code(ops, "getxattr", "/x", "user.imgfs.expect.size") == "ENODATA"


@pytest.mark.parametrize(
    ("name", "value"),
    [("size", b"-1"), ("size", b""), ("size", b"1.5"), ("size", b"one"), ("size", b"9" * 19), ("size", "²".encode()),
     ("size", b"1KiB"), ("checksum", b""), ("checksum", b"0" * 31), ("checksum", b"g" * 32),
     ("checksum", b"\xff" * 32), ("os_hash_value", b"0" * 64), ("colour", b"blue"), ("", b"1")],
)  # fmt: skip
def test_malformed_expectation_is_einval(ops: ImageOperations, name: str, value: bytes) -> None:
    fh = ops("create", "/x", 0o600)
    assert code(ops, "setxattr", "/x", f"user.imgfs.expect.{name}", value, 0) == "EINVAL"
    ops("release", "/x", fh)
    assert attribute(ops, "checksum") == hashlib.md5(b"").hexdigest()
    assert attribute(ops, "state") == "active"


def test_expected_size_that_fits_nowhere_is_enospc(ops: ImageOperations) -> None:
    fh = ops("create", "/x", 0o600)
    assert code(ops, "setxattr", "/x", "user.imgfs.expect.size", b"9" * 18, 0) == "ENOSPC"
    ops("release", "/x", fh)


def test_state_never_waits_and_digests_do(ops: ImageOperations) -> None:
    fh = ops("create", "/x", 0o600)
    ops("write", "/x", b"abc", 0, fh)
    assert attribute(ops, "state") == "saving"
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(attribute(ops, "checksum")))
    asking.start()
    ops("flush", "/x", fh)
    ops("release", "/x", fh)
    asking.join(20)
    assert found == [hashlib.md5(b"abc").hexdigest()]


def test_wait_for_a_digest_ends_when_the_caller_is_interrupted(open_store: OpenStore) -> None:
    ops = ImageOperations(open_store(), caller=lambda: CALLER, interrupted=lambda: True)
    fh = ops("create", "/x", 0o600)
    ops("write", "/x", b"abc", 0, fh)
    assert code(ops, "getxattr", "/x", "user.imgfs.checksum") == "EINTR"
    ops("release", "/x", fh)


def test_attributes_of_an_image_being_written_are_listed_without_waiting(ops: ImageOperations) -> None:
    fh = ops("create", "/x", 0o600)
    ops("write", "/x", b"abc", 0, fh)
    shown = ops("listxattr", "/x")
    assert "user.imgfs.state" in shown
    assert "user.imgfs.checksum" not in shown
    ops("release", "/x", fh)


def test_names_and_attributes_are_bytes(ops: ImageOperations, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xfe")
    put(ops, f"/{name}")
    assert listed(ops) == [name]
    assert os.listdir(os.fsencode(tmp_path / "high")).count(b"\xff\xfe") == 1
    assert attribute(ops, "location", f"/{name}").endswith("/%FF%FE")


# --- libfuse's hidden names ---


def test_image_removed_while_open_is_gone_at_once_and_readable_to_the_end(
    ops: ImageOperations, tmp_path: Path
) -> None:
    put(ops)
    fh = ops("open", "/x", os.O_RDONLY)
    ops("rename", "/x", HIDDEN)
    assert listed(ops) == []
    assert os.listdir(tmp_path / "high") == [".imgfs"]
    assert code(ops, "getattr", "/x") == "ENOENT"
    assert ops("getattr", HIDDEN)["st_nlink"] == 0
    assert ops("find", HIDDEN) == ops("status", HIDDEN)
    assert ops("find", "/y") is None
    assert ops("getattr", None, fh)["st_size"] == len(CONTENT)
    assert ops("read", None, 1 << 20, 0, fh) == CONTENT
    assert ops("unlink", HIDDEN) == 0
    assert ops("release", None, fh) == 0
    assert code(ops, "getattr", HIDDEN) == "ENOENT"


def test_hidden_image_that_is_closed_while_it_is_hidden_is_absent(
    ops: ImageOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = ops("create", "/x", 0o644)
    delete = ops._store.delete
    monkeypatch.setattr(ops._store, "delete", lambda name: (delete(name), ops("release", "/x", handle)))
    ops("rename", "/x", HIDDEN)
    for call in (("getattr", HIDDEN), ("open", HIDDEN, os.O_RDONLY), ("getxattr", HIDDEN, "user.imgfs.state")):
        with pytest.raises(OSError) as caught:
            ops(*call)
        assert caught.value.errno == errno.ENOENT
    ops("unlink", HIDDEN)


def test_hidden_name_stays_as_long_as_any_handle_does(ops: ImageOperations) -> None:
    put(ops)
    first, second = (ops("open", "/x", os.O_RDONLY) for _ in range(2))
    ops("rename", "/x", HIDDEN)
    ops("release", None, first)
    assert ops("getattr", HIDDEN)["st_size"] == len(CONTENT)
    assert ops("read", None, 10, 0, second) == CONTENT[:10]
    ops("release", None, second)
    assert code(ops, "getattr", HIDDEN) == "ENOENT"


def test_name_of_a_hidden_image_is_free_for_another(ops: ImageOperations) -> None:
    put(ops)
    fh = ops("open", "/x", os.O_RDONLY)
    ops("rename", "/x", HIDDEN)
    put(ops, "/x", b"another")
    assert get(ops) == b"another"
    assert ops("read", None, 10, 0, fh) == CONTENT[:10]
    ops("release", None, fh)
    assert get(ops) == b"another"


def test_image_written_while_hidden_is_written_on(ops: ImageOperations, tmp_path: Path) -> None:
    fh = ops("create", "/x", 0o600)
    ops("rename", "/x", HIDDEN)
    ops("write", None, b"abc", 0, fh)
    ops("truncate", HIDDEN, 2, fh)
    ops("chmod", HIDDEN, 0o644)
    assert ops("read", None, 10, 0, fh) == b"ab"
    ops("unlink", HIDDEN)
    ops("release", None, fh)
    assert os.listdir(tmp_path / "high") == [".imgfs"]


@pytest.mark.parametrize("name", [HIDDEN, "/.fuse_hidden1", "/.fuse_hiddenx"])
def test_image_that_nobody_has_open_can_not_be_hidden(ops: ImageOperations, tmp_path: Path, name: str) -> None:
    (tmp_path / "high/x").write_bytes(CONTENT)
    assert code(ops, "rename", "/x", name) == "EPERM"
    assert get(ops) == CONTENT


def test_image_released_a_while_ago_can_not_be_hidden(ops: ImageOperations, monkeypatch: pytest.MonkeyPatch) -> None:
    put(ops)
    monkeypatch.setattr(fuse_ops, "RELEASED_SECONDS", 0)
    assert code(ops, "rename", "/x", HIDDEN) == "EPERM"
    assert get(ops) == CONTENT


def test_image_released_a_moment_ago_is_removed_as_libfuse_asks(ops: ImageOperations, tmp_path: Path) -> None:
    """libfuse takes an image for open until a little after its release."""
    put(ops)
    ops("rename", "/x", HIDDEN)
    assert os.listdir(tmp_path / "high") == [".imgfs"]


def test_hidden_files_of_another_program_in_a_datadir_are_no_images(ops: ImageOperations, tmp_path: Path) -> None:
    (tmp_path / f"high{HIDDEN}").write_bytes(b"x")
    assert listed(ops) == []
    assert code(ops, "getattr", HIDDEN) == "ENOENT"
    assert (tmp_path / f"high{HIDDEN}").exists()


def test_handles_released_in_any_order_leave_nothing_open(ops: ImageOperations, tmp_path: Path) -> None:
    put(ops)
    handles = [ops("open", "/x", flags) for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY)]
    ops("rename", "/x", HIDDEN)
    for fh in (handles[1], handles[0], handles[2]):
        ops("release", None, fh)
    wait_until(lambda: not [fd for fd in _open_files() if fd.startswith(f"{tmp_path}/high/x")], "the image closed")


def _open_files() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return found
