"""The daemon has no more rights than it needs, and nothing of whoever started it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from imgfs import mounts
from imgfs.privileges import KEPT
from tests.clients import assert_sealed
from tests.conftest import IMGFS, WAIT_SECONDS, Mounter, wait_until, write_config

FD_CLOEXEC = 0o2000000


def fields(status: Path) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)


def test_every_thread_of_a_daemon_of_root_has_few_capabilities(mount: Mounter) -> None:
    images = mount()
    (images / "x").write_bytes(b"x")
    os.chown(images / "x", 4711, 4711)
    os.chmod(images / "x", 0)
    assert_sealed(images / "x")
    kept = sum(1 << number for number in KEPT.values())
    tasks = list(Path(f"/proc/{images.daemon.pid}/task").iterdir())
    assert len(tasks) > 3
    for task in tasks:
        found = fields(task / "status")
        sets = {name: int(found[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")}
        assert sets == {"CapEff": kept, "CapPrm": kept, "CapBnd": kept, "CapInh": 0, "CapAmb": 0}
        assert found["NoNewPrivs"] == "1"


def test_nothing_the_daemon_opens_is_inherited_by_what_it_runs(mount: Mounter) -> None:
    images = mount()
    with open(images / "x", "wb") as file:
        file.write(b"x")
        for info in Path(f"/proc/{images.daemon.pid}/fdinfo").iterdir():
            target = os.readlink(f"/proc/{images.daemon.pid}/fd/{info.name}")
            if int(info.name) > 2:
                assert int(fields(info)["flags"], 8) & FD_CLOEXEC, f"{info.name}: {target}"


@pytest.mark.parametrize("transport", ["kernel", "fusepy"])
def test_careless_parent_leaves_no_mark(tmp_path: Path, transport: str) -> None:
    mountpoint = tmp_path / "images"
    mountpoint.mkdir()
    config = write_config(tmp_path)
    log = tmp_path / "log"
    leaked = tmp_path / "leaked"
    with open(leaked, "wb") as file:
        command = [*IMGFS, "mount", "--transport", transport, "--log-file", log, config, mountpoint]
        subprocess.run(command, check=True, pass_fds=[file.fileno()], umask=0, timeout=WAIT_SECONDS)
    try:
        pid = int(os.getxattr(mountpoint, "user.imgfs.pid"))
        assert str(leaked) not in [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        (mountpoint / "x").write_bytes(b"x")
        assert_sealed(mountpoint / "x")
        for path in (log, tmp_path / "high", tmp_path / "high" / ".imgfs"):
            assert not stat.S_IMODE(path.stat().st_mode) & 0o022, path
    finally:
        mounts.unmount(str(mountpoint))
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the daemon's end")


def test_descriptors_of_python_itself_are_not_taken_for_inherited(tmp_path: Path) -> None:
    program = (
        "import os, sys; from imgfs.privileges import close_inherited_descriptors as close\n"
        "own = open(sys.argv[1]); close(); own.read(); print(sorted(map(int, os.listdir('/proc/self/fd')))[:4])"
    )
    (tmp_path / "x").touch()
    with open(tmp_path / "leaked", "wb") as file:
        command = [sys.executable, "-c", program, tmp_path / "x"]
        done = subprocess.run(command, check=True, pass_fds=[file.fileno()], capture_output=True, text=True)
        assert str(file.fileno()) not in done.stdout.strip("[]\n").split(", ")[3:]
