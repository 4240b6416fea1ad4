"""Which file a note means: its inode, and how that was when the note was written.

A number alone may be another file's by then; so the time of birth goes with it, where the filesystem keeps one, and
the time of the last change, of the bytes or of anything else (ctime of stat(2), which nobody can set back).

Threading: no state.
"""

import contextlib
import os
from dataclasses import dataclass

from imgfs import linux


@dataclass(frozen=True, slots=True)
class Inode:
    """A file of a datadir: its number, when it was made (None: not kept) and last changed, in ns."""

    number: int
    born_ns: int | None
    changed_ns: int

    def is_same(self, noted: "Inode") -> bool:
        """Whether this is the file that was noted, whatever was done to it since."""
        return (self.number, self.born_ns) == (noted.number, noted.born_ns)

    def is_unchanged(self, noted: "Inode") -> bool:
        """Whether nothing was done to it since, either; a power cut may have brought back an earlier state of it."""
        return self.is_same(noted) and self.changed_ns <= noted.changed_ns

    def encode(self) -> list[int | None]:
        """The form in which it is stored in JSON."""
        return [self.number, self.born_ns, self.changed_ns]


def inode_of(fd: int) -> Inode:
    """The inode of an open file (O_PATH will do)."""
    status = os.fstat(fd)
    born_ns = None
    with contextlib.suppress(OSError):  # fstat(2) works, so that is no dead filesystem, but one that lacks statx(2)
        born_ns = linux.birth_time_ns(fd)
    return Inode(status.st_ino, born_ns, status.st_ctime_ns)


def decode(stored: object) -> Inode:
    """From the stored form. Raises ValueError, TypeError or OverflowError for anything else."""
    if not isinstance(stored, list):
        raise TypeError("not an inode")
    number, born_ns, changed_ns = stored
    return Inode(int(number), None if born_ns is None else int(born_ns), int(changed_ns))
