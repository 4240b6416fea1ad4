"""Choosing the datadir: priority first, then free space, and only where there is room."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from imgfs import placement
from imgfs.placement import UNKNOWN_SIZE_BYTES, Candidate

GB = 10**9


@dataclass
class Place:
    """A datadir, as far as placement is concerned."""

    name: str
    priority: int
    free_bytes: int
    measured: bool = False

    def candidate(self) -> Candidate[str]:
        self.measured = True
        return Candidate(self.name, self.free_bytes)


def candidates(**priority_and_free: tuple[int, int]) -> list[Place]:
    """One place for each keyword: its priority and free bytes."""
    return [Place(name, *numbers) for name, numbers in priority_and_free.items()]


def in_order(places: list[Place], size: int | None) -> Iterator[str]:
    return placement.order(((place.candidate() for place in tier) for tier in placement.tiers(places)), size)


def order(places: list[Place], size: int | None) -> list[str]:
    return list(in_order(places, size))


def test_highest_priority_comes_first_however_little_is_free() -> None:
    found = order(candidates(slow=(0, 900 * GB), fast=(200, 2 * GB), middle=(100, 50 * GB)), GB)
    assert found == ["fast", "middle", "slow"]


def test_most_free_space_comes_first_among_equals() -> None:
    assert order(candidates(a=(1, 5 * GB), b=(1, 7 * GB), c=(1, 6 * GB)), GB) == ["b", "c", "a"]


def test_priorities_are_compared_as_numbers() -> None:
    assert order(candidates(nine=(9, GB), ten=(10, GB)), 1) == ["ten", "nine"]


def test_equals_in_everything_keep_their_order() -> None:
    assert order(candidates(a=(1, GB), b=(1, GB)), 1) == ["a", "b"]


def test_datadir_without_room_is_passed_over() -> None:
    assert order(candidates(fast=(200, GB - 1), slow=(0, GB)), GB) == ["slow"]


def test_image_may_fill_a_datadir_to_the_last_byte() -> None:
    assert order(candidates(a=(0, GB)), GB) == ["a"]
    assert order(candidates(a=(0, GB)), GB + 1) == []


@pytest.mark.parametrize("free_bytes", [0, -GB])
@pytest.mark.parametrize("size", [None, 0, 1])
def test_full_datadir_takes_nothing(free_bytes: int, size: int | None) -> None:
    assert order(candidates(a=(0, free_bytes)), size) == []


def test_no_candidates_is_full() -> None:
    assert order([], 1) == order([], None) == []


def test_unknown_size_passes_over_a_nearly_full_datadir() -> None:
    found = order(candidates(fast=(200, UNKNOWN_SIZE_BYTES - 1), slow=(0, UNKNOWN_SIZE_BYTES)), None)
    assert found == ["slow"]


def test_unknown_size_takes_any_free_byte_where_there_is_nothing_better() -> None:
    assert order(candidates(fast=(200, 0), middle=(100, 1), slow=(0, 2)), None) == ["middle", "slow"]


def test_lower_priorities_are_not_even_measured_where_the_highest_has_room() -> None:
    places = candidates(slow=(0, GB), fast=(200, GB), equal=(200, 2 * GB))
    assert next(in_order(places, None)) == "equal"
    assert [place.name for place in places if place.measured] == ["fast", "equal"]
