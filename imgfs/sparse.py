"""Where a file has data and where holes, and copying it so that the holes stay holes.

No names here, only descriptors. Threading: nothing is shared; the offset of a descriptor is moved, but never used.
"""

import errno
import os
from collections.abc import Callable, Iterator

STEP_BYTES = 16 << 20  # copied by the kernel in one call; after each, it is asked whether to go on
BUFFER_BYTES = 4 << 20
_BLOCK_BYTES = 64 << 10
_ZEROS = bytes(_BLOCK_BYTES)
_NOT_BY_KERNEL = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})

Progress = Callable[[int], None]
"""Told how many bytes more were copied; raises to end the copying."""


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


def copy(source_fd: int, target_fd: int, progress: Progress) -> None:
    """Copy the data of a file to an empty one, holes left out; the target may still lack a hole at the end."""
    status = os.fstat(source_fd)
    spans = list(data_spans(source_fd, status.st_size))
    by_reading = find_holes = _hides_holes(spans, status)
    for start, end in spans:
        at = start
        while at < end:
            copied = 0 if by_reading else _copy_in_kernel(source_fd, target_fd, at, min(end - at, STEP_BYTES))
            if not copied:
                by_reading = True
                copied = _copy_by_reading(source_fd, target_fd, at, min(end - at, BUFFER_BYTES), find_holes)
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


def _copy_by_reading(source_fd: int, target_fd: int, offset: int, length: int, find_holes: bool) -> int:
    """Copy what one read gives; with `find_holes`, its blocks of zeros become holes.

    Raises OSError where the file has become shorter.
    """
    data = memoryview(os.pread(source_fd, length, offset))
    if not data:
        raise OSError(errno.EIO, "the file became shorter while it was copied")
    step = _BLOCK_BYTES if find_holes else len(data)
    for at in range(0, len(data), step):
        block = data[at : at + step]
        if not find_holes or not _ZEROS.startswith(block):
            _write_all(target_fd, block, offset + at)
    return len(data)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
