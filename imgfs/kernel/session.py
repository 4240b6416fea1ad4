"""One mount from the handshake to its end: threads that read requests, answer them, and go.

Owns the connection: the descriptor and its clones, the reader threads, and the rule that every request gets
exactly one reply. What a request means is filesystem.py's. `mount` and `run` belong to one thread; `stop`,
`abort` and the invalidations may come from any, and wait for no request.
"""

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from imgfs import mounts
from imgfs.errors import MountError
from imgfs.kernel import abi, mount, negotiation, replies, requests
from imgfs.kernel.context import RequestContext
from imgfs.kernel.device import Device, Payload
from imgfs.kernel.filesystem import ATTEMPTS, CHANGE_WAIT_S, Filesystem
from imgfs.kernel.handles import Handles
from imgfs.kernel.mount import MountOptions
from imgfs.kernel.negotiation import Agreed, UnsupportedProtocol, Wants
from imgfs.kernel.nodes import ROOT_PATH, Nodes
from imgfs.kernel.notifier import Notifier
from imgfs.kernel.opcodes import OPCODES, SILENT
from imgfs.kernel.operations import Operations, StuckCall
from imgfs.kernel.readers import Readers
from imgfs.kernel.replies import Timeouts
from imgfs.kernel.requests import Header, MalformedRequest

log = logging.getLogger(__name__)

END_WAIT_S = 10.0
STOP_WAIT_S = 2.0
_CAP_SYS_ADMIN = 21
# Requests that change nothing, or nothing that can't be taken back.
_ASKS = frozenset(
    {
        abi.FUSE_LOOKUP,
        abi.FUSE_GETATTR,
        abi.FUSE_STATX,
        abi.FUSE_STATFS,
        abi.FUSE_ACCESS,
        abi.FUSE_GETXATTR,
        abi.FUSE_LISTXATTR,
        abi.FUSE_READDIR,
        abi.FUSE_READDIRPLUS,
        abi.FUSE_OPEN,
        abi.FUSE_READ,
        abi.FUSE_LSEEK,
    }
)
_NEVER_ON_THIS_MOUNT = frozenset({errno.EPERM, errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS})


class Found(NamedTuple):
    """The file that a name leads to: what tells it apart from others, and how many names it has."""

    ino: int
    links: int


class Route(NamedTuple):
    """What to do with one opcode."""

    parse: requests.Parser
    handle: Callable[[Header, Any], Payload]
    replies: bool


