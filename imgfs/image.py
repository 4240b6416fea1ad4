"""One image while anybody is concerned with it: its descriptors, its writers, its stream, its state.

An `Image` stands for one inode of a datadir and lives in the store's table as long as it is referenced (by a handle,
by sealing, by one call). What has to outlast that is in the record. It knows nothing of the namespace.

Threading: `change_lock` keeps changes of the file and of its record apart, one at a time; it is held over I/O on
this file alone. `lock` guards the fields marked so and is never held over I/O; who waits for a state waits for one of
them to change. Where both are taken, `change_lock` comes first.
"""

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from imgfs import record
from imgfs.datadir import FULL_ERRNOS, Datadir
from imgfs.errors import ImageFailed, Interrupted, NotPermitted, StorageFull
from imgfs.hashing import DigestStream
from imgfs.linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, fallocate, start_writeback
from imgfs.record import NOTHING_EXPECTED, Record, State
from imgfs.times import set_times
from imgfs.waiters import Waiters
from imgfs.xattrs import proc_path

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.1
RELEASE_SECONDS = 0.5
WRITEBACK_BYTES = 16 << 20
PIECE_BYTES = 256 << 10  # a system call that other threads can wait for
_ZEROS = bytes(1 << 20)
_ZEROING = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE
_READ = os.O_RDONLY | os.O_CLOEXEC
_WRITE = os.O_RDWR | os.O_CLOEXEC

StreamFactory = Callable[[], DigestStream]
Key = tuple[int, int]


def key_of(status: os.stat_result) -> Key:
    """What tells inodes apart: the device and inode number below."""
    return status.st_dev, status.st_ino


