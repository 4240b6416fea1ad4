"""Replies and notifications to bytes: values of the operations as the structs of <linux/fuse.h>.

Pure: no I/O, no state, callable from any thread. Attributes come as the dictionaries that fusepy's operations
return (`st_mode`, `st_size` ...), times as integers in nanoseconds.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from imgfs.kernel import abi

Attributes = Mapping[str, Any]
_NS = 1_000_000_000
_U64 = (1 << 64) - 1
_DOTS = (b".", b"..")


class Timeouts(NamedTuple):
    """How long the kernel may keep a name and attributes without asking: whole seconds, then nanoseconds."""

    entry_s: int
    attr_s: int
    entry_ns: int
    attr_ns: int

    @classmethod
    def of_seconds(cls, entry: float, attr: float) -> "Timeouts":
        return cls(int(entry), int(attr), int(entry % 1 * _NS), int(attr % 1 * _NS))


NEVER = Timeouts(0, 0, 0, 0)


def attr_fields(attr: Attributes, nodeid: int) -> tuple[int, ...]:
    """The fields of struct fuse_attr; `nodeid` stands in for a missing st_ino."""
    atime_s, atime_ns = divmod(attr["st_atime"], _NS)
    mtime_s, mtime_ns = divmod(attr["st_mtime"], _NS)
    ctime_s, ctime_ns = divmod(attr["st_ctime"], _NS)
    return (
        attr.get("st_ino") or nodeid,
        attr["st_size"],
        attr["st_blocks"],
        atime_s & _U64,
        mtime_s & _U64,
        ctime_s & _U64,
        atime_ns,
        mtime_ns,
        ctime_ns,
        attr["st_mode"],
        attr["st_nlink"],
        attr["st_uid"],
        attr["st_gid"],
        0,
        attr.get("st_blksize", 4096),
        0,
    )


def entry_out(nodeid: int, timeouts: Timeouts, attr: Attributes) -> bytes:
    """struct fuse_entry_out; generation is always 0, because a nodeid is never given out twice."""
    return abi.fuse_entry_out.pack(nodeid, 0, *timeouts, *attr_fields(attr, nodeid))


def negative_entry_out(timeouts: Timeouts) -> bytes:
    """struct fuse_entry_out for a name that does not exist, to be remembered as such."""
    return abi.fuse_entry_out.pack(0, 0, *timeouts, *(0,) * 16)


def attr_out(nodeid: int, timeouts: Timeouts, attr: Attributes) -> bytes:
    return abi.fuse_attr_out.pack(timeouts.attr_s, timeouts.attr_ns, *attr_fields(attr, nodeid))


def statx_out(nodeid: int, timeouts: Timeouts, attr: Attributes) -> bytes:
    """struct fuse_statx_out: what attr_out says, and `st_birthtime` (ns) where there is one."""
    born = attr.get("st_birthtime")
    mask = abi.STATX_BASIC_STATS | (0 if born is None else abi.STATX_BTIME)
    times = (attr["st_atime"], born or 0, attr["st_ctime"], attr["st_mtime"])
    return abi.fuse_statx_out.pack(
        timeouts.attr_s,
        timeouts.attr_ns,
        mask,
        attr.get("st_blksize", 4096),
        attr["st_nlink"],
        attr["st_uid"],
        attr["st_gid"],
        attr["st_mode"],
        attr.get("st_ino") or nodeid,
        attr["st_size"],
        attr["st_blocks"],
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


def direntplus(nodeid: int, timeouts: Timeouts, attr: Attributes, offset: int, name: bytes) -> bytes:
    """struct fuse_direntplus: the directory entry with what a lookup of it would say."""
    fields = attr_fields(attr, nodeid)
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
