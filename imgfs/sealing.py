"""From the last release of a writer to the record: digests, stable storage, permissions, record.

A `Sealer` seals images in threads of its own: quickly where the digests were computed as the bytes streamed past,
by a second reading otherwise. The record is written last, and only if the file is still what was hashed.

An empty image rests for a moment first: most are removed or filled at once (touch(1), lock files, tests of whether
a directory can be written), and a seal would cost far more than they do. Whoever asks for its digests ends its rest.

A seal that its datadir cuts short by going offline waits without a thread, and is begun again when it is back.

Threading: `seal`, `hurry` and `forget` may be called from any thread and do not wait. At most one seal of an image
is under way. `_resting_lock` guards the images that rest, and those that wait for their datadir.
"""

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from imgfs.datadir import FULL_ERRNOS, Datadir
from imgfs.errors import DatadirOffline, ImageChanging, Interrupted, SealingFailed, StorageFull
from imgfs.hashing import Digests, DigestStream, HashPool, digest_file
from imgfs.image import Image
from imgfs.record import NOTHING_EXPECTED, Expectations, Record, State
from imgfs.workers import Workers

log = logging.getLogger(__name__)

FINISHERS = 8  # for each datadir, as are the readers
READERS = 2
ATTEMPTS = 3
REST_SECONDS = 0.1
LONGEST_REST_SECONDS = 1.0  # as long as further empty images keep coming
GRACE_SECONDS = 5.0  # what digests that are nearly done get when the store closes


@dataclass(frozen=True, slots=True)
class SealingRules:
    """What a seal needs of the configuration: the hash algorithm, and the mode of sealed images (0: leave it)."""

    hashing_algo: str
    file_perm: int


