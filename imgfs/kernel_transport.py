"""The kernel transport: the FUSE protocol on /dev/fuse, spoken by imgfs itself, with passthrough where it can be had.

It joins a `KernelSession` to the operations and the store: signals end the session, and what the store changes on
its own (permissions and times of a sealed image) the kernel is told.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from imgfs.fuse_ops import ImageOperations
from imgfs.kernel import Found, KernelSession, MountOptions, RequestContext, why_unavailable

__all__ = ["NAME", "KernelTransport", "why_unavailable"]

NAME = "kernel"
SHORT_SECONDS = 1.0
"""How long the kernel may keep names and attributes where nobody tells of changes made to a datadir directly."""
LONG_SECONDS = 86400.0
"""How long it may where they are told (inotify(7))."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class KernelTransport:
    """One mount on /dev/fuse."""

    def __init__(self, passthrough: bool) -> None:
        self._context = RequestContext()
        self._wants_passthrough = passthrough
        self._session: KernelSession | None = None

    def caller(self) -> tuple[int, int, int]:
        """Uid, gid and pid of whoever made the request that the calling thread works on."""
        return self._context.caller()

    def interrupted(self) -> bool:
        """Whether they were interrupted meanwhile (FUSE_INTERRUPT)."""
        return self._context.interrupted()

    def abandoned(self) -> bool:
        """Whether nobody waits for an answer any more."""
        return self._context.abandoned()

    def describe(self) -> str:
        """What `user.imgfs.transport` shows."""
        on = self._session is not None and self._session.passthrough
        return f"{NAME}, passthrough {'on' if on else 'off'}"

    def serve(
        self,
        operations: ImageOperations,
        mountpoint: str,
        allow_other: bool,
        options: dict[str, str | bool],
        ready: Callable[[], None],
    ) -> None:
        """Mount, and answer requests until the mount is gone or a signal ends it (SIGTERM, SIGINT, SIGHUP).

        `ready` is called when requests are answered. Raises MountError.
        """
        told = operations.on_change(self._changed)
        default = LONG_SECONDS if told else SHORT_SECONDS
        self._operations = operations
        session = KernelSession(
            operations,
            mountpoint,
            _mount_options(allow_other, options),
            context=self._context,
            passthrough=self._wants_passthrough,
            entry_timeout=float(options.get("entry_timeout", default)),
            attr_timeout=float(options.get("attr_timeout", default)),
        )
        session.mount()
        self._session = session
        operations.on_stuck(session.give_up)
        operations.before_waits(session.step_aside)

        with _on_signals(session.stop):
            session.run(ready)

    def _changed(self, name: str | None, data: bool, gone: bool = False) -> None:
        """Make the kernel forget what it keeps of a changed image."""
        if self._session is None:
            return
        if name is None:
            self._session.look_again_at_all()
            return
        if not name:
            self._session.invalidate_root()
            return
        self._session.look_again(name, lambda: self._find(name), data=data, gone=gone)

    def _find(self, name: str) -> Found | None:
        try:
            status = self._operations.find(f"/{name}")
        except OSError:
            return None
        return None if status is None else Found(status.identity, status.stat.st_nlink)


@contextlib.contextmanager
def _on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` when a signal comes.

    Python runs a handler in the main thread only, which sleeps on while the kernel gives the signal to another one;
    the wake-up descriptor is written to in whichever it is (signal.set_wakeup_fd).
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def wait() -> None:
        if os.read(read_end, 1):
            stop()

    waiter = threading.Thread(target=wait, name="imgfs-signals", daemon=True)
    waiter.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(write_end)
        waiter.join()
        os.close(read_end)
        for number, handler in before.items():
            signal.signal(number, handler)


def _mount_options(allow_other: bool, options: dict[str, str | bool]) -> MountOptions:
    flags = tuple(name for name, value in options.items() if value is True)
    return MountOptions(source=str(options.get("fsname", "imgfs")), allow_other=allow_other, extra=flags)
