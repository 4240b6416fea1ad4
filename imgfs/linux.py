"""The few system calls that the standard library lacks, through the C library, with errors as OSError.

fallocate(2) with its modes (posix_fallocate would write zeros where the filesystem can't), sync_file_range(2),
renameat2(2), the birth time that statx(2) knows, and what proc(5) says of a process that is being ended.
"""

import ctypes
import errno
import os
import signal
import struct

FALLOC_FL_KEEP_SIZE = 0x01  # include/uapi/linux/falloc.h
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
RENAME_NOREPLACE = 1 << 0  # include/uapi/linux/fs.h
RENAME_EXCHANGE = 1 << 1
NO_RENAME_FLAGS = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""What a filesystem says that knows none of these."""
_SYNC_FILE_RANGE_WRITE = 2  # include/uapi/linux/fs.h
_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800  # include/uapi/linux/stat.h, as are the size and the places in struct statx
_STATX_BYTES = 256
_STX_MASK = struct.Struct("=I")
_STX_BTIME = struct.Struct("=80xqI")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
_libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); raises OSError, EOPNOTSUPP where the filesystem can't do what `mode` asks for."""
    _check(_libc.fallocate(fd, mode, offset, length))


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Have what was written there go to the disk, without waiting for it (sync_file_range(2)); raises OSError.

    It promises nothing: an error of the disk is still there for fsync(2) to tell.
    """
    _check(_libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE))


def exchange(directory_fd: int, one: str, other: str) -> None:
    """Swap two names of a directory in one step (renameat2(2) with RENAME_EXCHANGE)."""
    _check(_libc.renameat2(directory_fd, os.fsencode(one), directory_fd, os.fsencode(other), RENAME_EXCHANGE))


def rename_new(old_directory_fd: int, old: str, new_directory_fd: int, new: str) -> None:
    """Rename in one step to a name that must be free: FileExistsError where it is not (RENAME_NOREPLACE)."""
    arguments = (old_directory_fd, os.fsencode(old), new_directory_fd, os.fsencode(new))
    _check(_libc.renameat2(*arguments, RENAME_NOREPLACE))


def birth_time_ns(fd: int) -> int | None:
    """When the file was made, in ns; None where its filesystem does not keep that (statx(2), STATX_BTIME)."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    _check(_libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer))
    if not _STX_MASK.unpack_from(buffer)[0] & _STATX_BTIME:
        return None
    seconds, nanoseconds = _STX_BTIME.unpack_from(buffer)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def is_dying(pid: int) -> bool:
    """Whether a process, or thread, is gone or being ended by a signal: the kernel then has a SIGKILL pending."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            pending = next((line.split()[1] for line in status if line.startswith("SigPnd:")), "0")
    except OSError:
        return True
    return bool(int(pending, 16) >> (signal.SIGKILL - 1) & 1)


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
