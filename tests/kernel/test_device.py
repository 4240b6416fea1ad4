"""The descriptor by itself, on a socket that gives one message a read, as /dev/fuse does."""

import os
import socket

from imgfs.kernel import abi
from imgfs.kernel.device import Device

MAX_WRITE = 1 << 20
LARGEST = abi.fuse_in_header.size + abi.fuse_write_in.size + MAX_WRITE
SO_SNDBUFFORCE = 32  # socket(7)


def test_requests_of_any_size_come_whole_whatever_the_one_before_was() -> None:
    sizes = [40, LARGEST, LARGEST, 40, 41, 65_535, 65_536, 40, LARGEST, LARGEST - 1, 64]
    sent = [os.urandom(size) for size in sizes]
    read = []
    kernel, daemon = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, daemon:
        kernel.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 2 * LARGEST)
        device = Device(daemon.fileno(), MAX_WRITE)
        for request in sent:
            kernel.send(request)
            read.append(device.read())
    assert read == sent
