"""The command line: what it prints, which exit codes it has, and how mounts begin and end."""

import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from imgfs import DatadirConfig, ImageStore, State, load, mount_table, mounts
from imgfs.datadir import Datadir
from imgfs.version import VERSION
from tests.conftest import IMGFS, Mounted, attribute, run, wait_until, write_config

CONTENT = os.urandom(300_000)
END_SECONDS = 20.0
SOURCES = Path(mounts.__file__).parent.parent

Imgfs = Callable[..., subprocess.CompletedProcess[str]]
Mount = Callable[..., Mounted]


def with_path(place: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python finds the modules of a directory, too."""
    paths = [str(place), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def detach_all_below(place: Path) -> None:
    """Take away every imgfs that is mounted below a directory; their daemons end by that."""
    for found in mount_table.table():
        if found.fstype == mounts.FSTYPE and Path(found.mountpoint).is_relative_to(place):
            mounts.detach(found.mountpoint)


@pytest.fixture
def imgfs(tmp_path: Path) -> Iterator[Imgfs]:
    """Call it with the arguments of a command; what it mounts in the background is gone at the end, daemons too."""
    daemons: set[int] = set()

    def call(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        environment = with_path(SOURCES, os.environ if env is None else env)
        done = run(*IMGFS, *arguments, check=False, cwd=tmp_path, env=environment)
        assert "Traceback" not in done.stderr
        for found in mount_table.table():
            if found.fstype == mounts.FSTYPE and Path(found.mountpoint).is_relative_to(tmp_path):
                with contextlib.suppress(OSError):
                    daemons.add(daemon_of(Path(found.mountpoint)))
        return done

    yield call
    detach_all_below(tmp_path)
    wait_until(lambda: not any(map(lives, daemons)), "the end of the daemons")


def daemon_of(mountpoint: Path) -> int:
    """The process that serves a mount."""
    return int(os.getxattr(mountpoint, "user.imgfs.pid"))


def lives(pid: int) -> bool:
    """Whether a process is there, and no mere zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def is_dead(mountpoint: Path) -> bool:
    """Whether a mount answers no more because its daemon is gone."""
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def refusal(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one line with which a command was refused."""
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("imgfs: ")
    return line.removeprefix("imgfs: ")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with the datadirs high and low beside it, and an empty directory `images`."""
    (tmp_path / "images").mkdir()
    return write_config(tmp_path)


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], ["mount", "umount", "check", "Exit codes"]),
        (["mount", "--help"], ["CONFIG", "MOUNTPOINT", "--foreground", "--transport", "--allow-other", "--log-file"]),
        (["umount", "--help"], ["MOUNTPOINT", "--lazy"]),
        (["check", "--help"], ["CONFIG"]),
        (["--version"], [f"imgfs {VERSION}"]),
    ],
)
def test_help_says_what_there_is(imgfs: Imgfs, arguments: list[str], said: list[str]) -> None:
    done = imgfs(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert [word for word in said if word not in done.stdout] == []


@pytest.mark.parametrize(
    "arguments",
    [[], ["remount"], ["mount"], ["mount", "imgfs.yaml"], ["check"], ["check", "a", "b"], ["umount"],
     ["mount", "imgfs.yaml", "images", "--transport", "pigeon"], ["mount", "--frobnicate", "imgfs.yaml", "images"]],
)  # fmt: skip
@pytest.mark.usefixtures("config")
def test_wrong_command_line_ends_with_2(imgfs: Imgfs, tmp_path: Path, arguments: list[str]) -> None:
    done = imgfs(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: imgfs")
    assert not (tmp_path / "high").exists()


# --- check ---


def test_check_of_a_good_configuration_says_so_and_changes_nothing(
    imgfs: Imgfs, config: Path, tmp_path: Path
) -> None:
    done = imgfs("check", config)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{config}: good\n")
    assert f"datadir {tmp_path}/high: priority 200, mode rw" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["images", "imgfs.yaml"]


@pytest.mark.parametrize("command", ["check", "mount"])
def test_bad_configuration_is_told_whole_a_line_each(
    imgfs: Imgfs, config: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").touch()
    config.write_text("colour: blue\nfile_perm: 0240\ndatadirs:\n- high\n- file\n- low:-1\n")
    done = imgfs(command, config.name, *(["images"] if command == "mount" else []))
    assert (done.returncode, done.stdout) == (2, "")
    keys = [line.split(": ")[:3] for line in done.stderr.splitlines()]
    assert keys == [
        ["imgfs", "imgfs.yaml:1", "colour"],
        ["imgfs", "imgfs.yaml:2", "file_perm"],
        ["imgfs", "imgfs.yaml:5", "datadirs[1]"],
        ["imgfs", "imgfs.yaml:6", "datadirs[2]"],
    ]
    assert not (tmp_path / "high").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.yaml", "can't be read: No such file"),
        ("images", "can't be read: Is a directory"),
        ("\udcff.yaml", "No such"),
    ],
)
@pytest.mark.usefixtures("config")
def test_configuration_that_can_not_be_read_is_told(imgfs: Imgfs, name: str, said: str) -> None:
    assert said in refusal(imgfs("check", name), code=2)


def test_unwritable_datadir_is_told_with_its_line(
    imgfs: Imgfs, config: Path, tmp_path: Path, filesystem: Callable[..., Path]
) -> None:
    place = filesystem("tmpfs")
    run("mount", "-o", "remount,ro", place)
    config.write_text(f"datadirs:\n- high\n- {place}\n")
    for command in (["check", config], ["mount", config, "images"]):
        line = refusal(imgfs(*command), code=2)
        assert line.startswith(f"{config}:3: datadirs[1]: {place} is not writable")


# --- mounting in the background ---


def test_mount_returns_when_the_mount_answers(imgfs: Imgfs, config: Path, tmp_path: Path) -> None:
    done = imgfs("mount", config, "images")
    assert done.returncode == 0
    assert done.stdout == ""
    (tmp_path / "images/x").write_bytes(CONTENT)
    assert attribute(tmp_path / "images/x", "checksum") == hashlib.md5(CONTENT).hexdigest()
    daemon = daemon_of(tmp_path / "images")
    assert daemon != os.getpid()
    assert os.readlink(f"/proc/{daemon}/cwd") == "/"
    assert {os.readlink(f"/proc/{daemon}/fd/{n}") for n in (0, 1, 2)} == {"/dev/null"}
    done = imgfs("umount", "images")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not lives(daemon)
    assert os.listdir(tmp_path / "images") == []
    assert (tmp_path / "high/x").read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["with space", "new\nline", "komma,equals=", os.fsdecode(b"\xff\xfe"), "é ☃", "-rf"])
