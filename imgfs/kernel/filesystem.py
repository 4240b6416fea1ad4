"""Requests to operations: each request of the opcode table becomes calls of the operations, and their values
a reply.

Owns the translation of nodeids to paths and of handles to how they do their I/O; the wire is replies.py's,
threads and descriptors are the session's. Every method takes the header and the parsed request and gives the
body of the reply, or raises OSError. All are called from many threads at once and hold no lock while the
operations work.
"""

import errno
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, NamedTuple, TypeVar

from imgfs.kernel import abi, replies, requests
from imgfs.kernel.device import Payload
from imgfs.kernel.handles import Handles
from imgfs.kernel.nodes import ROOT_PATH, Node, Nodes
from imgfs.kernel.operations import Operations
from imgfs.kernel.replies import Timeouts
from imgfs.kernel.requests import Header
from imgfs.status import Status

LONG_S = 60
LINKED_S = 1.0  # a file with several names may change by one that nobody watches
CHANGE_WAIT_S = 1.0
ATTEMPTS = 5
RENAME_NOREPLACE = 1 << 0
RENAME_EXCHANGE = 1 << 1
UTIME_NOW = 0x3FFFFFFF
UTIME_OMIT = 0x3FFFFFFE

# What os.fsdecode() uses.
_ENCODING, _ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
_RELEASE_WAIT_S = 0.02
_MAX_COPY = 0xFFFFF000  # the reply to COPY_FILE_RANGE has 32 bits
_NS = 1_000_000_000
_NOT_OURS = (b"security.", b"system.")
_CAPABILITY = b"security.capability"
T = TypeVar("T")


class Entry(NamedTuple):
    """One name of a listing."""

    name: bytes
    ino: int
    mode: int


