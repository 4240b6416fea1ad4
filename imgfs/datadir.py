"""One backing directory, reached only through its descriptor.

Every file is named relative to that descriptor and opened without following a symlink; only regular files count.
So neither a name nor a file that lies there can lead anywhere else, and a directory mounted over the path later
does not change what is used. `DATADIR/.imgfs/` is imgfs's own room.

Threading: all methods may be called at once from any thread; the filesystem arbitrates.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from imgfs import identity, inode, linux, mount_table, names, own_files, record
from imgfs.config import DatadirConfig, Mode
from imgfs.errors import (
    AnsweredTooLate,
    DatadirError,
    DatadirOffline,
    ImageNotFound,
    InvalidName,
    StorageFull,
    WriteDenied,
)
from imgfs.inode import Inode
from imgfs.record import Record
from imgfs.xattrs import NativeXattrs, ReadOnlyXattrs, SidecarXattrs, Xattrs, proc_path, supported

log = logging.getLogger(__name__)

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What a datadir says when it can't take an image for want of room."""
LOST_ERRNOS = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENXIO, errno.ENODEV, errno.ESHUTDOWN, errno.ECONNABORTED}
)
"""What a datadir's root says when the filesystem below is gone; of a file it may concern that file only."""
UNTOLD_BYTES = 1 << 50
"""What counts as free where a filesystem does not tell its size at all (ramfs, some network filesystems)."""
MOST_UNSYNCED_NAMES = 10_000
MOST_IDENTITIES = 10_000
READ_ONLY_SECONDS = 30.0  # how long a datadir that answered EROFS is not tried again
LOCK_WAIT_SECONDS = 10.0
_LOCK_RETRY_SECONDS = 0.05
_REPLACED = "replaced-"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """An image as the directory shows it: its name, inode number in the datadir."""

    name: str
    ino: int


@dataclass(frozen=True, slots=True)
class Replaced:
    """A note that the file `old` of a name, in one datadir, gives way to `new`, in another, once that has the name.

    Datadirs are named by what they are `called`, as their paths may change.
    """

    token: str
    name: str
    old_in: str
    old: Inode
    new_in: str
    new: Inode

    def encode(self) -> bytes:
        """The form in which it is stored."""
        fields = {
            "name": os.fsencode(self.name).hex(),
            "old": [self.old_in, *self.old.encode()],
            "new": [self.new_in, *self.new.encode()],
        }
        return json.dumps(fields).encode("ascii")


def _decode_replaced(token: str, stored: bytes) -> Replaced | None:
    """What a note says; None where it was cut short, so that what it announces was never begun."""
    try:
        fields = json.loads(stored)
        name = names.check(os.fsdecode(bytes.fromhex(fields["name"])))
        (old_in, *old), (new_in, *new) = fields["old"], fields["new"]
        return Replaced(token, name, str(old_in), inode.decode(old), str(new_in), inode.decode(new))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, InvalidName):
        return None


def unusable(config: DatadirConfig) -> str | None:
    """Why a datadir can't be used, in one line that says what to do; None where it can. Changes nothing."""
    try:
        return _unusable(config, Path(config.path))
    except OSError as error:
        return f"{config.path[:200]} can't be used: {error.strerror}"


def _unusable(config: DatadirConfig, path: Path) -> str | None:
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return f"{path} is a symlink to nowhere" if path.is_symlink() else _uncreatable(config, path)
    if not is_directory:
        return f"{path} is not a directory"
    needed = os.R_OK | os.X_OK | (0 if config.mode is Mode.READ_ONLY else os.W_OK)
    return None if os.access(path, needed, effective_ids=True) else _denied(config)


