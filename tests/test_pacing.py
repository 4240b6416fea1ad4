"""Loops that pause."""

from imgfs.pacing import hold_breath, paced


def test_paced_items_are_all_there_with_a_breath_after_every_few() -> None:
    seen: list[object] = []
    for item in paced("abcdefg", 3, lambda: seen.append("breath")):
        seen.append(item)
    assert seen == [*"abc", "breath", *"def", "breath", "g"]
    assert list(paced(range(10), 1, hold_breath)) == list(range(10))
