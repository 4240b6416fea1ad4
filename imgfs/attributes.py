"""The extended attributes of images and of the mount's root: `user.imgfs.*` names to values, the rest as stored.

One table says what each computed name gives. Setting or removing a computed name is accepted and has no effect, so
that `rsync -X` and `cp -a` never fail on it; `user.imgfs.expect.*` can be set while an image is being written.
Absent names raise OSError ENODATA, never ENOSYS (xattr(7)).
"""

import errno
import json
import os
import string
import threading
from collections.abc import Callable

from imgfs.datadir import Datadir
from imgfs.errors import DatadirOffline, ImgfsError, InvalidValue, NoAttribute
from imgfs.hashing import CHECKSUM_ALGO, Digests, hex_digits
from imgfs.image import Image
from imgfs.store import ImageStore, location_of
from imgfs.version import VERSION

PREFIX = "user.imgfs."
EXPECT = PREFIX + "expect."
USER = "user."

Interrupted = Callable[[], bool]
MOST_WAITING = 128
WIDEST_NUMBER = len(str(1 << 64))


class ImageAttributes:
    """The attributes of the images of a store. `interrupted` tells a wait for a digest to end."""

    def __init__(self, store: ImageStore, interrupted: Interrupted) -> None:
        self._store = store
        self._interrupted = interrupted
        self._waiting = threading.BoundedSemaphore(MOST_WAITING)
        self._computed: dict[str, Callable[[Image], str]] = {
            "state": lambda image: image.state(),
            "size": lambda image: str(image.status().st_size),
            "location": location_of,
            "datadir": lambda image: image.datadir.path,
            "metadata": lambda image: json.dumps(store.metadata_of(image)),
        }
        if store.config.store_id is not None:
            self._computed["store"] = lambda _: str(store.config.store_id)
        self._digests: dict[str, Callable[[Image], str]] = {
            "checksum": lambda image: self._digests_of(image).checksum,
            "os_hash_algo": lambda image: self._digests_of(image).os_hash_algo,
            "os_hash_value": lambda image: self._digests_of(image).os_hash_value,
        }

    def get(self, image: Image, name: str) -> bytes:
        """The value of an attribute; a digest waits until the image is sealed."""
        if name.startswith(EXPECT):
            return self._expectation(image, name.removeprefix(EXPECT))
        if not name.startswith(PREFIX):
            return _stored(image, name)
        key = name.removeprefix(PREFIX)
        value = self._computed.get(key) or self._digests.get(key)
        if value is None:
            raise NoAttribute(f"no attribute {name!r}")
        return os.fsencode(value(image))

    def names(self, image: Image) -> list[str]:
        """All names; those of digests only where they can be read without waiting for a writer at work."""
        stored = [
            name
            for name in image.datadir.xattrs.list(image.path_fd)
            if name.startswith(USER) and not name.startswith(PREFIX)
        ]
        shown = [*self._computed, *(self._digests if image.wait_for_release() else ())]
        return [PREFIX + key for key in shown] + stored

    def set(self, image: Image, name: str, value: bytes, flags: int) -> None:
        """Store a `user.*` attribute, or declare an expectation; computed ones stay as they are."""
        if name.startswith(EXPECT):
            self._expect(image, name.removeprefix(EXPECT), value)
        elif not name.startswith(PREFIX):
            require_user(name)
            image.datadir.require_writable()
            with image.change_lock:
                image.datadir.xattrs.set(image.path_fd, name, value, flags)

    def remove(self, image: Image, name: str) -> None:
        """Remove a stored attribute; raises ENODATA where it is absent."""
        if name.startswith(PREFIX):
            return
        _require_stored(name)
        image.datadir.require_writable()
        with image.change_lock:
            image.datadir.xattrs.remove(image.path_fd, name)

    def _digests_of(self, image: Image) -> Digests:
        """Waits, but not with all the threads that answer requests: too many at once are told to come again."""
        if not self._waiting.acquire(blocking=False):
            raise ImgfsError("too many wait for digests already; ask again later", errno.EAGAIN)
        try:
            return self._store.digests_of(image, self._interrupted)
        finally:
            self._waiting.release()

    def _expectation(self, image: Image, field: str) -> bytes:
        value = getattr(image.expectations, field, None) if image.unsealed else None
        if value is None:
            raise NoAttribute(f"nothing is expected of {field!r}")
        return str(value).encode()

    def _expect(self, image: Image, field: str, value: bytes) -> None:
        digits = {"checksum": hex_digits(CHECKSUM_ALGO), "os_hash_value": hex_digits(self._store.config.hashing_algo)}
        text = value.decode("ascii", "replace").strip()
        if field == "size":
            self._store.expect_size(image, _whole_number(text))
        elif field in digits:
            image.require_saving()
            image.expect(**{field: _hex(text, digits[field])})
        else:
            raise InvalidValue(f"nothing can be expected of {field!r}: only of size, checksum, os_hash_value")


