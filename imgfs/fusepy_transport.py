"""The fusepy transport: libfuse 2, through fusepy, at the best settings it has.

It turns mount options into those of libfuse and runs its loop; requests go to ImageOperations as they come. libfuse
is looked for only when a mount is wanted, so all else works where it is absent.

Coherence: names are looked up anew at each use, attributes are trusted for `ATTR_SECONDS` on an open file only, and
cached pages are kept from one open to the next only if size and mtime are unchanged (`auto_cache`).
"""

import codecs
import contextlib
import ctypes
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imgfs import mounts, privileges
from imgfs.errors import MountError
from imgfs.fuse_ops import ImageOperations
from imgfs.kernel import mount
from imgfs.linux import is_dying
from imgfs.mounts import FSTYPE

log = logging.getLogger(__name__)

NAME = "fusepy"
REQUEST_BYTES = 128 << 10  # the most that libfuse 2 has room for
ATTR_SECONDS = 0.1
POLL_SECONDS = 0.5
END_SECONDS = 5.0  # what requests get to finish once the mount ends, while a datadir is offline
ENCODING = "imgfs-names"


def why_unavailable() -> str | None:
    """What keeps this process from mounting with libfuse, and what to do about it; None: nothing."""
    try:
        _load()
    except OSError:
        return "libfuse 2 is not installed; install it (Debian: apt-get install libfuse2)"
    return None


def _load() -> Any:
    import fuse  # noqa: PLC0415 - importing it loads libfuse

    return fuse


def _codec(name: str) -> codecs.CodecInfo | None:
    """Names are bytes: fusepy is given a codec that loses none (os.fsencode, os.fsdecode)."""
    if name.replace("_", "-") != ENCODING:
        return None
    return codecs.CodecInfo(
        lambda text, _errors="strict": (os.fsencode(text), len(text)),
        lambda data, _errors="strict": (os.fsdecode(bytes(data)), len(data)),
        name=ENCODING,
    )


codecs.register(_codec)


class FusepyTransport:
    """One mount through fusepy."""

    def __init__(self) -> None:
        """Load libfuse; `why_unavailable` says whether that works."""
        self._fuse = _load()
        self._over = threading.Event()

    def caller(self) -> tuple[int, int, int]:
        """Uid, gid and pid of whoever made the request that the calling thread works on."""
        uid, gid, pid = self._fuse.fuse_get_context()
        return uid, gid, pid

    def interrupted(self) -> bool:
        """Whether they were interrupted meanwhile (libfuse's `intr`), or the mount is ending: nobody reads then."""
        return bool(self._fuse._libfuse.fuse_interrupted()) or self._ending()

    def abandoned(self) -> bool:
        """Whether nobody waits for an answer: the mount is ending, or the signal ends whoever made the request.

        In a thread that works on no request libfuse has nothing to say, and must not be asked.
        """
        if not self._fuse._libfuse.fuse_get_context().contents.fuse:
            return False
        return self._ending() or (self.interrupted() and is_dying(self.caller()[2]))

    def _ending(self) -> bool:
        library = self._fuse._libfuse
        return bool(library.fuse_exited(ctypes.c_void_p(library.fuse_get_context().contents.fuse)))

    def _end_in_any_case(self, session: ctypes.c_void_p, mountpoint: str, operations: ImageOperations) -> None:
        """libfuse waits at the end for all its threads: where some are stuck in a datadir, end without it."""
        ending_since: float | None = None
        while not self._over.wait(POLL_SECONDS):
            if ending_since is None and self._fuse._libfuse.fuse_exited(session):
                ending_since = time.monotonic()
            if ending_since is None or not operations.misses_a_datadir():
                continue
            if time.monotonic() - ending_since > END_SECONDS:
                log.warning("requests are stuck in a datadir that is offline; the daemon ends without them")
                operations.finish()
                mount.abort(Path(mountpoint), mount.connection_number(Path(mountpoint)))
                with contextlib.suppress(MountError):
                    mounts.detach(mountpoint)
                logging.shutdown()
                os._exit(0)

    def describe(self) -> str:
        """What `user.imgfs.transport` shows."""
        return NAME

    def serve(
        self,
        operations: ImageOperations,
        mountpoint: str,
        allow_other: bool,
        options: dict[str, str | bool],
        ready: Callable[[], None],
    ) -> None:
        """Mount, and answer requests until the mount is gone or a signal ends it (SIGTERM, SIGINT, SIGHUP).

        `ready` is called as the mount comes up. Raises MountError where libfuse does not come up; it has written
        the reason to stderr then.
        """

        def up() -> None:
            privileges.keep_descriptors_to_ourselves()  # libfuse's own of /dev/fuse, too
            session = ctypes.c_void_p(self._fuse._libfuse.fuse_get_context().contents.fuse)
            arguments = (session, mountpoint, operations)
            threading.Thread(target=self._end_in_any_case, args=arguments, name="imgfs-end", daemon=True).start()
            ready()

        operations.on_init(up)
        operations.on_destroy(self._over.set)
        settings: dict[str, Any] = {
            "foreground": True,
            "fsname": "imgfs",
            "subtype": FSTYPE.partition(".")[2],
            "default_permissions": True,
            "allow_other": allow_other,
            "use_ino": True,
            "big_writes": True,
            "max_read": REQUEST_BYTES,
            "max_write": REQUEST_BYTES,
            "atomic_o_trunc": True,
            "auto_cache": True,
            "ac_attr_timeout": 0,
            "attr_timeout": ATTR_SECONDS,
            "entry_timeout": 0,
            "intr": True,
        }
        try:
            self._fuse.FUSE(operations, mountpoint, encoding=ENCODING, **(settings | options))
        except RuntimeError as error:
            raise MountError(f"libfuse could not mount or serve {mountpoint} (code {error})") from None
