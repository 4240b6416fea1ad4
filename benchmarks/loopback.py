"""The smallest fair loopback on fusepy or mfusepy: each request becomes the one system call it stands for.

    python -m benchmarks.loopback fusepy|mfusepy ROOT MOUNTPOINT

Like the loopback example of fusepy, with threads, but without its lock: pread(2) and pwrite(2) need none. What is not
defined here (access, flush, extended attributes) is answered once by ENOSYS, and the kernel does not ask again.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "fusepy": {"allow_other": True, "big_writes": True},  # without big_writes, libfuse 2 writes pages one by one
    "mfusepy": {"allow_other": True},
}
_STAT = ("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
_STATFS = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax")


class Loopback:
    """The names in one directory, with the method names and arguments of both modules' Operations."""

    use_ns = True

    def __init__(self, root: str) -> None:
        self._root = root

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        """stat(2)."""
        found = os.lstat(self._root + path) if fh is None else os.fstat(fh)
        values: dict[str, int] = {name: getattr(found, name) for name in _STAT}
        times = {"st_atime": found.st_atime_ns, "st_mtime": found.st_mtime_ns, "st_ctime": found.st_ctime_ns}
        return values | times

    def readdir(self, path: str, _fh: int) -> Iterator[str]:
        """Every name, and the two dots."""
        yield from (".", "..")
        yield from os.listdir(self._root + path)

    def create(self, path: str, mode: int, _fi: None = None) -> int:
        """open(2) with O_CREAT."""
        return os.open(self._root + path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode)

    def open(self, path: str, flags: int) -> int:
        """open(2)."""
        return os.open(self._root + path, flags)

    def read(self, _path: str, size: int, offset: int, fh: int) -> bytes:
        """pread(2)."""
        return os.pread(fh, size, offset)

    def write(self, _path: str, data: bytes, offset: int, fh: int) -> int:
        """pwrite(2)."""
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        """truncate(2)."""
        os.truncate(self._root + path if fh is None else fh, length)

    def fsync(self, _path: str, datasync: int, fh: int) -> None:
        """fsync(2)."""
        (os.fdatasync if datasync else os.fsync)(fh)

    def release(self, _path: str, fh: int) -> None:
        """close(2)."""
        os.close(fh)

    def unlink(self, path: str) -> None:
        """unlink(2)."""
        os.unlink(self._root + path)

    def statfs(self, path: str) -> dict[str, int]:
        """statvfs(3)."""
        found = os.statvfs(self._root + path)
        return {name: getattr(found, name) for name in _STATFS}


class CallableLoopback(Loopback):
    """fusepy calls the operations with the name of the method; mfusepy looks the method up."""

    def __call__(self, name: str, *arguments: Any) -> Any:
        return getattr(self, name)(*arguments)


def main(module: str, root: str, mountpoint: str) -> None:
    """Serve until it is unmounted."""
    operations = {"fusepy": CallableLoopback, "mfusepy": Loopback}[module](str(Path(root).resolve()))
    fuse = importlib.import_module({"fusepy": "fuse", "mfusepy": "mfusepy"}[module])
    fuse.FUSE(operations, mountpoint, foreground=True, nothreads=False, **OPTIONS[module])


if __name__ == "__main__":
    main(*sys.argv[1:])
