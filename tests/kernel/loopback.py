"""A directory served as it is: the smallest operations that a kernel session can be tested with."""

import ctypes
import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from imgfs.status import Status

_libc = ctypes.CDLL(None, use_errno=True)


def _status(stat: os.stat_result) -> Status:
    return Status(stat, stat.st_ino, stat.st_ino, stat.st_blksize)


class Open:
    def __init__(self, fd: int, path: str, flags: int) -> None:
        self.fd, self.path, self.flags = fd, path, flags


class Loopback:
    """Operations over `root`; `calls` counts them by name, `hooks` run before them and may raise."""

    def __init__(self, root: Path) -> None:
        self.root = os.open(root, os.O_PATH | os.O_DIRECTORY)
        self.directory = str(root)
        self.calls: Counter[str] = Counter()
        self.hooks: dict[str, Callable[..., Any]] = {}
        self.open_files: dict[int, Open] = {}
        self.backs = True
        self._lock = threading.Lock()
        self._next = 100

    def close(self) -> None:
        os.close(self.root)

    def __call__(self, op: str, *args: Any) -> Any:
        self.calls[op] += 1
        if op in self.hooks:
            value = self.hooks[op](*args)
            if value is not None:
                return value
        return getattr(self, op)(*args)

    def destroy(self, path: str, cut_off: bool) -> None:
        """Nothing is to be finished."""

    def _name(self, path: str | None) -> str:
        assert path is not None
        return path[1:] or "."

    def _full(self, path: str | None, fh: int | None) -> Any:
        return self.open_files[fh].fd if fh is not None else f"{self.directory}/{self._name(path)}"

    def _enter(self, fd: int, path: str, flags: int) -> int:
        with self._lock:
            self._next += 1
            self.open_files[self._next] = Open(fd, path, flags)
            return self._next

    def status(self, path: str | None, fh: int | None = None) -> Status:
        if fh is not None:
            return _status(os.fstat(self.open_files[fh].fd))
        return _status(os.stat(self._name(path), dir_fd=self.root, follow_symlinks=False))

    def find(self, path: str) -> Status | None:
        try:
            return self.status(path)
        except FileNotFoundError:
            return None

    def readdir(self, path: str, fh: int) -> Iterator[Any]:
        yield from (".", "..")
        with os.scandir(self.directory) as entries:
            for entry in entries:
                yield entry.name, {"st_ino": entry.inode(), "st_mode": 0o100000}, 0

    def open(self, path: str, flags: int) -> int:
        fd = os.open(self._name(path), flags & ~(os.O_DIRECT | os.O_APPEND), dir_fd=self.root)
        return self._enter(fd, path, flags)

    def create(self, path: str, mode: int, fi: int | None = None) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        return self._enter(os.open(self._name(path), flags, mode & 0o7777, dir_fd=self.root), path, os.O_RDWR)

    def read(self, path: str | None, size: int, offset: int, fh: int) -> bytes:
        return os.pread(self.open_files[fh].fd, size, offset)

    def write(self, path: str | None, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(self.open_files[fh].fd, data, offset)

    def truncate(self, path: str | None, length: int, fh: int | None = None) -> None:
        os.truncate(self._full(path, fh), length)

    def unlink(self, path: str) -> None:
        os.unlink(self._name(path), dir_fd=self.root)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._name(old), self._name(new), src_dir_fd=self.root, dst_dir_fd=self.root)

    def rename2(self, old: str, new: str, flags: int) -> None:
        names = os.fsencode(self._name(old)), os.fsencode(self._name(new))
        if _libc.renameat2(self.root, names[0], self.root, names[1], flags):
            raise OSError(ctypes.get_errno(), "renameat2")

    def flush(self, path: str | None, fh: int) -> None:
        pass

    def fsync(self, path: str | None, datasync: int, fh: int) -> None:
        os.fsync(self.open_files[fh].fd)

    def fsyncdir(self, path: str, datasync: int, fh: int) -> None:
        directory = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def release(self, path: str | None, fh: int) -> None:
        with self._lock:
            os.close(self.open_files.pop(fh).fd)

    def statfs(self, path: str) -> dict[str, int]:
        result = os.statvfs(self.directory)
        return {name: getattr(result, name) for name in dir(result) if name.startswith("f_")}

    def chmod(self, path: str | None, mode: int, fh: int | None = None) -> None:
        os.chmod(self._full(path, fh), mode & 0o7777)

    def chown(self, path: str | None, uid: int, gid: int, fh: int | None = None) -> None:
        os.chown(self._full(path, fh), uid, gid)

    def utimens(self, path: str | None, times: tuple[int, int], fh: int | None = None) -> None:
        now, omit = 0x3FFFFFFF, 0x3FFFFFFE
        if now in times:
            os.utime(self._full(path, fh))
        elif omit in times:
            old = os.stat(self._full(path, fh))
            kept = (old.st_atime_ns, old.st_mtime_ns)
            times = tuple(k if t == omit else t for t, k in zip(times, kept, strict=True))  # type: ignore[assignment]
            os.utime(self._full(path, fh), ns=times)
        else:
            os.utime(self._full(path, fh), ns=times)

    def getxattr(self, path: str | None, name: str, position: int = 0, fh: int | None = None) -> bytes:
        return os.getxattr(self._full(path, fh), name)

    def setxattr(
        self,
        path: str | None,
        name: str,
        value: bytes,
        options: int,
        position: int = 0,
        fh: int | None = None,
    ) -> None:
        os.setxattr(self._full(path, fh), name, value, options)

    def listxattr(self, path: str | None, fh: int | None = None) -> list[str]:
        return os.listxattr(self._full(path, fh))

    def removexattr(self, path: str | None, name: str, fh: int | None = None) -> None:
        os.removexattr(self._full(path, fh), name)

    def lseek(self, path: str | None, offset: int, whence: int, fh: int) -> int:
        return os.lseek(self.open_files[fh].fd, offset, whence)

    def fallocate(self, path: str | None, mode: int, offset: int, length: int, fh: int) -> None:
        sizes = ctypes.c_long(offset), ctypes.c_long(length)
        if _libc.fallocate(self.open_files[fh].fd, mode, *sizes):
            raise OSError(ctypes.get_errno(), "fallocate")

    def copy_file_range(
        self,
        path_in: str,
        fh_in: int,
        offset_in: int,
        path_out: str,
        fh_out: int,
        offset_out: int,
        length: int,
        flags: int,
    ) -> int:
        source, target = self.open_files[fh_in].fd, self.open_files[fh_out].fd
        return os.copy_file_range(source, target, min(length, 1 << 30), offset_in, offset_out)

    def passthrough_fd(self, fh: int) -> int | None:
        return self.open_files[fh].fd if self.backs else None

    def _refuse(self, *_args: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    mkdir = rmdir = symlink = link = mknod = _refuse
