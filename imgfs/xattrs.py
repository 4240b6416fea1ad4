"""Extended attributes of backing files, and what stands in for them where a filesystem has none.

Both forms take an open descriptor of the file (O_PATH will do), so that no name is looked up again. Where the
filesystem refuses `user.*` attributes, a sidecar file under `DATADIR/.imgfs/xattrs/` holds them, named after the
inode number, which a rename keeps. Values are bytes; an absent attribute raises OSError ENODATA (xattr(7)).

Threading: two writers of one file's attributes are kept apart by the image's change lock.
"""

import base64
import contextlib
import errno
import json
import os
from typing import Protocol

from imgfs import own_files


class Xattrs(Protocol):
    """Get, set, list and remove attributes of an open file.

    `forget` drops what is kept for an inode that was removed, or that a new file has got.
    """

    def get(self, fd: int, name: str) -> bytes: ...

    def set(self, fd: int, name: str, value: bytes, flags: int = 0) -> None: ...

    def list(self, fd: int) -> list[str]: ...

    def remove(self, fd: int, name: str) -> None: ...

    def forget(self, ino: int) -> None: ...


def proc_path(fd: int) -> str:
    """A path of an open file for the calls that take no O_PATH descriptor; it names the inode, no name."""
    return f"/proc/self/fd/{fd}"


class NativeXattrs:
    """The filesystem's own attributes (getxattr(2) and its kin)."""

    def get(self, fd: int, name: str) -> bytes:
        return os.getxattr(proc_path(fd), name)

    def set(self, fd: int, name: str, value: bytes, flags: int = 0) -> None:
        os.setxattr(proc_path(fd), name, value, flags)

    def list(self, fd: int) -> list[str]:
        return os.listxattr(proc_path(fd))

    def remove(self, fd: int, name: str) -> None:
        os.removexattr(proc_path(fd), name)

    def forget(self, ino: int) -> None:
        """Nothing to do: the attributes go with the inode."""


class SidecarXattrs:
    """Attributes in small JSON files of a directory, one for each inode that has any."""

    def __init__(self, directory_fd: int) -> None:
        self._directory_fd = directory_fd

    def get(self, fd: int, name: str) -> bytes:
        try:
            return self._read(fd)[name]
        except KeyError:
            raise _no_data() from None

    def set(self, fd: int, name: str, value: bytes, flags: int = 0) -> None:
        held = self._read(fd)
        if flags & os.XATTR_CREATE and name in held:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        if flags & os.XATTR_REPLACE and name not in held:
            raise _no_data()
        self._write(fd, held | {name: value})

    def list(self, fd: int) -> list[str]:
        return list(self._read(fd))

    def remove(self, fd: int, name: str) -> None:
        held = self._read(fd)
        if held.pop(name, None) is None:
            raise _no_data()
        self._write(fd, held)

    def forget(self, ino: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_sidecar(ino), dir_fd=self._directory_fd)

    def _read(self, fd: int) -> dict[str, bytes]:
        text = own_files.read(_sidecar(_ino(fd)), self._directory_fd)
        try:
            held = json.loads(text or "{}")
            return {name: base64.b64decode(value) for name, value in held.items()}
        except (ValueError, AttributeError, TypeError, RecursionError):
            return {}  # cut short or foreign: as good as none

    def _write(self, fd: int, held: dict[str, bytes]) -> None:
        """Replace the sidecar in one step, so that a crash leaves the old or the new; then the new is durable."""
        name = _sidecar(_ino(fd))
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        new = os.open(name + ".new", flags, 0o600, dir_fd=self._directory_fd)
        with open(new, "w", encoding="ascii") as file:
            json.dump({key: base64.b64encode(value).decode("ascii") for key, value in held.items()}, file)
            file.flush()
            os.fsync(new)
        os.rename(name + ".new", name, src_dir_fd=self._directory_fd, dst_dir_fd=self._directory_fd)
        os.fsync(self._directory_fd)


class ReadOnlyXattrs:
    """The attributes of a datadir that may not be changed; what is set is kept in memory, for some files.

    So the digests of an image there are computed once, not at every question.
    """

    CAPACITY = 10_000

    def __init__(self, below: Xattrs | None) -> None:
        self._below = below
        self._kept: dict[tuple[int, int, str], bytes] = {}

    def get(self, fd: int, name: str) -> bytes:
        kept = self._kept.get(_key(fd, name))
        if kept is not None:
            return kept
        if self._below is None:
            raise _no_data()
        return self._below.get(fd, name)

    def set(self, fd: int, name: str, value: bytes, flags: int = 0) -> None:  # noqa: ARG002
        if len(self._kept) >= self.CAPACITY:
            self._kept.clear()
        self._kept[_key(fd, name)] = value

    def list(self, fd: int) -> list[str]:
        return self._below.list(fd) if self._below else []

    def remove(self, fd: int, name: str) -> None:
        self._kept.pop(_key(fd, name), None)

    def forget(self, ino: int) -> None:
        """Nothing to do: files of a read-only datadir are not removed."""


def _key(fd: int, name: str) -> tuple[int, int, str]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, name


def _ino(fd: int) -> int:
    return os.fstat(fd).st_ino


def _sidecar(ino: int) -> str:
    return f"{ino}.json"


def _no_data() -> OSError:
    return OSError(errno.ENODATA, os.strerror(errno.ENODATA))


def supported(directory_fd: int) -> bool:
    """Whether the filesystem of a directory has `user.*` attributes."""
    try:
        os.getxattr(proc_path(directory_fd), "user.imgfs.probe")
    except OSError as error:
        return error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS)
    return True
