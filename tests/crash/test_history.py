"""The judge of crashes finds what is wrong, and accepts what may be: each case is a few notes and what was found."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.crash.history import NOW, Crash, Found, History

CREATE_OLD = ("create", {"name": "x", "md5": "old"})
CREATE_NEW = ("create", {"name": "y", "md5": "new"})
PROMISE_OLD = ("digest", {"name": "x", "md5": "old"})
PROMISE_NEW = ("digest", {"name": "y", "md5": "new"})
DELETE = ("delete", {"name": "x"})
REPLACE = ("rename", {"name": "y", "new": "x"})
REWRITE = ("rewrite", {"name": "x", "md5": "new"})
TOUCH = ("touch", {"name": "x"})
SYNC: tuple[str, dict[str, str]] = ("sync", {})
OLD, STALE_OLD = Found("x", "active", "old", "old"), Found("x", "stale", "old", None)
NEW = Found("y", "active", "new", "new")
REPLACED = Found("x", "active", "new", "new")
WRONG = Found("x", "active", "other", "old")


def problems(tmp_path: Path, steps: Any, found: list[Found], power_cut: bool, at: int = NOW) -> list[str]:
    """What the judge says; each step is over at the position of its number."""
    with open(tmp_path / "notes", "w", encoding="ascii") as notes:
        for number, (op, details) in enumerate(steps, start=1):
            for note in ({"begin": number, "op": op, **details}, {"end": number, "failed": None}):
                notes.write(json.dumps({"thread": "one", **note}) + "\n")
    return Crash(History.read(tmp_path / "notes"), at, power_cut).problems({image.name: image for image in found})


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([CREATE_OLD], []),
        ([CREATE_OLD], [STALE_OLD]),
        ([CREATE_OLD, PROMISE_OLD], [OLD]),
        ([CREATE_OLD, PROMISE_OLD, DELETE], [OLD]),
        ([CREATE_OLD, PROMISE_OLD, DELETE], []),
        ([CREATE_OLD, PROMISE_OLD, TOUCH], [STALE_OLD]),
        ([CREATE_OLD, PROMISE_OLD, REWRITE], [STALE_OLD]),
        ([CREATE_OLD, PROMISE_OLD, CREATE_NEW, PROMISE_NEW, REPLACE], [OLD, NEW]),
        ([CREATE_OLD, PROMISE_OLD, CREATE_NEW, PROMISE_NEW, REPLACE], [REPLACED]),
    ],
)
def test_old_state_and_new_state_are_accepted_after_a_power_cut(tmp_path: Path, steps: Any, found: Any) -> None:
    assert problems(tmp_path, steps, found, power_cut=True) == []


@pytest.mark.parametrize(
    ("steps", "found", "problem"),
    [
        ([CREATE_OLD, PROMISE_OLD], [], "is at no name"),
        ([CREATE_OLD, PROMISE_OLD], [STALE_OLD], "is stale"),
        ([CREATE_OLD, PROMISE_OLD], [WRONG], "wrong bytes"),
        ([CREATE_OLD], [Found("x", "active", "part", "part")], "nobody finished"),
        ([CREATE_OLD, PROMISE_OLD, DELETE, SYNC], [OLD], "an older image came back"),
        ([CREATE_OLD, PROMISE_OLD, DELETE, ("create", {"name": "x", "md5": "new"}), ("digest", {"name": "x"})], [OLD],
         "an older image came back"),
        ([CREATE_OLD, PROMISE_OLD, CREATE_NEW, PROMISE_NEW, REPLACE], [NEW], "its name has neither"),
        ([CREATE_OLD, PROMISE_OLD, CREATE_NEW, PROMISE_NEW, REPLACE], [OLD], "is at no name"),
        ([CREATE_OLD, PROMISE_OLD, CREATE_NEW, PROMISE_NEW, REPLACE], [REPLACED, NEW], "is at ["),
    ],
)  # fmt: skip
def test_what_is_lost_or_wrong_is_told(tmp_path: Path, steps: Any, found: Any, problem: str) -> None:
    assert any(problem in told for told in problems(tmp_path, steps, found, power_cut=True))


def test_end_of_the_daemon_alone_undoes_nothing_that_was_answered(tmp_path: Path) -> None:
    steps = [CREATE_OLD, PROMISE_OLD, DELETE]
    assert problems(tmp_path, steps, [OLD], power_cut=False)
    assert problems(tmp_path, steps, [], power_cut=False) == []


def test_what_came_after_the_crash_does_not_count(tmp_path: Path) -> None:
    assert problems(tmp_path, [CREATE_OLD, PROMISE_OLD, DELETE], [], power_cut=True, at=2)


def test_workload_that_failed_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text('{"thread": "one", "error": "EIO"}\n')
    with pytest.raises(AssertionError, match="the workload failed"):
        History.read(tmp_path / "notes")
