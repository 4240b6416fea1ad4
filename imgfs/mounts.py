"""Mountpoints: whether one can be used, whether an imgfs is there (its type is `fuse.imgfs`), taking it away."""

import contextlib
import ctypes
import errno
import logging
import math
import os
import select
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from imgfs.errors import MountError
from imgfs.linux import libc
from imgfs.mount_table import mounted_at

log = logging.getLogger(__name__)

FSTYPE = "fuse.imgfs"
PATIENCE_SECONDS = 5.0
_POLL_SECONDS = 0.5
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8  # umount2(2)


def absolute(mountpoint: str) -> str:
    """The absolute path of a mountpoint as the mount table has it; a dead mount's own path is not looked into."""
    parent, name = os.path.split(os.path.abspath(mountpoint))
    path = os.path.join(os.path.realpath(parent), name) if name else parent
    return path if mounted_at(path) else os.path.realpath(path)


def prepare(mountpoint: str, datadirs: Iterable[str]) -> str:
    """Make a directory ready to be mounted on and give its absolute path; a dead imgfs there is taken away.

    Raises MountError where it is missing, not empty, mounted on already, or mixed up with a datadir.
    """
    path = absolute(mountpoint)
    _clear_dead(path)
    path = os.path.realpath(path)
    mount = mounted_at(path)
    if mount is not None and mount.fstype == FSTYPE:
        raise MountError(f"an imgfs is mounted at {path} already; unmount it first: imgfs umount {path}")
    for datadir in map(os.path.realpath, datadirs):
        if Path(datadir).is_relative_to(path) or Path(path).is_relative_to(datadir):
            raise MountError(f"mountpoint {path} and datadir {datadir} lie one inside the other; move one of them")
    _require_empty_directory(path)
    return path


def _clear_dead(path: str) -> None:
    """A mount whose daemon died answers ENOTCONN (statvfs(3) is never answered from a cache)."""
    try:
        os.statvfs(path)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            return
        mount = mounted_at(path)
        if mount is None or mount.fstype != FSTYPE:
            raise MountError(f"{path} is a dead mount of something else; unmount it first") from None
        log.warning("%s is the mountpoint of an imgfs that died; it is unmounted", path)
        detach(path)


def _require_empty_directory(path: str) -> None:
    try:
        entries = os.listdir(path)
    except FileNotFoundError:
        raise MountError(f"mountpoint {path} does not exist; create it first", errno.ENOENT) from None
    except NotADirectoryError:
        raise MountError(f"mountpoint {path} is not a directory", errno.ENOTDIR) from None
    except OSError as error:
        raise MountError(f"mountpoint {path} can't be read: {error.strerror}", error.errno) from None
    if entries:
        raise MountError(f"mountpoint {path} is not empty; choose an empty directory")


def detach(path: str) -> None:
    """Unmount lazily: the name goes at once, the mount with its last user."""
    take_away(path, lazy=True)


def unmount(path: str, lazy: bool = False) -> None:
    """Unmount an imgfs, and wait until its daemon has ended, with its seals. Raises MountError."""
    path = absolute(path)
    mount = mounted_at(path)
    if mount is None or mount.fstype != FSTYPE:
        raise MountError(f"no imgfs is mounted at {path}")
    with contextlib.ExitStack() as stack:
        daemon = _daemon_of(path)
        if daemon is not None:
            stack.callback(os.close, daemon[0])
        take_away(path, lazy)
        if daemon is not None and not lazy:
            _wait_for_end(*daemon)


def _daemon_of(path: str) -> tuple[int, int] | None:
    """A pidfd and the pid of the process that serves a mount; None where it does not say, or is gone."""
    try:
        pid = int(os.getxattr(path, "user.imgfs.pid"))
        return os.pidfd_open(pid), pid
    except (OSError, ValueError):
        return None


def _wait_for_end(pidfd: int, pid: int) -> None:
    """Wait until a process has ended; or is done, but has threads that a hung datadir keeps from ending."""
    told_at = time.monotonic() + PATIENCE_SECONDS
    while not select.select([pidfd], [], [], _POLL_SECONDS)[0]:
        if time.monotonic() > told_at:
            told_at = math.inf
            log.warning(
                "process %d goes on: images are still being sealed, or the mount is in use elsewhere (a bind mount, "
                "another mount namespace); to end it in any case: kill %d", pid, pid
            )  # fmt: skip
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[0] == "Z":
                log.warning("process %d is done, but can't end before a datadir answers again", pid)
                return


def take_away(path: str, lazy: bool) -> None:
    """umount2(2), or fusermount where that takes privileges; raises MountError, EBUSY while it is in use."""
    if os.geteuid() == 0:
        if libc.umount2(os.fsencode(path), (_MNT_DETACH if lazy else 0) | _UMOUNT_NOFOLLOW) == 0:
            return
        code = ctypes.get_errno()
        if code != errno.EPERM:
            raise _refused(path, os.strerror(code), code)
    for program in ("fusermount3", "fusermount"):
        with contextlib.suppress(FileNotFoundError):
            options = ["-u", "-z"] if lazy else ["-u"]
            done = subprocess.run([program, *options, "--", path], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise _refused(path, done.stderr.strip().splitlines()[-1] if done.stderr else "refused", errno.EBUSY)
            return
    raise _refused(path, "neither root nor a fusermount program to ask", errno.EPERM)


def _refused(path: str, reason: str, code: int) -> MountError:
    return MountError(f"{path} can't be unmounted: {reason}; close what uses it, or detach it with --lazy", code)


def is_imgfs(path: str | Path) -> bool:
    """Whether an imgfs is mounted at a path."""
    mount = mounted_at(absolute(str(path)))
    return mount is not None and mount.fstype == FSTYPE
