"""The table of requests: opcode to name, parser, and whether the kernel expects a reply.

The one place that says which requests imgfs understands; an opcode that is not here is answered with ENOSYS,
which the kernel takes as "never ask again" for most of them (fs/fuse/*.c, `no_...` flags). Lock requests,
ioctl, poll and bmap are left out on purpose: locks stay with the kernel, the others have nothing to say here.
"""

from typing import NamedTuple

from imgfs.kernel import abi, requests


class Opcode(NamedTuple):
    """`name` is also the name of the method that handles it."""

    name: str
    parse: requests.Parser
    replies: bool = True


OPCODES: dict[int, Opcode] = {
    abi.FUSE_LOOKUP: Opcode("lookup", requests.parse_name),
    abi.FUSE_FORGET: Opcode("forget", requests.parse_forget, replies=False),
    abi.FUSE_GETATTR: Opcode("getattr", requests.parse_getattr),
    abi.FUSE_SETATTR: Opcode("setattr", requests.parse_setattr),
    abi.FUSE_SYMLINK: Opcode("symlink", requests.parse_symlink),
    abi.FUSE_MKNOD: Opcode("mknod", requests.parse_mknod),
    abi.FUSE_MKDIR: Opcode("mkdir", requests.parse_mkdir),
    abi.FUSE_UNLINK: Opcode("unlink", requests.parse_name),
    abi.FUSE_RMDIR: Opcode("rmdir", requests.parse_name),
    abi.FUSE_RENAME: Opcode("rename", requests.parse_rename),
    abi.FUSE_LINK: Opcode("link", requests.parse_link),
    abi.FUSE_OPEN: Opcode("open", requests.parse_open),
    abi.FUSE_READ: Opcode("read", requests.parse_read),
    abi.FUSE_WRITE: Opcode("write", requests.parse_write),
    abi.FUSE_STATFS: Opcode("statfs", requests.parse_nothing),
    abi.FUSE_RELEASE: Opcode("release", requests.parse_release),
    abi.FUSE_FSYNC: Opcode("fsync", requests.parse_fsync),
    abi.FUSE_SETXATTR: Opcode("setxattr", requests.parse_setxattr),
    abi.FUSE_GETXATTR: Opcode("getxattr", requests.parse_getxattr),
    abi.FUSE_LISTXATTR: Opcode("listxattr", requests.parse_listxattr),
    abi.FUSE_REMOVEXATTR: Opcode("removexattr", requests.parse_name),
    abi.FUSE_FLUSH: Opcode("flush", requests.parse_flush),
    abi.FUSE_OPENDIR: Opcode("opendir", requests.parse_open),
    abi.FUSE_READDIR: Opcode("readdir", requests.parse_read),
    abi.FUSE_RELEASEDIR: Opcode("releasedir", requests.parse_release),
    abi.FUSE_FSYNCDIR: Opcode("fsyncdir", requests.parse_fsync),
    abi.FUSE_ACCESS: Opcode("access", requests.parse_access),
    abi.FUSE_CREATE: Opcode("create", requests.parse_create),
    abi.FUSE_INTERRUPT: Opcode("interrupt", requests.parse_interrupt, replies=False),
    abi.FUSE_DESTROY: Opcode("destroy", requests.parse_nothing),
    abi.FUSE_BATCH_FORGET: Opcode("batch_forget", requests.parse_batch_forget, replies=False),
    abi.FUSE_FALLOCATE: Opcode("fallocate", requests.parse_fallocate),
    abi.FUSE_READDIRPLUS: Opcode("readdirplus", requests.parse_read),
    abi.FUSE_RENAME2: Opcode("rename", requests.parse_rename2),
    abi.FUSE_LSEEK: Opcode("lseek", requests.parse_lseek),
    abi.FUSE_COPY_FILE_RANGE: Opcode("copy_file_range", requests.parse_copy_file_range),
    abi.FUSE_STATX: Opcode("statx", requests.parse_statx),
    abi.FUSE_COPY_FILE_RANGE_64: Opcode("copy_file_range_64", requests.parse_copy_file_range),
}

# Requests without a reply that imgfs ignores: answering them would be an error.
SILENT = frozenset({abi.FUSE_FORGET, abi.FUSE_BATCH_FORGET, abi.FUSE_INTERRUPT, abi.FUSE_NOTIFY_REPLY})
