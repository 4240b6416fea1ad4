"""The few system calls that the standard library lacks, through the C library, with errors as OSError.

fallocate(2) with its modes (posix_fallocate would write zeros where the filesystem can't), and renameat2(2).
"""

import ctypes
import os

FALLOC_FL_KEEP_SIZE = 0x01  # include/uapi/linux/falloc.h
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
RENAME_NOREPLACE = 1 << 0  # include/uapi/linux/fs.h
RENAME_EXCHANGE = 1 << 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); raises OSError, EOPNOTSUPP where the filesystem can't do what `mode` asks for."""
    _check(_libc.fallocate(fd, mode, offset, length))


def exchange(directory_fd: int, one: str, other: str) -> None:
    """Swap two names of a directory in one step (renameat2(2) with RENAME_EXCHANGE)."""
    _check(_libc.renameat2(directory_fd, os.fsencode(one), directory_fd, os.fsencode(other), RENAME_EXCHANGE))


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
