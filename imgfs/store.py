"""The image store, and the Python API: a namespace whose images are sealed, labelled and served. No FUSE in it.

Threading: all public methods may be called from any thread.
"""

import contextlib
import errno
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from imgfs import location as locations
from imgfs import membership, names
from imgfs import metadata as labels
from imgfs.calls import Call
from imgfs.catalogue import Catalogue
from imgfs.config import Config, Reseal
from imgfs.copies import Copies
from imgfs.datadir import FULL_ERRNOS, Datadir, answers
from imgfs.errors import (
    BadLocation,
    ImageExists,
    ImageFailed,
    ImgfsError,
    InvalidValue,
    NoAttribute,
    NotPermitted,
    SealingFailed,
    SizeMismatch,
    StorageFull,
    VerificationFailed,
    WriteDenied,
)
from imgfs.hashing import Digests, DigestStream, HashPool, Stop, Verifier, never
from imgfs.health import Health
from imgfs.image import Handle, Image
from imgfs.membership import Returning
from imgfs.namespace import NOBODY_IN_PARTICULAR, Namespace, Owner
from imgfs.record import State
from imgfs.relocation import Relocator
from imgfs.resealing import Resealer
from imgfs.sealing import Sealer, SealingRules
from imgfs.timed import TimedImage
from imgfs.watching import Change, Watcher, watch

log = logging.getLogger(__name__)

NEW_IMAGE_MODE = 0o640
LONG_GAP_BYTES = 64 << 20  # takes 0.1 s to hash; a writer does not wait for more, the image is read again

T = TypeVar("T")


class ImageChanged(Protocol):
    """Told a name (None: any; empty: the listing), whether the bytes may have changed, not only attributes, and
    whether the name just went: who knows nothing of it need not look it up."""

    def __call__(self, name: str | None, data: bool, gone: bool = False, /) -> None: ...


class Readable(Protocol):
    """Where `add()` takes its bytes from, as from a binary file."""

    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Added:
    """What `add()` gives back (Glance behaviour 12)."""

    location: str
    bytes_written: int
    checksum: str
    os_hash_value: str
    metadata: labels.Metadata


