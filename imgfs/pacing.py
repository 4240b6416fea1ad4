"""Long loops in the background that leave most of the time to the threads which answer requests."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Breathe = Callable[[], object]


def hold_breath() -> None:
    """For those that somebody waits for: no pause."""


def paced(items: Iterable[T], every: int, breathe: Breathe) -> Iterator[T]:
    """The items, with a call of `breathe` after every so many, in which it may sleep.

    A thread of Python that does not sleep takes the interpreter from the others for milliseconds at a time
    (sys.getswitchinterval), whenever they make a system call.
    """
    for number, item in enumerate(items, 1):
        yield item
        if number % every == 0:
            breathe()
