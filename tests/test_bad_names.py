"""Names that must be refused, names that must work, and things in a datadir that are no images."""

import errno
import functools
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients import assert_sealed, fails_with, md5, new_image
from tests.conftest import Mounted, attribute, run

Mount = Callable[..., Mounted]
RESERVED = [".imgfs", ".imgfs.yaml", ".imgfs-anything"]
GOOD_NAMES = [
    b"plain",
    b" ",
    b"with space and 'quotes' and \"more\"",
    b"%2e%2e",
    b"?query#fragment&amp;",
    b"-rf",
    b"~",
    b"*",
    b"back\\slash",
    b"line\nbreak",
    b"tab\tand\x01\x7fcontrol",
    "ünïcödé-画像-😀".encode(),
    b"latin-\xe4\xf6\xfc",
    b"\xff\xfe\x80",
    b"\xed\xa0\x80",
    b".hidden",
    b"...",
    b".img",
    b"x" * 255,
    b"\xe4" * 255,
]


@pytest.fixture
def images(mount: Mount) -> Mounted:
    """A mount with two datadirs."""
    return mount()


def assert_unchanged(images: Mounted, names: list[str]) -> None:
    """The mount and its datadirs hold these images and nothing else."""
    assert sorted(os.listdir(images.path)) == sorted(names)
    below = [name for datadir in images.datadirs for name in os.listdir(datadir) if name != ".imgfs"]
    assert sorted(below) == sorted(names)


def test_names_are_bytes(images: Mounted) -> None:
    contents = {}
    for number, name in enumerate(GOOD_NAMES):
        path = images / os.fsdecode(name)
        contents[name] = new_image(path, 1000 + number)
        assert path.stat().st_size == 1000 + number
    assert sorted(os.listdir(os.fsencode(images.path))) == sorted(GOOD_NAMES)
    assert sorted(p for p in os.listdir(os.fsencode(images.datadirs[0])) if p != b".imgfs") == sorted(GOOD_NAMES)
    for name, content in contents.items():
        path = images / os.fsdecode(name)
        assert_sealed(path, md5(content))
        path.rename(images / "moved")
        assert attribute(images / "moved", "state") == "active"
        (images / "moved").rename(path)
        path.unlink()
    assert_unchanged(images, [])


def test_location_of_an_odd_name_is_percent_encoded(images: Mounted) -> None:
    for name in (b"a b?#%c", b"\xff\xfe", "ü".encode()):
        new_image(images / os.fsdecode(name), 10)
        quoted = "".join(chr(byte) if chr(byte).isalnum() and byte < 128 else f"%{byte:02X}" for byte in name)
        assert attribute(images / os.fsdecode(name), "location") == f"file://{images.datadirs[0]}/{quoted}"


def test_reserved_names_are_refused(images: Mounted) -> None:
    new_image(images / "a")
    for name in RESERVED:
        with fails_with(errno.EPERM):
            (images / name).touch()
        with fails_with(errno.EPERM):
            (images / "a").rename(images / name)
        for operation in (os.stat, os.unlink, lambda path: os.open(path, os.O_RDONLY)):
            with fails_with(errno.ENOENT):
                operation(images / name)
    assert_unchanged(images, ["a"])


def test_own_room_of_a_datadir_is_not_to_be_seen_or_reached(images: Mounted) -> None:
    assert (images.datadirs[0] / ".imgfs").is_dir()
    assert os.listdir(images.path) == []
    for operation in (os.stat, os.listdir, os.rmdir, os.unlink):
        with fails_with(errno.ENOENT):
            operation(images / ".imgfs")


def test_too_long_names_are_refused(images: Mounted) -> None:
    new_image(images / "a")
    for name in ("x" * 256, "ü" * 128, "x" * 1000, "x" * 2000):
        path = images / name
        for operation in (path.touch, path.stat, path.unlink, functools.partial((images / "a").rename, path)):
            with fails_with(errno.ENAMETOOLONG):
                operation()
    assert_unchanged(images, ["a"])


def test_names_with_a_slash_lead_nowhere(images: Mounted) -> None:
    new_image(images / "a")
    with fails_with(errno.ENOENT):
        (images / "missing" / "b").touch()
    with fails_with(errno.ENOTDIR):
        (images / "a" / "b").touch()
    with fails_with(errno.ENOTDIR):
        (images / "a" / ".." / "b").touch()
    with fails_with(errno.ENOENT):
        (images / "a").rename(images / "missing" / "b")
    assert_unchanged(images, ["a"])


