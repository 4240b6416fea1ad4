"""The fusepy transport: libfuse 2, through fusepy, at the best settings it has.

It turns mount options into those of libfuse and runs its loop; requests go to ImageOperations as they come. libfuse
is looked for only when a mount is wanted, so all else works where it is absent.

Coherence: names are looked up anew at each use, attributes are trusted for `ATTR_SECONDS` on an open file only, and
cached pages are kept from one open to the next only if size and mtime are unchanged (`auto_cache`).
"""

import codecs
import errno
import logging
import os
from collections.abc import Callable
from typing import Any

from imgfs.errors import MountError
from imgfs.fuse_ops import ImageOperations
from imgfs.mounts import FSTYPE

log = logging.getLogger(__name__)

REQUEST_BYTES = 128 << 10  # the most that libfuse 2 has room for
ATTR_SECONDS = 0.1
ENCODING = "imgfs-names"


def _load() -> Any:
    try:
        import fuse  # noqa: PLC0415 - importing it loads libfuse
    except OSError:
        raise MountError(
            "libfuse 2 is not installed; install it (Debian: apt-get install libfuse2)", errno.ENOSYS
        ) from None
    return fuse


def require() -> None:
    """Raise MountError, with what to install, where libfuse 2 is absent."""
    _load()


def available() -> bool:
    """Whether libfuse 2 is here."""
    try:
        _load()
    except MountError:
        return False
    return True


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


def interrupted() -> Callable[[], bool]:
    """A function that tells whether the caller of the request at hand was interrupted (libfuse's `intr`)."""
    function = _load()._libfuse.fuse_interrupted
    return lambda: bool(function())


def serve(operations: ImageOperations, mountpoint: str, allow_other: bool, options: dict[str, str | bool]) -> None:
    """Mount, and answer requests until the mount is gone or a signal ends it (SIGTERM, SIGINT, SIGHUP).

    Raises MountError where libfuse does not come up; it has written the reason to stderr then.
    """
    fuse = _load()
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
        fuse.FUSE(operations, mountpoint, encoding=ENCODING, **(settings | options))
    except RuntimeError as error:
        raise MountError(f"libfuse could not mount or serve {mountpoint} (code {error})") from None
