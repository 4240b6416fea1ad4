"""What a daemon that is root may still do, and what it takes over from whoever started it: as little as will do.

Capabilities belong to threads and new threads have those of their maker, so they are given up before any is made.
"""

import contextlib
import ctypes
import fcntl
import os
import struct
from collections.abc import Collection

from imgfs.linux import check, libc

KEPT = {
    "CAP_CHOWN": 0,  # images belong to whoever creates them
    "CAP_DAC_OVERRIDE": 1,  # and are read and written whatever their mode
    "CAP_FOWNER": 3,  # modes, times and attributes of images of others
    "CAP_FSETID": 4,  # a set-group-id bit stays through chmod(2)
    "CAP_SYS_ADMIN": 21,  # mount(2), umount2(2), registering files for passthrough
}
"""The capabilities (capabilities(7)) that a daemon started by root keeps, and what for."""

_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38  # include/uapi/linux/prctl.h
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION_3 = 0x20080522  # include/uapi/linux/capability.h
_HEADER = struct.Struct("=Ii")
_SETS = struct.Struct("=IIIIII")
_MOST_CAPABILITIES = 64


def drop_capabilities(kept: Collection[int] = tuple(KEPT.values())) -> None:
    """Give up every capability but these, for this thread, those it makes, and programs it runs; as root only.

    Raises OSError where the kernel refuses.
    """
    if os.geteuid() != 0:
        return  # there is none to lose, and fusermount3 must be able to get its own
    for number in range(_MOST_CAPABILITIES):
        if number not in kept:
            libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)  # without CAP_SETPCAP it stays, but can't be used
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = ctypes.create_string_buffer(_HEADER.pack(_CAPABILITY_VERSION_3, 0), _HEADER.size)
    sets = ctypes.create_string_buffer(_SETS.size)
    check(libc.capget(header, sets))
    permitted = _SETS.unpack(sets.raw)[1] | _SETS.unpack(sets.raw)[4] << 32
    left = permitted & sum(1 << number for number in kept)
    low, high = left & 0xFFFFFFFF, left >> 32
    sets.raw = _SETS.pack(low, low, 0, high, high, 0)
    check(libc.capset(header, sets))
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def close_inherited_descriptors() -> None:
    """Close what the program that started this one left open, but for the standard streams.

    All that Python opens is marked to be closed by execve(2), so what is not marked was inherited.
    """
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with contextlib.suppress(OSError):
            if fd > 2 and not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                os.close(fd)


def keep_descriptors_to_ourselves() -> None:
    """Let no program that is run from now on have the descriptors that a library opened without regard to that."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(name) > 2:
                os.set_inheritable(int(name), False)
