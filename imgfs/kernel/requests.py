"""Requests from bytes: each argument struct of <linux/fuse.h> as a typed, immutable value.

Owns the parsing and nothing else: no I/O, no state, callable from any thread. A parser is given the whole
request (header included) as `bytes` and either returns its value or raises `MalformedRequest`; nothing else
ever escapes, whatever the bytes are. Field names are the kernel's.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from imgfs.kernel import abi

HEADER_SIZE = abi.fuse_in_header.size
_new = tuple.__new__  # what NamedTuple's own constructor does, without a Python call for each request
_unpack_header = abi.fuse_in_header.unpack_from
T = TypeVar("T", bound=NamedTuple)


class MalformedRequest(ValueError):
    """The bytes are no request of this kind: too short, a name without its NUL, a wrong length."""


class Header(NamedTuple):
    """struct fuse_in_header; `uid`, `gid` and `pid` are the caller's, 0 where the kernel acts for itself."""

    len: int
    opcode: int
    unique: int
    nodeid: int
    uid: int
    gid: int
    pid: int
    total_extlen: int
    padding: int


class Nothing(NamedTuple):
    """A request without arguments."""


class InitIn(NamedTuple):
    """struct fuse_init_in; `flags` has flags2 in its upper 32 bits."""

    major: int
    minor: int
    max_readahead: int
    flags: int


class Name(NamedTuple):
    """The argument of LOOKUP, UNLINK, RMDIR and REMOVEXATTR."""

    name: bytes


class ForgetIn(NamedTuple):
    nlookup: int


class ForgetOne(NamedTuple):
    nodeid: int
    nlookup: int


class BatchForgetIn(NamedTuple):
    items: list[ForgetOne]


class GetattrIn(NamedTuple):
    getattr_flags: int
    fh: int


class StatxIn(NamedTuple):
    """`sx_mask` is what is wanted, `sx_flags` how fresh (statx(2)); imgfs always gives all it has."""

    getattr_flags: int
    fh: int
    sx_flags: int
    sx_mask: int


class SetattrIn(NamedTuple):
    valid: int
    fh: int
    size: int
    lock_owner: int
    atime: int
    mtime: int
    ctime: int
    atimensec: int
    mtimensec: int
    ctimensec: int
    mode: int
    uid: int
    gid: int


class MknodIn(NamedTuple):
    mode: int
    rdev: int
    umask: int
    name: bytes


class MkdirIn(NamedTuple):
    mode: int
    umask: int
    name: bytes


class SymlinkIn(NamedTuple):
    name: bytes
    target: bytes


class LinkIn(NamedTuple):
    oldnodeid: int
    name: bytes


class RenameIn(NamedTuple):
    """RENAME (flags 0) and RENAME2."""

    newdir: int
    flags: int
    oldname: bytes
    newname: bytes


class OpenIn(NamedTuple):
    flags: int
    open_flags: int


class CreateIn(NamedTuple):
    flags: int
    mode: int
    umask: int
    open_flags: int
    name: bytes


class ReadIn(NamedTuple):
    """READ, READDIR and READDIRPLUS."""

    fh: int
    offset: int
    size: int
    read_flags: int
    lock_owner: int
    flags: int


class WriteIn(NamedTuple):
    """`data` is a view of the request's own bytes, which nobody reuses: it may be kept."""

    fh: int
    offset: int
    size: int
    write_flags: int
    lock_owner: int
    flags: int
    data: memoryview


class ReleaseIn(NamedTuple):
    """RELEASE and RELEASEDIR."""

    fh: int
    flags: int
    release_flags: int
    lock_owner: int


class FlushIn(NamedTuple):
    fh: int
    lock_owner: int


class FsyncIn(NamedTuple):
    fh: int
    fsync_flags: int


class SetxattrIn(NamedTuple):
    flags: int
    name: bytes
    value: bytes


class GetxattrIn(NamedTuple):
    """`size` 0 asks for the length of the value."""

    size: int
    name: bytes


class ListxattrIn(NamedTuple):
    size: int


class AccessIn(NamedTuple):
    mask: int


class InterruptIn(NamedTuple):
    unique: int


class FallocateIn(NamedTuple):
    fh: int
    offset: int
    length: int
    mode: int


class LseekIn(NamedTuple):
    fh: int
    offset: int
    whence: int


class CopyFileRangeIn(NamedTuple):
    """COPY_FILE_RANGE and COPY_FILE_RANGE_64."""

    fh_in: int
    off_in: int
    nodeid_out: int
    fh_out: int
    off_out: int
    len: int
    flags: int


Parser = Callable[[bytes], NamedTuple]


def parse_header(data: bytes) -> Header:
    """The header of a request read from the device; its length must be that of the data."""
    if len(data) < HEADER_SIZE:
        raise MalformedRequest(f"{len(data)} bytes are no request")
    header = _new(Header, _unpack_header(data))
    if header.len != len(data):
        raise MalformedRequest(f"request of {len(data)} bytes says it has {header.len}")
    return header


def parse_nothing(_data: bytes) -> Nothing:
    return Nothing()


def parse_init(data: bytes) -> InitIn:
    major, minor, max_readahead, flags = _unpack(abi.fuse_init_in, data)
    end = HEADER_SIZE + abi.fuse_init_in.size
    if flags & abi.FUSE_INIT_EXT and len(data) >= end + abi.fuse_init_in_flags2.size:
        flags |= abi.fuse_init_in_flags2.unpack_from(data, end)[0] << 32
    return InitIn(major, minor, max_readahead, flags)


