"""The FUSE wire format: constants and struct layouts of <linux/fuse.h>, under the kernel's own names.

Every layout is little-endian and has the kernel's explicit padding; this transport runs on little-endian
machines only (`device.available()` says so elsewhere). Flags above bit 31 of INIT are written as one 64-bit
word here, as the header does. Nothing in this module does anything: no I/O, no parsing, no state.
"""

from struct import Struct
from typing import Final

FUSE_KERNEL_VERSION: Final = 7
FUSE_KERNEL_MINOR_VERSION: Final = 45
FUSE_ROOT_ID: Final = 1
FUSE_MIN_READ_BUFFER: Final = 8192

# fuse_setattr_in.valid
FATTR_MODE: Final = 1 << 0
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6
FATTR_ATIME_NOW: Final = 1 << 7
FATTR_MTIME_NOW: Final = 1 << 8
FATTR_LOCKOWNER: Final = 1 << 9
FATTR_CTIME: Final = 1 << 10
FATTR_KILL_SUIDGID: Final = 1 << 11

# fuse_open_out.open_flags
FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_CACHE_DIR: Final = 1 << 3
FOPEN_NOFLUSH: Final = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES: Final = 1 << 6
FOPEN_PASSTHROUGH: Final = 1 << 7

# fuse_init_in.flags and .flags2, fuse_init_out.flags and .flags2
FUSE_ASYNC_READ: Final = 1 << 0
FUSE_POSIX_LOCKS: Final = 1 << 1
FUSE_ATOMIC_O_TRUNC: Final = 1 << 3
FUSE_EXPORT_SUPPORT: Final = 1 << 4
FUSE_BIG_WRITES: Final = 1 << 5
FUSE_DONT_MASK: Final = 1 << 6
FUSE_AUTO_INVAL_DATA: Final = 1 << 12
FUSE_DO_READDIRPLUS: Final = 1 << 13
FUSE_READDIRPLUS_AUTO: Final = 1 << 14
FUSE_ASYNC_DIO: Final = 1 << 15
FUSE_WRITEBACK_CACHE: Final = 1 << 16
FUSE_PARALLEL_DIROPS: Final = 1 << 18
FUSE_HANDLE_KILLPRIV: Final = 1 << 19
FUSE_MAX_PAGES: Final = 1 << 22
FUSE_EXPLICIT_INVAL_DATA: Final = 1 << 25
FUSE_HANDLE_KILLPRIV_V2: Final = 1 << 28
FUSE_INIT_EXT: Final = 1 << 30
FUSE_DIRECT_IO_ALLOW_MMAP: Final = 1 << 36
FUSE_PASSTHROUGH: Final = 1 << 37

FUSE_GETATTR_FH: Final = 1 << 0
STATX_BASIC_STATS: Final = 0x7FF  # <linux/stat.h>
STATX_BTIME: Final = 0x800
FUSE_FSYNC_FDATASYNC: Final = 1 << 0
FUSE_WRITE_CACHE: Final = 1 << 0
FUSE_WRITE_KILL_SUIDGID: Final = 1 << 2
FUSE_OPEN_KILL_SUIDGID: Final = 1 << 0

# enum fuse_opcode
FUSE_LOOKUP: Final = 1
FUSE_FORGET: Final = 2
FUSE_GETATTR: Final = 3
FUSE_SETATTR: Final = 4
FUSE_READLINK: Final = 5
FUSE_SYMLINK: Final = 6
FUSE_MKNOD: Final = 8
FUSE_MKDIR: Final = 9
FUSE_UNLINK: Final = 10
FUSE_RMDIR: Final = 11
FUSE_RENAME: Final = 12
FUSE_LINK: Final = 13
FUSE_OPEN: Final = 14
FUSE_READ: Final = 15
FUSE_WRITE: Final = 16
FUSE_STATFS: Final = 17
FUSE_RELEASE: Final = 18
FUSE_FSYNC: Final = 20
FUSE_SETXATTR: Final = 21
FUSE_GETXATTR: Final = 22
FUSE_LISTXATTR: Final = 23
FUSE_REMOVEXATTR: Final = 24
FUSE_FLUSH: Final = 25
FUSE_INIT: Final = 26
FUSE_OPENDIR: Final = 27
FUSE_READDIR: Final = 28
FUSE_RELEASEDIR: Final = 29
FUSE_FSYNCDIR: Final = 30
FUSE_GETLK: Final = 31
FUSE_SETLK: Final = 32
FUSE_SETLKW: Final = 33
FUSE_ACCESS: Final = 34
FUSE_CREATE: Final = 35
FUSE_INTERRUPT: Final = 36
FUSE_BMAP: Final = 37
FUSE_DESTROY: Final = 38
FUSE_IOCTL: Final = 39
FUSE_POLL: Final = 40
FUSE_NOTIFY_REPLY: Final = 41
FUSE_BATCH_FORGET: Final = 42
FUSE_FALLOCATE: Final = 43
FUSE_READDIRPLUS: Final = 44
FUSE_RENAME2: Final = 45
FUSE_LSEEK: Final = 46
FUSE_COPY_FILE_RANGE: Final = 47
FUSE_SETUPMAPPING: Final = 48
FUSE_REMOVEMAPPING: Final = 49
FUSE_SYNCFS: Final = 50
FUSE_TMPFILE: Final = 51
FUSE_STATX: Final = 52
FUSE_COPY_FILE_RANGE_64: Final = 53

