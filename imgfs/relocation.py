"""Relocation: an image that found no room goes on in the next datadir that can take it, and its writers with it.

Its bytes are copied, holes kept, into a file in transit, which then takes over the name; every handle goes on in
that. The room is looked for before the first byte is copied, and promised meanwhile. Sizes that are declared go the
same way: where there is no room for one here, but elsewhere, the image moves there at once.

Threading: an image's `change_lock` is held while it is copied, so its writers wait; its readers, and all else, go on.
`_lock` guards the count of relocations under way.
"""

import contextlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from imgfs import sparse
from imgfs.datadir import FULL_ERRNOS, Datadir
from imgfs.errors import ImageChanging, ImageNotFound, Interrupted, StorageFull
from imgfs.hashing import Stop, never
from imgfs.image import Image
from imgfs.namespace import Namespace, Owner, Promise, give
from imgfs.times import set_times
from imgfs.transit import Transit
from imgfs.xattrs import proc_path

log = logging.getLogger(__name__)

CLOSING_SECONDS = 10.0
SYNC_BYTES = 256 << 20
RECORD_BYTES = 4096  # a filesystem may need a block for it


class Relocator:
    """Finds room for images that are being written."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self.abandoned: Stop = never  # asked in the thread that waits, if need be a writer's
        self._closing = False
        self._lock = threading.Condition()
        self._under_way = 0  # guarded by _lock

    def close(self) -> None:
        """Give up the relocations under way: their writers get ENOSPC."""
        with self._lock:
            self._closing = True
            self._lock.wait_for(lambda: not self._under_way, CLOSING_SECONDS)

    def declare_size(self, image: Image, size: int, strict: bool) -> None:
        """Reserve `size` bytes for an image that is being written, in another datadir if need be.

        An empty image also moves to a datadir of higher priority than it got without a size. Where no datadir can
        take it: StorageFull if `strict`, otherwise nothing is reserved (a sparse file may be larger than the disk).
        """
        with image.change_lock:
            fitting = self._namespace.reserve(image, size)
            here, priority = image.datadir in fitting, image.datadir.priority
            if here and (image.status().st_size or priority == fitting[0].priority):
                return
            worse = [datadir for datadir in self._namespace.datadirs if here and datadir.priority <= priority]
            try:
                self._move(
                    image, max(size, sparse.data_bytes(image.open_for_read())), size, {image.datadir, *worse}, size
                )
            except StorageFull as error:
                if strict and not here:
                    message = f"no datadir has room for the {size} bytes declared for {image.name!r}"
                    raise StorageFull(message) from error

    def relocate(self, image: Image, offset: int, length: int, full: set[Datadir]) -> None:
        """Move an image to where `length` bytes more at `offset` have room, passing over those that were `full`.

        Returns at once if the image is in none of those: another writer's relocation has brought it elsewhere.
        Raises StorageFull where no datadir can take it.
        """
        with image.change_lock:
            if image.datadir in full:
                size = sparse.data_bytes(image.open_for_read(), offset, length) + length
                self._move(image, max(size, image.declared_bytes), offset + length, full, image.declared_bytes)

    def make_room_for_record(self, image: Image) -> None:
        """Move an image that is complete, but whose datadir is too full even for its record. Raises StorageFull.

        Nothing is done where there is room (by now), but other attributes of the image may leave none to this one.
        """
        if image.datadir.free_bytes() < RECORD_BYTES:
            self.relocate(image, 0, RECORD_BYTES, {image.datadir})

    def _move(self, image: Image, size: int, end: int, passed_over: set[Datadir], declared: int) -> None:
        """Move an image to the best datadir with room for `size` bytes, in a file that may be `end` bytes long."""
        with image.held_movable(), self._under_way_with(image):
            while True:
                with self._namespace.promised(size, passed_over) as promise:
                    if self._moved(image, promise, end):
                        self._namespace.declare(image, declared)
                        return
                passed_over.add(promise.datadir)

    def _moved(self, image: Image, promise: Promise, end: int) -> bool:
        """Whether the image could be moved to this datadir. Raises StorageFull once nobody wants that any more."""
        started, path = time.monotonic(), promise.datadir.path
        log.info("image %r moves from %s to %s, where there is room for it", image.name, image.datadir.path, path)
        try:
            self._copy(image, promise, end)
        except Interrupted as reason:
            log.info("the relocation of image %r was given up: %s", image.name, reason)
            raise StorageFull(f"the relocation of image {image.name!r} was given up: {reason}") from None
        except OSError as error:
            level = logging.INFO if error.errno in FULL_ERRNOS else logging.WARNING
            log.log(level, "image %r can't move to %s: %s", image.name, path, error.strerror)
            return False
        log.info("image %r is in %s: %d bytes in %.1f s", image.name, path, promise.used, time.monotonic() - started)
        return True

    def _copy(self, image: Image, promise: Promise, end: int) -> None:
        with contextlib.closing(Transit(promise.datadir)) as transit:
            self._fill(image, transit, promise, end)
            try:
                self._namespace.replace_file(image, transit, lambda: _follow(image, transit))
            except ImageNotFound:
                self._require_wanted(image)  # it may have been removed right now
                raise

    def _fill(self, image: Image, transit: Transit, promise: Promise, end: int) -> None:
        """Make the file in transit equal to the image, on stable storage."""
        fd, before = transit.fd, image.status()
        finish: Callable[..., Any] = transit.datadir.finish
        finish(_give, fd, before)  # now, so that it counts against their quota
        finish(os.ftruncate, fd, max(end, before.st_size))  # some filesystems can't take a file so long
        _copy_xattrs(image, transit)

        def progress(copied: int) -> None:
            synced = promise.used // SYNC_BYTES
            promise.used += copied
            if promise.used // SYNC_BYTES != synced:
                finish(
                    os.fdatasync, fd
                )  # so that caches are not filled with it, and a disk that is full says so soon
            self._require_wanted(image)

        watched = (image.datadir.finish, finish) if transit.datadir.is_watched else ()
        sparse.copy(image.fd, fd, progress, *watched)
        finish(os.ftruncate, fd, before.st_size)
        _follow(image, transit)
        finish(set_times, proc_path(fd), (before.st_atime_ns, before.st_mtime_ns))
        finish(os.fsync, fd)
        after = image.status()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise ImageChanging("its file was changed directly meanwhile")

    def _require_wanted(self, image: Image) -> None:
        """Raise Interrupted where a relocation is of no use any more."""
        if self._closing:
            raise Interrupted("the store is closed")
        if image.name is None:
            raise Interrupted("it was removed")
        if self.abandoned():
            raise Interrupted("its writer was ended")

    @contextlib.contextmanager
    def _under_way_with(self, image: Image) -> Iterator[None]:
        """Inside, the image is kept though all its handles may go, and the store waits with its end."""
        with self._lock:
            self._under_way += 1
        self._namespace.hold(image)
        try:
            yield
        finally:
            self._namespace.let_go(image)
            with self._lock:
                self._under_way -= 1
                self._lock.notify_all()


def _give(fd: int, model: os.stat_result) -> None:
    """Give an open file the owner and mode of another."""
    give(fd, os.fstat(fd), stat.S_IMODE(model.st_mode), Owner(model.st_uid, model.st_gid))


def _follow(image: Image, transit: Transit) -> None:
    """Do to the file in transit what was done to the image's owner, mode and attributes meanwhile.

    Writing may have taken set-id bits away, too.
    """
    transit.datadir.finish(_give, transit.fd, image.status())
    _copy_xattrs(image, transit)


def _copy_xattrs(image: Image, transit: Transit) -> None:
    """The record goes with the others: it has no digests while the image is written, but what is expected of it."""
    wanted, there = _user_xattrs(image.datadir, image.path_fd), _user_xattrs(transit.datadir, transit.fd)
    for name in there.keys() - wanted.keys():
        transit.datadir.xattrs.remove(transit.fd, name)
    for name, value in wanted.items():
        if there.get(name) != value:
            transit.datadir.xattrs.set(transit.fd, name, value)


def _user_xattrs(datadir: Datadir, fd: int) -> dict[str, bytes]:
    xattrs = datadir.xattrs
    return {name: xattrs.get(fd, name) for name in xattrs.list(fd) if name.startswith("user.")}
