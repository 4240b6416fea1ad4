"""Who a datadir is: the marker in it, and what the markers of a store say of each other.

A marker is a small JSON file, `DATADIR/.imgfs/marker`: the identity of the store, that of the datadir, and the
datadirs that belong to the store, each with the path where it was last. So a datadir whose disk is not mounted is
told from a new one: the others know it. `judge` is pure; `look` and `write` touch a directory.

Threading: no state; whoever writes a marker holds the lock of its datadir.
"""

import errno
import json
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imgfs import names, own_files
from imgfs.config import DatadirConfig
from imgfs.errors import DatadirError

MARKER = "marker"
MOST_MEMBERS = 10_000
_HEX_DIGITS = 32
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Marker:
    """What a datadir says of itself and of its store: `members` are identities and the paths they were at.

    `generation` grows with each change of the members, so that the latest table is told from an older one.
    """

    store: str
    datadir: str
    members: Mapping[str, str]
    generation: int = 0

    def encode(self) -> bytes:
        """The form in which it is stored."""
        fields = {
            "version": 1,
            "store": self.store,
            "datadir": self.datadir,
            "generation": self.generation,
            "members": dict(self.members),
        }
        return json.dumps(fields, indent=1).encode("ascii") + b"\n"


def new_identity() -> str:
    """A random identity, of a store or of a datadir."""
    return secrets.token_hex(_HEX_DIGITS // 2)


def is_identity(value: object) -> bool:
    """Whether a value has the form of an identity."""
    return isinstance(value, str) and len(value) == _HEX_DIGITS and set(value) <= set("0123456789abcdef")


def decode(stored: bytes) -> Marker | None:
    """A marker in its stored form; None where it is none: whoever owns the datadir may have put anything there."""
    try:
        fields: dict[str, Any] = json.loads(stored)
        if fields["version"] != 1:
            return None
        marker = Marker(fields["store"], fields["datadir"], fields["members"], int(fields["generation"]))
        return marker if _is_sound(marker) else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _is_sound(marker: Marker) -> bool:
    known = marker.members
    return (
        is_identity(marker.store)
        and is_identity(marker.datadir)
        and isinstance(known, dict)
        and len(known) <= MOST_MEMBERS
        and all(is_identity(identity) and _is_path(path) for identity, path in known.items())
        and 0 <= marker.generation < 1 << 62
    )


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value.startswith("/") and "\0" not in value


# --- looking and writing ---


@dataclass(frozen=True, slots=True)
class Found:
    """What a look at the path of a datadir found: a marker, or none, or an obstacle (one clause for an operator)."""

    config: DatadirConfig
    marker: Marker | None = None
    obstacle: str | None = None

    @property
    def path(self) -> str:
        """The path of the datadir."""
        return self.config.path


def look(config: DatadirConfig) -> Found:
    """Look for the marker of a datadir; changes nothing."""
    try:
        fd = os.open(config.path, _DIRECTORY)
    except FileNotFoundError:
        return Found(config, obstacle="there is no such directory")
    except (OSError, ValueError) as error:
        return Found(config, obstacle=f"it can't be opened: {getattr(error, 'strerror', error)}")
    try:
        return _look_inside(config, fd)
    except OSError as error:
        return Found(config, obstacle=f"its marker can't be read: {error.strerror}")
    finally:
        os.close(fd)


def _look_inside(config: DatadirConfig, fd: int) -> Found:
    stored = _stored_in(fd)
    if stored is None:
        return Found(config)
    marker = decode(stored)
    return Found(config, marker, None if marker else f"the marker in {config.path}/{names.OWN_DIRECTORY} is damaged")


def marker_in(directory_fd: int) -> Marker | None:
    """The marker of an opened datadir; None where it has none, or none that can be read."""
    stored = _stored_in(directory_fd)
    return None if stored is None else decode(stored)


def _stored_in(directory_fd: int) -> bytes | None:
    try:
        own_fd = os.open(names.OWN_DIRECTORY, _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory_fd)
    except FileNotFoundError:
        return None
    try:
        return own_files.read(MARKER, own_fd)
    finally:
        os.close(own_fd)


def write(marker: Marker, own_fd: int) -> None:
    """Put a marker into a `.imgfs` in one step, on stable storage: a crash leaves the old one or the new."""
    own_files.replace(MARKER, own_fd, [marker.encode()])
    os.fsync(own_fd)


def tidy(own_fd: int) -> None:
    """Remove what a crash left of the writing of a marker."""
    own_files.tidy(MARKER, own_fd)


# --- judging ---


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a configured datadir is: there, new, or absent (`absence` says why, in one clause).

    `identity` is that of the datadir which is there, or which belongs there; None: it has none yet.
    """

    config: DatadirConfig
    identity: str | None = None
    absence: str | None = None
    moved_from: str | None = None

    @property
    def path(self) -> str:
        """The path of the datadir."""
        return self.config.path


@dataclass(frozen=True, slots=True)
class Judgement:
    """The store that the markers speak of (None: there are none yet), its members, and each datadir's verdict."""

    store: str | None
    members: Mapping[str, str] = field(default_factory=dict)
    generation: int = 0
    verdicts: Sequence[Verdict] = ()

    @property
    def absent(self) -> list[Verdict]:
        """The datadirs that are not there."""
        return [verdict for verdict in self.verdicts if verdict.absence is not None]


def judge(found: Sequence[Found]) -> Judgement:
    """What each datadir of a configuration is, from what was found at their paths.

    Identities count, not paths: a datadir that moved is followed. One that has no marker though the others know its
    path is absent; one that nobody knows is new. Raises DatadirError where the markers are those of several stores,
    none of which has more of the paths than the others.
    """
    store = _store_of(found)
    own = [f.marker for f in found if f.marker and f.marker.store == store]
    generation = max((marker.generation for marker in own), default=0)
    members: dict[str, str] = {}
    for marker in own:
        if marker.generation == generation:
            members.update(marker.members)
    places = _places(found, store, members)
    leftover = [identity for identity in members if identity not in places]
    verdicts = [_verdict(f, store, members, places, leftover) for f in found]
    return Judgement(store, members, generation, verdicts)


def _store_of(found: Sequence[Found]) -> str | None:
    """The store whose markers name most of the configured paths."""
    paths = {f.path for f in found}
    claimed: dict[str, set[str]] = {}
    markers: Counter[str] = Counter()
    for f in found:
        if f.marker:
            claimed.setdefault(f.marker.store, set()).update(paths & {f.path, *f.marker.members.values()})
            markers[f.marker.store] += 1
    ranked = sorted(claimed, key=lambda store: (len(claimed[store]), markers[store]), reverse=True)
    if len(ranked) > 1:
        first, second = ((len(claimed[store]), markers[store]) for store in ranked[:2])
        if first == second:
            one, other = (next(f.path for f in found if f.marker and f.marker.store == s) for s in ranked[:2])
            raise DatadirError(
                f"datadirs {one} and {other} belong to different stores; take one out of the configuration, "
                "or make it part of the other's store: imgfs check --adopt CONFIG DATADIR",
                errno.EINVAL,
            )
    return ranked[0] if ranked else None


def _places(found: Sequence[Found], store: str | None, members: Mapping[str, str]) -> dict[str, str]:
    """Where each identity of the store is: of two copies, the one at the path where it was."""
    places: dict[str, str] = {}
    for f in found:
        marker = f.marker
        if marker and marker.store == store:
            here_before = members.get(marker.datadir) == f.path
            if here_before or marker.datadir not in places:
                places[marker.datadir] = f.path
    return places


def _verdict(
    f: Found, store: str | None, members: Mapping[str, str], places: Mapping[str, str], leftover: list[str]
) -> Verdict:
    marker = f.marker
    if marker and marker.store == store and places[marker.datadir] == f.path:
        before = members.get(marker.datadir, f.path)
        return Verdict(f.config, marker.datadir, moved_from=before if before != f.path else None)
    missed = _missed(f.path, members, places, leftover) if f.path in members.values() else None
    if marker is None and missed is None:
        return Verdict(f.config)  # new; whoever finds that it can't be used says so
    return Verdict(f.config, missed, _absence(f, store, places))


def _missed(path: str, members: Mapping[str, str], places: Mapping[str, str], leftover: list[str]) -> str | None:
    """Who belongs to a path: the member that was there, or the one whose own path another member has taken."""
    displaced = (identity for identity in leftover if members[identity] in places.values())
    identity = next((identity for identity in leftover if members[identity] == path), next(displaced, None))
    if identity is not None:
        leftover.remove(identity)
    return identity


def _absence(f: Found, store: str | None, places: Mapping[str, str]) -> str:
    if f.obstacle:
        return f.obstacle
    if f.marker is None:
        return f"its disk is not mounted ({f.path} has no marker of imgfs)"
    if f.marker.store != store:
        return "what is there belongs to another store"
    return f"what is there is a copy of the datadir at {places[f.marker.datadir]}, with the same identity"
