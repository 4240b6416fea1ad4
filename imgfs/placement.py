"""Choosing the datadir for a new image (Glance behaviour 6). Pure: candidates and a size in, an order out."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

UNKNOWN_SIZE_BYTES = 1 << 20
"""Room that a datadir must have for an image of unknown size; images are rarely smaller."""


@dataclass(frozen=True, slots=True)
class Candidate(Generic[T]):
    """A datadir that takes new images, with what it can still take: free bytes less reserved and `min_free`."""

    datadir: T
    priority: int
    free_bytes: int


def order(candidates: Iterable[Candidate[T]], size: int | None) -> list[T]:
    """The datadirs that can take `size` bytes, best first: highest priority, then most free space.

    An unknown size (None) asks for a little room; where no datadir has that, any free byte will do. Empty: full.
    """
    ranked = sorted(candidates, key=lambda c: (-c.priority, -c.free_bytes))
    if size is not None:
        return [c.datadir for c in ranked if c.free_bytes >= max(size, 1)]
    roomy = [c.datadir for c in ranked if c.free_bytes >= UNKNOWN_SIZE_BYTES]
    return roomy or [c.datadir for c in ranked if c.free_bytes > 0]
