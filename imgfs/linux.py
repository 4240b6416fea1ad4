"""The few system calls that the standard library lacks, through the C library, with errors as OSError.

fallocate(2) with its modes (posix_fallocate would write zeros where the filesystem can't), sync_file_range(2),
renameat2(2), the birth time that statx(2) knows, what proc(5) says of a process that is being ended,
what a thread can do to be in nobody's way, and what becomes of freed memory.
"""

import ctypes
import errno
import os
import platform
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
_IOPRIO_WHO_PROCESS, _IOPRIO_CLASS_IDLE, _IOPRIO_CLASS_SHIFT = 1, 3, 13  # include/uapi/linux/ioprio.h
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")  # include/uapi/linux/sched/types.h, up to sched_period
_SHORT_TURN_NS = 100_000  # the shortest there is
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library
# The C library has no functions for these (include/uapi/asm-generic/unistd.h and the tables of each architecture).
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "ppc64le": 355, "s390x": 345}

libc = ctypes.CDLL(None, use_errno=True)
"""For further calls: see `check`."""
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def check(result: int, path: str | None = None) -> None:
    """Raise the OSError of a call of the C library that gave this result; 0 is success."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); raises OSError, EOPNOTSUPP where the filesystem can't do what `mode` asks for."""
    check(libc.fallocate(fd, mode, offset, length))


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Have what was written there go to the disk, without waiting for it (sync_file_range(2)); raises OSError.

    It promises nothing: an error of the disk is still there for fsync(2) to tell.
    """
    check(libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE))


def exchange(directory_fd: int, one: str, other: str) -> None:
    """Swap two names of a directory in one step (renameat2(2) with RENAME_EXCHANGE)."""
    check(libc.renameat2(directory_fd, os.fsencode(one), directory_fd, os.fsencode(other), RENAME_EXCHANGE))


def rename_new(old_directory_fd: int, old: str, new_directory_fd: int, new: str) -> None:
    """Rename in one step to a name that must be free: FileExistsError where it is not (RENAME_NOREPLACE)."""
    arguments = (old_directory_fd, os.fsencode(old), new_directory_fd, os.fsencode(new))
    check(libc.renameat2(*arguments, RENAME_NOREPLACE))


def birth_time_ns(fd: int) -> int | None:
    """When the file was made, in ns; None where its filesystem does not keep that (statx(2), STATX_BTIME)."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    check(libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer))
    if not _STX_MASK.unpack_from(buffer)[0] & _STATX_BTIME:
        return None
    seconds, nanoseconds = _STX_BTIME.unpack_from(buffer)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def use_idle_io_priority() -> None:
    """Have the calling thread's reads wait until no other process wants the disk (ioprio_set(2)); raises OSError."""
    idle = _IOPRIO_CLASS_IDLE << _IOPRIO_CLASS_SHIFT
    check(libc.syscall(_number(_IOPRIO_SET), _IOPRIO_WHO_PROCESS, 0, idle))


def take_short_turns() -> None:
    """Give the calling thread the CPU for short whiles, as often as is fair (sched_setattr(2)); raises OSError.

    A sched_yield(2) then costs it no more than such a while. Linux has this since 6.12; before, nothing changes.
    """
    if os.sched_getscheduler(0) == os.SCHED_OTHER:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, _SHORT_TURN_NS, 0, 0)
        check(libc.syscall(_number(_SCHED_SETATTR), 0, attributes, 0))


def keep_freed_memory(total_bytes: int, block_bytes: int) -> None:
    """Give freed memory back to the system only beyond `total_bytes`, but blocks of at least `block_bytes` at once.

    To be given memory costs more than to copy a request into it, as the system has to clear it (mallopt(3)). Without
    the GNU C library nothing is done.
    """
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, total_bytes)
        libc.mallopt(_M_MMAP_THRESHOLD, block_bytes)


def is_dying(pid: int) -> bool:
    """Whether a process, or thread, is gone or being ended by a signal: the kernel then has a SIGKILL pending."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            pending = next((line.split()[1] for line in status if line.startswith("SigPnd:")), "0")
    except OSError:
        return True
    return bool(int(pending, 16) >> (signal.SIGKILL - 1) & 1)


def _number(by_machine: dict[str, int]) -> int:
    number = by_machine.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return number
