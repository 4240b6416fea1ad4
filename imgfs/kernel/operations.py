"""What the transport expects of the object that answers the requests, as types only.

The names and arguments are those of fusepy's `Operations`, called through its `__call__`. The transport calls some
more that fusepy cannot deliver: `lseek`, `fallocate`, `copy_file_range`, `rename2`, `passthrough_fd`, and in place of
`getattr`, whose dictionaries take longer to make and to read than all else that a lookup needs,

    find(path)          the `Status` (status.py) of a name, None where there is no such file
    status(path, fh)    the same for what is known to be there
    statx(path, fh)     with it, when the file was made (ns), or None
"""

from typing import Any, NamedTuple, Protocol


class Operations(Protocol):
    """`operations("status", "/name", None)`: gives a value or raises OSError with a positive errno."""

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
