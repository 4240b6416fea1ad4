"""The calls under way in a datadir: which are late, and which count no more."""

from imgfs.calls import Calls


def test_a_call_that_comes_back_is_in_time() -> None:
    calls = Calls()
    number = calls.begin()
    assert calls.has(number)
    assert calls.end(number)
    assert not calls.has(number)


def test_a_call_that_was_given_up_comes_back_too_late() -> None:
    calls = Calls()
    number = calls.begin()
    calls.give_up(number)
    assert not calls.end(number)


def test_a_call_that_was_lost_is_under_way_no_more_and_comes_back_too_late() -> None:
    calls = Calls()
    number, other = calls.begin(), calls.begin()
    calls.all()[0].lose()
    assert [call.number for call in calls.all()] == [other]
    assert not calls.end(number)
    assert calls.end(other)
