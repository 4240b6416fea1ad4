"""Where a file has data and where holes, and copying it so that the holes stay holes.

No names here, only descriptors. Threading: nothing is shared; the offset of a descriptor is moved, but never used.
"""

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

STEP_BYTES = 16 << 20  # copied by the kernel in one call; after each, it is asked whether to go on
BUFFER_BYTES = 4 << 20
_BLOCK_BYTES = 64 << 10
_ZEROS = bytes(_BLOCK_BYTES)
_NOT_BY_KERNEL = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})

Progress = Callable[[int], None]
"""Told how many bytes more were copied; raises to end the copying."""
Calling = Callable[..., Any]
"""Calls its first argument with the others; whoever watches how long calls on one of the files take does it so."""


def _call(call: Callable[..., Any], *arguments: object) -> Any:
    return call(*arguments)


def data_spans(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The (start, end) byte ranges of a file that may hold data, holes left out (lseek(2), SEEK_DATA)."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            hole = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # the filesystem does not know: all of it may be data
                yield end, size
            return
        yield start, min(hole, size)
        end = hole


def data_bytes(fd: int, but_offset: int = 0, but_length: int = 0) -> int:
    """What a copy of a file takes up, in bytes; a range that is to be written anyway can be left out."""
    status = os.fstat(fd)
    spans = list(data_spans(fd, status.st_size))
    but_end = but_offset + but_length
    counted = sum(max(0, min(end, but_offset) - start) + max(0, end - max(start, but_end)) for start, end in spans)
    return min(counted, status.st_blocks * 512) if _hides_holes(spans, status) else counted


def copy(
    source_fd: int, target_fd: int, progress: Progress, reading: Calling = _call, writing: Calling = _call
) -> None:
    """Copy the data of a file to an empty one, holes left out; the target may still lack a hole at the end.

    Where reads or writes are watched they are made one by one, so that it shows which of the files does not answer.
    """
    status = os.fstat(source_fd)
    spans = list(data_spans(source_fd, status.st_size))
    find_holes = _hides_holes(spans, status)
    in_kernel = not find_holes and reading is writing
    for start, end in spans:
        at = start
        while at < end:
            copied = _copy_in_kernel(source_fd, target_fd, at, min(end - at, STEP_BYTES)) if in_kernel else 0
            if not copied:
                in_kernel = False
                data = memoryview(reading(_read, source_fd, min(end - at, BUFFER_BYTES), at))
                writing(_write_all, target_fd, data, at, find_holes)
                copied = len(data)
            progress(copied)
            at += copied


def _hides_holes(spans: list[tuple[int, int]], status: os.stat_result) -> bool:
    """Whether there must be holes that the filesystem does not show (network filesystems, FUSE)."""
    return sum(end - start for start, end in spans) > status.st_blocks * 512 + BUFFER_BYTES


def _copy_in_kernel(source_fd: int, target_fd: int, offset: int, length: int) -> int:
    """copy_file_range(2); 0 where these two files can't be copied so."""
    try:
        return os.copy_file_range(source_fd, target_fd, length, offset, offset)
    except InterruptedError:
        return _copy_in_kernel(source_fd, target_fd, offset, length)
    except OSError as error:
        if error.errno in _NOT_BY_KERNEL:
            return 0
        raise


def _read(fd: int, length: int, offset: int) -> bytes:
    """What one read gives. Raises OSError where the file has become shorter."""
    data = os.pread(fd, length, offset)
    if not data:
        raise OSError(errno.EIO, "the file became shorter while it was copied")
    return data


def _write_all(fd: int, data: memoryview, offset: int, find_holes: bool) -> None:
    """Write data; with `find_holes`, its blocks of zeros are left out."""
    end = offset + len(data)
    while data:
        block = data[:_BLOCK_BYTES] if find_holes else data
        hole = find_holes and _ZEROS.startswith(block)
        data = data[len(block) if hole else os.pwrite(fd, block, offset) :]
        offset = end - len(data)
