"""The kernel transport: the FUSE wire protocol on /dev/fuse, with nothing between but Python.

From bytes to operations: device (the descriptor) · requests (bytes to values) · opcodes (the table) ·
filesystem (requests to operations) · replies (values to bytes). Beside them: abi (the kernel's constants and
layouts), mount, negotiation (the handshake), nodes and handles (what the kernel holds), context (who asks),
notifier, and session, which joins them. abi, requests, replies, opcodes and negotiation are pure. Knows
nothing of images.
"""

import os
import sys

from imgfs.kernel import device
from imgfs.kernel.context import RequestContext
from imgfs.kernel.mount import MountOptions, fusermount
from imgfs.kernel.operations import Caller, Operations
from imgfs.kernel.session import Found, KernelSession

__all__ = ["Caller", "Found", "KernelSession", "MountOptions", "Operations", "RequestContext", "why_unavailable"]


def why_unavailable() -> str | None:
    """What keeps this process from mounting with the kernel transport, in a few words; None: nothing."""
    if sys.platform != "linux" or sys.byteorder != "little":
        return "it is for little-endian Linux"
    if not device.usable():
        return "/dev/fuse can't be opened"
    if os.geteuid() != 0 and fusermount() is None:
        return "not root, and fusermount3 is not installed"
    return None
