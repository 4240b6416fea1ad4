"""The INIT handshake as a function: what the kernel offers and what imgfs wants give what both will speak.

Pure. `negotiate()` decides, `init_out()` packs the decision; the session reads and writes. See
process_init_reply() in fs/fuse/inode.c for what the kernel makes of each field.
"""

import errno
from typing import NamedTuple

from imgfs.kernel import abi
from imgfs.kernel.requests import InitIn

OLDEST_MINOR = 23
EPOCH_MINOR = 44  # FUSE_NOTIFY_INC_EPOCH
PAGE_SIZE = 4096
_PAGES_WITHOUT_MAX_PAGES = 32

# Asked for wherever the kernel offers them.
ALWAYS = (
    abi.FUSE_ASYNC_READ
    | abi.FUSE_ATOMIC_O_TRUNC
    | abi.FUSE_BIG_WRITES
    | abi.FUSE_AUTO_INVAL_DATA
    | abi.FUSE_DO_READDIRPLUS
    | abi.FUSE_READDIRPLUS_AUTO
    | abi.FUSE_ASYNC_DIO
    | abi.FUSE_PARALLEL_DIROPS
    | abi.FUSE_MAX_PAGES
    | abi.FUSE_HANDLE_KILLPRIV_V2
    | abi.FUSE_INIT_EXT
    | abi.FUSE_DIRECT_IO_ALLOW_MMAP
)


class UnsupportedProtocol(OSError):
    """The kernel speaks a protocol too old for this transport."""

    def __init__(self, major: int, minor: int) -> None:
        super().__init__(errno.EPROTO, f"the kernel speaks FUSE {major}.{minor}; 7.{OLDEST_MINOR} is needed")


class Wants(NamedTuple):
    """What this mount would like; sizes in bytes."""

    passthrough: bool = True
    max_write: int = 1 << 20
    max_readahead: int = 1 << 20
    max_background: int = 64


class Agreed(NamedTuple):
    """What kernel and imgfs will speak; `flags` has flags2 in its upper 32 bits."""

    major: int
    minor: int
    max_readahead: int
    flags: int
    max_background: int
    max_write: int
    max_pages: int
    max_stack_depth: int

    @property
    def passthrough(self) -> bool:
        """Whether opens may carry a backing id."""
        return bool(self.flags & abi.FUSE_PASSTHROUGH)


def negotiate(offer: InitIn, wants: Wants) -> Agreed:
    """The most that both sides have; raises `UnsupportedProtocol` where that is too little.

    A kernel with a greater major version is told ours, and asks again (<linux/fuse.h>, "Version
    negotiation").
    """
    if offer.major < abi.FUSE_KERNEL_VERSION or (
        offer.major == abi.FUSE_KERNEL_VERSION and offer.minor < OLDEST_MINOR
    ):
        raise UnsupportedProtocol(offer.major, offer.minor)
    flags = offer.flags & (ALWAYS | (abi.FUSE_PASSTHROUGH if wants.passthrough else 0))
    if not flags & abi.FUSE_INIT_EXT:
        flags &= 0xFFFFFFFF
    pages = wants.max_write // PAGE_SIZE
    if not flags & abi.FUSE_MAX_PAGES:
        pages = min(pages, _PAGES_WITHOUT_MAX_PAGES)
    return Agreed(
        major=abi.FUSE_KERNEL_VERSION,
        minor=min(offer.minor, abi.FUSE_KERNEL_MINOR_VERSION),
        max_readahead=min(offer.max_readahead, wants.max_readahead),
        flags=flags,
        max_background=wants.max_background,
        max_write=pages * PAGE_SIZE,
        max_pages=pages if flags & abi.FUSE_MAX_PAGES else 0,
        max_stack_depth=1 if flags & abi.FUSE_PASSTHROUGH else 0,
    )


def init_out(agreed: Agreed) -> bytes:
    """struct fuse_init_out; time_gran is 1 ns."""
    return abi.fuse_init_out.pack(
        agreed.major,
        agreed.minor,
        agreed.max_readahead,
        agreed.flags & 0xFFFFFFFF,
        agreed.max_background,
        agreed.max_background * 3 // 4,
        agreed.max_write,
        1,
        agreed.max_pages,
        0,
        agreed.flags >> 32,
        agreed.max_stack_depth,
        0,
    )