def test_dot_and_dot_dot_are_the_directories_they_are(images: Mounted) -> None:
    new_image(images / "a")
    assert os.path.samefile(images / ".", images.path)
    assert os.path.samefile(images / "..", images.path.parent)
    for name in (".", ".."):
        with fails_with(errno.EBUSY, errno.ENOTEMPTY, errno.EINVAL, errno.EISDIR, errno.EEXIST):
            os.rename(images / "a", f"{images.path}/{name}")
        with fails_with(errno.EISDIR):
            os.unlink(f"{images.path}/{name}")
    assert_unchanged(images, ["a"])


def test_only_regular_files_can_be_made(images: Mounted, tmp_path: Path) -> None:
    new_image(images / "a")
    operations: list[Callable[[], object]] = [
        (images / "new").mkdir,
        lambda: (images / "new").symlink_to("/etc/passwd"),
        lambda: (images / "new").hardlink_to(images / "a"),
        lambda: os.mkfifo(images / "new"),
        lambda: os.mknod(images / "new", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        lambda: os.mknod(images / "new", stat.S_IFSOCK | 0o600),
    ]
    for operation in operations:
        with fails_with(errno.EPERM):
            operation()
    assert_unchanged(images, ["a"])


def test_programs_say_clearly_what_they_may_not(images: Mounted) -> None:
    new_image(images / "a")
    for command in (
        ["mkdir", images / "new"],
        ["ln", "-s", "a", images / "new"],
        ["ln", images / "a", images / "new"],
        ["mkfifo", images / "new"],
    ):
        done = run(*command, check=False)
        assert done.returncode == 1
        assert "Operation not permitted" in done.stderr
    assert "Not a directory" in run("rmdir", images / "a", check=False).stderr
    assert_unchanged(images, ["a"])


def test_open_with_o_directory_and_o_nofollow(images: Mounted) -> None:
    new_image(images / "a")
    with fails_with(errno.ENOTDIR):
        os.open(images / "a", os.O_RDONLY | os.O_DIRECTORY)
    os.close(os.open(images / "a", os.O_RDONLY | os.O_NOFOLLOW))


def strange(datadir: Path, kind: str) -> Path:
    """Something in a datadir that is no image."""
    path = datadir / "strange"
    match kind:
        case "symlink to a file":
            path.symlink_to(datadir / "image")
        case "symlink out":
            path.symlink_to("/etc/passwd")
        case "dangling symlink":
            path.symlink_to(datadir.parent / "made-by-following")
        case "symlink to a directory":
            path.symlink_to("/etc")
        case "fifo":
            os.mkfifo(path)
        case "device":
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        case "directory":
            path.mkdir()
            (path / "inside").write_bytes(b"x")
    return path


KINDS = [
    "symlink to a file",
    "symlink out",
    "dangling symlink",
    "symlink to a directory",
    "fifo",
    "device",
    "directory",
]


@pytest.mark.parametrize("datadir", [0, 1], ids=["high", "low"])
def test_what_is_no_image_is_invisible_and_never_followed(images: Mounted, datadir: int) -> None:
    new_image(images.datadirs[datadir] / "image")
    for kind in KINDS:
        below = strange(images.datadirs[datadir], kind)
        before = below.lstat()
        assert_no_image(images, "strange")
        after = below.lstat()
        for key in ("st_mode", "st_ino", "st_mtime_ns", "st_ctime_ns"):
            assert getattr(after, key) == getattr(before, key)
        assert not (images.datadirs[datadir].parent / "made-by-following").exists()
        below.rename(images.datadirs[datadir].parent / f"{datadir} {kind}")


def assert_no_image(images: Mounted, name: str) -> None:
    """Nothing can be done with a name that is taken by something that is no image, and nothing takes its place."""
    path = images / name
    looks: list[Callable[[], object]] = [
        path.lstat,
        path.read_bytes,
        path.unlink,
        lambda: os.truncate(path, 0),
        lambda: path.chmod(0o777),
        lambda: os.utime(path),
        lambda: os.getxattr(path, "user.imgfs.checksum"),
        lambda: os.setxattr(path, "user.note", b"x"),
        lambda: path.rename(images / "other"),
        lambda: os.listdir(path),
    ]
    for look in looks:
        with fails_with(errno.ENOENT):
            look()
    with fails_with(errno.EEXIST):
        path.write_bytes(b"never to arrive")
    with fails_with(errno.EEXIST):
        (images / "image").rename(path)
    assert os.listdir(images.path) == ["image"]


def test_symlink_put_in_the_place_of_an_open_image_is_not_followed(images: Mounted, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    content = new_image(images / "a")
    assert_sealed(images / "a")
    with open(images / "a", "r+b", buffering=0) as image:
        (images.datadirs[0] / "a").unlink()
        (images.datadirs[0] / "a").symlink_to(tmp_path / "secret")
        assert image.read(10) == content[:10]
        image.write(b"to the old file")
    assert (tmp_path / "secret").read_bytes() == b"secret"
    with fails_with(errno.ENOENT):
        (images / "a").read_bytes()
