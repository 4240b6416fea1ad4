"""Files in transit: copies of images on their way into a datadir, in its `.imgfs/` until they have arrived.

Two directories can't change in one step. So a note beside the copy says, on stable storage, which file it takes the
place of; where a crash comes between the two, the next start removes that file. Copies that had not arrived by then
are removed themselves.

Threading: a `Transit` belongs to one thread.
"""

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from imgfs import linux, names
from imgfs.datadir import Datadir
from imgfs.errors import InvalidName
from imgfs.xattrs import proc_path, read_regular

log = logging.getLogger(__name__)

_PREFIX = "transit-"
_NOTE = ".note"


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a note says: the file `ino`, once it is `name` here, replaces `old_ino` in the datadir at path `old`."""

    name: str
    ino: int
    old: str
    old_ino: int

    def encode(self) -> bytes:
        """The form in which it is stored."""
        fields = {"name": os.fsencode(self.name).hex(), "ino": self.ino, "old": self.old, "old_ino": self.old_ino}
        return json.dumps(fields).encode("ascii")


def _decode(stored: bytes) -> Arrival | None:
    """What a note says; None where it was cut short, so that what it announces was never begun."""
    try:
        fields = json.loads(stored)
        name = names.check(os.fsdecode(bytes.fromhex(fields["name"])))
        return Arrival(name, int(fields["ino"]), str(fields["old"]), int(fields["old_ino"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, InvalidName):
        return None


class Transit:
    """A new, empty file that has no name in its datadir yet, open for reading and writing."""

    def __init__(self, datadir: Datadir) -> None:
        self.datadir = datadir
        self._token = _PREFIX + secrets.token_hex(8)
        self.fd = datadir.finish(datadir.create_own, self._token)
        self.ino = os.fstat(self.fd).st_ino
        try:
            datadir.xattrs.forget(self.ino)  # of an earlier inode of this number
        except BaseException:
            self.close()
            raise

    def announce(self, name: str, old: Datadir, old_ino: int) -> None:
        """Put on stable storage which file this one is to replace."""
        self.datadir.finish(self._write_note, Arrival(name, self.ino, old.path, old_ino))

    def _write_note(self, arrival: Arrival) -> None:
        fd = self.datadir.create_own(self._token + _NOTE)
        try:
            with open(fd, "wb") as file:
                file.write(arrival.encode())
                file.flush()
                os.fsync(fd)
            os.fsync(self.datadir.own_fd)
        except BaseException:
            self.forget_note()
            raise

    def arrive(self, name: str) -> None:
        """Take the name, which must be free here, on stable storage. Raises FileExistsError."""
        self.datadir.finish(self._rename, name)
        self.datadir.sync()

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
        self.datadir.finish(os.unlink, self._token + _NOTE, dir_fd=self.datadir.own_fd)

    def close(self) -> None:
        """Give up the descriptor; a file that has not arrived is removed."""
        self.datadir.finish(os.close, self.fd)
        with contextlib.suppress(FileNotFoundError):
            self.datadir.finish(os.unlink, self._token, dir_fd=self.datadir.own_fd)
            self.datadir.xattrs.forget(self.ino)


def finish_arrivals(datadir: Datadir, datadirs: Iterable[Datadir]) -> None:
    """Complete or undo what a crash left in transit to a datadir."""
    if not datadir.writable or not datadir.has_own:
        return
    left = [token for token in os.listdir(proc_path(datadir.own_fd)) if token.startswith(_PREFIX)]
    for token in left:
        note = token.endswith(_NOTE)
        if note and not _finish(datadir, token, {other.path: other for other in datadirs}):
            continue
        try:
            os.unlink(token, dir_fd=datadir.own_fd)
        except OSError as error:
            log.warning("%s/%s/%s can't be removed: %s", datadir.path, names.OWN_DIRECTORY, token, error.strerror)


def _finish(datadir: Datadir, token: str, datadirs: dict[str, Datadir]) -> bool:
    """Do what a note asks for; False where that can't be done now."""
    arrival = _decode(read_regular(token, datadir.own_fd) or b"")
    here = datadir.find(arrival.name) if arrival else None
    if arrival is None or here is None or here.st_ino != arrival.ino:
        return True
    old = datadirs.get(arrival.old)
    if old is None or old.offline is not None or not old.writable:
        log.warning("image %r was moved from %s, which can't be looked into now", arrival.name, arrival.old)
        return False
    there = old.find(arrival.name)
    if there is not None and there.st_ino == arrival.old_ino:
        log.warning("the relocation of image %r to %s was cut short; it is completed", arrival.name, datadir.path)
        datadir.sync()  # a daemon that was killed may have left its name in the caches of the system
        old.unlink(arrival.name)
        old.xattrs.forget(arrival.old_ino)
        old.sync()
    return True