def _uncreatable(config: DatadirConfig, path: Path) -> str | None:
    if config.mode is Mode.READ_ONLY:
        return f"{path} does not exist; create it or take it out"
    parent = next(candidate for candidate in path.parents if candidate.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        return f"{path} does not exist and can't be created in {parent}"
    return None


def _denied(config: DatadirConfig) -> str:
    need = "readable" if config.mode is Mode.READ_ONLY else "writable"
    return f"{config.path} is not {need} for uid {os.geteuid()}; change its permissions or take it out"


class Datadir:
    """An opened datadir. `tag` (1 to 32767) tells its inode numbers from those of the others."""

    def __init__(
        self,
        config: DatadirConfig,
        file_perm: int = 0,
        *,
        known_as: str | None = None,
        absence: str | None = None,
        locked: bool = True,
    ) -> None:
        """Open the directory and lock it, unless there is an `absence`: the reason why it can't be opened now.

        One that is `known_as` an identity must have that marker and is changed in nothing otherwise; one that nobody
        knows is created where it is missing (Glance behaviour 4). Without the lock, another imgfs may be at work
        there. Raises DatadirError, with the path, where it can't be used or another imgfs uses it.
        """
        self.config = config
        self.path = config.path
        self.priority = config.priority
        self.tag = 1
        self._changes = 0  # guarded by _unsettled_lock: of what names lead to
        self._unsettled: dict[str, int] = {}  # guarded by _unsettled_lock: name -> its latest change since a sync
        self._unsettled_lock = threading.Lock()
        self.identities: dict[int, int] = {}  # of relocated images: inode number -> what they were known by before
        self._read_only_until = 0.0  # on the monotonic clock: no new images until then; 0: it is not read-only
        self.marked_as = known_as
        self.offline = absence  # why it counts as offline; None: it is online
        self.known_names: Set[str] = frozenset()  # while it is offline: the names that are known to be here
        self._file_perm = file_perm
        self._locked = locked
        self._own_fd: int | None = None
        if absence is None:
            self.open()

    def open(self) -> None:
        """Open and lock it; called again for one that was absent. Raises DatadirError."""
        self._open()
        try:
            self.device = os.fstat(self.fd).st_dev
            self._require_identity()
            if self._locked:
                self._lock()
            self._grant_search(self._file_perm)
            self._own_fd = self._own_directory(names.OWN_DIRECTORY, self.fd)
            self.xattrs = self._choose_xattrs()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Datadir({self.path!r}, priority={self.priority}, mode={self.config.mode})"

    # --- online or not ---

    def go_offline(self, reason: str) -> None:
        """Pass it over from now on; what is known to be here gives DatadirOffline. `reason` is for an operator."""
        if self.offline is None:
            log.error("datadir %s is offline: %s", self.path, reason)
        self.offline = reason

    def come_back(self) -> None:
        """Use it again."""
        if self.offline is not None:
            log.warning("datadir %s is online again", self.path)
        self.offline = None

    def require_online(self) -> None:
        """Raise DatadirOffline where it is offline."""
        if self.offline is not None:
            raise DatadirOffline(f"datadir {self.path} is offline: {self.offline}")

    def is_lost(self, error: OSError) -> bool:
        """Whether an error means that the datadir itself, not one file, can't be reached; then it is offline now."""
        if isinstance(error, AnsweredTooLate):
            return False
        if self.offline is not None:
            return True
        if error.errno not in LOST_ERRNOS or isinstance(error, DatadirOffline):
            return False
        try:
            self.check_root()
        except OSError as found:
            if found.errno in LOST_ERRNOS:
                self.go_offline(f"its root gives: {found.strerror}")
        return self.offline is not None

    def may_be_spared(self, error: OSError) -> bool:
        """The same for who can do without its answer: it may also be too busy with calls that do not come back."""
        refused = isinstance(error, DatadirOffline) and not isinstance(error, AnsweredTooLate)
        return refused or self.is_lost(error)

    def check_root(self) -> None:
        """Look at the root in every way that imgfs does; raises what a dead filesystem says. Changes nothing."""
        os.fstat(self.fd)
        os.fstatvfs(self.fd)
        unheard_of = f"{names.OWN_DIRECTORY}-{secrets.token_hex(4)}"  # no cache answers for it
        with contextlib.suppress(FileNotFoundError):
            os.stat(unheard_of, dir_fd=self.fd, follow_symlinks=False)
        fd = os.open(".", _DIRECTORY, dir_fd=self.fd)
        try:
            with os.scandir(fd) as found:
                next(found, None)
        finally:
            os.close(fd)

    # --- calls, which a datadir with a timeout watches (timed.py) ---

    is_watched = False

    def ask(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Make a call that asks something. Raises DatadirOffline where it is refused, or answered too late."""
        return call(*args, **options)

    def obtain(self, undo: Callable[[T], None], call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:  # noqa: ARG002
        """The same for a call whose answer is to be undone where it comes too late."""
        return call(*args, **options)

    def attempt(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Make a call that does something, which counts however late. Raises DatadirOffline where it is refused."""
        return call(*args, **options)

    def finish(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Make a call that is part of what was begun, so never refused; it may wait for all that was written."""
        return call(*args, **options)

    def has_stuck(self, _thread: int) -> bool:
        """Whether a thread is stuck in a call here."""
        return False

    # --- what may be done ---

    @property
    def takes_images(self) -> bool:
        """Whether new images may be placed here."""
        online = self.config.mode is Mode.READ_WRITE and self.offline is None
        return online and (not self._read_only_until or time.monotonic() >= self._read_only_until)

    def _turned_read_only(self, seconds: float) -> None:
        """The filesystem below refuses changes: for so long, nobody need try again."""
        if not self._read_only_until:
            log.warning("datadir %s is on a read-only filesystem: new images go elsewhere", self.path)
        self._read_only_until = time.monotonic() + seconds

    def _turned_writable(self) -> None:
        if time.monotonic() >= self._read_only_until:
            log.info("datadir %s is used for new images again", self.path)
            self._read_only_until = 0.0

    @property
    def writable(self) -> bool:
        """Whether images here may be changed or removed."""
        return self.config.mode is not Mode.READ_ONLY

    def require_writable(self) -> None:
        """Raise WriteDenied where the mode of the datadir is `ro`."""
        if not self.writable:
            raise WriteDenied(f"datadir {self.path} is read-only (mode: ro)")

    def close(self) -> None:
        """Give up the descriptors, and the lock with them."""
        for attribute in ("_own_fd", "_xattrs_fd", "fd"):
            fd = self.__dict__.pop(attribute, None)
            if fd is not None:
                os.close(fd)
        self._own_fd = None

    @property
    def is_open(self) -> bool:
        """Whether there are descriptors to ask; not of one that is absent since the start."""
        return "fd" in self.__dict__

    @property
    def has_own(self) -> bool:
        """Whether imgfs has a room of its own here; one that may not be changed need have none."""
        return self._own_fd is not None

    def mark(self, marker: identity.Marker) -> None:
        """Put a marker into it, on stable storage."""
        identity.write(marker, self.own_fd)

    @property
    def own_fd(self) -> int:
        """The descriptor of imgfs's own room here; StorageFull where there was no room to make it."""
        if self._own_fd is None:
            raise StorageFull(
                f"datadir {self.path} was too full for a directory {names.OWN_DIRECTORY} when it was mounted"
            )
        return self._own_fd

    # --- files ---

    def pin(self, name: str) -> int:
        """An O_PATH descriptor of an image; it needs no permission on the file and keeps its inode.

        Raises ImageNotFound where there is no regular file of that name.
        """
        try:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            raise ImageNotFound(f"no image {name!r}") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ImageNotFound(f"no image {name!r}")
        return fd

    def status(self, name: str) -> os.stat_result:
        """lstat(2) of an image; raises ImageNotFound where there is no regular file of that name."""
        status = self.find(name)
        if status is None:
            raise ImageNotFound(f"no image {name!r}")
        return status

    def find(self, name: str) -> os.stat_result | None:
        """lstat(2) of an image; None where there is no regular file of that name."""
        try:
            status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return status if stat.S_ISREG(status.st_mode) else None

    def has_any(self, name: str) -> bool:
        """Whether anything at all has that name here, images or not."""
        try:
            os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def create(self, name: str, mode: int) -> int:
        """A new, empty file, open for reading and writing (O_EXCL: the name must be free)."""
        return self._create(name, mode, self.fd)

    def create_own(self, name: str) -> int:
        """The same in imgfs's own room."""
        return self._create(name, 0o600, self.own_fd)

    def _create(self, name: str, mode: int, directory_fd: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(name, flags, mode, dir_fd=directory_fd)
        except OSError as error:
            if error.errno == errno.EROFS:
                self._turned_read_only(READ_ONLY_SECONDS)
            raise

    def unlink(self, name: str) -> None:
        """Remove a name; what is kept for the inode goes with it."""
        os.unlink(name, dir_fd=self.fd)
        self._unsettle(name)

    def rename(self, old: str, new: str) -> None:
        """Rename within the datadir, in one step (rename(2))."""
        os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        self._unsettle(old, new)

    def exchange(self, one: str, other: str) -> None:
        """Swap two names in one step (renameat2(2))."""
        linux.exchange(self.fd, one, other)
        self._unsettle(one, other)

    def entries(self) -> Iterator[Entry]:
        """The images here, in the directory's order; symlinks, pipes and directories are no images."""
        # A descriptor of its own: scandir moves the offset, which duplicates would share.
        fd = os.open(".", _DIRECTORY, dir_fd=self.fd)
        try:
            with os.scandir(fd) as found:
                for entry in found:
                    if entry.is_file(follow_symlinks=False) and not names.is_reserved(entry.name):
                        yield Entry(entry.name, entry.inode())
        finally:
            os.close(fd)

    def inode_number(self, ino: int) -> int:
        """An inode number that no image in another datadir has, the same for as long as the inode lives."""
        if ino < 1 << 48:
            return self.tag << 48 | ino
        mixed = hashlib.blake2b(ino.to_bytes(8, "little"), digest_size=6).digest()
        return self.tag << 48 | int.from_bytes(mixed, "little")

    def identity(self, ino: int) -> int:
        """What tells images apart for whoever keeps something about one: it stays when an image is relocated."""
        return self.identities.get(ino) or self.inode_number(ino)

    def take_over(self, ino: int, identity: int) -> None:
        """A file here is from now on the image that had this identity elsewhere."""
        self.identities[ino] = identity
        while len(self.identities) > MOST_IDENTITIES:
            self.identities.pop(next(iter(self.identities)))

    # --- the filesystem below ---

    def filesystem(self) -> os.statvfs_result:
        """statvfs(3) of the filesystem below."""
        return os.fstatvfs(self.fd)

    def filesystem_type(self) -> str:
        """The type of the filesystem below, as the mount table has it; empty where that does not tell."""
        mount = mount_table.holding(self.path)
        return mount.fstype if mount else ""

    def free_bytes(self) -> int:
        """What an unprivileged user may still write, in bytes (Glance behaviour 6)."""
        numbers = self.filesystem()
        if numbers.f_flag & os.ST_RDONLY and self.writable:
            self._turned_read_only(0)
            return 0
        if self._read_only_until:
            self._turned_writable()
        if numbers.f_blocks == 0:
            return UNTOLD_BYTES
        return max(0, numbers.f_bavail * numbers.f_frsize)

    def directory_status(self) -> os.stat_result:
        """fstat(2) of the directory itself."""
        return os.fstat(self.fd)

    def sync(self) -> None:
        """Put the directory's entries on stable storage."""
        settled = self._changes
        os.fsync(self.fd)
        with self._unsettled_lock:
            if self._unsettled:
                self._unsettled = {name: at for name, at in self._unsettled.items() if at > settled}

    def is_unsettled(self) -> bool:
        """Whether names were changed here, and a power cut might undo that."""
        return bool(self._unsettled)

    def settle(self, name: str) -> None:
        """Have it durable what a name leads to here, or that it is gone: it is about to appear in another datadir.

        Raises DatadirOffline where that can't be had.
        """
        if name in self._unsettled:
            self.require_online()
            self.sync()

    def _unsettle(self, *changed: str) -> None:
        with self._unsettled_lock:
            self._changes += 1
            for name in changed:
                self._unsettled[name] = self._changes
        if len(self._unsettled) > MOST_UNSYNCED_NAMES:
            with contextlib.suppress(OSError):  # it is done all the same; they are synced later
                self.sync()

    # --- replacing an image by one in another datadir ---

    @property
    def called(self) -> str:
        """What notes call it: its identity, which stays with the disk; its path as long as it has none."""
        return self.marked_as or self.path

    def inode(self, name: str) -> Inode | None:
        """The inode of an image; None where there is no regular file of that name."""
        try:
            fd = self.pin(name)
        except ImageNotFound:
            return None
        try:
            return self.ask(inode.inode_of, fd)
        finally:
            os.close(fd)

    def note_replaced(self, name: str, old_in: "Datadir", old: Inode, new_in: "Datadir", new: Inode) -> Replaced:
        """Put on stable storage, here, that one file gives way to another; undone by `forget_replaced`."""
        token = f"{_REPLACED}{secrets.token_hex(8)}"
        note = Replaced(token, name, old_in.called, old, new_in.called, new)
        fd = self._create(token, 0o600, self.own_fd)
        try:
            with open(fd, "wb") as file:
                file.write(note.encode())
                file.flush()
                os.fsync(fd)
            os.fsync(self.own_fd)
        except BaseException:
            self._forget_note(token)
            raise
        return note

    def forget_replaced(self, note: Replaced) -> None:
        """Take the note away."""
        self._forget_note(note.token)

    def _forget_note(self, token: str) -> None:
        os.unlink(token, dir_fd=self.own_fd)

    def has_note(self, note: Replaced) -> bool:
        """Whether a note is still there."""
        try:
            os.stat(note.token, dir_fd=self.own_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def notes_of_replaced(self) -> list[Replaced]:
        """The notes that a crash left behind; those that were cut short are taken away."""
        if not self.writable or self._own_fd is None:
            return []
        tokens = [token for token in os.listdir(proc_path(self._own_fd)) if token.startswith(_REPLACED)]
        return [note for token in tokens if (note := self._read_note(token))]

    def _read_note(self, token: str) -> Replaced | None:
        """One note; None for what is none. Whoever owns the datadir may have put anything here."""
        stored = own_files.read(token, self._own_fd)
        note = None if stored is None else _decode_replaced(token, stored)
        if stored is not None and note is None:
            with contextlib.suppress(OSError):
                self._forget_note(token)
        return note

    # --- records ---

    def record_of(self, fd: int) -> Record | None:
        """The record kept with an open file, whether or not it still holds."""
        try:
            return record.decode(self.xattrs.get(fd, record.XATTR))
        except OSError as error:
            if error.errno == errno.ENODATA:
                return None
            raise

    def inspect(self, name: str) -> tuple[os.stat_result, Record | None] | None:
        """The fstat(2) of an image, and its record where one holds and can be read; None where there is no image."""
        try:
            fd = self.pin(name)
        except ImageNotFound:
            return None
        try:
            status = os.fstat(fd)
            held = None
            with contextlib.suppress(OSError):
                held = self.record_of(fd)
            return status, held if held is not None and held.holds_for(status) else None
        finally:
            os.close(fd)

    # --- opening ---

    def _open(self) -> None:
        reason = unusable(self.config)
        if reason:
            raise DatadirError(reason)
        try:
            if self.writable and self.marked_as is None:
                Path(self.path).mkdir(parents=True, exist_ok=True)
            self.fd = os.open(self.path, _DIRECTORY)
        except OSError as error:
            raise DatadirError(f"datadir {self.path} can't be opened: {error.strerror}", error.errno) from None

    def _require_identity(self) -> None:
        """Before anything is written: what is known to have a marker must have it. Its disk may be gone by now."""
        if self.marked_as is None:
            return
        marker = identity.marker_in(self.fd)
        if marker is None or marker.datadir != self.marked_as:
            raise DatadirError(f"datadir {self.path} was taken away while it was opened; try again", errno.ENODEV)

    def _lock(self) -> None:
        """One imgfs at a time: two would not see each other's creates and seals."""
        kind = fcntl.LOCK_EX if self.writable else fcntl.LOCK_SH
        deadline = time.monotonic() + LOCK_WAIT_SECONDS
        while True:
            try:
                fcntl.flock(self.fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    message = f"datadir {self.path} is in use by another imgfs; unmount that one first"
                    raise DatadirError(message, errno.EBUSY) from None
                time.sleep(_LOCK_RETRY_SECONDS)
                continue
            except OSError as error:
                log.info("datadir %s can't be locked (%s); make sure that only one imgfs uses it", self.path, error)
            return

    def _grant_search(self, file_perm: int) -> None:
        """Let those whom `file_perm` serves reach the files (Glance behaviour 5)."""
        wanted = (0o010 if file_perm & 0o070 else 0) | (0o001 if file_perm & 0o007 else 0)
        mode = stat.S_IMODE(os.fstat(self.fd).st_mode)
        if mode | wanted == mode or not self.writable:
            return
        try:
            os.fchmod(self.fd, mode | wanted)
        except OSError as error:
            log.warning("datadir %s: can't set mode %o: %s", self.path, mode | wanted, error.strerror)

    def _own_directory(self, name: str, parent_fd: int) -> int | None:
        """The descriptor of a directory of imgfs's own, made where it is missing; None where it may not be."""
        try:
            if self.writable:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=parent_fd)
            return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent_fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in FULL_ERRNOS:
                log.warning(
                    "datadir %s is full: %s can't be made in it before there is room at a mount", self.path, name
                )
                return None
            message = f"datadir {self.path}: {name} in it can't be used: {error.strerror}"
            raise DatadirError(message, error.errno) from None

    def _choose_xattrs(self) -> Xattrs:
        if supported(self.fd):
            below: Xattrs | None = NativeXattrs()
        else:
            own = self._own_fd
            self._xattrs_fd = None if own is None else self._own_directory("xattrs", own)
            below = None if self._xattrs_fd is None else SidecarXattrs(self._xattrs_fd)
        return below if below and self.writable else ReadOnlyXattrs(below)


def answers(datadirs: Iterable[Datadir], ask: Callable[[Datadir], T]) -> list[T]:
    """What each datadir that is online answers; one that turns out to be lost is passed over."""
    given = []
    for datadir in datadirs:
        if datadir.offline is None:
            try:
                given.append(ask(datadir))
            except OSError as error:
                if not datadir.may_be_spared(error):
                    raise
    return given


def any_hangs(datadirs: Iterable[Datadir]) -> bool:
    """Whether one of them went offline while it was in use: a thread may be stuck in it."""
    return any(datadir.offline is not None and datadir.is_open for datadir in datadirs)


def give_tags(datadirs: list[Datadir]) -> None:
    """Give each datadir its tag: from its path, so that inode numbers stay the same from mount to mount."""
    taken: set[int] = set()
    for datadir in datadirs:
        digest = hashlib.blake2b(os.fsencode(datadir.path), digest_size=2).digest()
        tag = int.from_bytes(digest, "little") & 0x7FFF or 1
        while tag in taken:
            tag = tag % 0x7FFF + 1
        taken.add(tag)
        datadir.tag = tag
