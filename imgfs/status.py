"""stat(2) of a file as a mount shows it: what of the file below goes through, and what does not."""

from typing import NamedTuple, Protocol


class Stat(Protocol):
    """What is used of os.stat_result."""

    @property
    def st_mode(self) -> int: ...
    @property
    def st_nlink(self) -> int: ...
    @property
    def st_uid(self) -> int: ...
    @property
    def st_gid(self) -> int: ...
    @property
    def st_size(self) -> int: ...
    @property
    def st_blocks(self) -> int: ...
    @property
    def st_atime_ns(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_ctime_ns(self) -> int: ...


class Status(NamedTuple):
    """`stat` is that of the file below, but for what the others say in its place.

    `ino` is the inode number; `identity` tells files apart for as long as they live, also where their number changes;
    `blksize` is the best size of a read or write, in bytes.
    """

    stat: Stat
    ino: int
    identity: int
    blksize: int


class Together(NamedTuple):
    """What several directories show as one."""

    st_mode: int
    st_nlink: int
    st_uid: int
    st_gid: int
    st_size: int
    st_blocks: int
    st_atime_ns: int
    st_mtime_ns: int
    st_ctime_ns: int
