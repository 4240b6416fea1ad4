"""What the transport expects of the object that answers the requests, as types only.

The names and arguments are those of fusepy's `Operations`, called through its `__call__`; the transport calls
some more that fusepy cannot deliver: `statx`, `lseek`, `fallocate`, `copy_file_range`, `rename2` and
`passthrough_fd`.
"""

from typing import Any, NamedTuple, Protocol


class Operations(Protocol):
    """`operations("getattr", "/name", None)`: gives a value or raises OSError with a positive errno."""

    def __call__(self, operation: str, /, *args: Any) -> Any: ...


class StuckCall(Protocol):
    """A system call that does not come back; as long as it is under way, its thread does nothing else."""

    @property
    def thread(self) -> int: ...

    @property
    def given_up(self) -> bool: ...

    def is_under_way(self) -> bool: ...


class Caller(NamedTuple):
    """Who asks; all 0 where the kernel does, and for a process outside this PID namespace `pid` is 0."""

    uid: int
    gid: int
    pid: int
