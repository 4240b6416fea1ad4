"""Which of the configured datadirs are there: opened by what their markers say, left out where a disk is missing.

A datadir that is new gets its marker here; one whose disk is not mounted is never written to, and taken in by itself
once it is (`Returning`), or, replaced by another, on the operator's word (`adopt`).

Threading: one thread of its own looks for absent datadirs; all else is for whoever opens the store.
"""

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from imgfs import catalogue, identity
from imgfs import datadir as datadir_module
from imgfs.config import Config, DatadirConfig, MissingDatadirs
from imgfs.datadir import Datadir, give_tags
from imgfs.errors import DatadirError
from imgfs.identity import Judgement, Marker, Verdict, look
from imgfs.timed import TimedDatadir

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
_END_SECONDS = 5.0


def survey(configs: Sequence[DatadirConfig]) -> Judgement:
    """What each datadir is; changes nothing. Raises DatadirError for the disks of several stores."""
    return identity.judge([look(config) for config in configs])


def unusable(configs: Sequence[DatadirConfig]) -> dict[str, str]:
    """Which datadirs can't be used, by path, and why; one that is only missing is none of them. Changes nothing."""
    absent: set[str] = set()
    with contextlib.suppress(DatadirError):  # told when the store is opened
        absent = {verdict.path for verdict in survey(configs).absent}
    reasons = {config.path: datadir_module.unusable(config) for config in configs if config.path not in absent}
    return {path: reason for path, reason in reasons.items() if reason}


def told(verdict: Verdict) -> str:
    """That a datadir is absent, why, and what to do, in one line."""
    return f"datadir {verdict.path} is offline: {verdict.absence}; {_advice(verdict)}"


def _advice(verdict: Verdict) -> str:
    adopt = f"imgfs check --adopt CONFIG {verdict.path}"
    if verdict.identity is None:
        return f"take it out, or make it a datadir of its own in this store: {adopt}"
    return f"mount its disk, or, if that was replaced, take in what is there now: {adopt}"


def open_datadirs(config: Config) -> list[Datadir]:
    """All datadirs, highest priority first, those that are absent offline; or none of them.

    Raises DatadirError where one can't be used, and where one is absent and the configuration says to refuse.
    """
    judgement = survey(config.datadirs)
    for verdict in judgement.absent:
        if config.missing_datadirs is MissingDatadirs.REFUSE:
            raise DatadirError(told(verdict), errno.ENODEV)
        log.warning("%s", told(verdict))
    for verdict in judgement.verdicts:
        if verdict.moved_from is not None:
            log.warning("datadir %s was at %s before; its marker says so", verdict.path, verdict.moved_from)
    return _opened(judgement, config)


def _opened(judgement: Judgement, config: Config) -> list[Datadir]:
    kind = TimedDatadir if config.timeout_seconds else Datadir
    datadirs: list[Datadir] = []
    try:
        for verdict in sorted(judgement.verdicts, key=lambda v: -v.config.priority):
            datadirs.append(
                kind(verdict.config, config.file_perm, known_as=verdict.identity, absence=verdict.absence)
            )
        _keep_markers(datadirs, judgement)
    except BaseException:
        for datadir in datadirs:
            datadir.close()
        raise
    give_tags(datadirs)
    return datadirs


def _keep_markers(datadirs: Sequence[Datadir], judgement: Judgement) -> None:
    """Mark the new datadirs, and have all of them name each other.

    A datadir is named by the others only after it has its own marker, so that a crash leaves none that is missed.
    """
    marked = [datadir for datadir in datadirs if datadir.is_open and datadir.writable]
    store = judgement.store or identity.new_identity()
    members = {datadir.marked_as: datadir.path for datadir in datadirs if datadir.marked_as}
    generation = judgement.generation
    for datadir in marked:
        if datadir.marked_as is None:
            new = identity.new_identity()
            generation += 1
            if _mark(datadir, Marker(store, new, {**members, new: datadir.path}, generation)):
                datadir.marked_as = new
                members[new] = datadir.path
                log.info("datadir %s is part of the store now", datadir.path)
    generation += members != judgement.members
    for datadir in marked:
        with contextlib.suppress(OSError):
            identity.tidy(datadir.own_fd)
        if datadir.marked_as is not None:
            marker = Marker(store, datadir.marked_as, members, generation)
            if identity.marker_in(datadir.fd) != marker:
                _mark(datadir, marker)


