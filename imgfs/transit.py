"""Files in transit: copies of images on their way into a datadir, in its `.imgfs/` until they have arrived.

Two directories can't change in one step. So a note in its datadir says, on stable storage, which file the copy takes
the place of; where a crash comes between the two, the next start removes that file. Copies that had not arrived by
then are removed themselves.

Threading: a `Transit` belongs to one thread.
"""

import contextlib
import logging
import os
import secrets

from imgfs import linux, names
from imgfs.datadir import Datadir, Replaced
from imgfs.inode import Inode, inode_of
from imgfs.xattrs import proc_path

log = logging.getLogger(__name__)

_PREFIX = "transit-"


class Transit:
    """A new, empty file that has no name in its datadir yet, open for reading and writing."""

    def __init__(self, datadir: Datadir) -> None:
        self.datadir = datadir
        self._token = _PREFIX + secrets.token_hex(8)
        self._note: Replaced | None = None
        self.fd = datadir.finish(datadir.create_own, self._token)
        self.ino = os.fstat(self.fd).st_ino
        try:
            datadir.xattrs.forget(self.ino)  # of an earlier inode of this number
        except BaseException:
            self.close()
            raise

    def announce(self, name: str, old: Datadir, old_inode: Inode) -> None:
        """Put on stable storage which file this one is to replace."""
        new = self.datadir.finish(inode_of, self.fd)
        self._note = self.datadir.note_replaced(name, old, old_inode, self.datadir, new)

    def arrive(self, name: str) -> None:
        """Take the name, which must be free here, on stable storage. Raises FileExistsError.

        Where it can't be had on stable storage, the name is given up again.
        """
        self.datadir.finish(self._rename, name)
        try:
            self.datadir.sync()
        except BaseException:
            self.withdraw(name)
            raise

    def _rename(self, name: str) -> None:
        own_fd, datadir_fd = self.datadir.own_fd, self.datadir.fd
        try:
            linux.rename_new(own_fd, self._token, datadir_fd, name)
        except OSError as error:
            if error.errno not in linux.NO_RENAME_FLAGS:
                raise
            if self.datadir.has_any(name):
                raise FileExistsError(f"{name!r} is taken in {self.datadir.path}") from None
            os.rename(self._token, name, src_dir_fd=own_fd, dst_dir_fd=datadir_fd)

    def withdraw(self, name: str) -> None:
        """Give the name up again, and with it the file."""
        self.datadir.unlink(name)
        self.datadir.xattrs.forget(self.ino)

    def forget_note(self) -> None:
        """Take the note away: the other file is gone, or this one does not replace it after all."""
        if self._note is not None:
            self.datadir.forget_replaced(self._note)

    def close(self) -> None:
        """Give up the descriptor; a file that has not arrived is removed."""
        self.datadir.finish(os.close, self.fd)
        with contextlib.suppress(FileNotFoundError):
            self.datadir.finish(os.unlink, self._token, dir_fd=self.datadir.own_fd)
            self.datadir.xattrs.forget(self.ino)


def remove_leftovers(datadir: Datadir) -> None:
    """Remove the copies that a crash left in transit to a datadir."""
    if not datadir.writable or not datadir.has_own:
        return
    for token in os.listdir(proc_path(datadir.own_fd)):
        if token.startswith(_PREFIX):
            try:
                os.unlink(token, dir_fd=datadir.own_fd)
            except OSError as error:
                log.warning("%s/%s/%s can't be removed: %s", datadir.path, names.OWN_DIRECTORY, token, error.strerror)
