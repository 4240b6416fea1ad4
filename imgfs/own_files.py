"""Small files that imgfs keeps for itself in the directories of its own in a datadir.

Whoever owns the datadir may have put anything there: no symlink is followed, no pipe waited for. A file is replaced
in one step; what a crash leaves of that is `NAME.new`.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable

LARGEST_BYTES = 4 << 20
_NO_FILE = frozenset({errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EACCES})


def read(name: str, directory_fd: int | None) -> bytes | None:
    """The bytes of a file; None where there is no regular file that can be read."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=directory_fd)
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    try:
        return os.pread(fd, LARGEST_BYTES, 0) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)


def replace(name: str, directory_fd: int, parts: Iterable[bytes]) -> None:
    """Write a file anew, its bytes on stable storage: a crash leaves the old one or the new one.

    That it is the new one is sure once the directory is synced, too.
    """
    new = name + ".new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    tidy(name, directory_fd)
    try:
        with open(os.open(new, flags, 0o600, dir_fd=directory_fd), "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new, dir_fd=directory_fd)
        raise


def tidy(name: str, directory_fd: int) -> None:
    """Remove what a crash left of the writing of a file."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name + ".new", dir_fd=directory_fd)