def _mark(datadir: Datadir, marker: Marker) -> bool:
    """Write a marker; a datadir that has no room for it is used without."""
    try:
        datadir.mark(marker)
    except OSError as error:
        log.warning("datadir %s can't be marked (%s): at the next mount nobody can tell whether its disk is there",
                    datadir.path, error.strerror)  # fmt: skip
        return False
    return True


class Returning:
    """Looks every now and then whether absent datadirs are there; `back` is told of each that was opened."""

    def __init__(self, datadirs: Sequence[Datadir], back: Callable[[Datadir], None]) -> None:
        self._missed = [datadir for datadir in datadirs if not datadir.is_open and datadir.marked_as is not None]
        self._back = back
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="imgfs-returning", daemon=True)
        if self._missed:
            self._thread.start()

    def close(self) -> None:
        """End the thread, but wait for no disk that hangs."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_END_SECONDS)

    def _run(self) -> None:
        while self._missed and not self._closing.wait(LOOK_SECONDS):
            for datadir in self._missed[:]:
                if self._is_there(datadir):
                    self._missed.remove(datadir)
                    try:
                        self._back(datadir)
                    except OSError as error:
                        log.error(
                            "datadir %s is there again, but not all that follows was done: %s", datadir.path, error
                        )

    def _is_there(self, datadir: Datadir) -> bool:
        marker = look(datadir.config).marker
        if marker is None or marker.datadir != datadir.marked_as:
            return False
        try:
            datadir.open()
        except DatadirError as error:
            if datadir.offline != str(error):
                log.warning("datadir %s is there again, but can't be used: %s", datadir.path, error)
                datadir.offline = str(error)
            return False
        return True


# --- adopting ---


@dataclass(frozen=True, slots=True)
class Adopted:
    """A datadir that was taken in as a new one; `replaced` is the identity of the one that was there (None: none)."""

    path: str
    replaced: str | None


def adopt(config: Config, paths: Collection[str] = ()) -> list[Adopted]:
    """Make what lies at the paths of absent datadirs (all of them, or those named) new datadirs of the store.

    Raises DatadirError where one can't be used, or is in use.
    """
    found = [look(datadir) for datadir in config.datadirs]
    try:
        judgement = identity.judge(found)
    except DatadirError:
        if not paths:
            raise
        judgement = identity.judge([replace(f, marker=None) if f.path in paths else f for f in found])
    wanted = [v for v in judgement.verdicts if (v.path in paths if paths else v.absence) and _is_strange(v, found)]
    foreign = {f.path for f in found if f.marker and f.marker.store != judgement.store}
    verdicts = [Verdict(v.config) if v in wanted else v for v in judgement.verdicts]
    for datadir in _opened(replace(judgement, verdicts=verdicts), config):
        if datadir.path in foreign and datadir.has_own:
            catalogue.forget(datadir.own_fd)
        datadir.close()
    return [Adopted(verdict.path, verdict.identity) for verdict in wanted]


def _is_strange(verdict: Verdict, found: Sequence[identity.Found]) -> bool:
    """Whether a datadir is not there as what it should be: absent, or new with the marker of another store."""
    marker = next(f.marker for f in found if f.path == verdict.path)
    return verdict.absence is not None or (verdict.identity is None and marker is not None)


def paths_of(config: Config, named: Sequence[str]) -> list[str]:
    """The configured paths that were named. Raises DatadirError for one that is no datadir of the configuration."""
    known = {os.path.realpath(datadir.path): datadir.path for datadir in config.datadirs}
    for name in named:
        if os.path.realpath(name) not in known:
            raise DatadirError(f"{name} is no datadir of the configuration", errno.EINVAL)
    return [known[os.path.realpath(name)] for name in named]
