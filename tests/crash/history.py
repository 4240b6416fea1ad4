"""What the notes of a workload allow to be found after a crash at some moment, and what they demand.

A `Version` is the bytes of an image from one change to the next; a `Stay` is a name that it had. Moments are
positions of the disks' log. `Crash` says when an effect can no longer be lost: after a power cut, what a digest that
was read or a sync promised; after the end of the daemon alone, every step that was answered.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Moment = tuple[int, int]
"""A position of the disks' log, and a line of the notes, which tells what came first where no disk was written."""
LAST_LINE = 1 << 62
NOW = (1 << 62) - 1
NEVER: Moment = (1 << 62, LAST_LINE)


@dataclass(slots=True)
class Stay:
    """A version at a name, from a step between `entered` and `entered_end` to one between `left` and `left_end`."""

    name: str
    entered: Moment
    entered_end: Moment
    renamed: bool
    left: Moment = NEVER
    left_end: Moment = NEVER


@dataclass(slots=True, eq=False)
class Version:
    """The bytes of an image between two changes, and what was done with it."""

    md5: str
    stays: list[Stay]
    digested: Moment = NEVER  # its digest was read
    touched: Moment = NEVER  # its times were set, and no digest read since
    replaced_by: "Version | None" = None  # by a rename over it
    replaced_in: int = 0  # the number of the stay that this rename began
    rewritten: bool = False  # what ended it changed its bytes in place

    @property
    def ended(self) -> Moment:
        """The moment from which it may be gone."""
        return self.stays[-1].left


@dataclass(frozen=True, slots=True)
class Found:
    """An image as the store shows it after the crash."""

    name: str
    state: str
    md5: str
    recorded_md5: str | None


