"""What `imgfs check` says of a store: which datadirs are missing, what lies there, and what lies there twice.

It reads the datadirs as they are, without their locks, so it may run beside a mount; it changes nothing.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from imgfs import catalogue, membership
from imgfs.catalogue import Listed
from imgfs.config import Config, Mode
from imgfs.copies import Copy, copies_of, doubled
from imgfs.datadir import Datadir
from imgfs.identity import Judgement, Verdict

Listing = dict[str, Listed]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found: absent datadirs with the images that lie there, as far as their siblings know; the images of
    datadirs that are no part of the store any more, by identity; the names that lie in more than one datadir."""

    absent: Sequence[tuple[Verdict, Listing]] = ()
    lost: dict[str, Listing] = field(default_factory=dict)
    doubled: dict[str, list[Copy]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether there is nothing to be done."""
        return not self.absent and not self.doubled


def inspect(config: Config) -> Inspection:
    """Look a store over. Raises DatadirError where its datadirs belong to several stores."""
    judgement = membership.survey(config.datadirs)
    with _peeking(judgement) as there:
        return Inspection(
            absent=[(verdict, catalogue.latest(verdict.identity or "", there)) for verdict in judgement.absent],
            lost=_lost(judgement, there),
            doubled={name: copies_of(name, there) for name in sorted(doubled(there))},
        )


def images_of(identity: str, config: Config) -> Listing:
    """What the datadirs of a store list of one that is gone, less what lies in the store."""
    with _peeking(membership.survey(config.datadirs)) as there:
        return _missing_here(identity, there)


@contextlib.contextmanager
def _peeking(judgement: Judgement) -> Iterator[list[Datadir]]:
    """The datadirs that are there, to be read only."""
    with contextlib.ExitStack() as stack:
        there = []
        for verdict in judgement.verdicts:
            if verdict.absence is None and Path(verdict.path).is_dir():
                config = replace(verdict.config, mode=Mode.READ_ONLY)
                there.append(Datadir(config, known_as=verdict.identity, locked=False))
                stack.callback(there[-1].close)
        yield there


def _lost(judgement: Judgement, there: Sequence[Datadir]) -> dict[str, Listing]:
    """Of the datadirs that are no part of the store any more, the images that lie nowhere else."""
    kept = {s for datadir in there if datadir.has_own for s in catalogue.subjects(datadir.own_fd)}
    known = {verdict.identity for verdict in judgement.verdicts}
    lists = {subject: _missing_here(subject, there) for subject in sorted(kept - known)}
    return {subject: listing for subject, listing in lists.items() if listing}


def _missing_here(subject: str, there: Sequence[Datadir]) -> Listing:
    listed = catalogue.latest(subject, there)
    return {name: facts for name, facts in listed.items() if not any(datadir.find(name) for datadir in there)}
