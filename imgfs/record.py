"""The record: what is persisted about a sealed image, and whether it still holds.

It is one extended attribute of the backing file, `user.imgfs.record`, in JSON, so it follows the inode through
renames and can be read with imgfs gone. A record names the size and the mtime it was made for; a file that differs
in either has none that counts. While an image is being written its record holds the expectations declared for it.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Self

from imgfs.hashing import Digests

XATTR = "user.imgfs.record"


class State(StrEnum):
    """The state of an image, as `user.imgfs.state` shows it."""

    SAVING = "saving"
    ACTIVE = "active"
    STALE = "stale"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Expectations:
    """What was declared before sealing: a size in bytes, digests in lower-case hex; None: not declared."""

    size: int | None = None
    checksum: str | None = None
    os_hash_value: str | None = None

    def unmet(self, digests: Digests) -> str | None:
        """The first expectation that the digests do not meet, said for an operator, or None."""
        for name in ("size", "checksum", "os_hash_value"):
            expected, found = getattr(self, name), getattr(digests, name)
            if expected is not None and expected != found:
                return f"{name} is {found}, expected {expected}"
        return None


NOTHING_EXPECTED = Expectations()


@dataclass(frozen=True, slots=True)
class Record:
    """The facts of a sealed image, or the expectations of one that is being written (`digests` is None)."""

    state: State
    mtime_ns: int = 0
    digests: Digests | None = None
    expectations: Expectations = NOTHING_EXPECTED

    def holds_for(self, status: os.stat_result) -> bool:
        """Whether the record was made for the file as it is now."""
        sealed = self.digests is not None and self.state in (State.ACTIVE, State.FAILED)
        return sealed and (self.digests.size, self.mtime_ns) == (status.st_size, status.st_mtime_ns)  # type: ignore[union-attr]

    def stamped(self, mtime_ns: int) -> Self:
        """The same record for another mtime: times set through the mount do not make it stale."""
        return replace(self, mtime_ns=mtime_ns)

    def encode(self) -> bytes:
        """The form in which it is stored."""
        fields = {
            "version": 1,
            "state": self.state,
            "mtime_ns": self.mtime_ns,
            "digests": self.digests and asdict(self.digests),
            "expectations": {k: v for k, v in asdict(self.expectations).items() if v is not None},
        }
        return json.dumps({k: v for k, v in fields.items() if v}, separators=(",", ":")).encode()


def decode(stored: bytes) -> Record | None:
    """The record in its stored form; None where it is none that this version can read."""
    try:
        fields: dict[str, Any] = json.loads(stored)
        if fields["version"] != 1:
            return None
        digests = Digests(**fields["digests"]) if "digests" in fields else None
        expectations = Expectations(**fields.get("expectations", {}))
        return Record(State(fields["state"]), int(fields.get("mtime_ns", 0)), digests, expectations)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