class KernelSession:
    """A mount of `operations` on `mountpoint`, served on /dev/fuse.

    `context` is the one whose `caller` and `interrupted` the operations were given. Timeouts are in seconds:
    how long the kernel may keep names, attributes, and the knowledge that a name does not exist.
    """

    def __init__(
        self,
        operations: Operations,
        mountpoint: str | os.PathLike[str],
        options: MountOptions | None = None,
        *,
        context: RequestContext | None = None,
        passthrough: bool = True,
        entry_timeout: float = 1.0,
        attr_timeout: float = 1.0,
        negative_timeout: float = 0.0,
    ) -> None:
        self.mountpoint = Path(os.path.realpath(mountpoint))
        self.passthrough = False
        self._options = options or MountOptions()
        self._wants_passthrough = passthrough
        self._context = context or RequestContext()
        self._nodes = Nodes()
        self._handles = Handles(self._register, self._unregister)
        timeouts = Timeouts.of_seconds(entry_timeout, attr_timeout)
        self._filesystem = Filesystem(
            operations,
            self._nodes,
            self._handles,
            timeouts=timeouts,
            negative_s=negative_timeout,
            passthrough=lambda: self.passthrough,
            expire=self._expire,
        )
        self._routes = self._make_routes()
        self._connection: int | None = None
        self._connected = True
        self._cut_off = False
        self._tells_requests = log.isEnabledFor(logging.DEBUG)

    # The life of the mount

    def mount(self) -> None:
        """Mount and agree on the protocol; raises `MountError`. Nothing is answered before `run`."""
        self._device = Device(mount.mount(self.mountpoint, self._options))
        try:
            agreed = self._handshake()
        except UnsupportedProtocol as error:
            self._device.close()
            mounts.detach(str(self.mountpoint))
            raise MountError(f"{self.mountpoint} can't be mounted: {error.strerror}", error.errno) from None
        self._device.resize(agreed.max_write)
        self.passthrough = agreed.passthrough
        self._has_epochs = agreed.minor >= negotiation.EPOCH_MINOR
        self._connection = mount.connection_number(self.mountpoint)
        if self._connection is not None:
            mount.set_readahead(self._connection, agreed.max_write)
        self._notifier = Notifier(self._device)
        self._readers = Readers(self._device, self._answer)

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Answer requests until the mount is gone, then release what was left open."""
        self._notifier.start()
        self._readers.run(ready, self._context.end_all, END_WAIT_S)
        self._finish()

    def stop(self) -> None:
        """Unmount; if files are open on it, whoever has them open gets ENOTCONN from now on.

        So do those who use the mount by another path (a bind mount, another mount namespace); it takes a moment to
        see that there are some.
        """
        if not self._is_unmounted() or not self._readers.has_ended(STOP_WAIT_S):
            log.warning("%s is in use; it ends all the same", self.mountpoint)
            self._cut_off = True
            self.abort()

    def abort(self) -> None:
        """End the connection at once; whoever has files open on it gets ENOTCONN."""
        if not mount.abort(self.mountpoint if self._is_here() else None, self._connection):
            self._readers.break_off()

    def _is_unmounted(self) -> bool:
        """Whether the mount point is free, now at the latest."""
        with contextlib.suppress(MountError):
            if self._is_here():
                mounts.take_away(str(self.mountpoint), lazy=False)
            return True
        return False

    def _is_here(self) -> bool:
        """Whether what is mounted on the mount point is this."""
        number = mount.connection_number(self.mountpoint)
        return number is not None and number == self._connection

    # What the kernel may have cached

    def invalidate(self, name: str, *, data: bool = False) -> None:
        """The attributes of an image changed otherwise than by a request; with `data`, its bytes too."""
        node = self._nodes.find(ROOT_PATH + name)
        if node is not None:
            self._notifier.send(replies.inval_inode(node.nodeid, 0 if data else -1, 0))

    def name_added(self, name: str) -> None:
        """A name appeared otherwise than by a request."""
        self._doubt_name(replies.inval_entry(abi.FUSE_ROOT_ID, os.fsencode(name)))
        self.invalidate_root()

    def name_removed(self, name: str) -> None:
        """A name went otherwise than by a request; what comes back under it is another image."""
        node = self._nodes.unlink(ROOT_PATH + name)
        if node is not None:
            self._doubt_name(replies.delete(abi.FUSE_ROOT_ID, node.nodeid, os.fsencode(name)))
        self.name_added(name)

    def _expire(self, nodeid: int) -> None:
        """Have the kernel ask for attributes again. That takes no lock, so it may be said while a request waits."""
        self._device.notify(replies.inval_inode(nodeid, -1, 0))

    def _doubt_name(self, notification: bytes) -> None:
        """Have the kernel ask again about a name, by this notification if there is no better way.

        To obey one about a name it takes the lock of the directory, for which it may have to wait until a request is
        answered. Were the daemon killed in that moment, the thread that sent it could not end, and with it neither
        the connection nor that request.
        """
        self._notifier.send(replies.inc_epoch() if self._has_epochs else notification)

    def look_again(self, name: str, find: Callable[[], Found | None], *, data: bool, gone: bool = False) -> None:
        """Something happened to a name behind the kernel's back, unless a request did it; `find` says what.

        Of a name that is just `gone` there is nothing to find, and nothing to say unless the kernel knows it.
        """
        path = ROOT_PATH + name
        self._filesystem.doubt(path)
        if gone and self._nodes.steady(path) and self._nodes.find(path) is None:
            return
        for _ in range(ATTEMPTS):
            node, found = self._nodes.find(path), find()
            if self._nodes.steady(path) and self._nodes.find(path) is node:
                break
            self._nodes.wait_steady(path, CHANGE_WAIT_S)
        if node is None:
            for other in self._nodes.of_file(found.ino) if found and found.links > 1 else ():
                self._notifier.send(replies.inval_inode(other.nodeid, -1, 0))
        elif found is None or node.ino not in (None, found.ino):
            self.name_removed(name)
        else:
            self.invalidate(name, data=data)

    def look_again_at_all(self) -> None:
        """Anything may have happened behind the kernel's back."""
        self._filesystem.doubt_all()
        for path in self._nodes.paths():
            self.name_removed(path.removeprefix(ROOT_PATH))
        self.invalidate_root()

    def invalidate_root(self) -> None:
        """The listing, or the attributes of the directory itself, changed otherwise than by a request."""
        self._notifier.send(replies.inval_inode(abi.FUSE_ROOT_ID, 0, 0))

    def _finish(self) -> None:
        if answering := self._readers.answering():
            log.warning("%d requests were still being worked on when the mount went", answering)
        self._connected = False
        self._context.drop_all()
        self._notifier.close()
        self._filesystem.destroy(self._cut_off)
        for failure in self._filesystem.release_all():
            log.error("an image left open could not be closed: %s", failure)
        self._readers.close()
        self._device.close()
        self._leave_no_dead_mount()

    def _leave_no_dead_mount(self) -> None:
        """After an abort the mount point still shows a file system that answers ENOTCONN."""
        if self._is_here():
            try:
                mounts.detach(str(self.mountpoint))
            except MountError as error:
                log.warning("%s", error)

    # One request, one reply

    def step_aside(self) -> None:
        """The calling thread, which works on a request, is about to wait: others are to be read meanwhile."""
        self._readers.step_aside()

    def give_up(self, calls: Iterable[StuckCall]) -> None:
        """These calls do not come back: do without their threads, and answer in place of those that are given up.

        What only asks is asked again by another thread, as it may concern something else than what is stuck.
        """
        for call in calls:
            self._readers.lose(call.thread)
            taken = self._context.take_over(call) if call.given_up else None
            if taken is None:
                continue
            if taken.header.opcode in _ASKS and not taken.again:
                arguments = (taken.device, taken.data, True)
                threading.Thread(target=self._answer, args=arguments, name="fuse-again", daemon=True).start()
            else:
                self._reply(taken.device, taken.header, b"", errno.EIO)

    def _answer(self, device: Device, data: bytes, again: bool = False) -> None:
        try:
            header = requests.parse_header(data)
        except MalformedRequest as error:
            log.error("unreadable request: %s", error)
            if len(data) >= requests.HEADER_SIZE:
                device.refuse(abi.fuse_in_header.unpack_from(data)[2], errno.EIO)
            return
        route = self._routes.get(header.opcode)
        if route is None:
            if header.opcode not in SILENT:
                device.refuse(header.unique, errno.ENOSYS)
            return
        if self._tells_requests:
            log.debug("request %d: %s of inode %d", header.unique, OPCODES[header.opcode].name, header.nodeid)
        work = self._context.begin(header, device, data, again)
        try:
            body, code = route.handle(header, route.parse(data)), 0
        except Exception as error:  # noqa: BLE001 - whatever happens, the request gets its reply
            body, code = b"", _errno_of(error, header)
        if not self._context.end(work):
            self._undo(header, body, code)
        elif route.replies:
            self._reply(device, header, body, code)

    def _undo(self, header: Header, body: Payload, code: int) -> None:
        """The request was answered in place of this thread: the kernel does not know what was done."""
        if not code and self._connected:
            try:
                self._filesystem.undo(header, body)
            except Exception:
                log.exception("%s came too late, and can't be undone", OPCODES[header.opcode].name)

    def _reply(self, device: Device, header: Header, body: Payload, code: int) -> None:
        try:
            if code:
                device.refuse(header.unique, code)
            else:
                device.reply(header.unique, body)
        except OSError as error:
            # The kernel has ended the request with EIO itself (fuse_dev_do_write in fs/fuse/dev.c).
            log.error("the kernel did not take the reply to %s: %s", OPCODES[header.opcode].name, error)

    def _make_routes(self) -> dict[int, Route]:
        ours: dict[str, Callable[[Header, Any], Payload]] = {
            "interrupt": self._interrupt,
            "destroy": self._destroy,
        }
        return {
            number: Route(
                opcode.parse,
                ours.get(opcode.name) or getattr(self._filesystem, opcode.name),
                opcode.replies,
            )
            for number, opcode in OPCODES.items()
        }

    def _interrupt(self, _header: Header, request: requests.InterruptIn) -> Payload:
        self._context.interrupt(request.unique)
        return b""

    def _destroy(self, _header: Header, _request: requests.Nothing) -> Payload:
        return b""

    # The handshake and passthrough

    def _handshake(self) -> Agreed:
        wants = Wants(passthrough=self._wants_passthrough and _may_register_backing_files())
        while (data := self._device.read()) is not None:
            header = requests.parse_header(data)
            if header.opcode != abi.FUSE_INIT:
                self._device.refuse(header.unique, errno.EIO)
                continue
            offer = requests.parse_init(data)
            try:
                agreed = negotiation.negotiate(offer, wants)
            except UnsupportedProtocol:
                self._device.refuse(header.unique, errno.EPROTO)
                raise
            self._device.reply(header.unique, negotiation.init_out(agreed))
            if offer.major == agreed.major:
                if self._wants_passthrough and not agreed.passthrough:
                    log.warning(
                        "no passthrough: %s",
                        "the kernel has none" if wants.passthrough else "it takes CAP_SYS_ADMIN",
                    )
                return agreed
        raise MountError(f"{self.mountpoint} was unmounted at once")

    def _register(self, fd: int) -> int:
        if not self.passthrough:
            return 0
        try:
            return self._device.open_backing(fd)
        except OSError as error:
            if error.errno in _NEVER_ON_THIS_MOUNT:
                self.passthrough = False
                log.warning("no passthrough any more: %s", error.strerror)
            else:
                log.info("an image is read without passthrough: %s", error.strerror)
            return 0

    def _unregister(self, backing_id: int) -> None:
        try:
            self._device.close_backing(backing_id)
        except OSError as error:
            log.warning("backing id %d can't be given back: %s", backing_id, error)


def _errno_of(error: Exception, header: Header) -> int:
    """The errno a request fails with; what nobody foresaw is logged and becomes EIO."""
    name = OPCODES[header.opcode].name
    if isinstance(error, MalformedRequest):
        log.error("malformed %s: %s", name, error)
        return errno.EIO
    # The kernel takes errnos up to 511 only.
    if isinstance(error, OSError) and error.errno and 0 < error.errno < 512:
        return error.errno
    log.error("%s of inode %d failed", name, header.nodeid, exc_info=error)
    return errno.EIO


def _may_register_backing_files() -> bool:
    """Whether this process has CAP_SYS_ADMIN (capabilities(7)), which the kernel asks of passthrough."""
    for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False
