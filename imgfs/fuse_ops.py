"""ImageOperations: one call per FUSE request, paths, handle numbers and flags in, values or OSError out.

The methods have the names and arguments of fusepy's `Operations`, so the class runs under stock fusepy as well as
under imgfs's own transports. A path is "/" or "/NAME"; None, with a handle, means an image whose name is gone. It
translates and delegates: what images are and do is the store's business, how requests arrive the transport's.

libfuse 2 renames an image that is removed while open to `.fuse_hidden*`, and removes that when it is closed. Such
a name never reaches a datadir: the image is removed at once, and the name kept as an alias of the open inode.

Threading: every method may be called from any thread; `_lock` guards the handle and alias tables.
"""

import contextlib
import errno
import itertools
import logging
import operator
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from imgfs.attributes import ImageAttributes, RootAttributes
from imgfs.calls import Call
from imgfs.datadir import Datadir
from imgfs.errors import ImageNotFound, NotPermitted
from imgfs.hashing import never
from imgfs.image import Handle, Image, Key
from imgfs.linux import RENAME_EXCHANGE, RENAME_NOREPLACE, birth_time_ns
from imgfs.namespace import Owner
from imgfs.status import Status, Together
from imgfs.store import ImageChanged, ImageStore
from imgfs.times import UTIME_NOW, set_times
from imgfs.xattrs import proc_path

log = logging.getLogger(__name__)

ROOT = "/"
ROOT_INO = 1
BLOCK_BYTES = 1 << 20
"""What stat(2) shows as the best size of a read or write, which cp(1) and cat(1) then use: a whole request."""
STATFS_BLOCK_BYTES = 4096
COPY_BYTES = 128 << 20
RELEASED_SECONDS = 2.0
_HIDDEN = re.compile(r"/\.fuse_hidden[0-9a-f]{16}")

Caller = Callable[[], tuple[int, int, int]]
_directory_status = operator.methodcaller("directory_status")


def _fusepy_caller() -> tuple[int, int, int]:
    """Uid, gid and pid of whoever made the request, under fusepy."""
    import fuse  # noqa: PLC0415 - it needs libfuse, which a program without a mount need not have

    uid, gid, pid = fuse.fuse_get_context()
    return uid, gid, pid


def _fusepy() -> str:
    return "fusepy"


