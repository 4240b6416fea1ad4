"""Choosing the datadir for a new image (Glance behaviour 6). Pure: candidates and a size in, an order out.

It is lazy: a datadir is measured only when those of higher priority did not do.
"""

from collections.abc import Iterable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

T = TypeVar("T")

UNKNOWN_SIZE_BYTES = 1 << 20
"""Room that a datadir must have for an image of unknown size; images are rarely smaller."""


class Prioritized(Protocol):
    """What has a priority; higher is preferred."""

    @property
    def priority(self) -> int: ...


P = TypeVar("P", bound=Prioritized)


class Candidate(NamedTuple, Generic[T]):
    """A datadir that takes new images, with what it can still take: free bytes less reserved and `min_free`."""

    datadir: T
    free_bytes: int


def tiers(datadirs: Iterable[P]) -> list[list[P]]:
    """The datadirs by priority, the highest first."""
    by_priority: dict[int, list[P]] = {}
    for datadir in datadirs:
        by_priority.setdefault(datadir.priority, []).append(datadir)
    return [by_priority[priority] for priority in sorted(by_priority, reverse=True)]


def order(candidates: Iterable[Iterable[Candidate[T]]], size: int | None) -> Iterator[T]:
    """The datadirs that can take `size` bytes, best first: by tiers of priority, in each by free space.

    An unknown size (None) asks for a little room; where no datadir has that, any free byte will do. Empty: full.
    """
    wanted = UNKNOWN_SIZE_BYTES if size is None else max(size, 1)
    narrow: list[T] = []
    is_full = True
    for tier in candidates:
        for datadir, free_bytes in sorted(tier, key=_least_free_first, reverse=True):
            if free_bytes >= wanted:
                is_full = False
                yield datadir
            elif size is None and free_bytes > 0:
                narrow.append(datadir)
    if is_full:
        yield from narrow


def _least_free_first(candidate: Candidate[T]) -> int:
    return candidate.free_bytes
