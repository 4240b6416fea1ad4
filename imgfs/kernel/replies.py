"""Replies and notifications to bytes: values of the operations as the structs of <linux/fuse.h>.

Pure: no I/O, no state, callable from any thread.
"""

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from imgfs.kernel import abi
from imgfs.status import Status

_NS = 1_000_000_000
_pack_entry_out = abi.fuse_entry_out.pack


class Timeouts(NamedTuple):
    """How long the kernel may keep a name and attributes without asking: whole seconds, then nanoseconds."""

    entry_s: int
    attr_s: int
    entry_ns: int
    attr_ns: int

    @classmethod
    def of_seconds(cls, entry: float, attr: float) -> "Timeouts":
        return cls(int(entry), int(attr), int(entry % 1 * _NS), int(attr % 1 * _NS))

    def with_attr_at_most(self, seconds: float) -> "Timeouts":
        """The same, with attributes kept for so long at the most."""
        attr_s, attr_ns = min((self.attr_s, self.attr_ns), (int(seconds), int(seconds % 1 * _NS)))
        return self._replace(attr_s=attr_s, attr_ns=attr_ns)


NEVER = Timeouts(0, 0, 0, 0)


def attr_fields(status: Status) -> tuple[int, ...]:
    """The fields of struct fuse_attr."""
    stat, ino, _, blksize = status
    atime, mtime, ctime = stat.st_atime_ns, stat.st_mtime_ns, stat.st_ctime_ns
    return (
        ino,
        stat.st_size,
        stat.st_blocks,
        atime // _NS,
        mtime // _NS,
        ctime // _NS,
        atime % _NS,
        mtime % _NS,
        ctime % _NS,
        stat.st_mode,
        stat.st_nlink,
        stat.st_uid,
        stat.st_gid,
        0,
        blksize,
        0,
    )


def entry_out(nodeid: int, timeouts: Timeouts, status: Status) -> bytes:
    """struct fuse_entry_out; generation is always 0, because a nodeid is never given out twice."""
    return _pack_entry_out(nodeid, 0, *timeouts, *attr_fields(status))


def negative_entry_out(timeouts: Timeouts) -> bytes:
    """struct fuse_entry_out for a name that does not exist, to be remembered as such."""
    return abi.fuse_entry_out.pack(0, 0, *timeouts, *(0,) * 16)


def attr_out(timeouts: Timeouts, status: Status) -> bytes:
    return abi.fuse_attr_out.pack(timeouts.attr_s, timeouts.attr_ns, *attr_fields(status))


def statx_out(timeouts: Timeouts, status: Status, born_ns: int | None) -> bytes:
    """struct fuse_statx_out: what attr_out says, and when the file was made, where that is known."""
    stat = status.stat
    mask = abi.STATX_BASIC_STATS | (0 if born_ns is None else abi.STATX_BTIME)
    times = (stat.st_atime_ns, born_ns or 0, stat.st_ctime_ns, stat.st_mtime_ns)
    return abi.fuse_statx_out.pack(
        timeouts.attr_s,
        timeouts.attr_ns,
        mask,
        status.blksize,
        stat.st_nlink,
        stat.st_uid,
        stat.st_gid,
        stat.st_mode,
        status.ino,
        stat.st_size,
        stat.st_blocks,
        *(part for time_ns in times for part in divmod(time_ns, _NS)),
    )


def open_out(fh: int, open_flags: int, backing_id: int = 0) -> bytes:
    return abi.fuse_open_out.pack(fh, open_flags, backing_id)


def statfs_out(stat: Mapping[str, int]) -> bytes:
    """struct fuse_statfs_out from the fields of statvfs(3)."""
    return abi.fuse_statfs_out.pack(
        stat["f_blocks"],
        stat["f_bfree"],
        stat["f_bavail"],
        stat["f_files"],
        stat["f_ffree"],
        stat["f_bsize"],
        stat.get("f_namemax", 255),
        stat["f_frsize"],
    )


def names_out(names: list[str]) -> bytes:
    """The list of attribute names as listxattr(2) gives it: each with a NUL behind it."""
    return b"".join([os.fsencode(name) + b"\0" for name in names])


def dirent(ino: int, offset: int, mode: int, name: bytes) -> bytes:
    """struct fuse_dirent; `offset` is that of the *next* entry."""
    return _padded(abi.fuse_dirent.pack(ino, offset, len(name), mode >> 12 & 0xF) + name)


def dirent_size(name: bytes) -> int:
    return (abi.fuse_dirent.size + len(name) + 7) & ~7


def direntplus(nodeid: int, timeouts: Timeouts, status: Status, offset: int, name: bytes) -> bytes:
    """struct fuse_direntplus: the directory entry with what a lookup of it would say."""
    fields = attr_fields(status)
    kind = fields[9] >> 12 & 0xF
    return _padded(abi.fuse_direntplus.pack(nodeid, 0, *timeouts, *fields, fields[0], offset, len(name), kind) + name)


def bare_direntplus(ino: int, offset: int, mode: int, name: bytes) -> bytes:
    """struct fuse_direntplus without a lookup: `.`, `..`, and names whose attributes can't be had."""
    return _padded(abi.fuse_direntplus.pack(*(0,) * 6, *(0,) * 16, ino, offset, len(name), mode >> 12 & 0xF) + name)


def direntplus_size(name: bytes) -> int:
    return (abi.fuse_direntplus.size + len(name) + 7) & ~7


def nodeid_of_entry(body: bytes) -> int:
    """What a reply of `entry_out` gave out; 0 for a negative one."""
    return int.from_bytes(body[:8], "little")


def fh_of_open(body: bytes) -> int:
    """What a reply of `open_out` gave out."""
    return int.from_bytes(body[:8], "little")


def nodeids_of_listing(body: bytes) -> Iterator[int]:
    """What a reply made of `direntplus` gave out, entries without a lookup left out."""
    at = 0
    while at < len(body):
        fields = abi.fuse_direntplus.unpack_from(body, at)
        if fields[0]:
            yield fields[0]
        at += (abi.fuse_direntplus.size + fields[-2] + 7) & ~7


def inval_inode(nodeid: int, offset: int, length: int) -> bytes:
    """FUSE_NOTIFY_INVAL_INODE: forget attributes and, unless `offset` is negative, cached data."""
    return _notification(abi.FUSE_NOTIFY_INVAL_INODE, abi.fuse_notify_inval_inode_out.pack(nodeid, offset, length))


def inc_epoch() -> bytes:
    """FUSE_NOTIFY_INC_EPOCH: ask again about every name before it is used; takes no lock."""
    return _notification(abi.FUSE_NOTIFY_INC_EPOCH, b"")


def inval_entry(parent: int, name: bytes) -> bytes:
    """FUSE_NOTIFY_INVAL_ENTRY: forget what is known of a name."""
    body = abi.fuse_notify_inval_entry_out.pack(parent, len(name), 0) + name + b"\0"
    return _notification(abi.FUSE_NOTIFY_INVAL_ENTRY, body)


def delete(parent: int, child: int, name: bytes) -> bytes:
    """FUSE_NOTIFY_DELETE: a name is gone, which also tells inotify watchers of the mount."""
    body = abi.fuse_notify_delete_out.pack(parent, child, len(name)) + name + b"\0"
    return _notification(abi.FUSE_NOTIFY_DELETE, body)


def _notification(code: int, body: bytes) -> bytes:
    return abi.fuse_out_header.pack(abi.fuse_out_header.size + len(body), code, 0) + body


def _padded(entry: bytes) -> bytes:
    return entry + bytes(-len(entry) & 7)
