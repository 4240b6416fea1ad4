"""utimensat(2) with all it can say, which os.utime can not: UTIME_NOW and UTIME_OMIT for either time.

A time is a whole number of nanoseconds since the epoch, or one of the two constants. (Two moments of 1 January 1970,
a little over a second after midnight, can't be told from them; fusepy gives times in this form.)
"""

import ctypes
import os

from imgfs.linux import check, libc

UTIME_NOW = (1 << 30) - 1  # include/linux/stat.h
UTIME_OMIT = (1 << 30) - 2
_AT_FDCWD = -100


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def set_times(path: str, times_ns: tuple[int, int]) -> None:
    """Set atime and mtime of what a path names."""
    pair = (_Timespec * 2)(*(_timespec(time_ns) for time_ns in times_ns))
    check(libc.utimensat(_AT_FDCWD, os.fsencode(path), pair, 0), path)


def _timespec(time_ns: int) -> _Timespec:
    if time_ns in (UTIME_NOW, UTIME_OMIT):
        return _Timespec(0, time_ns)
    return _Timespec(*divmod(time_ns, 10**9))
