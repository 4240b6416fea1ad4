"""The exceptions of the image store, each with the errno that a system call shows for it.

Every one is an `OSError`, so `error.errno` is always there and a caller that knows only system calls is
served too. Nothing else in imgfs decides which errno a condition has.
"""

import errno
import os
from typing import ClassVar


class ImgfsError(OSError):
    """Base of all errors of the store; `str(error)` is one line for an operator."""

    default_errno: ClassVar[int] = errno.EIO

    def __init__(self, message: str = "", errno: int | None = None) -> None:
        code = self.default_errno if errno is None else errno
        super().__init__(code, message or os.strerror(code))

    def __str__(self) -> str:
        return str(self.strerror)


class ImageNotFound(ImgfsError):
    """No image of that name, or none at that location."""

    default_errno = errno.ENOENT


class ImageExists(ImgfsError):
    """The name is taken, in whichever datadir."""

    default_errno = errno.EEXIST


class NameDoubled(ImgfsError):
    """The name lies in more than one datadir: which copy is meant must be settled first."""

    default_errno = errno.EBUSY


class StorageFull(ImgfsError):
    """No datadir can take the image (ENOSPC, EDQUOT and EFBIG of a datadir count alike)."""

    default_errno = errno.ENOSPC


class WriteDenied(ImgfsError):
    """The datadir may not be written: its mode is `ro`, or the process lacks the permission."""

    default_errno = errno.EACCES


class NotPermitted(ImgfsError):
    """The store does not do this: write-once images, directories, links, special files."""

    default_errno = errno.EPERM


class InvalidName(ImgfsError):
    """The name can't be that of an image: empty, `.`, `..`, with a slash or a NUL byte."""

    default_errno = errno.EINVAL


class NameTooLong(InvalidName):
    """The name has more than 255 bytes."""

    default_errno = errno.ENAMETOOLONG


class ReservedName(InvalidName):
    """The name starts with `.imgfs` or `.fuse_hidden`, which imgfs and libfuse keep for themselves."""

    default_errno = errno.EPERM


class BadLocation(ImgfsError):
    """A location that is no `file://` or `filesystem://` URI of a file in a datadir."""

    default_errno = errno.EINVAL


class InvalidValue(ImgfsError):
    """A value of the wrong form: an expectation, an offset, a length."""

    default_errno = errno.EINVAL


class NoAttribute(ImgfsError):
    """The image has no such extended attribute."""

    default_errno = errno.ENODATA


class SizeMismatch(ImgfsError):
    """More bytes, or fewer, than were declared."""

    default_errno = errno.EINVAL


class VerificationFailed(ImgfsError):
    """The verifier given to `add()` refused the bytes."""

    default_errno = errno.EBADMSG


class ImageFailed(ImgfsError):
    """The image did not meet an expectation when it was sealed; its bytes are not served."""

    default_errno = errno.EIO


class SealingFailed(ImgfsError):
    """The digests of an image could not be computed or recorded."""

    default_errno = errno.EIO


class ImageChanging(ImgfsError):
    """The image kept changing behind imgfs while its digests were computed."""

    default_errno = errno.EAGAIN


class Interrupted(ImgfsError):
    """The caller that waited for a digest was interrupted."""

    default_errno = errno.EINTR


class DatadirError(ImgfsError):
    """A datadir can't be used: missing, not writable, or in use by another imgfs."""

    default_errno = errno.EACCES


class DatadirOffline(ImgfsError):
    """The datadir that has the image does not answer, or is gone."""

    default_errno = errno.EIO


class AnsweredTooLate(DatadirOffline):
    """The datadir answers now, but whoever asked was told that it is offline: nothing more may be done for them."""


class MountError(ImgfsError):
    """The mount can't be made or taken away."""

    default_errno = errno.EBUSY
