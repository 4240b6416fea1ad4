"""Running a mount: open the store, choose the transport, tell when the mount answers, end cleanly.

In the background, a child process serves while the parent waits for it to say that the mount answers; until then
the child shares the parent's stderr, so errors reach whoever typed the command.
"""

import contextlib
import errno
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from imgfs import fusepy_transport, kernel_transport, mounts, privileges
from imgfs.config import Config, Mode
from imgfs.errors import MountError
from imgfs.fuse_ops import ImageOperations
from imgfs.fusepy_transport import FusepyTransport
from imgfs.hashing import POOL_QUEUE_BYTES
from imgfs.kernel_transport import KernelTransport
from imgfs.linux import keep_freed_memory
from imgfs.store import ImageStore

log = logging.getLogger(__name__)

BLOCK_BYTES = 4 << 20  # more than a request has


@dataclass(frozen=True, slots=True)
class MountRequest:
    """What is to be mounted where: a checked configuration, a mountpoint, and how."""

    config: Config
    mountpoint: str
    allow_other: bool
    options: dict[str, str | bool] = field(default_factory=dict)
    transport: str = "auto"
    passthrough: bool = True

    @property
    def store_config(self) -> Config:
        """The configuration to serve: a mount that is read-only (-o ro) does not change the datadirs either."""
        if not self.options.get("ro"):
            return self.config
        datadirs = tuple(replace(datadir, mode=Mode.READ_ONLY) for datadir in self.config.datadirs)
        return replace(self.config, datadirs=datadirs)


def serve(request: MountRequest, ready: Callable[[], None]) -> None:
    """Mount and serve until unmounted or told to end by SIGTERM or SIGINT; `ready` is called when mounted.

    When this returns the store is closed: seals are finished, or their images visibly stale.
    """
    mountpoint = mounts.prepare(request.mountpoint, (datadir.path for datadir in request.config.datadirs))
    _raise_descriptor_limit()
    try:
        privileges.drop_capabilities()  # no thread has been made yet
    except OSError as error:
        log.warning("the daemon keeps all its capabilities: %s", error.strerror)
    logging.logThreads = False  # naming a foreign thread would keep an object for each for ever
    keep_freed_memory(POOL_QUEUE_BYTES, BLOCK_BYTES)  # the requests that wait for the hash functions come and go
    os.umask(0o022)  # for directories; images get the mode that was asked for
    transport = choose_transport(request.transport, request.passthrough)
    with ImageStore(request.store_config) as store:
        operations = ImageOperations(store, transport.caller, transport.interrupted, transport.describe)
        store.give_up_relocations_when(transport.abandoned)

        gc.freeze()  # what there is now stays: no collection need look at it again

        def tell() -> None:
            log.info("%s is served by transport %s", mountpoint, transport.describe())
            ready()

        transport.serve(operations, mountpoint, request.allow_other, request.options, tell)
        log.info("%s is unmounted; finishing", mountpoint)


def choose_transport(wanted: str, passthrough: bool) -> FusepyTransport | KernelTransport:
    """The transport asked for, or for `auto` the first that can be had. Raises MountError with what is missing."""
    missing = {}
    if wanted in (kernel_transport.NAME, "auto"):
        missing[kernel_transport.NAME] = kernel_transport.why_unavailable()
        if missing[kernel_transport.NAME] is None:
            return KernelTransport(passthrough)
    if wanted in (fusepy_transport.NAME, "auto"):
        missing[fusepy_transport.NAME] = fusepy_transport.why_unavailable()
        if missing[fusepy_transport.NAME] is None:
            return FusepyTransport()
    reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    raise MountError(f"no transport can be had: {reasons}", errno.ENOSYS)


def _raise_descriptor_limit() -> None:
    """Each image in use takes two or three descriptors."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def in_background(
    run: Callable[[Callable[[], None]], int], mountpoint: str, set_up_logging: Callable[[], None]
) -> int:
    """Call `run(ready)` in a child process of its own session; return when it is ready (0) or has ended.

    After `ready` the child's standard streams lead nowhere, and its logging is what `set_up_logging` makes it.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        os.setsid()
        os._exit(_child(run, write_end, set_up_logging))
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        answered = pipe.read(1) == b"+"
    if not answered:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1
    try:
        os.statvfs(mountpoint)  # waits until the kernel and the daemon have shaken hands
    except OSError as error:
        raise MountError(f"the mount at {mountpoint} does not answer: {error.strerror}") from None
    return 0


def _child(run: Callable[[Callable[[], None]], int], write_end: int, set_up_logging: Callable[[], None]) -> int:
    def ready() -> None:
        set_up_logging()
        _close_standard_streams()
        try:
            os.write(write_end, b"+")
        except BrokenPipeError:
            log.warning("the command was ended before the mount was ready; it is taken away again")
            os.kill(os.getpid(), signal.SIGTERM)
        os.close(write_end)

    try:
        return run(ready)
    finally:
        logging.shutdown()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def _close_standard_streams() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    os.chdir("/")
