"""`reseal: background`: stale images are sealed by themselves, one at a time, at idle I/O priority.

One thread goes over the namespace when it starts and every now and then, and seals what is stale and has rested for
a moment (somebody may be copying into the datadir at this minute). A round looks at each image's record once.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from imgfs.errors import ImageNotFound
from imgfs.image import Image, Key
from imgfs.linux import use_idle_io_priority
from imgfs.namespace import Namespace
from imgfs.record import State

log = logging.getLogger(__name__)

PAUSE_SECONDS = 15.0
REST_SECONDS = 2.0
END_SECONDS = 0.5
_SHARE_OF_TIME = 0.05


class Resealer:
    """The background thread; `close` ends it."""

    def __init__(self, namespace: Namespace, seal: Callable[[Image], None]) -> None:
        self._namespace = namespace
        self._seal = seal
        self._closing = threading.Event()
        self._given_up: dict[Key, tuple[int, int, int]] = {}
        self._thread = threading.Thread(target=self._run, name="imgfs-reseal", daemon=True)
        self._thread.start()

    def close(self, give_up: Callable[[], bool]) -> None:
        """End the thread, or do without it once `give_up()` is true; the sealer must have given its seal up."""
        self._closing.set()
        while self._thread.is_alive() and not give_up():
            self._thread.join(END_SECONDS)

    def _run(self) -> None:
        try:
            use_idle_io_priority()
        except OSError as error:
            log.debug("images are resealed at ordinary I/O priority: %s", error)
        pause = 0.0
        while not self._closing.wait(pause):
            started = time.monotonic()
            try:
                self._round()
            except OSError as error:
                log.warning("looking for stale images failed, to be tried again: %s", error)
            pause = max(PAUSE_SECONDS, (time.monotonic() - started) / _SHARE_OF_TIME)

    def _round(self) -> None:
        for name, _ in self._namespace.listing():
            if self._closing.is_set():
                return
            with contextlib.suppress(ImageNotFound), self._namespace.image(name) as image:
                if image.state() is State.STALE and _has_rested(image):
                    self._try(image)

    def _try(self, image: Image) -> None:
        """Seal an image, but one that could not be sealed is left alone until it changes."""
        status = image.status()
        as_it_is = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if self._given_up.get(image.key) == as_it_is:
            return
        self._seal(image)
        if image.seal_error is not None:
            self._given_up[image.key] = as_it_is


def _has_rested(image: Image) -> bool:
    return time.time() - image.status().st_mtime >= REST_SECONDS or image.status().st_mtime > time.time()
