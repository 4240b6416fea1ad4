"""The layouts of abi.py against <linux/fuse.h>: a C program fills every field, Python must read each one back.

Debian's header may be older than the protocol; what it lacks is listed in NEWER and checked by size alone.
"""

import struct
import subprocess
from pathlib import Path

from imgfs.kernel import abi, replies, requests

ATTR = "ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags"
ENTRY = "nodeid generation entry_valid attr_valid entry_valid_nsec attr_valid_nsec"
IN_ATTR = " ".join(f"attr.{name}" for name in ATTR.split())

# layout in abi.py -> the fields it reads or writes, in order
FIELDS = {
    "fuse_in_header": "len opcode unique nodeid uid gid pid total_extlen padding",
    "fuse_init_in": "major minor max_readahead flags",
    "fuse_forget_in": "nlookup",
    "fuse_forget_one": "nodeid nlookup",
    "fuse_batch_forget_in": "count",
    "fuse_getattr_in": "getattr_flags fh",
    "fuse_setattr_in": "valid fh size lock_owner atime mtime ctime atimensec mtimensec ctimensec mode uid gid",
    "fuse_mknod_in": "mode rdev umask",
    "fuse_mkdir_in": "mode umask",
    "fuse_rename_in": "newdir",
    "fuse_rename2_in": "newdir flags",
    "fuse_link_in": "oldnodeid",
    "fuse_open_in": "flags open_flags",
    "fuse_create_in": "flags mode umask open_flags",
    "fuse_read_in": "fh offset size read_flags lock_owner flags",
    "fuse_write_in": "fh offset size write_flags lock_owner flags",
    "fuse_release_in": "fh flags release_flags lock_owner",
    "fuse_flush_in": "fh lock_owner",
    "fuse_fsync_in": "fh fsync_flags",
    "fuse_setxattr_in": "size flags",
    "fuse_getxattr_in": "size",
    "fuse_access_in": "mask",
    "fuse_interrupt_in": "unique",
    "fuse_fallocate_in": "fh offset length mode",
    "fuse_lseek_in": "fh offset whence",
    "fuse_copy_file_range_in": "fh_in off_in nodeid_out fh_out off_out len flags",
    "fuse_out_header": "len error unique",
    "fuse_attr": ATTR,
    "fuse_attr_out": f"attr_valid attr_valid_nsec {IN_ATTR}",
    "fuse_entry_out": f"{ENTRY} {IN_ATTR}",
    "fuse_write_out": "size",
    "fuse_statfs_out": "st.blocks st.bfree st.bavail st.files st.ffree st.bsize st.namelen st.frsize",
    "fuse_getxattr_out": "size",
    "fuse_lseek_out": "offset",
    "fuse_dirent": "ino off namelen type",
    "fuse_direntplus": " ".join(f"entry_out.{name}" for name in f"{ENTRY} {IN_ATTR}".split())
    + " dirent.ino dirent.off dirent.namelen dirent.type",
    "fuse_notify_inval_inode_out": "ino off len",
    "fuse_notify_inval_entry_out": "parent namelen flags",
    "fuse_notify_delete_out": "parent child namelen",
}
# fuse_open_out.backing_id is `padding` before 7.40, max_stack_depth and request_timeout are `unused` before
# 7.40 and 7.43: the same place under an older name.
OLDER_NAMES = {
    "fuse_open_out": "fh open_flags padding",
    "fuse_init_out": "major minor max_readahead flags max_background congestion_threshold max_write time_gran"
    " max_pages map_alignment flags2 unused[0]",
}
PREFIXES = {"fuse_init_in", "fuse_setxattr_in"}  # we read the part that every version has
NEWER = {
    "fuse_statx_in": 24,
    "fuse_statx_out": 288,
    "fuse_copy_file_range_out": 8,
    "fuse_backing_map": 16,
    "fuse_backing_id": 4,
    "fuse_init_in_flags2": 4,
}


