"""A store of a user who is not root: mounted through fusermount3, written and read, with nothing but their rights."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from imgfs import mounts
from tests.clients import MIB, digest, run_as
from tests.conftest import WAIT_SECONDS, run, wait_until, write_config

SOURCES = Path(mounts.__file__).parent.parent
GETFATTR = ["getfattr", "--absolute-names", "--only-values", "-n"]


pytestmark = pytest.mark.usefixtures("fuse_for_everybody")


@pytest.fixture
def home(tmp_path: Path, second_user: int) -> Path:
    """A directory of the second user's own."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "images").mkdir()
    write_config(home)
    for path in (home, *home.iterdir()):
        os.chown(path, second_user, second_user)
    return home


def python_of(user: int) -> str:
    """A Python that the user may run, with the same modules: this one, or the system's."""
    for program in (sys.executable, "/usr/bin/python3"):
        try:
            if subprocess.run([program, "-c", ""], user=user, check=False).returncode == 0:
                return program
        except PermissionError:
            continue
    raise AssertionError("no Python can be run by an ordinary user")


class UserMount:
    """A mount of the second user, in the foreground; gone at the end of its `with` block."""

    def __init__(self, home: Path, user: int, *options: str, **environment: str) -> None:
        self.home, self.path = home, home / "images"
        self.log = home.parent / "log"
        self._imgfs = [python_of(user), "-m", "imgfs"]
        modules = os.pathsep.join([str(SOURCES), sysconfig.get_path("purelib")])
        self._as_user = {
            "user": user, "group": user, "extra_groups": [], "cwd": "/",
            "env": {**os.environ, "HOME": str(home), "PYTHONPATH": modules, **environment},
        }  # fmt: skip
        command = [*self._imgfs, "-v", "mount", "--foreground", *options, str(home / "imgfs.yaml"), str(self.path)]
        with open(self.log, "wb") as log:
            self.daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._as_user)

    def __enter__(self) -> "UserMount":
        try:
            wait_until(lambda: self.daemon.poll() is not None or mounts.is_imgfs(self.path), "the mount")
            assert self.daemon.poll() is None, self.log.read_text()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def unmount(self) -> None:
        """By the user, with the command line; the daemon ends well."""
        run(*self._imgfs, "umount", self.path, **self._as_user)
        assert self.daemon.wait(WAIT_SECONDS) == 0, self.log.read_text()
        assert not mounts.is_imgfs(self.path)

    def _end(self) -> None:
        if self.daemon.poll() is None:
            self.daemon.terminate()
            try:
                self.daemon.wait(WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                self.daemon.kill()
                self.daemon.wait()
        if mounts.is_imgfs(self.path):
            mounts.detach(str(self.path))


def test_user_mounts_writes_reads_and_unmounts(home: Path, second_user: int, tmp_path: Path) -> None:
    with open(tmp_path / "source", "wb") as source:
        source.write(os.urandom(5 * MIB + 321))
    (tmp_path / "source").chmod(0o644)
    expected = digest(tmp_path / "source")
    with UserMount(home, second_user, "--transport", "kernel") as images:
        transport = run_as(second_user, *GETFATTR, "user.imgfs.transport", images.path).stdout
        assert transport == "kernel, passthrough off"
        run_as(second_user, "cp", tmp_path / "source", images.path / "a")
        assert run_as(second_user, *GETFATTR, "user.imgfs.checksum", images.path / "a").stdout == expected
        assert run_as(second_user, *GETFATTR, "user.imgfs.state", images.path / "a").stdout == "active"
        assert run_as(second_user, "md5sum", images.path / "a").stdout.split()[0] == expected
        run_as(second_user, "dd", "if=/dev/zero", f"of={images.path / 'a'}", "bs=4k", "count=3", "conv=notrunc")
        changed = digest(home / "high" / "a")
        assert run_as(second_user, "md5sum", images.path / "a").stdout.split()[0] == changed != expected
        assert run_as(second_user, *GETFATTR, "user.imgfs.checksum", images.path / "a").stdout == changed
        run_as(second_user, "mv", images.path / "a", images.path / "b")
        run_as(second_user, "cp", images.path / "b", images.path / "c")
        run_as(second_user, "rm", images.path / "b")
        assert run_as(second_user, "ls", images.path).stdout == "c\n"
        assert run_as(second_user, *GETFATTR, "user.imgfs.checksum", images.path / "c").stdout == changed
        images.unmount()
    status = (home / "high" / "c").stat()
    assert (status.st_uid, status.st_gid) == (second_user, second_user)
    assert digest(home / "high" / "c") == changed


def test_user_is_told_once_that_passthrough_takes_privileges(home: Path, second_user: int) -> None:
    with UserMount(home, second_user, "--transport", "kernel") as images:
        for name in "abc":
            run_as(second_user, "cp", "/etc/passwd", images.path / name)
            run_as(second_user, "cat", images.path / name)
        images.unmount()
    warnings = [line for line in images.log.read_text().splitlines() if "INFO" not in line]
    assert len(warnings) == 1
    assert "no passthrough: it takes CAP_SYS_ADMIN" in warnings[0]


def test_mount_of_a_user_is_closed_to_others(home: Path, second_user: int) -> None:
    with UserMount(home, second_user, "--transport", "kernel") as images:
        for other in (0, 12345):
            assert "Permission denied" in run_as(other, "ls", images.path, check=False).stderr
        images.unmount()


def test_user_has_holes_and_copies_by_the_kernel_too(home: Path, second_user: int) -> None:
    with UserMount(home, second_user, "--transport", "kernel") as images:
        run_as(second_user, "truncate", "-s", "1G", images.path / "a")
        run_as(second_user, "dd", "if=/dev/urandom", f"of={images.path / 'a'}", "bs=64k", "count=4", "seek=100",
               "conv=notrunc")  # fmt: skip
        run_as(second_user, "cp", images.path / "a", images.path / "b")
        run_as(second_user, "fallocate", "--punch-hole", "-o", "6553600", "-l", "65536", images.path / "b")
        assert (home / "high" / "a").stat().st_blocks * 512 < MIB
        assert (home / "high" / "b").stat().st_blocks < (home / "high" / "a").stat().st_blocks
        images.unmount()


def test_signal_ends_the_mount_of_a_user(home: Path, second_user: int) -> None:
    with UserMount(home, second_user, "--transport", "kernel") as images:
        run_as(second_user, "cp", "/etc/passwd", images.path / "a")
        images.daemon.terminate()
        assert images.daemon.wait(WAIT_SECONDS) == 0
        assert not mounts.is_imgfs(images.path)
    assert (home / "high" / "a").read_bytes() == Path("/etc/passwd").read_bytes()


# Which transport


def test_auto_takes_the_kernel_transport_for_users_too(home: Path, second_user: int) -> None:
    with UserMount(home, second_user) as images:
        assert run_as(second_user, *GETFATTR, "user.imgfs.transport", images.path).stdout.startswith("kernel")
        images.unmount()


@pytest.mark.parametrize("options", [(), ("--transport", "auto")], ids=["default", "auto"])
def test_auto_falls_back_to_fusepy_where_the_kernel_transport_can_not_mount(
    home: Path, second_user: int, options: tuple[str, ...]
) -> None:
    """Without fusermount3 in its path; libfuse 2 has a fusermount of its own, by its full name."""
    with UserMount(home, second_user, *options, PATH="/nonexistent") as images:
        assert run_as(second_user, *GETFATTR, "user.imgfs.transport", images.path).stdout == "fusepy"
        wait_until(lambda: "is served by transport fusepy" in images.log.read_text())
        run_as(second_user, "cp", "/etc/passwd", images.path / "a")
        checksum = run_as(second_user, *GETFATTR, "user.imgfs.checksum", images.path / "a").stdout
        assert checksum == digest(Path("/etc/passwd"))
        run_as(second_user, "fusermount", "-u", images.path)
        assert images.daemon.wait(WAIT_SECONDS) == 0


def test_kernel_transport_that_can_not_be_had_is_refused_with_the_reason(home: Path, second_user: int) -> None:
    refused = UserMount(home, second_user, "--transport", "kernel", PATH="/nonexistent")
    assert refused.daemon.wait(WAIT_SECONDS) == 1
    assert "fusermount3 is not installed" in refused.log.read_text()
    assert len(refused.log.read_text().splitlines()) == 1
    assert not mounts.is_imgfs(refused.path)


@pytest.mark.parametrize("transport", ["auto", "kernel", "fusepy"])
def test_device_that_may_not_be_opened_is_named(home: Path, second_user: int, transport: str) -> None:
    os.chmod("/dev/fuse", 0o600)
    refused = UserMount(home, second_user, "--transport", transport)
    assert refused.daemon.wait(WAIT_SECONDS) == 1
    assert "/dev/fuse can't be opened" in refused.log.read_text()
    assert len(refused.log.read_text().splitlines()) == 1
    assert not mounts.is_imgfs(refused.path)