class Filesystem:
    """The requests of one mount, answered by `operations`."""

    def __init__(
        self,
        operations: Operations,
        nodes: Nodes,
        handles: Handles,
        *,
        timeouts: Timeouts,
        negative_s: float = 0,
        passthrough: Callable[[], bool] = lambda: True,
        expire: Callable[[int], None] = lambda _nodeid: None,
    ) -> None:
        """`expire` has the kernel forget the attributes of a nodeid, at once."""
        self._call = operations
        self._expire = expire
        self._passthrough = passthrough
        self._nodes = nodes
        self._handles = handles
        self._timeouts = timeouts
        self._linked_timeouts = timeouts.with_attr_at_most(LINKED_S)
        self._negative = Timeouts.of_seconds(negative_s, 0)
        self._looking: dict[str, Header] = {}  # path -> the request that looks it up, the latest of them
        self._listings: dict[int, list[Entry] | None] = {}
        self._listing_numbers = count(1)
        self._listings_lock = threading.Lock()

    # Names and attributes

    def lookup(self, header: Header, request: requests.Name) -> Payload:
        path = self._child(header, request.name)
        attempts = count(1)
        while (found := self._look(path, header)) is not None:
            node, status, sure = found
            if sure or next(attempts) == ATTEMPTS:
                return replies.entry_out(node.nodeid, self._shown(node, status, sure), status)
            self._forget([(node.nodeid, 1)])
            self._nodes.wait_steady(path, CHANGE_WAIT_S)
        return self._absent()

    def _look(self, path: str, whose: Header) -> tuple[Node, Status, bool] | None:
        """The node and status of a name, with a lookup counted, and whether they surely hold and belong together.

        None where there is no such file.
        """
        known = self._nodes.find(path)
        self._looking[path] = whose
        try:
            status: Status | None = self._call("find", path)
            if status is None:
                return None
            node = self._nodes.look_up(path, status.identity)
        finally:
            undoubted = self._looking.pop(path, None) is whose
        sure = undoubted and self._nodes.steady(path) and (known is node or known is None or known.path is None)
        return node, status, sure

    def doubt(self, path: str) -> None:
        """What requests have just found out about a path may not hold any more, so they are to look again.

        Called before the nodes are asked for it: either they know it by then, or the request that looks it up hears
        of this.
        """
        self._looking.pop(path, None)

    def doubt_all(self) -> None:
        """The same for every path."""
        self._looking.clear()

    def _absent(self) -> Payload:
        """The answer for a name that does not exist: to be remembered as such, or ENOENT."""
        if any(self._negative):
            return replies.negative_entry_out(self._negative)
        raise _error(errno.ENOENT)

    def forget(self, header: Header, request: requests.ForgetIn) -> Payload:
        self._forget([(header.nodeid, request.nlookup)])
        return b""

    def batch_forget(self, _header: Header, request: requests.BatchForgetIn) -> Payload:
        self._forget(request.items)
        return b""

    def _forget(self, forgotten: Iterable[tuple[int, int]]) -> None:
        for fh in self._nodes.forget(forgotten):
            self._call("release", None, fh)

    def getattr(self, header: Header, request: requests.GetattrIn) -> Payload:
        if header.nodeid == abi.FUSE_ROOT_ID:  # it has one name for ever, and is asked for after each change
            return replies.attr_out(self._timeouts, self._call("status", ROOT_PATH, None))
        node = self._nodes.get(header.nodeid)
        fh = request.fh if request.getattr_flags & abi.FUSE_GETATTR_FH else None
        return self._attr_out(node, fh)

    def statx(self, header: Header, request: requests.StatxIn) -> Payload:
        node = self._nodes.get(header.nodeid)
        fh = request.fh if request.getattr_flags & abi.FUSE_GETATTR_FH else None
        (status, born_ns), sure = self._steadily(node, fh, lambda path, handle: self._call("statx", path, handle))
        return replies.statx_out(self._shown(node, status, sure), status, born_ns)

    def setattr(self, header: Header, request: requests.SetattrIn) -> Payload:
        node = self._nodes.get(header.nodeid)
        fh = request.fh if request.valid & abi.FATTR_FH else None
        # An image is truncated by a handle that may write, or by its name.
        any_handle = not request.valid & abi.FATTR_SIZE
        self._steadily(node, fh, lambda path, handle: self._set(node, request, path, handle), any_handle)
        return self._attr_out(node, fh)

    def _set(self, node: Node, request: requests.SetattrIn, path: str | None, fh: int | None) -> None:
        valid = request.valid
        if valid & abi.FATTR_SIZE:
            self._call("truncate", path, request.size, fh)
            if valid & abi.FATTR_KILL_SUIDGID:
                self._drop_privileges(path, fh)
        if valid & abi.FATTR_MODE:
            self._call("chmod", path, request.mode, fh)
            for handle in self._handles.of(node.nodeid):
                handle.privileges_dropped = False
        if valid & (abi.FATTR_UID | abi.FATTR_GID):
            uid = request.uid if valid & abi.FATTR_UID else -1
            gid = request.gid if valid & abi.FATTR_GID else -1
            self._call("chown", path, uid, gid, fh)
        if valid & (abi.FATTR_ATIME | abi.FATTR_MTIME):
            self._call("utimens", path, _times(request), fh)

    def statfs(self, _header: Header, _request: requests.Nothing) -> Payload:
        return replies.statfs_out(self._call("statfs", ROOT_PATH))

    def access(self, header: Header, request: requests.AccessIn) -> Payload:
        path, _fh = self._target(self._nodes.get(header.nodeid), None)
        if path is not None:
            self._call("access", path, request.mask)
        return b""

    def unlink(self, header: Header, request: requests.Name) -> Payload:
        path = self._child(header, request.name)
        with self._nodes.changing(path):
            self._call("unlink", path)
            self._nodes.unlink(path)
        return b""

    def rename(self, header: Header, request: requests.RenameIn) -> Payload:
        old = self._child(header, request.oldname)
        new = self._child(header._replace(nodeid=request.newdir), request.newname)
        if request.flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise _error(errno.EINVAL)
        with self._nodes.changing(old, new):
            if request.flags & RENAME_EXCHANGE:
                self._call("rename2", old, new, request.flags)
                self._nodes.exchange(old, new)
            elif request.flags:
                self._call("rename2", old, new, request.flags)
                self._nodes.rename(old, new)
            else:
                self._replace(old, new)
        return b""

    def _replace(self, old: str, new: str) -> None:
        """rename(2), over an image that others may have looked up just now.

        To them its name never was missing, so what they ask for next is answered: of the image that they found.
        """
        replaced = self._nodes.find(new)
        kept = None if replaced is None or old == new else self._kept(new)
        in_use = False
        try:
            self._call("rename", old, new)
            in_use = self._nodes.rename(old, new, kept)
        finally:
            if kept is not None and not in_use:
                self._call("release", None, kept)

    def _kept(self, path: str) -> int | None:
        """A handle to reach the image of a name by when it has none any more; None where none is to be had."""
        try:
            fh: int = self._call("open", path, os.O_RDONLY)
        except OSError:
            return None
        return fh

    # What a flat store refuses; the operations say how.

    def mkdir(self, header: Header, request: requests.MkdirIn) -> Payload:
        return self._made(header, request.name, "mkdir", request.mode)

    def mknod(self, header: Header, request: requests.MknodIn) -> Payload:
        return self._made(header, request.name, "mknod", request.mode, request.rdev)

    def symlink(self, header: Header, request: requests.SymlinkIn) -> Payload:
        return self._made(header, request.name, "symlink", os.fsdecode(request.target))

    def link(self, header: Header, request: requests.LinkIn) -> Payload:
        source, _fh = self._target(self._nodes.get(request.oldnodeid), None)
        return self._made(header, request.name, "link", source)

    def rmdir(self, header: Header, request: requests.Name) -> Payload:
        self._call("rmdir", self._child(header, request.name))
        return b""

    # Handles

    def create(self, header: Header, request: requests.CreateIn) -> Payload:
        path = self._child(header, request.name)
        try:
            fh = self._call("create", path, request.mode, request.flags)
        except FileExistsError:
            if request.flags & os.O_EXCL:
                raise
            # The kernel knew of no such name, but somebody was faster: then it is an open.
            node = self._nodes.look_up(path)
            return self._entry_out(node) + self._open(node, request.flags, request.open_flags)
        self._nodes.unlink(path)
        status: Status = self._guarded(path, fh, lambda: self._call("status", path, fh))
        node = self._nodes.look_up(path, status.identity)
        mode = self._handles.add(fh, node.nodeid, request.flags, None)
        timeouts = self._shown(node, status, sure=True)
        return replies.entry_out(node.nodeid, timeouts, status) + replies.open_out(fh, *mode)

    def open(self, header: Header, request: requests.OpenIn) -> Payload:
        return self._open(self._nodes.get(header.nodeid), request.flags, request.open_flags)

    def read(self, header: Header, request: requests.ReadIn) -> Payload:
        path = self._nodes.get(header.nodeid).path
        data: Payload = self._call("read", path, request.size, request.offset, request.fh)
        return data

    def write(self, header: Header, request: requests.WriteIn) -> Payload:
        path = self._nodes.get(header.nodeid).path
        self._modifying(path, request.fh, bool(request.write_flags & abi.FUSE_WRITE_KILL_SUIDGID))
        return abi.fuse_write_out.pack(self._call("write", path, request.data, request.offset, request.fh))

    def flush(self, header: Header, request: requests.FlushIn) -> Payload:
        self._call("flush", self._nodes.get(header.nodeid).path, request.fh)
        self._handles.get(request.fh).flushed = True
        return b""

    def fsync(self, header: Header, request: requests.FsyncIn) -> Payload:
        data_only = request.fsync_flags & abi.FUSE_FSYNC_FDATASYNC
        self._call("fsync", self._nodes.get(header.nodeid).path, data_only, request.fh)
        return b""

    def release(self, header: Header, request: requests.ReleaseIn) -> Payload:
        self._handles.begin_release(request.fh)
        try:
            self._call("release", self._nodes.get(header.nodeid).path, request.fh)
        finally:
            self._handles.remove(request.fh)
        return b""

    def destroy(self, cut_off: bool) -> None:
        """The mount is gone: the operations are told before what was left open is released.

        `cut_off`: it was ended though files were open on it.
        """
        self._call("destroy", ROOT_PATH, cut_off)

    def release_all(self) -> list[Exception]:
        """Release what the kernel left open when the connection ended; gives what went wrong."""
        failures: list[Exception] = []
        for handle in self._handles.all():
            header = Header(0, 0, 0, handle.nodeid, 0, 0, 0, 0, 0)
            try:
                self.release(header, requests.ReleaseIn(handle.fh, handle.flags, 0, 0))
            except Exception as error:  # noqa: BLE001 - one bad release must not keep the others open
                failures.append(error)
        return failures

    def lseek(self, header: Header, request: requests.LseekIn) -> Payload:
        path = self._nodes.get(header.nodeid).path
        return abi.fuse_lseek_out.pack(self._call("lseek", path, request.offset, request.whence, request.fh))

    def fallocate(self, header: Header, request: requests.FallocateIn) -> Payload:
        path = self._nodes.get(header.nodeid).path
        self._modifying(path, request.fh, header.uid != 0)
        self._call("fallocate", path, request.mode, request.offset, request.length, request.fh)
        return b""

    def copy_file_range(self, header: Header, request: requests.CopyFileRangeIn) -> Payload:
        return abi.fuse_write_out.pack(self._copy(header, request, min(request.len, _MAX_COPY)))

    def copy_file_range_64(self, header: Header, request: requests.CopyFileRangeIn) -> Payload:
        return abi.fuse_copy_file_range_out.pack(self._copy(header, request, request.len))

    def undo(self, header: Header, body: Payload) -> None:
        """Take back what a request gave the kernel that will never hear of it: lookups, handles, a new image."""
        body = bytes(body)
        if header.opcode == abi.FUSE_LOOKUP:
            self._forget([(replies.nodeid_of_entry(body), 1)])
        elif header.opcode == abi.FUSE_READDIRPLUS:
            self._forget((nodeid, 1) for nodeid in replies.nodeids_of_listing(body))
        elif header.opcode == abi.FUSE_OPEN:
            self._take_back(replies.fh_of_open(body))
        elif header.opcode == abi.FUSE_CREATE:
            self._forget([(replies.nodeid_of_entry(body), 1)])
            fh = replies.fh_of_open(body[abi.fuse_entry_out.size :])
            self._call("discard", fh)
            self._take_back(fh)

    def _take_back(self, fh: int) -> None:
        try:
            self._call("release", None, fh)
        finally:
            self._handles.remove(fh)

    # Extended attributes

    def getxattr(self, header: Header, request: requests.GetxattrIn) -> Payload:
        if request.name == _CAPABILITY:
            raise _error(errno.ENODATA)
        _check_namespace(request.name)
        name = os.fsdecode(request.name)
        return _sized(self._by_any(header, lambda path, fh: self._call("getxattr", path, name, 0, fh)), request.size)

    def setxattr(self, header: Header, request: requests.SetxattrIn) -> Payload:
        _check_namespace(request.name)
        arguments = os.fsdecode(request.name), request.value, request.flags, 0
        self._by_any(header, lambda path, fh: self._call("setxattr", path, *arguments, fh))
        return b""

    def listxattr(self, header: Header, request: requests.ListxattrIn) -> Payload:
        names: list[str] = self._by_any(header, lambda path, fh: self._call("listxattr", path, fh))
        return _sized(replies.names_out(names), request.size)

    def removexattr(self, header: Header, request: requests.Name) -> Payload:
        name = os.fsdecode(request.name)
        self._by_any(header, lambda path, fh: self._call("removexattr", path, name, fh))
        return b""

    def _by_any(self, header: Header, act: Callable[[str | None, int | None], T]) -> T:
        """Do something by the name or any handle of the inode that a request is about."""
        return self._steadily(self._nodes.get(header.nodeid), None, act)[0]

    # The directory

    def opendir(self, header: Header, _request: requests.OpenIn) -> Payload:
        if header.nodeid != abi.FUSE_ROOT_ID:
            raise _error(errno.ENOTDIR)
        with self._listings_lock:
            number = next(self._listing_numbers)
            self._listings[number] = None
        # The kernel may keep the listing as long as the directory's mtime stands (fs/fuse/readdir.c).
        # Names are kept for long only where changes are told; a clock behind would hide one otherwise.
        told = self._timeouts.entry_s >= LONG_S
        keep = abi.FOPEN_KEEP_CACHE | abi.FOPEN_CACHE_DIR if told else 0
        return replies.open_out(number, keep)

    def readdir(self, _header: Header, request: requests.ReadIn) -> Payload:
        listing = self._listing(request)
        reply, used = [], 0
        for offset in range(request.offset, len(listing)):
            entry = listing[offset]
            used += replies.dirent_size(entry.name)
            if used > request.size:
                break
            reply.append(replies.dirent(entry.ino, offset + 1, entry.mode, entry.name))
        return b"".join(reply)

    def readdirplus(self, header: Header, request: requests.ReadIn) -> Payload:
        listing = self._listing(request)
        reply, used = [], 0
        for offset in range(request.offset, len(listing)):
            entry = listing[offset]
            used += replies.direntplus_size(entry.name)
            if used > request.size:
                break
            reply.append(self._direntplus(header, entry, offset + 1))
        return b"".join(reply)

    def releasedir(self, _header: Header, request: requests.ReleaseIn) -> Payload:
        with self._listings_lock:
            self._listings.pop(request.fh, None)
        return b""

    def fsyncdir(self, _header: Header, request: requests.FsyncIn) -> Payload:
        self._call("fsyncdir", ROOT_PATH, request.fsync_flags & abi.FUSE_FSYNC_FDATASYNC, request.fh)
        return b""

    # Beneath

    def _child(self, header: Header, name: bytes) -> str:
        if header.nodeid != abi.FUSE_ROOT_ID:
            raise _error(errno.ENOTDIR)
        return ROOT_PATH + name.decode(_ENCODING, _ERRORS)

    def _target(self, node: Node, fh: int | None) -> tuple[str | None, int | None]:
        """Path and handle to name an inode by: one of them is there, else ESTALE."""
        path = node.path
        if path is None and fh is None:
            fh = self._any_handle(node)
            if fh is None:
                raise _error(errno.ESTALE)
        return path, fh

    def _any_handle(self, node: Node) -> int | None:
        fh = self._handles.any_of(node.nodeid)
        return node.kept if fh is None else fh

    def _steadily(
        self, node: Node, fh: int | None, act: Callable[[str | None, int | None], T], any_handle: bool = True
    ) -> tuple[T, bool]:
        """Do something by a handle of a node, or by its name; again if that led elsewhere meanwhile.

        With `any_handle`, one that others have opened will do. Gives the value, and whether it surely belongs to the
        node.
        """
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            given = self._handles.any_of(node.nodeid) if fh is None and any_handle else fh
            path, handle = self._target(node, given)
            try:
                value = act(path, handle)
            except OSError as error:
                was_released = fh is None and handle is not None and error.errno == errno.EBADF
                if last or (not was_released and (handle is not None or self._is_still(node, path))):
                    raise
            else:
                if handle is not None or self._is_still(node, path):
                    return value, True
            if not last:
                self._nodes.wait_steady(path, CHANGE_WAIT_S)
        return value, False

    def _status(self, node: Node, fh: int | None) -> tuple[Timeouts, Status]:
        status, sure = self._steadily(node, fh, lambda path, handle: self._call("status", path, handle))
        self._require_same(node, status)
        return self._shown(node, status, sure), status

    def _shown(self, node: Node, status: Status, sure: bool) -> Timeouts:
        """How long the kernel may keep what it is shown; of which file state that is, is noted with the node."""
        node.ctime_ns = status.stat.st_ctime_ns
        if not sure:
            return replies.NEVER
        return self._timeouts if status.stat.st_nlink < 2 else self._linked_timeouts

    def _require_same(self, node: Node, status: Status) -> None:
        """ESTALE where the name of a node leads to another file by now, so that the kernel looks it up again."""
        if node.ino not in (None, status.identity):
            self._nodes.take_name(node)
            raise _error(errno.ESTALE)

    def _attr_out(self, node: Node, fh: int | None) -> bytes:
        return replies.attr_out(*self._status(node, fh))

    def _entry_out(self, node: Node) -> bytes:
        return replies.entry_out(node.nodeid, *self._status(node, None))

    def _made(self, header: Header, name: bytes, operation: str, *args: Any) -> bytes:
        path = self._child(header, name)
        self._call(operation, path, *args)
        return self._entry_out(self._nodes.look_up(path))

    def _open(self, node: Node, flags: int, open_flags: int) -> bytes:
        reads = flags & os.O_ACCMODE == os.O_RDONLY
        if reads:
            self._handles.wait_for_closed(node.nodeid, _RELEASE_WAIT_S)
        passed = reads and self._passthrough()
        path, fh = self._open_steadily(node, flags)
        backing_fd = self._guarded(path, fh, lambda: self._prepare(node, path, fh, open_flags, passed))
        return replies.open_out(fh, *self._handles.add(fh, node.nodeid, flags, backing_fd))

    def _prepare(self, node: Node, path: str | None, fh: int, open_flags: int, passed: bool) -> int | None:
        """What is to be done with a new handle; gives the descriptor to be passed through, where there is one."""
        status: Status = self._call("status", path, fh)
        self._require_same(node, status)
        if status.stat.st_ctime_ns != node.ctime_ns:  # whatever else is told of a change may come too late
            self._expire(node.nodeid)
        if open_flags & abi.FUSE_OPEN_KILL_SUIDGID:
            self._drop_privileges(path, fh)
        return self._call("passthrough_fd", fh) if passed else None

    def _open_steadily(self, node: Node, flags: int) -> tuple[str | None, int]:
        """Open by name, again if the name went to another image meanwhile; by a handle where there is no name."""
        for _ in range(ATTEMPTS):
            path = node.path
            try:
                fh: int = self._reopen(node, flags) if path is None else self._call("open", path, flags)
            except OSError as error:
                was_released = path is None and error.errno == errno.EBADF
                if not was_released and self._is_still(node, path):
                    raise
            else:
                if self._is_still(node, path):
                    return path, fh
                self._call("release", path, fh)
            self._nodes.wait_steady(path, CHANGE_WAIT_S)
        raise _error(errno.ESTALE)

    def _reopen(self, node: Node, flags: int) -> int:
        """Open an image once more that has no name, but a handle (/proc/PID/fd); ESTALE where it has neither."""
        path, handle = self._target(node, None)
        fh: int = self._call("open", path, flags, handle)
        return fh

    def _is_still(self, node: Node, path: str | None) -> bool:
        """Whether the node has had this path all along."""
        return node.path is path and self._nodes.steady(path)

    def _guarded(self, path: str | None, fh: int, act: Callable[[], T]) -> T:
        """Do something with a handle the kernel does not know yet; if it fails, the handle goes."""
        try:
            return act()
        except BaseException:
            self._call("release", path, fh)
            raise

    def _modifying(self, path: str | None, fh: int, drops_privileges: bool) -> None:
        """Before data changes through a handle; only WRITE is told whether the caller lacks CAP_FSETID."""
        handle = self._handles.get(fh)
        handle.flushed = False
        if drops_privileges and not handle.privileges_dropped:
            self._drop_privileges(path, fh)
            handle.privileges_dropped = True

    def _drop_privileges(self, path: str | None, fh: int | None) -> None:
        """Take set-uid and, where the group may execute, set-gid away (FUSE_HANDLE_KILLPRIV_V2, inode(7))."""
        mode = self._call("status", path, fh).stat.st_mode
        dropped = mode & ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            dropped &= ~stat.S_ISGID
        if dropped != mode:
            self._call("chmod", path, dropped, fh)

    def _copy(self, header: Header, request: requests.CopyFileRangeIn, length: int) -> int:
        source = self._nodes.get(header.nodeid).path
        target = self._nodes.get(request.nodeid_out).path
        self._modifying(target, request.fh_out, header.uid != 0)
        copied: int = self._call(
            "copy_file_range",
            source,
            request.fh_in,
            request.off_in,
            target,
            request.fh_out,
            request.off_out,
            length,
            request.flags,
        )
        return copied

    def _listing(self, request: requests.ReadIn) -> list[Entry]:
        """The names as they were when the reader of this handle began, or began again."""
        if request.fh not in self._listings:
            raise _error(errno.EBADF)
        listing = self._listings[request.fh]
        if listing is None or request.offset == 0:
            listing = [_entry(item) for item in self._call("readdir", ROOT_PATH, 0)]
            self._listings[request.fh] = listing
        return listing

    def _direntplus(self, header: Header, entry: Entry, offset: int) -> bytes:
        if entry.name in (b".", b".."):
            return replies.bare_direntplus(entry.ino, offset, entry.mode, entry.name)
        path = ROOT_PATH + entry.name.decode(_ENCODING, _ERRORS)
        try:
            found = self._look(path, header)
        except OSError:
            found = None
        if found is None:
            return replies.bare_direntplus(entry.ino, offset, entry.mode, entry.name)
        node, status, sure = found
        return replies.direntplus(node.nodeid, self._shown(node, status, sure), status, offset, entry.name)


