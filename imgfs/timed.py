"""Datadirs and images whose system calls are watched, for stores with a `timeout`.

They are the plain ones with each call entered in the datadir's `Calls` while it is made; without a timeout the plain
ones are used, and nothing of this costs anything. A call that asks something is refused while the datadir is offline;
one that takes part in a change is made all the same, so that no change is left half done by imgfs itself.

Threading: as what they stand for. Nobody waits for a lock that a stuck thread holds once the datadir is offline.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from imgfs.calls import Calls
from imgfs.datadir import Datadir, Entry
from imgfs.errors import AnsweredTooLate, DatadirOffline
from imgfs.image import Image
from imgfs.xattrs import Xattrs

LOCK_WAIT_SECONDS = 0.2
_BATCH = 256
P = ParamSpec("P")
T = TypeVar("T")


def _asked(method: Callable[Concatenate[Datadir, P], T]) -> Callable[Concatenate["TimedDatadir", P], T]:
    def timed(self: "TimedDatadir", /, *args: P.args, **options: P.kwargs) -> T:
        return self.ask(method, self, *args, **options)

    return timed


def _finished(method: Callable[Concatenate[Datadir, P], T]) -> Callable[Concatenate["TimedDatadir", P], T]:
    def timed(self: "TimedDatadir", /, *args: P.args, **options: P.kwargs) -> T:
        return self.finish(method, self, *args, **options)

    return timed


class TimedDatadir(Datadir):
    """A datadir whose calls are watched."""

    is_watched = True

    def __init__(self, *args: Any, **options: Any) -> None:
        self.calls = Calls()
        super().__init__(*args, **options)

    def open(self) -> None:
        super().open()
        self.xattrs = TimedXattrs(self, self.xattrs)

    def ask(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return self._ask(call, args, options, None)

    def obtain(self, undo: Callable[[T], None], call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return self._ask(call, args, options, undo)

    def _ask(
        self, call: Callable[..., T], args: tuple[Any, ...], options: dict[str, Any], undo: Callable[[T], None] | None
    ) -> T:
        """Whoever was told that the datadir is offline must not go on when it answers after all."""
        self._require_progress()
        number = self.calls.begin()
        try:
            self.require_online()
            answer = call(*args, **options)
        except BaseException:
            if not self.calls.end(number):
                raise AnsweredTooLate(f"datadir {self.path} has answered too late") from None
            raise
        if not self.calls.end(number):
            if undo is not None:
                undo(answer)
            raise AnsweredTooLate(f"datadir {self.path} has answered too late")
        return answer

    def attempt(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        self._require_progress()
        number = self.calls.begin()
        try:
            self.require_online()
            return call(*args, **options)
        finally:
            self.calls.end(number)

    def finish(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        number = self.calls.begin(slow=True)
        try:
            return call(*args, **options)
        finally:
            self.calls.end(number)

    def check_root(self) -> None:
        number = self.calls.begin()
        try:
            super().check_root()
        finally:
            self.calls.end(number)

    find = _asked(Datadir.find)
    has_any = _asked(Datadir.has_any)
    filesystem = _asked(Datadir.filesystem)
    directory_status = _asked(Datadir.directory_status)
    unlink = _finished(Datadir.unlink)
    rename = _finished(Datadir.rename)
    exchange = _finished(Datadir.exchange)
    sync = _finished(Datadir.sync)
    note_replaced = _finished(Datadir.note_replaced)
    forget_replaced = _finished(Datadir.forget_replaced)
    notes_of_replaced = _finished(Datadir.notes_of_replaced)

    def pin(self, name: str) -> int:
        return self.obtain(os.close, super().pin, name)

    def create(self, name: str, mode: int) -> int:
        def undo(fd: int) -> None:
            os.close(fd)
            self.unlink(name)

        return self.obtain(undo, super().create, name, mode)

    def create_own(self, name: str) -> int:
        return self.obtain(os.close, super().create_own, name)

    def has_stuck(self, thread: int) -> bool:
        return self.offline is not None and self.calls.has_of(thread)

    def entries(self) -> Iterator[Entry]:
        found = super().entries()
        while batch := self.ask(lambda: list(itertools.islice(found, _BATCH))):
            yield from batch

    def come_back(self) -> None:
        self.calls.stalled = False
        super().come_back()

    def _require_progress(self) -> None:
        if self.calls.stalled:
            raise DatadirOffline(f"datadir {self.path} does not answer, and too many wait for it already")


class TimedImage(Image):
    """An image of a TimedDatadir."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.change_lock = LockOfImage(self)  # type: ignore[assignment]

    def status(self) -> os.stat_result:
        return self.datadir.ask(super().status)

    def read(self, size: int, offset: int) -> bytes:
        return self.datadir.ask(super().read, size, offset)

    def open_for_read(self) -> int:
        self.datadir.require_online()
        return super().open_for_read()

    def open_for_write(self) -> int:
        self.datadir.require_online()
        return super().open_for_write()

    def _write_all(self, data: bytes | memoryview, offset: int) -> int:
        return self.datadir.attempt(super()._write_all, data, offset)

    def close(self) -> None:
        """Where the filesystem does not answer, by a thread that may wait for it (close(2) may)."""
        if self.datadir.offline is None:
            self.datadir.finish(super().close)
        else:
            threading.Thread(target=super().close, name="imgfs-close", daemon=True).start()


class LockOfImage:
    """A change lock that nobody waits for once the datadir of the image is offline."""

    def __init__(self, image: TimedImage) -> None:
        self._image = image
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        while not self._lock.acquire(timeout=LOCK_WAIT_SECONDS):
            self._image.datadir.require_online()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


class TimedXattrs:
    """The extended attributes of a TimedDatadir."""

    def __init__(self, datadir: TimedDatadir, below: Xattrs) -> None:
        self._datadir = datadir
        self._below = below

    def get(self, fd: int, name: str) -> bytes:
        return self._datadir.ask(self._below.get, fd, name)

    def list(self, fd: int) -> list[str]:
        return self._datadir.ask(self._below.list, fd)

    def set(self, fd: int, name: str, value: bytes, flags: int = 0) -> None:
        self._datadir.attempt(self._below.set, fd, name, value, flags)

    def remove(self, fd: int, name: str) -> None:
        self._datadir.attempt(self._below.remove, fd, name)

    def forget(self, ino: int) -> None:
        self._datadir.finish(self._below.forget, ino)
