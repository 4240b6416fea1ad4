"""Notifications to the kernel, sent from a thread of their own.

The kernel takes the lock of the directory or of pages to obey one, which a request being worked on may hold.
So a notification is never written by whoever asks for it: it is queued, and `send` returns at once from any
thread.
"""

import logging
import queue
import threading

from imgfs.kernel.device import Device

log = logging.getLogger(__name__)


class Notifier:
    """The queue and its thread; `close` lets what is queued go out first."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._queued: set[bytes] = set()
        self._thread = threading.Thread(target=self._run, name="fuse-notifier", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, notification: bytes) -> None:
        """Queue a notification; one that is on its way anyway is not said twice."""
        if notification not in self._queued:
            self._queued.add(notification)
            self._queue.put(notification)

    def close(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (notification := self._queue.get()) is not None:
            self._queued.discard(notification)
            try:
                self._device.notify(notification)
            except OSError as error:
                log.warning("the kernel refused a notification: %s", error)