def parse_name(data: bytes) -> Name:
    if data.find(b"\0", HEADER_SIZE) != len(data) - 1 or len(data) < HEADER_SIZE + 2:
        raise MalformedRequest(f"{data[HEADER_SIZE:]!r} is no name")
    return _new(Name, (data[HEADER_SIZE:-1],))


def parse_batch_forget(data: bytes) -> BatchForgetIn:
    (count,) = _unpack(abi.fuse_batch_forget_in, data)
    start = HEADER_SIZE + abi.fuse_batch_forget_in.size
    end = start + count * abi.fuse_forget_one.size
    if end > len(data):
        raise MalformedRequest(f"{count} forgets do not fit in {len(data)} bytes")
    return BatchForgetIn([ForgetOne._make(one) for one in abi.fuse_forget_one.iter_unpack(data[start:end])])


def parse_mknod(data: bytes) -> MknodIn:
    return MknodIn._make((*_unpack(abi.fuse_mknod_in, data), _name_after(abi.fuse_mknod_in, data)))


def parse_mkdir(data: bytes) -> MkdirIn:
    return MkdirIn._make((*_unpack(abi.fuse_mkdir_in, data), _name_after(abi.fuse_mkdir_in, data)))


def parse_symlink(data: bytes) -> SymlinkIn:
    return SymlinkIn(*_names(data, HEADER_SIZE, 2))


def parse_link(data: bytes) -> LinkIn:
    return LinkIn._make((*_unpack(abi.fuse_link_in, data), _name_after(abi.fuse_link_in, data)))


def parse_rename(data: bytes) -> RenameIn:
    (newdir,) = _unpack(abi.fuse_rename_in, data)
    return RenameIn(newdir, 0, *_names(data, HEADER_SIZE + abi.fuse_rename_in.size, 2))


def parse_rename2(data: bytes) -> RenameIn:
    newdir, flags = _unpack(abi.fuse_rename2_in, data)
    return RenameIn(newdir, flags, *_names(data, HEADER_SIZE + abi.fuse_rename2_in.size, 2))


def parse_create(data: bytes) -> CreateIn:
    return _new(CreateIn, (*_unpack(abi.fuse_create_in, data), _name_after(abi.fuse_create_in, data)))


def parse_write(data: bytes) -> WriteIn:
    fields = _unpack(abi.fuse_write_in, data)
    payload = memoryview(data)[HEADER_SIZE + abi.fuse_write_in.size :]
    if len(payload) != fields[2]:
        raise MalformedRequest(f"write of {fields[2]} bytes came with {len(payload)}")
    return WriteIn._make((*fields, payload))


def parse_setxattr(data: bytes) -> SetxattrIn:
    size, flags = _unpack(abi.fuse_setxattr_in, data)
    name = _name_after(abi.fuse_setxattr_in, data)
    value = data[HEADER_SIZE + abi.fuse_setxattr_in.size + len(name) + 1 :]
    if len(value) != size:
        raise MalformedRequest(f"attribute of {size} bytes came with {len(value)}")
    return SetxattrIn(flags, name, value)


def parse_getxattr(data: bytes) -> GetxattrIn:
    return GetxattrIn._make((*_unpack(abi.fuse_getxattr_in, data), _name_after(abi.fuse_getxattr_in, data)))


def _fixed(layout: struct.Struct, kind: type[T]) -> Callable[[bytes], T]:
    """The parser of a request that is one struct, whose fields are those of `kind`."""

    def parse(data: bytes) -> T:
        try:
            return _new(kind, layout.unpack_from(data, HEADER_SIZE))
        except struct.error as error:
            raise MalformedRequest(str(error)) from None

    return parse


parse_forget = _fixed(abi.fuse_forget_in, ForgetIn)
parse_getattr = _fixed(abi.fuse_getattr_in, GetattrIn)
parse_statx = _fixed(abi.fuse_statx_in, StatxIn)
parse_setattr = _fixed(abi.fuse_setattr_in, SetattrIn)
parse_open = _fixed(abi.fuse_open_in, OpenIn)
parse_read = _fixed(abi.fuse_read_in, ReadIn)
parse_release = _fixed(abi.fuse_release_in, ReleaseIn)
parse_flush = _fixed(abi.fuse_flush_in, FlushIn)
parse_fsync = _fixed(abi.fuse_fsync_in, FsyncIn)
parse_listxattr = _fixed(abi.fuse_getxattr_in, ListxattrIn)
parse_access = _fixed(abi.fuse_access_in, AccessIn)
parse_interrupt = _fixed(abi.fuse_interrupt_in, InterruptIn)
parse_fallocate = _fixed(abi.fuse_fallocate_in, FallocateIn)
parse_lseek = _fixed(abi.fuse_lseek_in, LseekIn)
parse_copy_file_range = _fixed(abi.fuse_copy_file_range_in, CopyFileRangeIn)


def _unpack(layout: struct.Struct, data: bytes) -> tuple[int, ...]:
    try:
        return layout.unpack_from(data, HEADER_SIZE)
    except struct.error as error:
        raise MalformedRequest(str(error)) from None


def _name_after(layout: struct.Struct, data: bytes) -> bytes:
    return _names(data, HEADER_SIZE + layout.size, 1)[0]


def _names(data: bytes, start: int, count: int) -> list[bytes]:
    """`count` NUL-terminated names, none of them empty, from `start` on."""
    *names, _rest = data[start:].split(b"\0", count)
    if len(names) != count or not all(names):
        raise MalformedRequest(f"expected {count} names, found {names}")
    return names