@dataclass
class History:
    """All versions, and when something was promised: a digest read, all names synced."""

    versions: list[Version] = field(default_factory=list)
    syncs: list[tuple[Moment, Moment]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    promises: list[int] = field(default_factory=list)
    replacements: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    at_name: dict[str, list[tuple[Version, Stay]]] = field(default_factory=dict)

    @classmethod
    def read(cls, notes: Path) -> "History":
        """From the notes of a workload. Fails where the workload itself failed."""
        history = cls()
        current: dict[str, Version] = {}
        for step, end in _steps(notes):
            history._enter(step, end, current)
        return history

    def _enter(self, step: dict[str, Any], end: dict[str, Any] | None, current: dict[str, Version]) -> None:
        begin: Moment = (step["begin"], step["line"])
        done: Moment = NEVER if end is None else (end["end"], end["line"])
        failed = end is not None and end["failed"] is not None
        op = step["op"] + (" failed" if failed else "")
        self.counts[op] = self.counts.get(op, 0) + 1
        self.positions += [begin[0], done[0]] if end else [begin[0]]
        if step["op"] in ("exchange", "rename") and failed:
            return
        if op == "sync" and end is not None:
            self.syncs.append((begin, done))
            self.promises.append(done[0])
        handler = getattr(self, f"_{step['op']}", None)
        if handler is not None:
            handler(step, begin, done, failed, current)

    def _create(self, step: Any, begin: Moment, done: Moment, failed: bool, current: dict[str, Version]) -> None:
        version = self._new(step["md5"], Stay(step["name"], begin, done, renamed=False))
        if failed:
            _leave(version, begin, done)
        else:
            current[step["name"]] = version

    def _rewrite(self, step: Any, begin: Moment, done: Moment, failed: bool, current: dict[str, Version]) -> None:
        old = current[step["name"]]
        old.rewritten = True
        _leave(old, begin, done)
        current[step["name"]] = self._new(step["md5"], Stay(step["name"], begin, done, renamed=False))

    def _delete(self, step: Any, begin: Moment, done: Moment, failed: bool, current: dict[str, Version]) -> None:
        version = current.pop(step["name"])
        _leave(version, begin, done)

    def _rename(self, step: Any, begin: Moment, done: Moment, failed: bool, current: dict[str, Version]) -> None:
        if step["name"] == step["new"]:
            return
        version, target = current.pop(step["name"]), current.get(step["new"])
        if target is not None:
            target.replaced_by, target.replaced_in = version, len(version.stays)
            self.replacements += [begin[0]] if done == NEVER else [begin[0], done[0]]
            _leave(target, begin, done)
        self._move(version, step["new"], begin, done)
        current[step["new"]] = version

    def _exchange(self, step: Any, begin: Moment, done: Moment, failed: bool, current: dict[str, Version]) -> None:
        one, other = current[step["name"]], current[step["new"]]
        self._move(one, step["new"], begin, done)
        self._move(other, step["name"], begin, done)
        current[step["new"]], current[step["name"]] = one, other

    def _digest(self, step: Any, begin: Moment, done: Moment, failed: bool, current: dict[str, Version]) -> None:
        version = current[step["name"]]
        if done != NEVER:
            self.promises.append(done[0])
            version.digested = min(version.digested, done)
            # A digest read after the times were set is of a record for the new times or for the bytes alone: the
            # record's second writing was not promised to be durable.

    def _touch(self, step: Any, begin: Moment, done: Moment, failed: bool, current: dict[str, Version]) -> None:
        version = current[step["name"]]
        version.touched = min(version.touched, begin)

    def _new(self, md5: str, stay: Stay) -> Version:
        version = Version(md5, [stay])
        self.versions.append(version)
        self.at_name.setdefault(stay.name, []).append((version, stay))
        return version

    def _move(self, version: Version, name: str, begin: Moment, done: Moment) -> None:
        _leave(version, begin, done)
        stay = Stay(name, begin, done, renamed=True)
        version.stays.append(stay)
        self.at_name.setdefault(name, []).append((version, stay))


def _leave(version: Version, begin: Moment, done: Moment) -> None:
    version.stays[-1].left, version.stays[-1].left_end = begin, done


def _steps(notes: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each step with its end, where it had one; the steps of one thread in order."""
    open_steps: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(notes.read_text().splitlines()):
        note = json.loads(line) | {"line": number}
        assert "error" not in note, f"the workload failed: {note}"
        if "begin" in note:
            open_steps[note["thread"]] = note
        else:
            yield open_steps.pop(note["thread"]), note
    for step in open_steps.values():
        yield step, None


class Crash:
    """A crash at a moment: judges what is found after it."""

    def __init__(self, history: History, position: int, power_cut: bool) -> None:
        self._history = history
        self._moment = (position, LAST_LINE)
        self._power_cut = power_cut

    def problems(self, found: dict[str, Found]) -> list[str]:
        """Everything that is wrong, in words; empty where nothing is."""
        return [*self._wrong(found), *self._missing(found)]

    def _wrong(self, found: dict[str, Found]) -> Iterator[str]:
        """What is there, and should not be, or not so."""
        for name, image in found.items():
            candidates = [version for version, stay in self._at(name) if self._possible(version, stay)]
            if image.state == "active":
                if image.md5 != image.recorded_md5:
                    yield f"{name} is active with wrong bytes: {image.md5}, its record says {image.recorded_md5}"
                if image.md5 not in {version.md5 for version in candidates}:
                    known = [v.md5 for v, _ in self._at(name)]
                    what = "an older image came back" if image.md5 in known else "bytes that nobody finished"
                    yield f"{name} is active, but {what}: {image}, possible: {candidates}"
            elif not any(self._may_be_inactive(version) for version in candidates):
                yield f"{name} is {image.state}, possible: {candidates}"

    def _missing(self, found: dict[str, Found]) -> Iterator[str]:
        """What is not there, and must be."""
        for version in self._history.versions:
            places = self._places(version, found)
            if version.digested <= self._moment and version.ended > self._moment:
                if len(places) != 1:
                    yield f"{version} was active, and is at {places or 'no name'}"
                elif version.touched > self._moment and places[0].state != "active":
                    yield f"{version} was active, and is {places[0].state}"
            by = version.replaced_by
            promised = version.digested <= self._moment and by is not None and by.ended > self._moment
            if promised and not places and by is not None and not self._places(by, found, version.replaced_in):
                yield f"{version} was to be replaced by {by}, and its name has neither"

    def _at(self, name: str) -> list[tuple[Version, Stay]]:
        return self._history.at_name.get(name, [])

    def _places(self, version: Version, found: dict[str, Found], since: int = 0) -> list[Found]:
        names = {stay.name for stay in version.stays[since:] if self._possible(version, stay)}
        return [found[name] for name in names if name in found and found[name].md5 == version.md5]

    def _possible(self, version: Version, stay: Stay) -> bool:
        """Whether the version can be at this name: it came there before the crash, and may not have left."""
        if stay.entered > self._moment or self._durable(stay.left_end):
            return False
        return not any(
            self._settled(other, successor)
            for other, successor in self._at(stay.name)
            if successor is not stay and successor.entered >= stay.left
        )

    def _settled(self, version: Version, stay: Stay) -> bool:
        """Whether it is certain that the version came to this name."""
        if stay.renamed:
            return self._durable(stay.entered_end)
        return version.digested <= self._moment or self._durable(stay.entered_end)

    def _durable(self, done: Moment) -> bool:
        """Whether a step that was over at a moment can't be undone by the crash."""
        if not self._power_cut:
            return done <= self._moment
        return any(begin[1] > done[1] and end <= self._moment for begin, end in self._history.syncs)

    def _may_be_inactive(self, version: Version) -> bool:
        unfinished = version.digested > self._moment
        changing = version.rewritten and version.ended <= self._moment
        return unfinished or changing or version.touched <= self._moment