def run_c(tmp_path: Path, body: str) -> list[str]:
    source = tmp_path / "check.c"
    source.write_text(
        "#include <linux/fuse.h>\n#include <stdio.h>\n#include <string.h>\n#include <sys/ioctl.h>\n"
        "static void show(const char *name, const void *bytes, size_t size) {\n"
        '  printf("%s ", name);\n'
        '  for (size_t i = 0; i < size; i++) printf("%02x", ((const unsigned char *)bytes)[i]);\n'
        '  puts(""); }\n'
        f"int main(void) {{\n{body}\nreturn 0; }}\n"
    )
    subprocess.run(["gcc", "-o", tmp_path / "check", source], check=True)
    return subprocess.run([tmp_path / "check"], check=True, capture_output=True, text=True).stdout.splitlines()


def test_every_field_is_where_the_kernel_has_it(tmp_path: Path) -> None:
    body = []
    fields = {**FIELDS, **OLDER_NAMES}
    for name, members in fields.items():
        assignments = "".join(f"s.{member} = {n};" for n, member in enumerate(members.split(), 1))
        size = "offsetof(struct fuse_dirent, name)" if name == "fuse_dirent" else "sizeof s"
        if name == "fuse_direntplus":
            size = "offsetof(struct fuse_direntplus, dirent.name)"
        body.append(f'{{ struct {name} s; memset(&s, 0, sizeof s); {assignments} show("{name}", &s, {size}); }}')
    for line in run_c(tmp_path, "#include <stddef.h>\n" + "\n".join(body)):
        name, hexadecimal = line.split()
        data = bytes.fromhex(hexadecimal)
        layout: struct.Struct = getattr(abi, name)
        count = len(fields[name].split())
        assert layout.unpack_from(data)[:count] == tuple(range(1, count + 1)), name
        assert layout.size == len(data) or (name in PREFIXES and layout.size < len(data)), name


def test_every_layout_is_checked() -> None:
    layouts = {name for name, value in vars(abi).items() if isinstance(value, struct.Struct)}
    assert layouts == FIELDS.keys() | OLDER_NAMES.keys() | NEWER.keys()
    assert {name: getattr(abi, name).size for name in NEWER} == NEWER


def test_every_constant_has_the_kernels_value(tmp_path: Path) -> None:
    header = Path("/usr/include/linux/fuse.h").read_text()
    ours = {name: value for name, value in vars(abi).items() if isinstance(value, int) and name.isupper()}
    known = [name for name in ours if f"{name}\t" in header or f"{name} " in header]
    known.remove("FUSE_KERNEL_MINOR_VERSION")
    lines = run_c(tmp_path, "\n".join(f'printf("{name} %llu\\n", (unsigned long long){name});' for name in known))
    theirs = {name: int(value) for name, value in (line.split() for line in lines)}
    assert theirs == {name: ours[name] for name in known}
    assert len(known) > 90


def test_ioctl_numbers_follow_from_their_arguments(tmp_path: Path) -> None:
    body = (
        "struct map { int32_t fd; uint32_t flags; uint64_t padding; };\n"
        'printf("%lu %lu", (unsigned long)_IOW(229, 1, struct map), (unsigned long)_IOW(229, 2, uint32_t));'
    )
    (line,) = run_c(tmp_path, body)
    assert line.split() == [str(abi.FUSE_DEV_IOC_BACKING_OPEN), str(abi.FUSE_DEV_IOC_BACKING_CLOSE)]


def test_request_values_have_the_kernels_field_names() -> None:
    pairs = {
        "fuse_in_header": requests.Header,
        "fuse_getattr_in": requests.GetattrIn,
        "fuse_setattr_in": requests.SetattrIn,
        "fuse_read_in": requests.ReadIn,
        "fuse_release_in": requests.ReleaseIn,
        "fuse_open_in": requests.OpenIn,
        "fuse_fallocate_in": requests.FallocateIn,
        "fuse_lseek_in": requests.LseekIn,
        "fuse_copy_file_range_in": requests.CopyFileRangeIn,
        "fuse_flush_in": requests.FlushIn,
        "fuse_fsync_in": requests.FsyncIn,
    }
    for name, kind in pairs.items():
        assert " ".join(kind._fields) == FIELDS[name]


def test_directory_entries_are_padded_to_eight_bytes() -> None:
    for length in range(1, 20):
        name = b"n" * length
        entry = replies.dirent(7, 1, 0o100644, name)
        assert len(entry) == replies.dirent_size(name)
        assert len(entry) % 8 == 0
        assert entry[24 : 24 + length] == name
        plus = replies.bare_direntplus(7, 1, 0o100644, name)
        assert len(plus) == replies.direntplus_size(name)