# enum fuse_notify_code
FUSE_NOTIFY_INVAL_INODE: Final = 2
FUSE_NOTIFY_INVAL_ENTRY: Final = 3
FUSE_NOTIFY_DELETE: Final = 6
FUSE_NOTIFY_INC_EPOCH: Final = 8  # since 7.44

# Device ioctls: _IOR(229, 0, uint32_t), _IOW(229, 1, struct fuse_backing_map), _IOW(229, 2, uint32_t)
FUSE_DEV_IOC_CLONE: Final = 0x8004E500
FUSE_DEV_IOC_BACKING_OPEN: Final = 0x4010E501
FUSE_DEV_IOC_BACKING_CLOSE: Final = 0x4004E502

# Requests. "x" is padding (or a field this server has no use for).
fuse_in_header: Final = Struct("<IIQQIIIHH")
fuse_init_in: Final = Struct("<IIII")
fuse_init_in_flags2: Final = Struct("<I")
fuse_forget_in: Final = Struct("<Q")
fuse_forget_one: Final = Struct("<QQ")
fuse_batch_forget_in: Final = Struct("<I4x")
fuse_getattr_in: Final = Struct("<I4xQ")
fuse_statx_in: Final = Struct("<I4xQII")
fuse_setattr_in: Final = Struct("<I4xQQQQQQIIII4xII4x")
fuse_mknod_in: Final = Struct("<III4x")
fuse_mkdir_in: Final = Struct("<II")
fuse_rename_in: Final = Struct("<Q")
fuse_rename2_in: Final = Struct("<QI4x")
fuse_link_in: Final = Struct("<Q")
fuse_open_in: Final = Struct("<II")
fuse_create_in: Final = Struct("<IIII")
fuse_read_in: Final = Struct("<QQIIQI4x")
fuse_write_in: Final = Struct("<QQIIQI4x")
fuse_release_in: Final = Struct("<QIIQ")
fuse_flush_in: Final = Struct("<Q8xQ")
fuse_fsync_in: Final = Struct("<QI4x")
fuse_setxattr_in: Final = Struct("<II")  # 8 bytes: FUSE_SETXATTR_EXT is not negotiated
fuse_getxattr_in: Final = Struct("<I4x")
fuse_access_in: Final = Struct("<I4x")
fuse_interrupt_in: Final = Struct("<Q")
fuse_fallocate_in: Final = Struct("<QQQI4x")
fuse_lseek_in: Final = Struct("<QqI4x")  # the offset is that of lseek(2), so it may be negative
fuse_copy_file_range_in: Final = Struct("<QQQQQQQ")

# Replies and notifications. Seconds of times are signed, as the kernel takes them (fuse_change_attributes_common).
fuse_out_header: Final = Struct("<IiQ")
fuse_init_out: Final = Struct("<IIIIHHIIHHIIH22x")
fuse_attr: Final = Struct("<QQQqqqIIIIIIIIII")
fuse_attr_out: Final = Struct("<QI4x" + "QQQqqqIIIIIIIIII")
fuse_statx_out: Final = Struct("<QI4x16x" + "II8xIIIH2xQQQ8x" + "qI4x" * 4 + "128x")
fuse_entry_out: Final = Struct("<QQQQII" + "QQQqqqIIIIIIIIII")
fuse_open_out: Final = Struct("<QIi")
fuse_write_out: Final = Struct("<I4x")
fuse_copy_file_range_out: Final = Struct("<Q")
fuse_statfs_out: Final = Struct("<QQQQQIII4x24x")
fuse_getxattr_out: Final = Struct("<I4x")
fuse_lseek_out: Final = Struct("<Q")
fuse_dirent: Final = Struct("<QQII")  # the name follows, padded to 8 bytes
fuse_direntplus: Final = Struct("<QQQQII" + "QQQqqqIIIIIIIIII" + "QQII")
fuse_notify_inval_inode_out: Final = Struct("<Qqq")
fuse_notify_inval_entry_out: Final = Struct("<QII")
fuse_notify_delete_out: Final = Struct("<QQI4x")
fuse_backing_map: Final = Struct("<iI8x")
fuse_backing_id: Final = Struct("<I")