def _check_namespace(name: bytes) -> None:
    """EOPNOTSUPP for ACLs and labels (xattr(7)); capabilities can be asked for, there are none.

    It is the answer after which ls(1) asks for them no more; with ENODATA it asks for every name.
    """
    if name.startswith(_NOT_OURS):
        raise _error(errno.EOPNOTSUPP)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _entry(item: Any) -> Entry:
    """A name, or a (name, attributes, offset) tuple, as fusepy's readdir gives them."""
    if isinstance(item, str):
        directory = item in (".", "..")
        return Entry(os.fsencode(item), 1, stat.S_IFDIR if directory else stat.S_IFREG)
    name, attr, _offset = item
    attr = attr or {}
    return Entry(os.fsencode(name), attr.get("st_ino", 1), attr.get("st_mode", stat.S_IFREG))


def _times(request: requests.SetattrIn) -> tuple[int, int]:
    """What utimensat(2) would be told: nanoseconds, UTIME_NOW or UTIME_OMIT."""
    atime = mtime = UTIME_OMIT
    if request.valid & abi.FATTR_ATIME_NOW:
        atime = UTIME_NOW
    elif request.valid & abi.FATTR_ATIME:
        atime = _signed(request.atime) * _NS + request.atimensec
    if request.valid & abi.FATTR_MTIME_NOW:
        mtime = UTIME_NOW
    elif request.valid & abi.FATTR_MTIME:
        mtime = _signed(request.mtime) * _NS + request.mtimensec
    return atime, mtime


def _signed(seconds: int) -> int:
    """The kernel's int64_t, sent as uint64_t."""
    return seconds - (1 << 64) if seconds >> 63 else seconds


def _sized(value: bytes, size: int) -> bytes:
    """The value if `size` has room for it, its length if `size` is 0 (getxattr(2)); else ERANGE."""
    if not size:
        return abi.fuse_getxattr_out.pack(len(value))
    if len(value) > size:
        raise _error(errno.ERANGE)
    return value