class ImageOperations:
    """The operations of a mount over a store."""

    use_ns = True  # fusepy: times are whole nanoseconds
    flag_utime_omit_ok = 1  # libfuse 2: pass UTIME_NOW and UTIME_OMIT on
    flag_nullpath_ok = 1  # libfuse 2: handles need no path, so none is computed
    flag_nopath = 1

    def __init__(
        self,
        store: ImageStore,
        caller: Caller = _fusepy_caller,
        interrupted: Callable[[], bool] = never,
        transport: Callable[[], str] = _fusepy,
    ) -> None:
        """`caller` tells who made the request at hand, `interrupted` whether they still want an answer."""
        self._store = store
        self._caller = caller
        self._ready: Callable[[], None] = lambda: None
        self._destroyed: Callable[[], None] = lambda: None
        self._attributes = ImageAttributes(store, interrupted)
        self._root_attributes = RootAttributes(store, transport)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._handles: dict[int, Handle] = {}
        self._released: dict[Key, float] = {}  # inode -> when a handle of it was released, for a moment
        self._aliases: dict[str, int] = {}  # hidden path -> a handle number of the removed image

    def __call__(self, operation: str, *arguments: Any) -> Any:
        """Do one operation. Raises OSError only: anything else is logged and becomes EIO."""
        try:
            return getattr(self, operation)(*arguments)
        except OSError as error:
            if error.errno is None or error.errno <= 0:
                log.exception("%s failed without an errno", operation)
                raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
            raise
        except Exception as error:
            log.exception("%s failed unexpectedly", operation)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error

    def on_init(self, ready: Callable[[], None]) -> None:
        """Have `ready` called when fusepy says that the mount is about to answer."""
        self._ready = ready

    def on_destroy(self, destroyed: Callable[[], None]) -> None:
        """Have `destroyed` called when the mount is gone, and no request is under way."""
        self._destroyed = destroyed

    def misses_a_datadir(self) -> bool:
        """Whether some datadir is offline."""
        return any(datadir.offline is not None for datadir in self._store.datadirs)

    def finish(self) -> None:
        """End as `destroy` and the store do, though requests are under way that nobody waits for."""
        self.destroy(ROOT, cut_off=True)
        self._store.close()

    def on_change(self, changed: ImageChanged) -> bool:
        """Have `changed` called when an image changes otherwise than by a request; see ImageStore.on_change."""
        return self._store.on_change(changed)

    def on_stuck(self, stuck: Callable[[list[Call]], None]) -> None:
        """Have `stuck` called with calls that a datadir does not answer; see ImageStore.on_stuck."""
        self._store.on_stuck(stuck)

    def before_waits(self, call: Callable[[], None]) -> None:
        """Have `call` called in a writer's thread before it waits; see ImageStore.before_waits."""
        self._store.before_waits(call)

    def init(self, _path: str) -> None:
        """The mount is about to answer."""
        self._ready()

    def destroy(self, _path: str, cut_off: bool = False) -> None:
        """The mount is gone. What was left open and is complete is sealed, what was being written stays stale.

        A release that is under way when the mount goes never reaches the daemon; so a handle that was flushed after
        its last write counts as closed, unless the transport knows that it was `cut_off` from open files.
        """
        self._destroyed()
        with self._lock:
            handles, self._handles = list(self._handles.values()), {}
        for handle in handles:
            try:
                self._store.close_handle(handle, complete=not (cut_off or handle.unflushed))
            except OSError as error:
                log.error("image %r can't be closed: %s", handle.image.name, error)

    # --- which image ---

    @contextlib.contextmanager
    def _image(self, path: str | None, fh: int | None = None) -> Iterator[Image]:
        """The image of a handle, where there is one, of a path, or of a hidden path.

        A handle may be one that another process opened, and closes meanwhile.
        """
        handle = self._open_handle(path, fh)
        if handle is not None:
            with self._store.held(handle.image) as image:
                yield image
        elif path is None or path == ROOT:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        else:
            with self._store.image(_name(path)) as image:
                yield image

    def _open_handle(self, path: str | None, fh: int | None) -> Handle | None:
        """The handle `fh`, or one of the removed image that libfuse hides under a path; None for other paths.

        Raises ImageNotFound where nobody has that open any more.
        """
        if fh is not None:
            return self._handle(fh)
        number = None if path is None else self._aliases.get(path)
        if number is None:
            return None
        handle = self._handles.get(number)
        if handle is None:
            raise ImageNotFound(f"{path}: nobody has it open any more")
        return handle

    def _handle(self, fh: int) -> Handle:
        try:
            return self._handles[fh]
        except KeyError:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    def _number(self, handle: Handle) -> int:
        with self._lock:
            number = next(self._numbers)
            self._handles[number] = handle
        return number

    # --- attributes of files ---

    def getattr(self, path: str | None, fh: int | None = None) -> dict[str, int]:
        """stat(2) in fusepy's form, times in ns."""
        return _in_fusepys_form(self.status(path, fh))

    def status(self, path: str | None, fh: int | None = None) -> Status:
        """stat(2)."""
        if path == ROOT:
            return self._root_status()
        handle = self._open_handle(path, fh)
        if handle is None:
            return _shown(*self._store.status(_name(str(path))))
        with self._store.held(handle.image) as image:
            return _shown(*image.located())

    def find(self, path: str) -> Status | None:
        """stat(2) of a name; None where there is no image of that name."""
        if self._aliases:
            with contextlib.suppress(ImageNotFound):
                return self.status(path)
            return None
        found = self._store.find(_name(path))
        return None if found is None else _shown(*found)

    def _root_status(self) -> Status:
        """The root shows the first datadir's owner and mode, and the latest times of all that are online."""
        first, *others = self._store.answers(_directory_status) or [os.stat(ROOT)]
        size, blocks = first.st_size, first.st_blocks
        atime, mtime, ctime = first.st_atime_ns, first.st_mtime_ns, first.st_ctime_ns
        for other in others:  # the kernel asks for this after each create and each unlink
            size += other.st_size
            blocks += other.st_blocks
            atime, mtime = max(atime, other.st_atime_ns), max(mtime, other.st_mtime_ns)
            ctime = max(ctime, other.st_ctime_ns)
        shown = Together(first.st_mode, 2, first.st_uid, first.st_gid, size, blocks, atime, mtime, ctime)
        return Status(shown, ROOT_INO, ROOT_INO, STATFS_BLOCK_BYTES)

    def access(self, path: str, amode: int) -> int:
        """access(2), as far as the datadir has a say; permissions are the kernel's (default_permissions)."""
        if path != ROOT:
            datadir, _ = self._store.status(_name(path))
            if amode & os.W_OK:
                datadir.require_writable()
        return 0

    def chmod(self, path: str | None, mode: int, fh: int | None = None) -> int:
        """chmod(2); without effect on images where `file_perm` says which mode they have."""
        if path == ROOT:
            for datadir in self._changeable_datadirs():
                os.fchmod(datadir.fd, stat.S_IMODE(mode))
            return 0
        with self._image(path, fh) as image:
            image.datadir.require_writable()
            if not self._store.config.file_perm:
                image.set_mode(stat.S_IMODE(mode))
        return 0

    def chown(self, path: str | None, uid: int, gid: int, fh: int | None = None) -> int:
        """chown(2); -1 leaves one as it is."""
        if path == ROOT:
            for datadir in self._changeable_datadirs():
                os.fchown(datadir.fd, uid, gid)
            return 0
        with self._image(path, fh) as image:
            image.datadir.require_writable()
            image.set_owner(uid, gid)
        return 0

    def utimens(self, path: str | None, times: tuple[int, int] | None = None, fh: int | None = None) -> int:
        """utimensat(2): (atime, mtime) in ns, UTIME_NOW and UTIME_OMIT included; None: now."""
        wanted = (UTIME_NOW, UTIME_NOW) if times is None else times
        if path == ROOT:
            for datadir in self._changeable_datadirs():
                set_times(proc_path(datadir.fd), wanted)
            return 0
        with self._image(path, fh) as image:
            image.datadir.require_writable()
            image.set_times(wanted)
        return 0

    def _changeable_datadirs(self) -> list[Datadir]:
        """What a change of the root's own attributes goes to."""
        return [datadir for datadir in self._store.online_datadirs() if datadir.writable]

    # --- the directory ---

    def readdir(self, _path: str | None, _fh: int) -> Iterator[str | tuple[str, dict[str, int], int]]:
        """Names with inode number and type; the offset 0 lets libfuse keep the whole listing."""
        yield from (".", "..")
        for name, ino in self._store.listing():
            yield name, {"st_ino": ino, "st_mode": stat.S_IFREG}, 0

    def fsyncdir(self, _path: str | None, _datasync: int, _fh: int) -> int:
        """fsync(2) of the directory, in all datadirs."""
        self._store.sync()
        return 0

    def statfs(self, _path: str) -> dict[str, int]:
        """statvfs(3): the sum of the filesystems below, each counted once."""
        below = dict(self._store.answers(lambda datadir: (datadir.device, datadir.filesystem())))
        totals = {
            key: sum(getattr(numbers, key) * numbers.f_frsize // STATFS_BLOCK_BYTES for numbers in below.values())
            for key in ("f_blocks", "f_bfree", "f_bavail")
        }
        files = {
            key: sum(getattr(numbers, key) for numbers in below.values())
            for key in ("f_files", "f_ffree", "f_favail")
        }
        return {"f_bsize": STATFS_BLOCK_BYTES, "f_frsize": STATFS_BLOCK_BYTES, "f_namemax": 255} | totals | files

    def unlink(self, path: str) -> int:
        """unlink(2)."""
        if self._aliases:
            with self._lock:
                if self._aliases.pop(path, None) is not None:
                    return 0  # libfuse 2 forgets an image that is gone already
        self._store.delete(_name(path))
        return 0

    def rename(self, old: str, new: str) -> int:
        """rename(2), over an existing image, too."""
        if _HIDDEN.fullmatch(new):
            self._hide(old, new)
        else:
            self._store.rename(_name(old), _name(new))
        return 0

    def _hide(self, old: str, new: str) -> None:
        """What libfuse 2 does instead of removing an image that is open: remove it, and keep an alias."""
        with self._store.image(_name(old)) as image:
            with self._lock:
                number = next((n for n, handle in self._handles.items() if handle.image is image), None)
                released = time.monotonic() - self._released.get(image.key, -RELEASED_SECONDS)
                if number is None and released >= RELEASED_SECONDS:
                    raise NotPermitted(f"{new!r} is a name that libfuse keeps for itself")
            self._store.delete(_name(old))
            if number is not None:
                with self._lock:
                    self._aliases[new] = number

    def mkdir(self, path: str, _mode: int) -> int:
        """Refused: the namespace is flat."""
        raise NotPermitted(f"{path}: no directories here, the namespace is flat")

    def rmdir(self, path: str) -> int:
        """Refused: there are no directories."""
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)

    def mknod(self, path: str, _mode: int, _device: int) -> int:
        """Refused: only regular files are images."""
        raise NotPermitted(f"{path}: no special files here")

    def symlink(self, target: str, _source: str) -> int:
        """Refused."""
        raise NotPermitted(f"{target}: no links here")

    def link(self, target: str, _source: str) -> int:
        """Refused."""
        raise NotPermitted(f"{target}: no links here")

    # --- open images ---

    def create(self, path: str, mode: int, _fi: Any = None) -> int:
        """open(2) with O_CREAT of a new name; it belongs to the caller."""
        uid, gid, _ = self._caller()
        return self._number(self._store.create(_name(path), stat.S_IMODE(mode), Owner(uid, gid, by_default=True)))

    def open(self, path: str | None, flags: int, fh: int | None = None) -> int:
        """open(2) of an image that exists; of one whose name is gone through a handle of it."""
        handle = self._open_handle(path, fh if path is None else None)
        if handle is not None:
            return self._number(self._store.reopen(handle, flags))
        return self._number(self._store.open(_name(str(path)), flags))

    def read(self, _path: str | None, size: int, offset: int, fh: int) -> bytes:
        """pread(2)."""
        return self._handle(fh).read(size, offset)

    def write(self, _path: str | None, data: bytes | memoryview, offset: int, fh: int) -> int:
        """pwrite(2); `data` must not change afterwards, it may be hashed later."""
        return self._store.write(self._handle(fh), data, offset)

    def truncate(self, path: str | None, length: int, fh: int | None = None) -> int:
        """truncate(2), or ftruncate(2) where there is a handle."""
        if fh is not None:
            self._store.truncate(self._handle(fh), length)
            return 0
        number = self.open(path, os.O_WRONLY)
        try:
            return self.truncate(None, length, number)
        finally:
            self.release(None, number)

    def flush(self, _path: str | None, fh: int) -> int:
        """A descriptor of the handle was closed."""
        self._handle(fh).flush()
        return 0

    def fsync(self, _path: str | None, datasync: int, fh: int) -> int:
        """fsync(2), fdatasync(2)."""
        self._handle(fh).sync(bool(datasync))
        return 0

    def release(self, _path: str | None, fh: int) -> int:
        """The last descriptor of the handle was closed."""
        with self._lock:
            handle = self._handles.pop(fh, None)
            if handle is None:
                return 0
            if self._aliases:
                self._move_alias(fh, handle)
            self._note_released(handle.image.key)
        self._store.close_handle(handle)
        return 0

    def _note_released(self, key: Key) -> None:
        """libfuse takes an image for open until a little after its release."""
        now = time.monotonic()
        self._released.pop(key, None)  # so that the oldest comes first
        self._released[key] = now
        while now - self._released[oldest := next(iter(self._released))] > RELEASED_SECONDS:
            del self._released[oldest]

    def _move_alias(self, fh: int, handle: Handle) -> None:
        """An alias goes over to another handle of the same image, or ends with the last."""
        for path, number in list(self._aliases.items()):
            if number == fh:
                others = (n for n, other in self._handles.items() if other.image is handle.image)
                other = next(others, None)
                if other is None:
                    del self._aliases[path]
                else:
                    self._aliases[path] = other

    # --- what fusepy can't deliver ---

    def statx(self, path: str | None, fh: int | None = None) -> tuple[Status, int | None]:
        """stat(2), and when the file was made (ns), where that is known (statx(2))."""
        if path == ROOT:
            born = (birth_time_ns(datadir.fd) for datadir in self._store.online_datadirs())
            return self._root_status(), next(born, None)
        with self._image(path, fh) as image:
            return _shown(*image.located()), birth_time_ns(image.path_fd)

    def lseek(self, _path: str | None, offset: int, whence: int, fh: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE."""
        return self._handle(fh).seek(offset, whence)

    def fallocate(self, _path: str | None, mode: int, offset: int, length: int, fh: int) -> int:
        """fallocate(2)."""
        self._store.allocate(self._handle(fh), mode, offset, length)
        return 0

    def copy_file_range(
        self,
        _path_in: str | None,
        fh_in: int,
        offset_in: int,
        _path_out: str | None,
        fh_out: int,
        offset_out: int,
        length: int,
        _flags: int,
    ) -> int:
        """copy_file_range(2): at most COPY_BYTES at a time, so that no request takes long."""
        source, target = self._handle(fh_in), self._handle(fh_out)
        return self._store.copy_range(source, offset_in, target, offset_out, min(length, COPY_BYTES))

    def rename2(self, old: str, new: str, flags: int) -> int:
        """renameat2(2) with RENAME_NOREPLACE or RENAME_EXCHANGE."""
        if flags == RENAME_NOREPLACE:
            self._store.rename_new(_name(old), _name(new))
        elif flags == RENAME_EXCHANGE:
            self._store.exchange(_name(old), _name(new))
        else:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return 0

    def discard(self, fh: int) -> int:
        """Remove an image that was just created, and is empty: nobody ever heard of it."""
        self._store.discard(self._handle(fh))
        return 0

    def passthrough_fd(self, fh: int) -> int | None:
        """The descriptor that the kernel may read in the daemon's place, where the image is at rest."""
        return self._handle(fh).resting_fd()

    # --- extended attributes ---

    def getxattr(self, path: str | None, name: str, _position: int = 0, fh: int | None = None) -> bytes:
        """getxattr(2); ENODATA where there is none."""
        if not name.startswith("user."):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        if path == ROOT:
            return self._root_attributes.get(name)
        with self._image(path, fh) as image:
            return self._attributes.get(image, name)

    def listxattr(self, path: str | None, fh: int | None = None) -> list[str]:
        """listxattr(2)."""
        if path == ROOT:
            return self._root_attributes.names()
        with self._image(path, fh) as image:
            return self._attributes.names(image)

    def setxattr(
        self, path: str | None, name: str, value: bytes, options: int, _position: int = 0, fh: int | None = None
    ) -> int:
        """setxattr(2)."""
        if path == ROOT:
            self._root_attributes.set(name, value, options)
            return 0
        with self._image(path, fh) as image:
            self._attributes.set(image, name, value, options)
        return 0

    def removexattr(self, path: str | None, name: str, fh: int | None = None) -> int:
        """removexattr(2)."""
        if path == ROOT:
            self._root_attributes.remove(name)
            return 0
        with self._image(path, fh) as image:
            self._attributes.remove(image, name)
        return 0


def _name(path: str) -> str:
    return path.removeprefix("/")


def _shown(datadir: Datadir, below: os.stat_result) -> Status:
    number = datadir.inode_number(below.st_ino)
    return Status(below, number, datadir.identities.get(below.st_ino, number), BLOCK_BYTES)


def _in_fusepys_form(status: Status) -> dict[str, int]:
    shown = status.stat
    return {
        "st_ino": status.ino,
        "st_mode": shown.st_mode,
        "st_nlink": shown.st_nlink,
        "st_uid": shown.st_uid,
        "st_gid": shown.st_gid,
        "st_size": shown.st_size,
        "st_blocks": shown.st_blocks,
        "st_blksize": status.blksize,
        "st_atime": shown.st_atime_ns,
        "st_mtime": shown.st_mtime_ns,
        "st_ctime": shown.st_ctime_ns,
    }