def test_mountpoint_may_have_any_name(imgfs: Imgfs, config: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert imgfs("mount", config, tmp_path / name).returncode == 0
    assert mounts.is_imgfs(tmp_path / name)
    (tmp_path / name / "x").write_bytes(CONTENT)
    assert imgfs("umount", tmp_path / name).returncode == 0
    assert not mounts.is_imgfs(tmp_path / name)


def test_a_symlink_to_a_mountpoint_will_do(imgfs: Imgfs, config: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("images")
    assert imgfs("mount", config, tmp_path / "link").returncode == 0
    assert mounts.is_imgfs(tmp_path / "images")
    assert imgfs("umount", f"{tmp_path}/link/").returncode == 0
    assert not mounts.is_imgfs(tmp_path / "images")


def test_umount_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(mounts, "PATIENCE_SECONDS", 0)
    with subprocess.Popen(["sleep", "2"]) as process:
        pidfd = os.pidfd_open(process.pid)
        mounts._wait_for_end(pidfd, process.pid)
        os.close(pidfd)
    (message,) = caplog.messages
    assert f"process {process.pid} goes on" in message
    assert f"kill {process.pid}" in message


def test_a_mount_whose_command_was_killed_goes_again(config: Path, tmp_path: Path) -> None:
    """Here it waits for a datadir that another one lets go of a moment later."""
    with contextlib.closing(Datadir(DatadirConfig(str(tmp_path / "high")))):
        command = [
            sys.executable,
            "-m",
            "imgfs",
            "mount",
            "--log-file",
            tmp_path / "log",
            config,
            tmp_path / "images",
        ]
        with subprocess.Popen(command) as process:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            wait_until(children.read_text, "the child that is to be the daemon")
            child = int(children.read_text())
            process.kill()
        assert lives(child)
    wait_until(lambda: not lives(child), "the end of the child")
    assert "it is taken away again" in (tmp_path / "log").read_text()
    assert not mounts.is_imgfs(tmp_path / "images")


def test_log_file_gets_what_the_daemon_says(imgfs: Imgfs, config: Path, tmp_path: Path) -> None:
    done = imgfs("-v", "mount", "--log-file", "daemon.log", config, "images")
    assert done.returncode == 0
    daemon = daemon_of(tmp_path / "images")
    handle = os.open(tmp_path / "images/x", os.O_CREAT | os.O_WRONLY)
    os.setxattr(tmp_path / "images/x", "user.imgfs.expect.checksum", b"0" * 32)
    os.write(handle, b"x")
    os.close(handle)
    wait_until(lambda: attribute(tmp_path / "images/x", "state") == "failed", "the verdict")
    imgfs("umount", "images")
    lines = (tmp_path / "daemon.log").read_text().splitlines()
    assert all(f" imgfs[{daemon}]: " in line for line in lines)
    assert [line for line in lines if "ERROR: image 'x'" in line]
    assert "is unmounted" in lines[-1]


def test_log_file_that_can_not_be_written_is_refused(imgfs: Imgfs, config: Path, tmp_path: Path) -> None:
    assert "none/daemon.log" in refusal(imgfs("mount", "--log-file", "none/daemon.log", config, "images"))
    assert not mounts.is_imgfs(tmp_path / "images")


def test_foreground_logs_to_stderr_and_stays(mount: Mount) -> None:
    images = mount()
    assert daemon_of(images.path) == images.daemon.pid
    images.wait_for_log("INFO: mounted")
    assert f"transport {attribute(images.path, 'transport')}" in images.log.read_text()


# --- mount options ---


def test_options_are_passed_on(imgfs: Imgfs, config: Path, tmp_path: Path) -> None:
    (tmp_path / "high").mkdir()
    (tmp_path / "low").mkdir()
    options = "ro,noatime,fsname=my-store,defaults,_netdev,x-systemd.automount"
    assert imgfs("mount", "-o", options, config, "images").returncode == 0
    found = mount_table.mounted_at(str(tmp_path / "images"))
    assert found is not None
    assert found.source == "my-store"
    with pytest.raises(OSError, match="Read-only"):
        (tmp_path / "images/x").touch()


@pytest.mark.parametrize("options", ["frobnicate", "ro,frobnicate=7", "allow_other=1", "fsname", "fsname=", "ro=1"])
def test_unknown_option_is_refused_by_name(imgfs: Imgfs, config: Path, tmp_path: Path, options: str) -> None:
    line = refusal(imgfs("mount", "-o", options, config, "images"), code=2)
    assert repr(options.rpartition(",")[2]) in line
    assert not (tmp_path / "high").exists()


# --- where nothing can be mounted ---


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("missing", "mountpoint {there} does not exist; create it first"),
        ("a file", "mountpoint {there} is not a directory"),
        ("not empty", "mountpoint {there} is not empty"),
        ("holds a datadir", "mountpoint {there} and datadir {there}/high lie one inside the other"),
        ("lies in a datadir", "mountpoint {there} and datadir {base} lie one inside the other"),
        ("is a datadir", "mountpoint {there} and datadir {there} lie one inside the other"),
        ("symlink to a datadir", "mountpoint {base}/real and datadir {base}/real lie one inside the other"),
    ],
)
def test_mountpoint_that_is_none_is_refused(imgfs: Imgfs, config: Path, tmp_path: Path, case: str, said: str) -> None:
    there = tmp_path / "images"
    datadirs = {"holds a datadir": "images/high", "lies in a datadir": ".", "is a datadir": "images",
                "symlink to a datadir": "real"}  # fmt: skip
    config.write_text(f"datadir: {datadirs.get(case, 'high')}\n")
    if case in ("missing", "a file", "symlink to a datadir"):
        there.rmdir()
    if case == "a file":
        there.touch()
    if case == "not empty":
        (there / "x").touch()
    if case == "symlink to a datadir":
        (tmp_path / "real").mkdir()
        there.symlink_to("real")
    before = sorted(tmp_path.rglob("*"))
    for where in ([], ["--foreground"]):
        done = imgfs("mount", *where, config, there)
        assert refusal(done).startswith(said.format(there=there, base=tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_mounting_twice_is_refused(imgfs: Imgfs, config: Path, tmp_path: Path) -> None:
    assert imgfs("mount", config, "images").returncode == 0
    line = refusal(imgfs("mount", config, "images"))
    assert (
        line == f"an imgfs is mounted at {tmp_path}/images already; unmount it first: imgfs umount {tmp_path}/images"
    )
    (tmp_path / "images/x").touch()


def test_kernel_transport_is_refused_or_there(imgfs: Imgfs, config: Path, tmp_path: Path) -> None:
    done = imgfs("mount", "--transport", "kernel", config, "images")
    if done.returncode != 0:
        assert "--transport fusepy" in refusal(done)
    else:
        assert attribute(tmp_path / "images", "transport").startswith("kernel")


# --- dead mounts ---


@pytest.fixture
def dead(imgfs: Imgfs, config: Path, tmp_path: Path) -> Path:
    """The mountpoint of a daemon that was killed, with the image `x`."""
    assert imgfs("mount", config, "images").returncode == 0
    (tmp_path / "images/x").write_bytes(CONTENT)
    attribute(tmp_path / "images/x", "checksum")
    daemon = daemon_of(tmp_path / "images")
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: is_dead(tmp_path / "images"), "the mount without a daemon")
    return tmp_path / "images"


def test_dead_mount_is_cleaned_before_mounting(imgfs: Imgfs, config: Path, dead: Path) -> None:
    done = imgfs("mount", config, dead)
    assert done.returncode == 0
    assert f"{dead} is the mountpoint of an imgfs that died" in done.stderr
    assert (dead / "x").read_bytes() == CONTENT
    assert attribute(dead / "x", "state") == "active"
    assert len([m for m in mount_table.table() if m.mountpoint == str(dead)]) == 1


def test_dead_mount_can_be_unmounted(imgfs: Imgfs, dead: Path) -> None:
    done = imgfs("umount", dead)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(dead) == []


def test_image_cut_short_by_a_kill_is_stale_afterwards(imgfs: Imgfs, config: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    assert imgfs("mount", config, images).returncode == 0
    handle = os.open(images / "x", os.O_CREAT | os.O_WRONLY)
    os.write(handle, CONTENT)
    daemon = daemon_of(images)
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: is_dead(images), "the mount without a daemon")
    with contextlib.suppress(OSError):
        os.close(handle)
    assert imgfs("mount", config, images).returncode == 0
    assert attribute(images / "x", "state") == "stale"


# --- unmounting ---


@pytest.mark.parametrize("case", ["nothing", "missing", "something else"])
def test_unmounting_what_is_no_imgfs_is_refused(
    imgfs: Imgfs, tmp_path: Path, filesystem: Callable[..., Path], case: str
) -> None:
    place = filesystem("tmpfs") if case == "something else" else tmp_path / "images"
    if case == "nothing":
        place.mkdir()
    assert refusal(imgfs("umount", place)) == f"no imgfs is mounted at {place}"
    assert place.is_mount() == (case == "something else")


def test_unmounting_a_busy_mount_is_refused_and_leaves_it_at_work(mount: Mount, imgfs: Imgfs) -> None:
    images = mount()
    with open(images / "x", "wb") as file:
        line = refusal(imgfs("umount", images.path))
        assert line.startswith(f"{images.path} can't be unmounted: ")
        assert "--lazy" in line
        file.write(CONTENT)
    assert attribute(images / "x", "checksum") == hashlib.md5(CONTENT).hexdigest()


def test_lazy_unmount_lets_a_writer_finish(mount: Mount, imgfs: Imgfs) -> None:
    images = mount()
    with open(images / "x", "wb") as file:
        file.write(CONTENT[:1000])
        assert imgfs("umount", "--lazy", images.path).returncode == 0
        assert not mounts.is_imgfs(images.path)
        assert images.daemon.poll() is None
        file.write(CONTENT[1000:])
    assert images.daemon.wait(END_SECONDS) == 0
    with ImageStore(load(images.config)) as store:
        assert store.state("x") is State.ACTIVE
        assert store.digests("x").checksum == hashlib.md5(CONTENT).hexdigest()


def test_unmount_waits_for_seals_under_way(imgfs: Imgfs, config: Path, tmp_path: Path) -> None:
    assert imgfs("mount", config, "images").returncode == 0
    for number in range(20):
        (tmp_path / f"images/x{number}").write_bytes(CONTENT)
    assert imgfs("umount", "images").returncode == 0
    with ImageStore(load(config)) as store:
        assert {store.state(name) for name in store.names()} == {State.ACTIVE}
        assert len(list(store.names())) == 20


# --- signals ---


def end(images: Mounted, number: int = signal.SIGTERM) -> None:
    """Send a signal; the daemon must end well, and soon."""
    images.daemon.send_signal(number)
    assert images.daemon.wait(END_SECONDS) == 0
    assert not mounts.is_imgfs(images.path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_unmounts_and_ends_cleanly(mount: Mount, number: int) -> None:
    images = mount()
    (images / "x").write_bytes(CONTENT)
    end(images, number)
    with ImageStore(load(images.config)) as store:
        assert store.state("x") is State.ACTIVE


def test_signal_ends_a_mount_in_the_background(imgfs: Imgfs, config: Path, tmp_path: Path) -> None:
    assert imgfs("mount", config, "images").returncode == 0
    daemon = daemon_of(tmp_path / "images")
    os.kill(daemon, signal.SIGTERM)
    wait_until(lambda: not lives(daemon), "the end of the daemon")
    assert os.listdir(tmp_path / "images") == []


def test_signal_with_an_open_writer_leaves_the_image_stale(mount: Mount) -> None:
    images = mount()
    images.expect_warning("is in use; it ends all the same")
    writer = os.open(images / "x", os.O_CREAT | os.O_WRONLY)
    os.write(writer, CONTENT)
    end(images)
    with contextlib.suppress(OSError):
        os.close(writer)
    with ImageStore(load(images.config)) as store:
        assert store.state("x") is State.STALE
        assert store.digests("x").checksum == hashlib.md5(CONTENT).hexdigest()


def write_for_a_long_seal(path: Path) -> None:
    """An image that takes long to read: out of order, and a terabyte, though a hole for the most part."""
    with open(path, "wb") as file:
        file.seek(4096)
        file.write(b"later")
        file.seek(0)
        file.write(b"sooner")
        file.truncate(1 << 40)


@pytest.mark.parametrize("how", ["signal", "umount"])
def test_end_with_a_seal_under_way_is_quick_and_leaves_the_image_stale(mount: Mount, how: str) -> None:
    images = mount()
    write_for_a_long_seal(images / "x")
    (images / "y").write_bytes(CONTENT)
    assert attribute(images / "x", "state") == "saving"
    began = time.monotonic()
    if how == "signal":
        end(images)
    else:
        assert images.unmount() == 0
    assert time.monotonic() - began < END_SECONDS
    with ImageStore(load(images.config)) as store:
        assert (store.state("x"), store.state("y")) == (State.STALE, State.ACTIVE)
        assert store.size("x") == 1 << 40


# --- without libfuse ---


@pytest.fixture(params=["nothing at the path given", "nothing found"])
def no_libfuse(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """An environment in which there is no libfuse."""
    environment = {key: value for key, value in os.environ.items() if key != "FUSE_LIBRARY_PATH"}
    if request.param == "nothing at the path given":
        return environment | {"FUSE_LIBRARY_PATH": "/nonexistent/libfuse.so"}
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text("import ctypes.util\nctypes.util.find_library = lambda name: None\n")
    return with_path(hooks, environment)


def test_all_but_mounting_works_without_libfuse(
    imgfs: Imgfs, config: Path, tmp_path: Path, no_libfuse: dict[str, str]
) -> None:
    program = f"import imgfs; print(imgfs.ImageStore(imgfs.load({str(config)!r})).add('x', [b'x']).checksum)"
    done = run(sys.executable, "-c", program, env=with_path(SOURCES, no_libfuse))
    assert done.stdout.strip() == hashlib.md5(b"x").hexdigest()
    assert imgfs("check", config, env=no_libfuse).returncode == 0
    assert imgfs("--help", env=no_libfuse).returncode == 0
    assert imgfs("mount", config, "images").returncode == 0
    assert imgfs("umount", "images", env=no_libfuse).returncode == 0


@pytest.mark.parametrize("where", [[], ["--foreground"]])
def test_mounting_without_libfuse_says_what_to_install(
    imgfs: Imgfs, config: Path, tmp_path: Path, no_libfuse: dict[str, str], where: list[str]
) -> None:
    line = refusal(imgfs("mount", "--transport", "fusepy", *where, config, "images", env=no_libfuse))
    assert "libfuse 2 is not installed" in line
    assert "apt-get install libfuse2" in line
    assert not (tmp_path / "high").exists()