class Sealer:
    """Seals images; tells `sealed` of each one when it is done with it, in whatever state."""

    def __init__(
        self,
        pool: HashPool,
        rules: SealingRules,
        sealed: Callable[[Image], None],
        make_room: Callable[[Image], None],
    ) -> None:
        """`make_room` finds an image another place where its datadir has no room for the record."""
        self._make_room = make_room
        self._pool = pool
        self._rules = rules
        self._sealed = sealed
        self._closing_since: float | None = None
        self._finishers: dict[Datadir, Workers] = {}
        self._readers: dict[Datadir, Workers] = {}
        self._resting: dict[Image, None] = {}
        self._stranded: dict[Image, None] = {}
        self._resting_lock = threading.Lock()
        self._closing = threading.Event()
        self._somebody_rests = threading.Event()
        self._clock = threading.Thread(target=self._wake_the_resting, name="imgfs-seal-clock", daemon=True)
        self._clock.start()

    def seal(self, image: Image) -> None:
        """Have an image sealed on which `begin_sealing` was True; the caller's reference goes to the sealer."""
        if not _may_rest(image):
            self._start(image)
            return
        with self._resting_lock:
            self._resting[image] = None
        if not self._somebody_rests.is_set():
            self._somebody_rests.set()
        if image.awaited or self._closing.is_set():  # they looked before it was entered
            self.hurry(image)

    def hurry(self, image: Image) -> None:
        """Somebody waits for the seal: if the image rests, that is over."""
        if self._end_rest(image):
            self._start(image)

    def forget(self, image: Image) -> None:
        """The image was removed: if it rests, there is nothing to seal any more."""
        if self._end_rest(image):
            self._give_up(image)

    def _end_rest(self, image: Image) -> bool:
        with self._resting_lock:
            return self._resting.pop(image, self) is None

    def _wake_the_resting(self) -> None:
        """Start the seals of the images that rest when no other has joined them for a while."""
        while not self._closing.is_set():
            self._somebody_rests.wait()
            latest = time.monotonic() + LONGEST_REST_SECONDS
            seen = -1
            while seen != len(self._resting) and time.monotonic() < latest:
                seen = len(self._resting)
                self._closing.wait(REST_SECONDS)
            self._somebody_rests.clear()
            self._seal_the_resting()

    def _seal_the_resting(self) -> None:
        """One after the other in each datadir: side by side they would hold up the requests that still come."""
        by_datadir: dict[Datadir, list[Image]] = {}
        for image in list(self._resting):
            by_datadir.setdefault(image.datadir, []).append(image)
        for images in by_datadir.values():
            try:
                self._workers(images[0].datadir, quick=True).submit(self._seal_in_turn, images)
            except RuntimeError as error:  # no thread is to be had
                log.warning("%d images stay stale: %s", len(images), error)
                for image in images:
                    self.forget(image)

    def _seal_in_turn(self, images: list[Image]) -> None:
        for image in images:
            if self._end_rest(image):
                self.seal_here(image)

    def _start(self, image: Image) -> None:
        if (taken := self._taken(image)) is None:
            return
        stream, _ = taken
        quick = stream is not None and not stream.broken
        try:
            self._workers(image.datadir, quick).submit(self._run, image, *taken)
        except RuntimeError:  # closing, or no thread is to be had: the image stays visibly stale
            self._give_up(image)

    def _workers(self, datadir: Datadir, quick: bool) -> Workers:
        """Of each datadir its own, so that none waits for another's; and an image that needs only its record never
        waits for one that must be read."""
        pool, most, name = (
            (self._finishers, FINISHERS, "imgfs-seal") if quick else (self._readers, READERS, "imgfs-seal-read")
        )
        return pool.get(datadir) or pool.setdefault(datadir, Workers(most, name))

    def seal_here(self, image: Image) -> None:
        """The same in the calling thread, so done when this returns."""
        if (taken := self._taken(image)) is not None:
            self._run(image, *taken)

    def _taken(self, image: Image) -> tuple[DigestStream | None, int] | None:
        """What `take_stream` gives; None where the seal must wait for its datadir."""
        try:
            return image.take_stream()
        except DatadirOffline:
            self._strand(image)
            return None

    def replace(self, lost: Collection[int]) -> None:
        """Go on without threads that are stuck in a datadir."""
        for workers in [*self._finishers.values(), *self._readers.values()]:
            workers.replace(lost)

    def resume(self, datadir: Datadir) -> None:
        """A datadir is back: begin the seals again that wait for it."""
        for image in list(self._stranded):
            if image.datadir is datadir and self._end_wait(image):
                self._start(image)

    def close(self) -> None:
        """Finish the seals that need no reading, give up the others (they stay stale)."""
        self._closing.set()
        self._somebody_rests.set()
        self._clock.join()
        self._closing_since = time.monotonic()
        for datadir, workers in [*self._readers.items(), *self._finishers.items()]:
            workers.close(give_up=functools.partial(_is_offline, datadir))
        for image in list(self._stranded):
            if self._end_wait(image):
                log.warning("image %r in %s stays stale: its datadir is offline", image.name, image.datadir.path)
                self._give_up(image)

    def _give_up(self, image: Image) -> None:
        image.end_sealing(for_good=True)
        self._sealed(image)

    def _strand(self, image: Image) -> None:
        """Wait, without a thread, until the datadir is back."""
        with self._resting_lock:
            self._stranded[image] = None
        if image.datadir.offline is None:  # it came back before the image was entered
            self.resume(image.datadir)

    def _end_wait(self, image: Image) -> bool:
        with self._resting_lock:
            return self._stranded.pop(image, self) is None

    def _run(self, image: Image, stream: DigestStream | None, changes: int) -> None:
        try:
            self._try(image, stream, changes)
            while not image.end_sealing(for_good=self._closing_for(0)):
                self._try(image, *image.take_stream())
        except DatadirOffline as error:
            if not self._closing.is_set():
                self._strand(image)
                return
            log.warning("image %r stays stale: %s", image.name, error)
            self._give_up(image)
        else:
            self._sealed(image)

    def _try(self, image: Image, stream: DigestStream | None, changes: int) -> None:
        """One seal; what goes wrong is kept with the image. Raises DatadirOffline."""
        try:
            self._seal(image, stream, changes)
        except DatadirOffline:
            raise
        except Interrupted as reason:
            log.debug("sealing of %r given up: %s", image.name, reason)
        except OSError as error:
            log.error("image %r in %s stays stale: sealing failed: %s", image.name, image.datadir.path, error)
            image.seal_error = error
        except Exception as error:
            log.exception("image %r in %s stays stale: sealing failed", image.name, image.datadir.path)
            image.seal_error = SealingFailed(f"sealing failed: {error}")
        finally:
            if stream is not None:
                stream.break_off()

    def _seal(self, image: Image, stream: DigestStream | None, changes: int) -> None:
        for _ in range(ATTEMPTS):
            with contextlib.suppress(ImageChanging):
                digests = self._digests(image, stream, changes)
                if self._finish(image, digests, changes):
                    return
            stream = None
        raise ImageChanging(f"image {image.name!r} keeps changing behind imgfs")

    def _digests(self, image: Image, stream: DigestStream | None, changes: int) -> Digests:
        """From the stream where it saw everything (the mtime says so), by reading the file otherwise."""
        with image.change_lock:
            status = image.status()
            if status.st_mtime_ns != image.mtime_ns:
                stream, image.mtime_ns = None, status.st_mtime_ns

        def outdated() -> bool:
            return image.name is None or image.changes != changes

        if stream is not None:
            digests = stream.finish(status.st_size, lambda: outdated() or self._closing_for(GRACE_SECONDS))
            if digests is not None:
                return digests
        fd = image.open_for_read()
        # A store through a mapping to a page that is dirty already does not move the mtime; to a clean one it does.
        image.sync()
        return digest_file(
            fd,
            status.st_size,
            self._pool,
            self._rules.hashing_algo,
            lambda: outdated() or self._closing_for(0),
            lambda *arguments: image.datadir.ask(os.pread, *arguments),
        )

    def _closing_for(self, seconds: float) -> bool:
        return self._closing_since is not None and time.monotonic() - self._closing_since >= seconds

    def _finish(self, image: Image, digests: Digests, changes: int) -> bool:
        """Make the bytes durable, then vouch for them; False where they are no longer those hashed."""
        if image.name is None:
            raise Interrupted("the image was removed")
        if digests.size:  # an empty image has no bytes that must be there before its record
            image.sync()
        with image.change_lock:
            if image.changes != changes or (image.unsealed and image.writing):
                raise Interrupted("the image is being changed again")
            status = image.status()
            if (status.st_size, status.st_mtime_ns) != (digests.size, image.mtime_ns):
                return False
            self._set_permissions(image)
            self._record(image, digests, status.st_mtime_ns)
        return True

    def _set_permissions(self, image: Image) -> None:
        if not self._rules.file_perm or not image.datadir.writable:
            return
        try:
            image.set_mode(self._rules.file_perm)
        except OSError as error:
            log.warning("image %r: can't set mode %o: %s", image.name, self._rules.file_perm, error.strerror)

    def _record(self, image: Image, digests: Digests, mtime_ns: int) -> None:
        expectations = _expectations(image)
        unmet = expectations.unmet(digests)
        state = State.FAILED if unmet else State.ACTIVE
        self._store(image, Record(state, mtime_ns, digests, expectations))
        image.expectations = NOTHING_EXPECTED
        # Whoever reads a digest, or that the image failed, can rely on it after a crash, too.
        image.sync()
        if image.is_new:
            image.datadir.sync()
            image.is_new = False
        if unmet:
            log.error("image %r in %s failed: its %s", image.name, image.datadir.path, unmet)
        with image.lock:
            image.unsealed = False
            image.failed = unmet is not None

    def _store(self, image: Image, new: Record) -> None:
        try:
            image.store_record(new)
        except OSError as error:
            if error.errno not in FULL_ERRNOS:
                raise
            try:
                self._make_room(image)
            except StorageFull:
                if image.name is None or not image.status().st_nlink:
                    raise Interrupted("the image was removed") from None
                raise
            image.store_record(new.stamped(image.status().st_mtime_ns))


def _may_rest(image: Image) -> bool:
    try:
        return image.may_rest()
    except OSError:  # the seal will say so
        return False


def _is_offline(datadir: Datadir) -> bool:
    return datadir.offline is not None


def _expectations(image: Image) -> Expectations:
    """Those declared in this life of the image, or those that a crash left unanswered."""
    if image.expectations != NOTHING_EXPECTED:
        return image.expectations
    held = image.stored_record()
    return held.expectations if held is not None and held.state is State.SAVING else NOTHING_EXPECTED