class RootAttributes:
    """The attributes of the mount's root: computed ones, and user attributes kept with the first datadir."""

    def __init__(self, store: ImageStore, transport: Callable[[], str]) -> None:
        self._store = store
        self._computed: dict[str, Callable[[], str]] = {
            "version": lambda: VERSION,
            "transport": transport,
            "pid": lambda: str(os.getpid()),
            "datadirs": lambda: _steadily_long([self._describe(datadir) for datadir in store.datadirs]),
        }

    def get(self, name: str) -> bytes:
        """The value of an attribute of the root."""
        if not name.startswith(PREFIX):
            _require_stored(name)
            return self._first.xattrs.get(self._first.fd, name)
        value = self._computed.get(name.removeprefix(PREFIX))
        if value is None:
            raise NoAttribute(f"no attribute {name!r}")
        return os.fsencode(value())

    def names(self) -> list[str]:
        """All names of the root's attributes."""
        stored = self._first.xattrs.list(self._first.fd) if self._store.online_datadirs() else []
        own = [name for name in stored if name.startswith(USER) and not name.startswith(PREFIX)]
        return [PREFIX + key for key in self._computed] + own

    def set(self, name: str, value: bytes, flags: int) -> None:
        """Store a `user.*` attribute of the root; computed ones stay as they are."""
        if not name.startswith(PREFIX):
            require_user(name)
            self._first.require_writable()
            self._first.xattrs.set(self._first.fd, name, value, flags)

    def remove(self, name: str) -> None:
        """Remove a stored attribute of the root; raises ENODATA where it is absent."""
        if not name.startswith(PREFIX):
            _require_stored(name)
            self._first.require_writable()
            self._first.xattrs.remove(self._first.fd, name)

    @property
    def _first(self) -> Datadir:
        online = self._store.online_datadirs()
        if not online:
            raise DatadirOffline("all datadirs are offline")
        return online[0]

    def _describe(self, datadir: Datadir) -> dict[str, object]:
        """Of a datadir that is offline, or found to be so just now, nothing is known but why."""
        numbers: dict[str, object] = {"total": 0, "free": 0, "reserved": 0, "images": 0}
        if datadir.offline is None:
            try:
                numbers = self._numbers(datadir)
            except OSError as error:
                if not datadir.is_lost(error):
                    raise
        offline = datadir.offline
        return {
            "path": datadir.path,
            "priority": datadir.priority,
            "mode": datadir.config.mode,
            "online": offline is None,
            **numbers,
            **({} if offline is None else {"reason": offline}),
        }

    def _numbers(self, datadir: Datadir) -> dict[str, object]:
        """Bytes and images."""
        numbers = datadir.filesystem()
        return {
            "total": numbers.f_blocks * numbers.f_frsize,
            "free": datadir.free_bytes(),
            "reserved": self._store.reserved_bytes(datadir),
            "images": sum(1 for _ in datadir.entries()),
        }


def _steadily_long(objects: list[dict[str, object]]) -> str:
    """JSON that does not change its length with its numbers: blanks at the end make up for short ones.

    Programs ask for the length of a value first (rsync fails where it is another by the time of its reading).
    """
    values = [value for described in objects for value in described.values()]
    short = sum(WIDEST_NUMBER - len(json.dumps(value)) for value in values if isinstance(value, int))
    return json.dumps(objects) + " " * short


def _stored(image: Image, name: str) -> bytes:
    _require_stored(name)
    return image.datadir.xattrs.get(image.path_fd, name)


def _require_stored(name: str) -> None:
    """Only `user.*` attributes are kept; of the others there is none, which the kernel asks before each write."""
    if not name.startswith(USER):
        raise NoAttribute(f"no attribute {name!r}")


def require_user(name: str) -> None:
    """Raise EOPNOTSUPP for what can't be stored: `security.*`, `trusted.*`, `system.*`."""
    if not name.startswith(USER):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def _whole_number(text: str) -> int:
    if not text.isdigit() or len(text) > 18:
        raise InvalidValue(f"a size must be a whole number of bytes, not {text[:40]!r}")
    return int(text)


def _hex(text: str, digits: int) -> str:
    if len(text) != digits or not set(text) <= set(string.hexdigits):
        raise InvalidValue(f"a digest of {digits} hex digits is wanted, not {text[:40]!r}")
    return text.lower()
