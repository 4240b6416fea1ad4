"""The /dev/fuse descriptor: the only place that reads, writes or ioctls it.

A `Device` is one descriptor of a connection; `clone()` gives another one with its own queue of requests being
worked on, so that reader threads do not get into each other's way. A reply goes to the descriptor its request
came from. Each `Device` has one reading thread; writing and the ioctls are safe from any.
"""

import errno
import fcntl
import os
import select
import time

from imgfs.kernel import abi

PATH = "/dev/fuse"
_HEADERS = abi.fuse_in_header.size + abi.fuse_write_in.size
_OUT_HEADER_SIZE = abi.fuse_out_header.size
_pack_out_header = abi.fuse_out_header.pack
_SMALL_BYTES = 4096  # to copy so little costs less than to write it as two parts
_LARGE_BYTES = 64 << 10  # to copy so much costs more than room for the largest request; one seldom comes alone
_GONE = frozenset({errno.ENODEV, errno.ECONNABORTED, errno.EBADF})
_AGAIN = frozenset({errno.EINTR, errno.EAGAIN, errno.ENOENT})

Payload = bytes | bytearray | memoryview


class Device:
    """One open descriptor of a FUSE connection, and its read buffer."""

    def __init__(self, fd: int, max_write: int = abi.FUSE_MIN_READ_BUFFER) -> None:
        self.fd = fd
        self.resize(max_write)
        self._incoming = select.poll()
        self._incoming.register(fd, select.POLLIN)

    def resize(self, max_write: int) -> None:
        """Make room for requests that carry up to `max_write` bytes of data."""
        self._buffer = bytearray(max(_HEADERS + max_write, abi.FUSE_MIN_READ_BUFFER))
        self._view = memoryview(self._buffer)
        self._max_write = max_write
        self._large = False  # the request before was

    def clone(self) -> "Device":
        """Another descriptor of the same connection; OSError where the kernel has none."""
        fd = os.open(PATH, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, abi.FUSE_DEV_IOC_CLONE, abi.fuse_backing_id.pack(self.fd))
        except OSError:
            os.close(fd)
            raise
        return Device(fd, self._max_write)

    def comes_within(self, seconds: float) -> bool:
        """Look out for the next request without going to sleep."""
        deadline = time.monotonic() + seconds
        while not self._incoming.poll(0):
            if time.monotonic() > deadline:
                return False
        return True

    def read(self) -> bytes | None:
        """The next request; None once the connection is gone (unmounted or aborted)."""
        while True:
            try:
                if self._large:
                    data = os.read(self.fd, len(self._buffer))
                else:
                    data = bytes(self._view[: os.readv(self.fd, (self._buffer,))])
                self._large = len(data) >= _LARGE_BYTES
                return data
            except OSError as error:
                if error.errno in _GONE:
                    return None
                if error.errno not in _AGAIN:
                    raise

    def reply(self, unique: int, payload: Payload) -> None:
        """Answer a request with success."""
        length = _OUT_HEADER_SIZE + len(payload)
        self._write(_pack_out_header(length, 0, unique), payload)

    def refuse(self, unique: int, code: int) -> None:
        """Answer a request with a (positive) errno."""
        self._write(_pack_out_header(_OUT_HEADER_SIZE, -code, unique), b"")

    def notify(self, notification: bytes) -> None:
        """Send a notification; what the kernel does not know anyway is no error."""
        self._write(notification, b"")

    def open_backing(self, fd: int) -> int:
        """Register a file for passthrough and give its backing id (> 0); raises OSError."""
        # Only a mutable buffer makes fcntl.ioctl() give back the integer result.
        backing_map = bytearray(abi.fuse_backing_map.pack(fd, 0))
        backing_id: int = fcntl.ioctl(self.fd, abi.FUSE_DEV_IOC_BACKING_OPEN, backing_map)
        return backing_id

    def close_backing(self, backing_id: int) -> None:
        fcntl.ioctl(self.fd, abi.FUSE_DEV_IOC_BACKING_CLOSE, abi.fuse_backing_id.pack(backing_id))

    def close(self) -> None:
        os.close(self.fd)

    def _write(self, header: bytes, payload: Payload) -> None:
        try:
            if len(payload) > _SMALL_BYTES:
                os.writev(self.fd, (header, payload))
            else:
                os.write(self.fd, header + payload)
        except OSError as error:
            # ENOENT: whoever asked has been killed, or nothing of that name is cached.
            if error.errno != errno.ENOENT and error.errno not in _GONE:
                raise


def usable() -> bool:
    """Whether this process may open /dev/fuse."""
    return os.access(PATH, os.R_OK | os.W_OK)