class ImageStore:
    """A store of images over the datadirs of a configuration; as a context manager it closes itself."""

    def __init__(self, config: Config) -> None:
        """Open every datadir. Raises DatadirError where one can't be used."""
        self.config = config
        self.datadirs = membership.open_datadirs(config)
        self._labels = {datadir.path: self._label(datadir) for datadir in self.datadirs}
        self._pool = HashPool()
        rules = SealingRules(config.hashing_algo, config.file_perm)
        self._sealer = Sealer(self._pool, rules, self._sealed, self._make_room_for_record)
        self._changed: ImageChanged = lambda _name, _data, _gone=False: None
        self._stuck: Callable[[list[Call]], None] = lambda _calls: None
        self._watcher: Watcher | None = None
        self._resealer: Resealer | None = None
        self._health: Health | None = None
        self._copies: Copies | None = None
        self._returning: Returning | None = None
        self._catalogue = Catalogue(self.datadirs)
        try:
            self._namespace = Namespace(
                self.datadirs,
                self._new_stream,
                self._sealer.forget,
                thin=config.thin_provisioning,
                write_once=config.write_once,
                image_class=TimedImage if config.timeout_seconds else Image,
                noted=self._catalogue.note,
            )
        except BaseException:
            self._let_go()
            raise
        self._relocator = Relocator(self._namespace)
        self._copies = self._namespace.copies
        self._copies.watch(lambda name: self._changed(name, True))
        if config.reseal is Reseal.BACKGROUND:
            self._resealer = Resealer(self._namespace, self._reseal_here)
        self._health = Health(self.datadirs, config.timeout_seconds, self._health_changed, self._calls_stuck)
        self._returning = Returning(self.datadirs, self._returned)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish the seals that need no reading, leave the others stale, and let go of the datadirs."""
        self._relocator.close()
        self._let_go()

    def _let_go(self) -> None:
        if self._returning:
            self._returning.close()
        if self._watcher:
            self._watcher.close()
        self._sealer.close()
        if self._health:
            self._health.close()
        if self._resealer:
            self._resealer.close(lambda: any(datadir.offline is not None for datadir in self.datadirs))
        self._pool.close()
        if self._copies:
            self._copies.close()
        self._catalogue.close()
        for datadir in self.datadirs:
            if datadir.offline is None:  # what is stuck in one may still use its descriptors
                datadir.close()

    def on_stuck(self, stuck: Callable[[list[Call]], None]) -> None:
        """Have `stuck` called with calls that a datadir does not answer, given up or not yet; see Health."""
        self._stuck = stuck

    def _calls_stuck(self, calls: list[Call]) -> None:
        threads = {call.thread for call in calls if call.given_up}
        self._namespace.replace(threads)
        self._sealer.replace(threads)
        self._stuck(calls)

    def _health_changed(self, datadir: Datadir) -> None:
        if datadir.offline is None:
            self._sealer.resume(datadir)
            self._namespace.copies.look()
        self._changed("", False)

    def on_change(self, changed: ImageChanged) -> bool:
        """Have `changed` called when an image changes otherwise than by a call: its seal sets mode and times.

        True where changes made directly to a datadir are told, too (inotify(7)).
        """
        self._changed = changed
        self._watcher = watch(self.datadirs, self._changed_directly)
        return self._watcher is not None

    def give_up_relocations_when(self, abandoned: Stop) -> None:
        """Have it asked whether the writer that waits for a relocation, in whose thread that is, still wants it."""
        self._relocator.abandoned = abandoned

    def before_waits(self, call: Callable[[], None]) -> None:
        """Have `call` called in a writer's thread before it waits for the hash functions."""
        self._pool.before_wait = call

    def _returned(self, datadir: Datadir) -> None:
        """Serve a datadir that was absent and is open now."""
        datadir.come_back()
        self._namespace.finish_replacements()
        self._namespace.copies.look()
        if self._health:
            self._health.watch(datadir)
        self._changed(None, True)

    def _sealed(self, image: Image) -> None:
        if image.name is not None:
            self._catalogue.note(image.datadir, image.name)
            self._changed(image.name, False)
        self._namespace.let_go(image)

    def _make_room_for_record(self, image: Image) -> None:
        self._relocator.make_room_for_record(image)

    def _changed_directly(self, told: dict[str, Change] | None) -> None:
        """Pass on what may be news; of an image that is written here right now nobody keeps anything."""
        if told is None:
            self._changed(None, True)
            return
        busy = {image.name for image in self._namespace.live_images() if image.unsealed or image.sealing}
        news = {name: change for name, change in told.items() if name not in busy}
        if len(self.datadirs) > 1 and (there := [name for name, change in news.items() if not change.gone]):
            self._namespace.copies.suspect(there)
        for name, change in news.items():
            self._changed(name, *change)
        if news:
            self._changed("", False)

    def _new_stream(self) -> DigestStream:
        return DigestStream(self._pool, self.config.hashing_algo, LONG_GAP_BYTES)

    # --- the namespace ---

    def online_datadirs(self) -> list[Datadir]:
        """The datadirs that can be asked, highest priority first."""
        return self._namespace.online()

    def answers(self, ask: Callable[[Datadir], T]) -> list[T]:
        """What each datadir that is online answers; one that turns out to be lost is passed over."""
        return answers(self.datadirs, ask)

    def names(self) -> Iterator[str]:
        """The name of every image, once."""
        return (name for name, _ in self._namespace.listing())

    def listing(self) -> Iterator[tuple[str, int]]:
        """Every image, once: its name and its inode number."""
        return self._namespace.listing()

    def status(self, name: str) -> tuple[Datadir, os.stat_result]:
        """The datadir of an image and its lstat(2) there. Raises ImageNotFound."""
        return self._namespace.status(name)

    def find(self, name: str) -> tuple[Datadir, os.stat_result] | None:
        """The same; None where there is none."""
        return self._namespace.find(name)

    def size(self, name: str) -> int:
        """The size of an image in bytes. Raises ImageNotFound."""
        return self.status(name)[1].st_size

    def image(self, name: str) -> contextlib.AbstractContextManager[Image]:
        """The image of a name, for the duration of a `with` block. Raises ImageNotFound."""
        return self._namespace.image(name)

    def held(self, image: Image) -> contextlib.AbstractContextManager[Image]:
        """An image at hand, which nobody closes inside a `with` block. Raises OSError, EBADF, where somebody has."""
        return self._namespace.held(image)

    def delete(self, name: str) -> None:
        """Remove an image; handles that are open keep it readable. Raises ImageNotFound, or the true errno."""
        self._namespace.delete(name)

    def rename(self, old: str, new: str) -> None:
        """Rename an image, replacing one that has the new name; it stays in its datadir, with its record.

        Raises ImageNotFound, and NotPermitted where an active image of a write-once store would go.
        """
        self._namespace.rename(old, new, self._require_changeable)

    def rename_new(self, old: str, new: str) -> None:
        """Rename an image to a name that is free; raises ImageExists where it is not."""

        def refuse(_: Image) -> None:
            raise ImageExists(f"image {new!r} exists")

        self._namespace.rename(old, new, refuse)

    def exchange(self, one: str, other: str) -> None:
        """Swap the names of two images of one datadir in one step. Raises ImageNotFound; EXDEV across datadirs."""
        if self.config.write_once:
            raise NotPermitted("images of a write-once store are not exchanged")
        self._namespace.exchange(one, other)

    def sync(self) -> None:
        """fsync(2) of the directory: what was created, renamed and removed before stays so after a power cut."""
        self._namespace.sync()

    # --- handles ---

    def create(self, name: str, mode: int = NEW_IMAGE_MODE, owner: Owner = NOBODY_IN_PARTICULAR) -> Handle:
        """Create an image on the best datadir and open it for reading and writing.

        Raises ImageExists where the name is taken in whichever datadir, StorageFull where no datadir has room.
        """
        return Handle(self._namespace.create(name, mode, owner), writable=True)

    def open(self, name: str, flags: int = os.O_RDONLY) -> Handle:
        """Open an image; of the flags, the access mode and O_TRUNC count (open(2)).

        Raises ImageNotFound; ImageFailed for reading one that failed an expectation; for writing, NotPermitted
        where it is active and the store write-once, WriteDenied where its datadir is read-only.
        """
        return self._open(self._namespace.pin(name), flags)

    def reopen(self, handle: Handle, flags: int) -> Handle:
        """Open the image of a handle once more, whether or not it still has a name."""
        return self._open(self._namespace.hold(handle.image), flags)

    def _open(self, image: Image, flags: int) -> Handle:
        """Open an image, whose reference passes to the handle."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        try:
            self._prepare(image, writable)
            if flags & os.O_TRUNC:
                image.truncate(0)
            return Handle(image, writable)
        except BaseException:
            self._namespace.let_go(image)
            raise

    def _prepare(self, image: Image, writable: bool) -> None:
        if writable:
            self._require_changeable(image)
            image.open_for_write()
        else:
            image.open_for_read()
        held = image.valid_record()
        image.failed = held is not None and held.state is State.FAILED
        if image.failed and not writable:
            raise ImageFailed(f"image {image.name!r} failed an expectation; write it again or remove it")

    def _require_changeable(self, image: Image) -> None:
        image.datadir.require_writable()
        if self.config.write_once and (image.sealing or image.state() is State.ACTIVE):
            raise NotPermitted(f"image {image.name!r} is complete, and the store is write-once")

    def close_handle(self, handle: Handle, complete: bool = True) -> None:
        """Close an open image; the last writer to go has it sealed, unless what it wrote is not `complete`."""
        image = handle.image
        if not handle.close(complete):
            self._namespace.let_go(image)
            return
        if image.is_new and image.lacking_at is not None:
            log.error("image %r is removed: %s was full before all of it was written", image.name, image.datadir.path)
            try:
                self._namespace.discard(image)
            finally:
                image.end_sealing(for_good=True)
                self._namespace.let_go(image)
        else:
            self._sealer.seal(image)

    def discard(self, handle: Handle) -> None:
        """Remove a new image through the handle that created it, unless it has bytes by now."""
        if handle.image.is_new and not handle.status().st_size:
            self._namespace.discard(handle.image)

    def write(self, handle: Handle, data: bytes | memoryview, offset: int) -> int:
        """Write at `offset`; gives the bytes written. An image that finds no room is relocated first.

        Raises StorageFull where no datadir can take it.
        """
        written = 0
        while written < len(data):
            rest = memoryview(data)[written:] if written else data
            try:
                written += self._with_room(handle, offset + written, len(rest), handle.write, rest, offset + written)
            except OSError:
                if written:
                    break  # the next call will show it (write(2))
                raise
        return written

    def copy_range(self, source: Handle, source_offset: int, handle: Handle, offset: int, length: int) -> int:
        """copy_file_range(2); gives the bytes copied. An image that finds no room is relocated first."""
        copied: int = self._with_room(handle, offset, length, handle.copy_from, source, source_offset, offset, length)
        return copied

    def _with_room(self, handle: Handle, offset: int, length: int, act: Callable[..., T], *arguments: Any) -> T:
        """Do something that may take `length` bytes at `offset`, again wherever the image finds room.

        Raises StorageFull where no datadir can take it.
        """
        full: set[Datadir] = set()
        while True:
            datadir = handle.image.datadir
            try:
                return act(*arguments)
            except OSError as no_room:
                if no_room.errno not in FULL_ERRNOS:
                    raise
                full.add(datadir)
                try:
                    self._relocator.relocate(handle.image, offset, length, full)
                except StorageFull as error:
                    raise error from no_room

    def truncate(self, handle: Handle, size: int) -> None:
        """ftruncate(2); on an empty new image the size counts as a declared one, too (for its placement)."""
        image = handle.image
        if size and image.unsealed and image.status().st_size == 0:
            self._relocator.declare_size(image, size, strict=False)
        self._with_room(handle, size, 0, handle.truncate, size)

    def allocate(self, handle: Handle, mode: int, offset: int, length: int) -> None:
        """fallocate(2); on an empty new image it counts as a declared size, too (for its placement)."""
        image = handle.image
        if image.unsealed and image.status().st_size == 0:
            self._relocator.declare_size(image, offset + length, strict=False)
        self._with_room(handle, offset, length, handle.allocate, mode, offset, length)

    # --- sealing ---

    def state(self, name: str) -> State:
        """The state of an image; never waits. Raises ImageNotFound."""
        with self.image(name) as image:
            return image.state()

    def expect_size(self, image: Image, size: int) -> None:
        """Declare the final size in bytes of an image that is being written: reserved now, checked by its seal.

        Raises NotPermitted once the image is sealed, StorageFull where no datadir can take it.
        """
        image.require_saving()
        self._relocator.declare_size(image, size, strict=True)
        image.expect(size=size)

    def digests(self, name: str, interrupted: Stop = never) -> Digests:
        """The digests of an image; waits while it is written or sealed, has it sealed first where it is stale.

        Raises ImageNotFound, Interrupted once `interrupted()` is true, and what made sealing fail.
        """
        with self.image(name) as image:
            return self.digests_of(image, interrupted)

    def digests_of(self, image: Image, interrupted: Stop = never) -> Digests:
        """The same for an image at hand."""
        with image.awaiting_seal():
            self._sealer.hurry(image)
            return self._sealed_digests(image, interrupted)

    def _sealed_digests(self, image: Image, interrupted: Stop) -> Digests:
        image.wait_while_sealing(interrupted)
        held = image.valid_record()
        if held is None:
            if image.name is None:
                raise NoAttribute("a removed image is not sealed any more")
            self._reseal(image, self._sealer.seal)
            image.wait_while_sealing(interrupted)
            held = image.valid_record()
        if held is None or held.digests is None:
            raise image.seal_error or SealingFailed(f"image {image.name!r} could not be sealed")
        return held.digests

    def _reseal(self, image: Image, seal: Callable[[Image], None]) -> None:
        if image.begin_sealing():
            seal(self._namespace.hold(image))

    def _reseal_here(self, image: Image) -> None:
        self._reseal(image, self._sealer.seal_here)

    # --- facts ---

    def location(self, name: str) -> str:
        """The `file://` location of an image. Raises ImageNotFound."""
        with self.image(name) as image:
            return location_of(image)

    def resolve(self, location: str) -> str:
        """The name of the image at a location (Glance behaviour 15).

        Raises BadLocation where it lies in no datadir, ImageNotFound where there is no such image.
        """
        directory, _, name = locations.to_path(location).rpartition("/")
        names.check(name)
        for datadir in self.datadirs:
            if directory in (datadir.path, os.path.realpath(datadir.path)):
                datadir.require_online()
                datadir.status(name)
                return name
        raise BadLocation(f"{location!r} lies in no datadir of this store")

    def metadata(self, name: str) -> labels.Metadata:
        """A fresh copy of the metadata object of an image (Glance behaviour 13). Raises ImageNotFound."""
        with self.image(name) as image:
            return self.metadata_of(image)

    def metadata_of(self, image: Image) -> labels.Metadata:
        """The same for an image at hand."""
        return dict(json.loads(self._labels[image.datadir.path]))

    def _label(self, datadir: Datadir) -> str:
        found = labels.match(list(self.config.metadata or ()), datadir.path)
        if found is None and self.config.metadata is not None:
            log.warning("no object of the metadata file has a mountpoint that holds datadir %s", datadir.path)
        store = {"store": self.config.store_id} if self.config.store_id else {}
        return json.dumps((found or {}) | store)

    def reserved_bytes(self, datadir: Datadir) -> int:
        """What is promised to images that are being written on a datadir's filesystem, in bytes."""
        return self._namespace.reserved_bytes(datadir)

    # --- whole images ---

    def add(
        self,
        name: str,
        data: Readable | Iterable[bytes],
        size: int | None = None,
        verifier: Verifier | None = None,
        mode: int = NEW_IMAGE_MODE,
    ) -> Added:
        """Add an image from a binary file or an iterable of bytes; it is sealed when this returns (Glance 7 to 12).

        `size` is in bytes, 0 or None: unknown. Any failure removes what was written. Raises ImageExists,
        StorageFull, WriteDenied, SizeMismatch, VerificationFailed, and whatever `data` or `verifier` raise.
        """
        with _told_as_storage_errors():
            handle = self.create(name, mode)
        image = self._namespace.hold(handle.image)
        try:
            with _told_as_storage_errors():
                written = self._fill(handle, data, size, verifier)
            digests = self.digests_of(image)
            return Added(
                location_of(image), written, digests.checksum, digests.os_hash_value, self.metadata_of(image)
            )
        except BaseException:
            self._namespace.discard(image)
            raise
        finally:
            self._namespace.let_go(image)

    def _fill(
        self, handle: Handle, data: Readable | Iterable[bytes], size: int | None, verifier: Verifier | None
    ) -> int:
        """Write all of the data and close the handle; gives the bytes written."""
        try:
            if size:
                self._relocator.declare_size(handle.image, size, strict=True)
            written = 0
            for chunk in _chunks(data, self.config.chunk_size_bytes):
                if size and written + len(chunk) > size:
                    raise SizeMismatch(f"more than the declared {size} bytes came")
                # Hashed after this returns, so it must not be a buffer that its owner fills again.
                self._write_all(handle, bytes(chunk), written)
                written += len(chunk)
                if verifier is not None:
                    verifier.update(chunk)
            if size and written != size:
                raise SizeMismatch(f"{written} bytes came, {size} were declared")
            if verifier is not None and verifier.verify() is False:
                raise VerificationFailed("the verifier refused the bytes")
            return written
        except BaseException:
            self._namespace.discard(handle.image)
            raise
        finally:
            self.close_handle(handle)

    def _write_all(self, handle: Handle, chunk: bytes, offset: int) -> None:
        """Write until nothing is left, so that an error cut short by bytes already written is shown, too."""
        view = memoryview(chunk)
        while view:
            written = self.write(handle, view, offset)
            view, offset = view[written:], offset + written

    def read(self, name: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The bytes of an image, from an offset, as many as wanted, in chunks of `chunk_size` (Glance 14).

        Raises at the call: ImageNotFound, ImageFailed, and InvalidValue for a negative offset or length.
        """
        if offset < 0 or (length is not None and length < 0):
            raise InvalidValue("an offset and a length are 0 or more")
        chunks = self._read(self.open(name), offset, length)
        next(chunks)  # under way, so that dropping it closes the image
        return chunks

    def _read(self, handle: Handle, offset: int, length: int | None) -> Iterator[bytes]:
        remaining = handle.status().st_size if length is None else length
        try:
            yield b""
            while remaining and (chunk := handle.read(min(remaining, self.config.chunk_size_bytes), offset)):
                yield chunk
                offset += len(chunk)
                remaining -= len(chunk)
        finally:
            self.close_handle(handle)


def location_of(image: Image) -> str:
    """The `file://` location of an image at hand. Raises NoAttribute where it was removed."""
    if image.name is None:
        raise NoAttribute("a removed image has no location")
    return locations.to_uri(f"{image.datadir.path}/{image.name}")


def _chunks(data: Readable | Iterable[bytes], size: int) -> Iterator[bytes]:
    if hasattr(data, "read"):
        yield from iter(lambda: data.read(size), b"")
    else:
        yield from data


@contextlib.contextmanager
def _told_as_storage_errors() -> Iterator[None]:
    """Glance behaviour 11: no room, and no permission, have exceptions of their own."""
    try:
        yield
    except ImgfsError:
        raise
    except OSError as error:
        if error.errno in FULL_ERRNOS:
            raise StorageFull(f"the datadir is full: {error.strerror}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise WriteDenied(f"the datadir can't be written: {error.strerror}") from error
        raise
