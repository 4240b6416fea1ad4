"""Open handles, and how each may do its I/O: passed through, direct, or through the page cache.

Owns the table of open handles and the backing ids, counted per inode; registering a backing file is done by
the two functions it is given. The rules are those of fs/fuse/iomode.c: while one open of an inode is passed
through, every other must carry the same backing id; a cached open (a shared mapping of a direct one counts as
such) forbids passthrough. So an inode is passed through or not from its first open to its last release, and
only direct and cached opens mix. One lock guards everything; the ioctls under it do no I/O.
"""

import errno
import os
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from imgfs.kernel import abi
from imgfs.waiters import Waiters


@dataclass(slots=True)
class Handle:
    """One open file: the operations' handle number, its inode, the flags of open(2), FOPEN_ flags of the
    reply."""

    fh: int
    nodeid: int
    flags: int
    open_flags: int
    flushed: bool = False
    releasing: bool = False
    privileges_dropped: bool = False

    @property
    def writes(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


@dataclass(slots=True)
class Inode:
    """All opens of one inode; `backing_id` is 0 where they are not passed through."""

    backing_id: int = 0
    handles: dict[int, Handle] = field(default_factory=dict)


class OpenMode(NamedTuple):
    """What the kernel is told of an open."""

    open_flags: int
    backing_id: int = 0


_CACHED = abi.FOPEN_KEEP_CACHE
_DIRECT = abi.FOPEN_DIRECT_IO | abi.FOPEN_PARALLEL_DIRECT_WRITES


def open_flags(writes: bool, others: Collection[Handle], passed_through: bool) -> int:
    """The FOPEN_ flags of one more open of an inode that `others` have open.

    A writer always does direct I/O, so that every byte comes by here, unless a cached reader must see it;
    whoever reads while somebody writes does direct I/O too. A close that has nothing to say needs no FLUSH.
    """
    if passed_through:
        return abi.FOPEN_PASSTHROUGH | (_DIRECT if writes else abi.FOPEN_NOFLUSH)
    if not others:
        return _DIRECT if writes else _CACHED | abi.FOPEN_NOFLUSH
    if any(not other.open_flags & abi.FOPEN_DIRECT_IO for other in others):
        return _CACHED if writes else _CACHED | abi.FOPEN_NOFLUSH
    if writes or any(other.writes for other in others):
        return _DIRECT
    return _CACHED | abi.FOPEN_NOFLUSH


class Handles:
    """The open handles of a session. `register(fd)` gives a backing id or 0, `unregister(id)` takes it
    back."""

    def __init__(self, register: Callable[[int], int], unregister: Callable[[int], None]) -> None:
        self._register = register
        self._unregister = unregister
        self._handles: dict[int, Handle] = {}
        self._inodes: dict[int, Inode] = {}
        self._lock = threading.Lock()
        self._waiters = Waiters(self._lock)

    def __len__(self) -> int:
        return len(self._handles)

    @property
    def backing_ids(self) -> list[int]:
        """The backing ids in use."""
        with self._lock:
            return [inode.backing_id for inode in self._inodes.values() if inode.backing_id]

    def get(self, fh: int) -> Handle:
        """The handle; EBADF for a number that is not open."""
        handle = self._handles.get(fh)
        if handle is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle

    def all(self) -> list[Handle]:
        with self._lock:
            return list(self._handles.values())

    def any_of(self, nodeid: int) -> int | None:
        """Some open handle of the inode, but none that is being released."""
        with self._lock:
            inode = self._inodes.get(nodeid)
            return next((fh for fh, handle in inode.handles.items() if not handle.releasing), None) if inode else None

    def of(self, nodeid: int) -> list[Handle]:
        """All open handles of the inode."""
        with self._lock:
            inode = self._inodes.get(nodeid)
            return list(inode.handles.values()) if inode else []

    def add(self, fh: int, nodeid: int, flags: int, backing_fd: int | None) -> OpenMode:
        """Enter a handle and decide how it does its I/O.

        `backing_fd` is the descriptor of an image at rest, None where reads must come by here.
        """
        handle = Handle(fh, nodeid, flags, 0)
        with self._lock:
            inode = self._inodes.get(nodeid)
            if inode is None:
                inode = self._inodes[nodeid] = Inode()
            if not inode.handles and not handle.writes and backing_fd is not None:
                inode.backing_id = self._register(backing_fd)
            passed_through = bool(inode.backing_id)
            handle.open_flags = open_flags(handle.writes, inode.handles.values(), passed_through)
            inode.handles[fh] = self._handles[fh] = handle
            return OpenMode(handle.open_flags, inode.backing_id)

    def begin_release(self, fh: int) -> None:
        """The operations are about to forget a handle; what that sets off may take a while."""
        with self._lock:
            if fh in self._handles:
                self._handles[fh].releasing = True

    def remove(self, fh: int) -> None:
        """Drop a handle; the last one of an inode gives its backing id back."""
        with self._lock:
            handle = self._handles.pop(fh, None)
            if handle is None:
                return
            inode = self._inodes[handle.nodeid]
            del inode.handles[fh]
            if not inode.handles:
                del self._inodes[handle.nodeid]
                if inode.backing_id:
                    self._unregister(inode.backing_id)
            self._waiters.wake()

    def wait_for_closed(self, nodeid: int, timeout_s: float) -> None:
        """Wait for releases that are on their way.

        RELEASE comes after close(2) has returned. Who opens an image right after its writer closed it should
        find it at rest, so give the handles that were flushed last a moment to go.
        """
        inode = self._inodes.get(nodeid)
        if inode is None or inode.backing_id:
            return
        with self._lock:
            self._waiters.wait_for(lambda: not self._closing(nodeid), timeout_s)

    def _closing(self, nodeid: int) -> bool:
        inode = self._inodes.get(nodeid)
        return bool(inode and inode.handles) and all(h.flushed for h in self._inodes[nodeid].handles.values())
