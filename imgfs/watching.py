"""Changes made to datadirs directly, behind imgfs: told by inotify(7), where the filesystem is local.

A `Watcher` tells names, as they change, to whoever keeps something about them. inotify sees imgfs's own changes, too,
and nothing of what other machines do to a network filesystem; the library for it is an optional requirement
(`imgfs[inotify]`). Without any of that, what is kept must be kept for a short time only.

Threading: one thread of its own calls `changed`, at once for a few changes, and then in batches: to wake up for each
of many changes of imgfs's own would cost more than they do.
"""

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from imgfs import names
from imgfs.datadir import Datadir
from imgfs.xattrs import proc_path

log = logging.getLogger(__name__)

LOCAL = frozenset(
    {"bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "ntfs3"}
    | {"overlay", "ramfs", "reiserfs", "tmpfs", "vfat", "xfs", "zfs"}
)
"""Filesystems on which nobody but this machine makes changes."""
BURST_EVENTS = 64
PAUSE_SECONDS = 0.02
END_SECONDS = 5.0


class Change(NamedTuple):
    """What happened to a name: whether bytes may have changed, and whether all that is known is that it is gone."""

    data: bool
    gone: bool


Changed = Callable[[dict[str, Change] | None], None]
"""Told names, each with what happened to it; None: anything may have."""


def _inotify() -> Any:
    try:
        import inotify_simple  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return inotify_simple


class Watcher:
    """Watches the directories of datadirs until it is closed. Raises OSError where inotify has no room for them."""

    def __init__(self, datadirs: Iterable[Datadir], changed: Changed) -> None:
        self._changed = changed
        self._library = _inotify()
        self._inotify = self._library.INotify()
        flags = self._library.flags
        self._bytes = flags.MODIFY
        self._gone = flags.DELETE | flags.MOVED_FROM
        self._overflow = flags.Q_OVERFLOW
        mask = flags.CREATE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO | flags.MODIFY | flags.ATTRIB
        for datadir in datadirs:
            self._inotify.add_watch(proc_path(datadir.fd), mask)
        self._closing = threading.Event()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll = select.poll()
        for fd in (self._inotify.fileno(), self._wake_fd):
            self._poll.register(fd, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="imgfs-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, unless it is stuck where it looks for what changed."""
        self._closing.set()
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join(END_SECONDS)
        if not self._thread.is_alive():
            self._inotify.close()
            os.close(self._wake_fd)

    def _run(self) -> None:
        burst, latest = 0, 0.0
        while not self._closing.is_set():
            self._poll.poll()
            events = list(self._inotify.read(timeout=0))
            if not events:
                continue
            self._tell(events)
            burst = len(events) + (burst if time.monotonic() - latest < PAUSE_SECONDS else 0)
            if burst > BURST_EVENTS:
                self._closing.wait(PAUSE_SECONDS)
            latest = time.monotonic()

    def _tell(self, events: list[Any]) -> None:
        if any(event.mask & self._overflow for event in events):
            self._changed(None)
            return
        last = {(event.name, event.wd): event.mask for event in events}
        told: dict[str, Change] = {}
        for event in events:
            if not names.is_reserved(event.name):
                before = told.get(event.name, Change(data=False, gone=True))
                told[event.name] = Change(
                    data=before.data or bool(event.mask & self._bytes),
                    gone=before.gone and bool(last[event.name, event.wd] & self._gone),
                )
        self._changed(told)


def watch(datadirs: Iterable[Datadir], changed: Changed) -> Watcher | None:
    """A watcher, or None, with the reason in the log, where not all direct changes would be seen."""
    datadirs = list(datadirs)
    absent = [datadir for datadir in datadirs if not datadir.is_open]
    if absent:
        log.info("datadir %s is offline: changes there will not be told once it is back", absent[0].path)
        return None
    remote = [datadir for datadir in datadirs if datadir.filesystem_type() not in LOCAL]
    if remote:
        log.info("datadir %s is on %s: changes there are not told", remote[0].path, remote[0].filesystem_type())
        return None
    if _inotify() is None:
        log.info("inotify_simple is not installed: direct changes to datadirs are not told")
        return None
    try:
        return Watcher(datadirs, changed)
    except OSError as error:
        log.info("direct changes to datadirs are not told: inotify: %s", error)
        return None
