"""Who asked for what the current thread is doing, and whether they still want it.

Made before both the operations and the session, and given to both: the session enters each request, the
operations ask. `caller` and `interrupted` answer for the calling thread; outside a request they name this
process and say no.
"""

import os
import threading
from typing import NamedTuple

from imgfs.kernel.device import Device
from imgfs.kernel.operations import Caller, StuckCall
from imgfs.kernel.requests import Header
from imgfs.linux import is_dying

_REMEMBERED = 256
_NONE = Header(0, 0, 0, 0, 0, 0, 0, 0, 0)


class Work:
    """The request of one reader thread; only that thread sets it."""

    __slots__ = ("data", "device", "header", "interrupted_unique", "key", "thread")

    def __init__(self) -> None:
        self.header = _NONE
        self.interrupted_unique = 0
        self.thread = threading.get_ident()
        self.device: Device | None = None
        self.data = b""
        self.key = 0


class Unanswered(NamedTuple):
    """A request that its thread will not answer, to be answered on the device it came from."""

    header: Header
    device: Device
    data: bytes
    again: bool


class RequestContext:
    """The requests being worked on. Single dictionary operations need no lock under the interpreter's.

    Who takes a request out of `_running` has the right to answer it, and nobody else. It is there under its number;
    one that is worked on `again`, as its first thread is stuck, under the complement of that.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._running: dict[int, Work] = {}
        self._early: dict[int, None] = {}
        self._ended = False

    def caller(self) -> Caller:
        """uid, gid and pid of the process whose request the calling thread works on."""
        work: Work | None = getattr(self._local, "work", None)
        if work is None:
            return Caller(os.geteuid(), os.getegid(), os.getpid())
        return Caller(work.header.uid, work.header.gid, work.header.pid)

    def interrupted(self) -> bool:
        """Whether the calling thread's request was interrupted (signal(7)), or its mount is gone."""
        work: Work | None = getattr(self._local, "work", None)
        return work is not None and (self._ended or work.interrupted_unique == work.header.unique)

    def abandoned(self) -> bool:
        """Whether nobody waits for an answer: the mount is gone, or the signal ends whoever made the request."""
        return self._ended or (self.interrupted() and is_dying(self.caller().pid))

    def begin(self, header: Header, device: Device | None = None, data: bytes = b"", again: bool = False) -> Work:
        """The calling thread works on this request until `end`."""
        try:
            work: Work = self._local.work
        except AttributeError:
            work = self._local.work = Work()
        work.header, work.device, work.data = header, device, data
        work.key = key = ~header.unique if again else header.unique
        self._running[key] = work
        if self._early and header.unique in self._early:
            del self._early[header.unique]
            work.interrupted_unique = header.unique
        return work

    def end(self, work: Work) -> bool:
        """Whether the request is to be answered: nobody has taken it over."""
        work.data = b""
        return self._running.pop(work.key, None) is not None

    def take_over(self, call: StuckCall) -> Unanswered | None:
        """The request whose thread is stuck in a call; None where it is in none, or does answer it after all."""
        for work in list(self._running.values()):
            if work.thread == call.thread:
                key, header, device, data = work.key, work.header, work.device, work.data
                # As long as the call is under way, the thread has not gone on to another request.
                if device is not None and call.is_under_way() and self._running.pop(key, None) is not None:
                    return Unanswered(header, device, data, key < 0)
        return None

    def interrupt(self, unique: int) -> None:
        """FUSE_INTERRUPT came. It may overtake its request on another thread, and is kept for it then."""
        if work := self._running.get(unique) or self._running.get(~unique):
            work.interrupted_unique = unique
            return
        self._early[unique] = None
        if work := self._running.get(unique):
            work.interrupted_unique = unique
        if len(self._early) > _REMEMBERED:
            self._early.pop(next(iter(self._early)), None)

    def end_all(self) -> None:
        """The connection is gone: nobody waits for any answer."""
        self._ended = True

    def drop_all(self) -> None:
        """Let none of the requests that are still being worked on be answered: the descriptors are to be closed."""
        self._running.clear()
