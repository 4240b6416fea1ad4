"""stat(2) of a file as a mount shows it: what of the file below goes through, and what does not."""

import os
from typing import NamedTuple


class Together(NamedTuple):
    """What several directories show as one; the fields are those of os.stat_result."""

    st_mode: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_size: int
    st_blocks: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int


class Status(NamedTuple):
    """`stat` is that of the file below, but for what the others say in its place.

    `ino` is the inode number; `identity` tells files apart for as long as they live, also where their number changes;
    `blksize` is the best size of a read or write, in bytes.
    """

    stat: os.stat_result | Together
    ino: int
    identity: int
    blksize: int
