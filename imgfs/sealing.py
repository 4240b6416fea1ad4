"""From the last release of a writer to the record: digests, stable storage, permissions, record.

A `Sealer` seals images in threads of its own: quickly where the digests were computed as the bytes streamed past,
by a second reading otherwise. The record is written last, and only if the file is still what was hashed.

Threading: `seal` may be called from any thread and does not wait. At most one seal of an image is under way.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from imgfs.errors import ImageChanging, Interrupted, SealingFailed
from imgfs.hashing import Digests, DigestStream, HashPool, digest_file
from imgfs.image import Image
from imgfs.record import Expectations, Record, State

log = logging.getLogger(__name__)

FINISHERS = 8
READERS = 2
ATTEMPTS = 3
GRACE_SECONDS = 5.0  # what digests that are nearly done get when the store closes


@dataclass(frozen=True, slots=True)
class SealingRules:
    """What a seal needs of the configuration: the hash algorithm, and the mode of sealed images (0: leave it)."""

    hashing_algo: str
    file_perm: int


class Sealer:
    """Seals images; tells `sealed` of each one when it is done with it, in whatever state."""

    def __init__(self, pool: HashPool, rules: SealingRules, sealed: Callable[[Image], None]) -> None:
        self._pool = pool
        self._rules = rules
        self._sealed = sealed
        self._closing_since: float | None = None
        # Two pools, so that an image that needs only its record never waits for one that must be read.
        self._finishers = ThreadPoolExecutor(FINISHERS, "imgfs-seal")
        self._readers = ThreadPoolExecutor(READERS, "imgfs-seal-read")

    def seal(self, image: Image) -> None:
        """Start sealing an image on which `begin_sealing` was True; the caller's reference goes to the sealer."""
        stream, changes = image.take_stream()
        quick = stream is not None and not stream.broken
        try:
            (self._finishers if quick else self._readers).submit(self._run, image, stream, changes)
        except RuntimeError:  # closing: the image stays visibly stale
            image.end_sealing(for_good=True)
            self._sealed(image)

    def seal_here(self, image: Image) -> None:
        """The same in the calling thread, so done when this returns."""
        self._run(image, *image.take_stream())

    def close(self) -> None:
        """Finish the seals that need no reading, give up the others (they stay stale)."""
        self._closing_since = time.monotonic()
        self._readers.shutdown(wait=True, cancel_futures=False)
        self._finishers.shutdown(wait=True, cancel_futures=False)

    def _run(self, image: Image, stream: DigestStream | None, changes: int) -> None:
        self._try(image, stream, changes)
        while not image.end_sealing(for_good=self._closing_for(0)):
            self._try(image, *image.take_stream())
        self._sealed(image)

    def _try(self, image: Image, stream: DigestStream | None, changes: int) -> None:
        """One seal; what goes wrong is kept with the image."""
        try:
            self._seal(image, stream, changes)
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
        return digest_file(
            image.open_for_read(),
            status.st_size,
            self._pool,
            self._rules.hashing_algo,
            lambda: outdated() or self._closing_for(0),
        )

    def _closing_for(self, seconds: float) -> bool:
        return self._closing_since is not None and time.monotonic() - self._closing_since >= seconds

    def _finish(self, image: Image, digests: Digests, changes: int) -> bool:
        """Make the bytes durable, then vouch for them; False where they are no longer those hashed."""
        if image.name is None:
            raise Interrupted("the image was removed")
        os.fsync(image.open_for_read())
        if image.is_new:
            image.datadir.sync()
            image.is_new = False
        self._set_permissions(image)
        with image.change_lock:
            if image.changes != changes:
                raise Interrupted("the image is being changed again")
            status = image.status()
            if (status.st_size, status.st_mtime_ns) != (digests.size, image.mtime_ns):
                return False
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
        image.store_record(Record(state, mtime_ns, digests, expectations))
        if unmet:
            os.fsync(image.fd)  # after a crash, too, nobody may take it for good
            log.error("image %r in %s failed: its %s", image.name, image.datadir.path, unmet)
        with image.lock:
            image.unsealed = False
            image.failed = unmet is not None


def _expectations(image: Image) -> Expectations:
    """Those declared in this life of the image, or those that a crash left unanswered."""
    if image.expectations != Expectations():
        return image.expectations
    held = image.stored_record()
    return held.expectations if held is not None and held.state is State.SAVING else Expectations()