class Image:
    """An inode that somebody is concerned with. `name` is None once it was unlinked."""

    def __init__(
        self,
        datadir: Datadir,
        name: str,
        path_fd: int,
        status: os.stat_result,
        new_stream: StreamFactory,
        *,
        thin: bool,
        write_once: bool,
    ) -> None:
        """`path_fd`, which may be O_PATH, passes to the image; `status` is its fstat(2)."""
        self._place = datadir, key_of(status)  # replaced as one, by move_to
        self.name: str | None = name
        self.path_fd = path_fd
        self.references = 0  # guarded by the store's table lock
        self.change_lock = threading.RLock()
        self.lock = threading.Lock()
        self.waiters = Waiters(self.lock)
        self.handles = 0  # guarded by lock
        self.writers = 0  # guarded by lock: handles that may write
        self.writing = 0  # guarded by lock: of those, the ones that have written
        self.pinned = False  # guarded by lock: the kernel may read the file itself, until all handles are gone
        self.moving = False  # guarded by lock: it is being relocated, so the kernel may not begin to
        self.unflushed = 0  # guarded by lock: of those, the ones written to since their last flush
        self.unsealed = False  # guarded by lock: bytes have changed since there was a record
        self.sealing = False  # guarded by lock: a seal is queued or under way
        self.abandoned = False  # guarded by lock: a writer was cut off, nobody knows whether all has come
        self.seal_again = False  # guarded by lock: writers came and went while it was
        self.seal_error: OSError | None = None  # guarded by lock: why the last seal failed
        self.awaited = 0  # guarded by lock: who waits for the seal
        self.failed = False  # guarded by lock: sealed, and an expectation was not met
        self.declared_bytes = 0  # guarded by lock: size announced, for the reservation
        self.is_new = False  # created here: its directory entry is not on stable storage yet
        self.changes = 0  # guarded by change_lock: counts changes of the bytes
        self.mtime_ns = status.st_mtime_ns  # guarded by change_lock: as imgfs's own changes left it
        self.lacking_at: int | None = None  # guarded by change_lock: the offset of a write that found no room
        self.expectations = NOTHING_EXPECTED  # guarded by change_lock
        self._stream: DigestStream | None = None  # guarded by change_lock
        self._new_stream = new_stream
        self._thin = thin
        self._write_once = write_once
        self._read_fd: int | None = None
        self._write_fd: int | None = None

    # --- where it is ---

    @property
    def datadir(self) -> Datadir:
        """The datadir that the file is in; another one once the image was relocated."""
        return self._place[0]

    @property
    def key(self) -> Key:
        """What tells the inode from others."""
        return self._place[1]

    def located(self) -> tuple[Datadir, os.stat_result]:
        """The datadir and fstat(2) of the file, of one moment."""
        status = self.status()
        datadir, key = self._place
        if key == key_of(status):
            return datadir, status
        with self.lock:  # it is being moved
            datadir = self.datadir
        return datadir, self.status()

    # --- descriptors ---

    def open_for_read(self) -> int:
        """A descriptor that can be read from, shared by all handles."""
        while self._read_fd is None and self._write_fd is None:
            fd, key = self._reopened(_READ)
            with self.lock:
                wanted = self._read_fd is None and self._write_fd is None and key == self.key
                if wanted:
                    self._read_fd = fd
            if not wanted:
                os.close(fd)
        return self.fd

    def open_for_write(self) -> int:
        """A descriptor that can be read from and written to, shared by all writers."""
        while self._write_fd is None:
            fd, key = self._reopened(_WRITE)
            with self.lock:
                wanted = self._write_fd is None and key == self.key
                if wanted:
                    self._write_fd = fd
            if not wanted:
                os.close(fd)
        return self._write_fd

    def _reopened(self, flags: int) -> tuple[int, Key]:
        """Another descriptor of the file, and which file that is: it may be moved at this moment."""
        fd = self.datadir.obtain(os.close, os.open, proc_path(self.path_fd), flags)
        return fd, key_of(os.fstat(fd))

    def read(self, size: int, offset: int) -> bytes:
        """pread(2)."""
        return os.pread(self.fd, size, offset)

    def sync(self, data_only: bool = False) -> None:
        """fsync(2) or fdatasync(2)."""
        self.datadir.finish(os.fdatasync if data_only else os.fsync, self.open_for_read())

    def adopt(self, fd: int) -> None:
        """Write through the descriptor of a file that was just created; its bytes are all still to come."""
        self._write_fd = fd
        self.unsealed = True
        self.is_new = True
        self._stream = self._new_stream()

    @property
    def fd(self) -> int:
        """The descriptor to read from; one of the open_for_ methods must have been called."""
        fd = self._write_fd if self._read_fd is None else self._read_fd
        if fd is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return fd

    def move_to(self, datadir: Datadir, fd: int) -> None:
        """Continue in another, equal file: every descriptor is made to mean it (dup2 is atomic for readers).

        Called under change_lock. The caller keeps the old file open, so that closing it here costs nothing.
        """
        seen_all = self.status().st_mtime_ns == self.mtime_ns
        status = os.fstat(fd)
        with self.lock:
            for own in self._descriptors():
                os.dup2(fd, own, inheritable=False)
            self._place = datadir, key_of(status)
        if seen_all:
            self.mtime_ns = status.st_mtime_ns
        elif self._stream is not None:
            self._stream.break_off()  # somebody else changed the old file

    @contextlib.contextmanager
    def held_movable(self) -> Iterator[None]:
        """Inside, nothing keeps the image in its file. Raises StorageFull where something does."""
        links = self.status().st_nlink
        why = "its file has other names" if links > 1 else None
        with self.lock:
            if self.name is None or not links:
                why = "it was removed"
            elif self.pinned:
                why = "programs read its file directly"
            if why is not None:
                raise StorageFull(f"{self.datadir.path} is full, and image {self.name!r} can't move: {why}")
            self.moving = True
        try:
            yield
        finally:
            with self.lock:
                self.moving = False

    def close(self) -> None:
        """Give up all descriptors; called when the last reference goes."""
        if self._stream is not None:
            self._stream.break_off()
        for fd in self._descriptors():
            try:
                os.close(fd)
            except OSError as error:  # it is closed all the same (close(2)); what was vouched for was synced before
                log.warning("image %r in %s: closing it gives: %s", self.name, self.datadir.path, error.strerror)

    def _descriptors(self) -> set[int]:
        """The one that pins the inode is also the one to write through where the image was created here."""
        return {fd for fd in (self.path_fd, self._read_fd, self._write_fd) if fd is not None}

    def status(self) -> os.stat_result:
        """fstat(2) of the file as it is now."""
        return os.fstat(self.path_fd)

    # --- changing the bytes ---

    def write(self, data: bytes | memoryview, offset: int) -> int:
        """Write all of `data` at `offset` and pass it to the digests; gives the bytes written.

        Fewer come back only where the rest hit an error that the next call will show (write(2)).
        """
        with self.change_lock:
            self._before_change()
            try:
                written = self._write_all(data, offset)
            except OSError as error:
                self._note_lack(error, offset)
                raise
            finally:
                self._after_change()
            self._note_room(offset, written)
            if self._stream is not None:
                self._stream.write(offset, memoryview(data)[:written])
        return written

    def truncate(self, size: int) -> None:
        """ftruncate(2), followed by the digests."""
        with self.change_lock:
            fd = self.open_for_write()
            self._before_change()
            try:
                self.datadir.finish(os.ftruncate, fd, size)
            except OSError:
                self._doubt_stream()
                raise
            finally:
                self._after_change()
            if self.lacking_at is not None and size <= self.lacking_at:
                self.lacking_at = None
            if size == 0 and self._stream is None:
                self._stream = self._new_stream()
            elif self._stream is not None:
                self._stream.truncate(size)

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2), followed by the digests; EOPNOTSUPP for what would move bytes."""
        if mode & ~(FALLOC_FL_KEEP_SIZE | _ZEROING):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        with self.change_lock:
            fd = self.open_for_write()
            self._before_change()
            try:
                self.datadir.finish(fallocate, fd, mode, offset, length)
            except OSError as error:
                if mode & _ZEROING or error.errno not in FULL_ERRNOS:
                    self._doubt_stream()
                raise
            finally:
                self._after_change()
            if self._stream is not None and mode & _ZEROING:
                self._stream.zero(offset)

    def copy_from(self, source: "Image", source_offset: int, offset: int, length: int) -> int:
        """copy_file_range(2) out of another image; gives the bytes copied. The digests are computed later."""
        with self.change_lock:
            fd = self.open_for_write()
            self._before_change()
            try:
                copied = self.datadir.finish(
                    source.datadir.finish, os.copy_file_range, source.fd, fd, length, source_offset, offset
                )
            except OSError as error:
                self._note_lack(error, offset)
                raise
            finally:
                self._after_change()
            self._note_room(offset, copied)
            if self._stream is not None and copied:
                self._stream.break_off()
        return copied

    def _before_change(self) -> None:
        """Before the first changed byte, the old record goes, on stable storage: it vouches for other bytes."""
        self.changes += 1
        if self.unsealed:
            if self._stream is not None and self.status().st_mtime_ns != self.mtime_ns:
                self._stream.break_off()  # somebody else changed the file: the stream has not seen all
            return
        if self._write_once and self.state() is State.ACTIVE:
            raise NotPermitted(f"image {self.name!r} is complete, and the store is write-once")
        if self._drop_record():
            self.sync()
        with self.lock:
            self.unsealed = True
            self.failed = False
        self.expectations = NOTHING_EXPECTED
        self._stream = self._new_stream() if self.status().st_size == 0 else None

    def _note_lack(self, error: OSError, offset: int) -> None:
        if error.errno in FULL_ERRNOS:
            self.lacking_at = offset
        else:
            self._doubt_stream()

    def _doubt_stream(self) -> None:
        """After an error nobody knows what was done, or will be done yet: the digests are to come from the file."""
        if self._stream is not None:
            self._stream.break_off()

    def _note_room(self, offset: int, written: int) -> None:
        if self.lacking_at is not None and offset <= self.lacking_at < offset + written:
            self.lacking_at = None

    def _drop_record(self) -> bool:
        try:
            self.datadir.xattrs.remove(self.path_fd, record.XATTR)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
            return False
        return True

    def _after_change(self) -> None:
        self.mtime_ns = os.fstat(self.path_fd).st_mtime_ns

    def _write_all(self, data: bytes | memoryview, offset: int) -> int:
        fd = self.open_for_write()
        if self._thin and _is_zero(data) and offset >= os.fstat(fd).st_size:
            os.ftruncate(fd, offset + len(data))
            return len(data)
        view, written = memoryview(data), 0
        while written < len(data):
            try:
                written += os.pwrite(fd, view[written : written + PIECE_BYTES], offset + written)
            except OSError:
                if written:
                    break
                raise
        _write_back(fd, offset, offset + written)
        return written

    # --- attributes of the file ---

    def set_times(self, times_ns: tuple[int, int]) -> None:
        """Set atime and mtime, in ns or as `times` has it; a record that holds is made to hold for the new mtime."""
        with self.change_lock:
            before = self.status()
            held = None if self.unsealed else self.stored_record()
            self.datadir.attempt(set_times, proc_path(self.path_fd), times_ns)
            after = self.status()
            if self.mtime_ns == before.st_mtime_ns:
                self.mtime_ns = after.st_mtime_ns
            if held is not None and held.holds_for(before) and after.st_mtime_ns != before.st_mtime_ns:
                self.store_record(held.stamped(after.st_mtime_ns))

    def set_mode(self, mode: int) -> None:
        """fchmod(2)."""
        self.datadir.attempt(os.chmod, proc_path(self.path_fd), mode)

    def set_owner(self, uid: int, gid: int) -> None:
        """fchown(2); -1 leaves one as it is."""
        self.datadir.attempt(os.chown, proc_path(self.path_fd), uid, gid)

    # --- state ---

    def stored_record(self) -> Record | None:
        """The record kept with the file, whether or not it still holds."""
        return self.datadir.record_of(self.path_fd)

    def store_record(self, new: Record) -> None:
        """Keep a record with the file."""
        self.datadir.xattrs.set(self.path_fd, record.XATTR, new.encode())

    def valid_record(self) -> Record | None:
        """The record, where it holds for the file as it is and nothing has changed since."""
        if self.unsealed:
            return None
        held = self.stored_record()
        return held if held is not None and held.holds_for(self.status()) else None

    def state(self) -> State:
        """The state of the image; never waits."""
        with self.lock:
            if self.unsealed and (self.writers or self.sealing):
                return State.SAVING
        held = self.valid_record()
        return held.state if held else State.STALE

    def require_saving(self) -> None:
        """Raise NotPermitted unless the image is being written or sealed."""
        if self.state() is not State.SAVING:
            raise NotPermitted(f"image {self.name!r} is not being written: too late to expect something of it")

    def expect(self, **expected: int | str) -> None:
        """Declare what sealing must find (fields of Expectations); raises NotPermitted unless it is saving."""
        with self.change_lock:
            self.require_saving()
            self.expectations = replace(self.expectations, **expected)  # type: ignore[arg-type]
            # Kept with the file, so that a crash can't turn an unfinished image into a good one.
            self.store_record(Record(State.SAVING, expectations=self.expectations))

    def begin_sealing(self) -> bool:
        """Enter the phase of sealing; False where somebody is writing, who has it sealed in the end, and where a seal
        is under way, which then looks again at what changed."""
        with self.lock:
            return self.begin_sealing_under_lock()

    def begin_sealing_under_lock(self) -> bool:
        """The same for who holds `lock`, and has changed what this depends on."""
        self.seal_again = self.sealing
        if self.sealing or (self.unsealed and self.writing):
            return False
        self.sealing = True
        self.seal_error = None
        return True

    def end_sealing(self, for_good: bool = False) -> bool:
        """Leave it, and wake those who wait; False where writers came and went, so that it must go on.

        `for_good` leaves it all the same: the image stays stale.
        """
        with self.lock:
            if self.seal_again and self.unsealed and not self.writers and not for_good:
                self.seal_again = False
                self.seal_error = None
                return False
            self.sealing = False
            self.waiters.wake()
            return True

    def may_rest(self) -> bool:
        """Whether nobody would miss the seal for a moment: the image is empty, and nothing is expected of it."""
        return self.expectations is NOTHING_EXPECTED and self.status().st_size == 0

    def take_stream(self) -> tuple[DigestStream | None, int]:
        """Hand the stream over to sealing, with the count of changes it stands for; later writes break it."""
        with self.change_lock:
            stream, self._stream = self._stream, None
            return stream, self.changes

    def outstanding_bytes(self) -> int:
        """Of the declared size, what is not yet allocated in the datadir."""
        return max(0, self.declared_bytes - self.status().st_blocks * 512) if self.declared_bytes else 0

    def wait_for_release(self) -> bool:
        """Whether no writer is at work; gives those that have flushed a moment to be released, as close(2) does.

        The kernel releases a closed file some time after close(2) has returned, so a writer that is done may
        still look as if it had the image open.
        """
        deadline = time.monotonic() + RELEASE_SECONDS
        with self.lock:
            while self.unsealed and self.writers and not self.unflushed and time.monotonic() < deadline:
                self.waiters.wait(WAIT_SECONDS)
            return not (self.unsealed and self.writers)

    def wait_while_sealing(self, interrupted: Callable[[], bool]) -> None:
        """Wait until nobody writes and no seal is under way. Raises Interrupted, DatadirOffline."""
        while not self._comes_to_rest(WAIT_SECONDS):
            self.datadir.require_online()
            if interrupted():
                raise Interrupted("interrupted while waiting for the image to be sealed")

    def _comes_to_rest(self, timeout_s: float) -> bool:
        """Whether nobody writes and no seal is under way, now or within some time."""
        with self.lock:
            return self.waiters.wait_for(lambda: not (self.sealing or (self.unsealed and self.writers)), timeout_s)

    @contextlib.contextmanager
    def awaiting_seal(self) -> Iterator[None]:
        """Inside, it is known that somebody waits for the seal, be it under way or still to come."""
        with self.lock:
            self.awaited += 1
        try:
            yield
        finally:
            with self.lock:
                self.awaited -= 1


def _is_zero(data: bytes | memoryview) -> bool:
    view = memoryview(data)
    return all(_ZEROS.startswith(view[at : at + len(_ZEROS)]) for at in range(0, len(view), len(_ZEROS)))


def _write_back(fd: int, start: int, end: int) -> None:
    """Have the disk begin with every stretch that a write has come to the end of.

    So the fsync(2) of the seal finds little left to do; it also tells of what went wrong.
    """
    first, last = start // WRITEBACK_BYTES, end // WRITEBACK_BYTES
    if first < last:
        with contextlib.suppress(OSError):
            start_writeback(fd, first * WRITEBACK_BYTES, (last - first) * WRITEBACK_BYTES)


class Handle:
    """An open image, as read(2) and write(2) want it. Closed once, by whoever opened it."""

    def __init__(self, image: Image, writable: bool) -> None:
        self.image = image
        self.writable = writable
        with image.lock:
            self._unflushed = writable and image.unsealed
            self._wrote = False
            image.handles += 1
            image.writers += writable
            image.unflushed += self._unflushed

    def read(self, size: int, offset: int) -> bytes:
        """At most `size` bytes from `offset`; empty at the end. Raises EIO for a failed image."""
        self.require_readable()
        return self.image.read(size, offset)

    def require_readable(self) -> None:
        """Raise ImageFailed where the image failed an expectation."""
        if self.image.failed:
            raise ImageFailed(f"image {self.image.name!r} failed an expectation; it is not served")

    def write(self, data: bytes | memoryview, offset: int) -> int:
        """Write at `offset`; gives the bytes written."""
        self._require_writable()
        self._set_unflushed(True)
        return self.image.write(data, offset)

    def truncate(self, size: int) -> None:
        """ftruncate(2)."""
        self._require_writable()
        self._set_unflushed(True)
        self.image.truncate(size)

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        self._require_writable()
        self._set_unflushed(True)
        self.image.allocate(mode, offset, length)

    def copy_from(self, source: "Handle", source_offset: int, offset: int, length: int) -> int:
        """copy_file_range(2) out of another handle; gives the bytes copied."""
        source.require_readable()
        self._require_writable()
        self._set_unflushed(True)
        return self.image.copy_from(source.image, source_offset, offset, length)

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE; ENXIO beyond the end."""
        return self.image.datadir.ask(os.lseek, self.image.fd, offset, whence)

    def resting_fd(self) -> int | None:
        """A descriptor whose bytes are those of the image for as long as it is open, or None.

        There is one when nobody writes, and when no seal is under way that may find an expectation unmet.
        """
        image = self.image
        with image.lock:
            in_doubt = (
                image.failed
                or image.writers
                or image.moving
                or (image.sealing and image.expectations != NOTHING_EXPECTED)
            )
            image.pinned = image.pinned or not in_doubt
        return None if in_doubt else image.fd

    def status(self) -> os.stat_result:
        """fstat(2)."""
        return self.image.status()

    def flush(self) -> None:
        """Called at every close(2) of a descriptor of this handle: what it wrote is complete, for now."""
        self._set_unflushed(False)

    @property
    def unflushed(self) -> bool:
        """Whether it may be in the middle of writing: nothing was closed since it was last written to."""
        return self._unflushed

    def close(self, complete: bool = True) -> bool:
        """Give the handle up; True where it was the last that could write, and sealing is to be started now.

        An image that a writer left in the middle is not `complete`: it is not sealed, and so visibly stale.
        """
        self.flush()
        image = self.image
        with image.lock:
            image.handles -= 1
            image.writers -= self.writable
            image.writing -= self._wrote
            image.pinned = image.pinned and image.handles > 0
            image.abandoned |= not complete and self.writable
            if not self.writable or image.writers:
                return False
            image.declared_bytes = 0
            image.waiters.wake()
            # In the same step: whoever waits for the seal must not find an image that nobody writes or seals.
            complete = image.unsealed and not image.abandoned and image.name is not None
            return complete and image.begin_sealing_under_lock()

    def sync(self, data_only: bool = False) -> None:
        """fsync(2) or fdatasync(2)."""
        self.image.sync(data_only)

    def _require_writable(self) -> None:
        if not self.writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _set_unflushed(self, unflushed: bool) -> None:
        if unflushed != self._unflushed:
            with self.image.lock:
                self.image.unflushed += 1 if unflushed else -1
            self._unflushed = unflushed
        if unflushed and not self._wrote:
            with self.image.lock:
                self.image.writing += 1
            self._wrote = True
