"""Page cache in the same state for everybody."""

import mmap
import os
from pathlib import Path

MIB = 1 << 20


def write_image(path: Path, size_bytes: int) -> None:
    """A file of bytes that no filesystem compresses, without the cost of making that many."""
    block = os.urandom(MIB)
    with path.open("wb", buffering=0) as file:
        for offset in range(0, size_bytes, MIB):
            file.write(block[: size_bytes - offset])


def warm(path: Path) -> None:
    """Have all of a file in the page cache; idle pages may have been taken away."""
    buffer = bytearray(MIB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def touch(size_bytes: int) -> None:
    """Use some memory and give it back.

    A virtual machine that never used a page before waits for its host to make it, which would be charged to whoever
    writes first.
    """
    mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
