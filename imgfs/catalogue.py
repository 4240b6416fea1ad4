"""What lies in each datadir, as lists kept in the others: so that the images of a lost disk can still be named.

The list of a datadir is a journal, `.imgfs/catalogue-IDENTITY` in each of its siblings: a line for an image that was
sealed, with size and digests, a line for one that is gone. It is a convenience, nothing relies on it: lines are
written some time later, without fsync, and a look at the datadirs after each start corrects what is missing. What is
read may be anything that the owner of a datadir put there: sizes are limited, what is no line is passed over.

Threading: `note` may be called from any thread and only queues; one thread of its own does all else, with a small
share of the time, so that the requests do not feel it.
"""

import contextlib
import errno
import json
import logging
import math
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import BinaryIO

from imgfs import identity, names, own_files
from imgfs.datadir import Datadir, any_hangs
from imgfs.errors import InvalidName
from imgfs.pacing import Breathe, hold_breath, paced
from imgfs.record import State
from imgfs.xattrs import proc_path

log = logging.getLogger(__name__)

PREFIX = "catalogue-"
LARGEST_BYTES = 1 << 30
LONGEST_LINE_BYTES = 4096
SPARE_LINES = 1000
"""How many lines more than twice the images a journal may have before it is written anew."""
MOST_NOTED = 100_000
"""What waits to be written down; where it is more, the datadirs are looked at again instead."""
FLUSH_SECONDS = 1.0
"""How long nothing new may have been noted before it is written down."""
LATEST_SECONDS = 15.0
"""When it is written down though more keeps coming."""
_SHARE_OF_TIME = 0.1
_BATCH = 512
_SLICE = 16
_PACE = 128  # lines, or names that are only compared
_BREATH_SECONDS = 0.01
_END_SECONDS = 5.0
_STUCK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Listed:
    """What is known of an image: size in bytes, mtime in ns, its state, and the digests of a sealed one."""

    size: int
    mtime_ns: int
    state: str = State.STALE
    checksum: str = ""
    os_hash_algo: str = ""
    os_hash_value: str = ""


# --- one journal ---


def line_of(name: str, listed: Listed | None) -> bytes:
    """The line for an image, or for one that is gone (None)."""
    fields = [name] if listed is None else [name, *astuple(listed)]
    return json.dumps(fields, separators=(",", ":")).encode("ascii") + b"\n"


def parse(line: bytes) -> tuple[str, Listed | None] | None:
    """What a line says; None for what is no line."""
    try:
        name, *fields = json.loads(line)
        names.check(name)
        return name, _listed(*fields) if fields else None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, InvalidName):
        return None


def _listed(size: int, mtime_ns: int, state: str, *digests: str) -> Listed:
    if not all(isinstance(text, str) and text.isascii() and text.isprintable() for text in digests):
        raise ValueError("a digest is plain text")
    if not 0 <= int(size) < 1 << 63:
        raise ValueError("a size is a number of bytes")
    return Listed(int(size), int(mtime_ns), State(state), *digests)


class Journal:
    """The list of one datadir, kept in `.imgfs` of another (its descriptor)."""

    def __init__(self, own_fd: int, subject: str) -> None:
        self._own_fd = own_fd
        self._name = PREFIX + subject
        self._lines = 0
        self._listed = 0

    def read(self, breathe: Breathe = hold_breath) -> dict[str, Listed]:
        """What it lists; empty where there is none that can be read."""
        listed: dict[str, Listed] = {}
        lines = 0
        with contextlib.suppress(FileNotFoundError), open(self._open(os.O_RDONLY), "rb") as file:
            for lines, line in enumerate(paced(_lines(file), _PACE, breathe), 1):  # noqa: B007 - counted
                said = parse(line)
                if said is None:
                    continue
                if said[1] is None:
                    listed.pop(said[0], None)
                else:
                    listed[said[0]] = said[1]
        self._lines, self._listed = lines, len(listed)
        return listed

    def tidy(self) -> None:
        """Remove what a crash left of its writing anew."""
        own_files.tidy(self._name, self._own_fd)

    def mtime_ns(self) -> int:
        """When it was last written to; 0 where there is none."""
        try:
            return os.stat(self._name, dir_fd=self._own_fd, follow_symlinks=False).st_mtime_ns
        except OSError:
            return 0

    def append(self, lines: Sequence[bytes]) -> None:
        """Add lines; a last line that a crash cut short ends before them. One that grew too long is written anew."""
        if not lines:
            return
        with open(self._open(os.O_RDWR | os.O_APPEND | os.O_CREAT), "ab", buffering=0) as file:
            fd = file.fileno()
            size = os.fstat(fd).st_size
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            left = memoryview(b"\n" * torn + b"".join(lines))
            while left:
                left = left[file.write(left) or 0 :]
        self._lines += len(lines)
        if self._is_long():
            listed = self.read()
            if self._is_long():
                self._rewrite(listed)

    def _is_long(self) -> bool:
        return self._lines > 2 * self._listed + SPARE_LINES

    def _rewrite(self, listed: Mapping[str, Listed]) -> None:
        """Write it anew, in one step."""
        own_files.replace(self._name, self._own_fd, (line_of(name, facts) for name, facts in listed.items()))
        self._lines = len(listed)

    def _open(self, flags: int) -> int:
        """A descriptor, if it is a regular file: no symlink is followed, no pipe waited for."""
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(self._name, flags, 0o600, dir_fd=self._own_fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, f"{self._name} is no regular file")
        return fd


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, the overlong in pieces (which are no lines then)."""
    left = LARGEST_BYTES
    while left > 0 and (line := file.readline(LONGEST_LINE_BYTES)):
        left -= len(line)
        yield line


def subjects(own_fd: int) -> list[str]:
    """The identities of the datadirs that are listed in a `.imgfs`."""
    found = (name.removeprefix(PREFIX) for name in os.listdir(proc_path(own_fd)) if name.startswith(PREFIX))
    return [subject for subject in found if identity.is_identity(subject)]


def forget(own_fd: int) -> None:
    """Take away the lists in a `.imgfs`: they speak of another store."""
    for subject in subjects(own_fd):
        os.unlink(PREFIX + subject, dir_fd=own_fd)


def latest(subject: str, keepers: Iterable[Datadir]) -> dict[str, Listed]:
    """What the siblings of a datadir list of it: the list that was written to last."""
    journals = [Journal(keeper.own_fd, subject) for keeper in keepers if keeper.has_own]
    if not journals:
        return {}
    try:
        return max(journals, key=Journal.mtime_ns).read()
    except OSError as error:
        log.warning("the list of a datadir that is offline can't be read: %s", error)
        return {}


def facts(datadir: Datadir, name: str) -> Listed | None:
    """What is to be listed of an image as it is now; None where there is none."""
    found = datadir.inspect(name)
    if found is None:
        return None
    status, held = found
    if held is None or held.digests is None:
        return Listed(status.st_size, status.st_mtime_ns)
    digests = held.digests
    return Listed(status.st_size, status.st_mtime_ns, held.state,
                  digests.checksum, digests.os_hash_algo, digests.os_hash_value)  # fmt: skip


# --- all of them ---


class Catalogue:
    """Keeps the lists of the datadirs of a store current in the background, until it is closed."""

    def __init__(self, datadirs: Sequence[Datadir]) -> None:
        """The names known to be in datadirs that are offline now are there when this returns."""
        self._datadirs = datadirs
        self._noted: deque[tuple[Datadir, str]] = deque(maxlen=MOST_NOTED)
        self._closing = threading.Event()
        self._offline: set[Datadir] = set()
        self._journals: dict[tuple[str, str], Journal] = {}
        self._closed = False  # the descriptors of the datadirs are not to be used any more
        self._noted_before = 0
        self._noted_since = 0.0
        self._thread: threading.Thread | None = None
        if len(datadirs) > 1:
            self._follow_offline()
            self._thread = threading.Thread(target=self._run, name="imgfs-catalogue", daemon=True)
            self._thread.start()

    def note(self, datadir: Datadir, name: str) -> None:
        """Something happened to a name in a datadir: what is listed of it is looked up again, some time later."""
        if self._thread is not None:
            self._noted.append((datadir, name))

    def close(self) -> None:
        """Write down what is noted, and end the thread; but wait for no disk that hangs."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(_STUCK_SECONDS if any_hangs(self._datadirs) else 2 * _END_SECONDS)
            self._closed = True

    def _run(self) -> None:
        looked = False
        pause = FLUSH_SECONDS
        while not self._closing.wait(pause):
            started = time.monotonic()
            looked = self._follow_offline() and looked and len(self._noted) < MOST_NOTED
            try:
                if not looked:
                    self._look_at_all()
                looked = True
                if self._has_settled(started):
                    self._write_noted()
            except OSError as error:
                log.info("the lists of the datadirs can't be kept, to be tried again: %s", error)
            pause = max(FLUSH_SECONDS, (time.monotonic() - started) / _SHARE_OF_TIME)
        with contextlib.suppress(OSError):
            self._write_noted(time.monotonic() + _END_SECONDS)

    def _has_settled(self, now: float) -> bool:
        """Whether no more comes at this moment: what follows on a name (a rename, its removal) is listed at once."""
        before, self._noted_before = self._noted_before, len(self._noted)
        if before == 0:
            self._noted_since = now
        return before == len(self._noted) or now - self._noted_since > LATEST_SECONDS

    # --- datadirs that are offline ---

    def _follow_offline(self) -> bool:
        """Have the names of offline datadirs known, and forgotten once they are back; False where one is."""
        offline = {datadir for datadir in self._datadirs if datadir.offline is not None}
        for datadir in offline - self._offline:
            if datadir.marked_as is not None:
                datadir.known_names = latest(datadir.marked_as, self._keepers(datadir)).keys()
        back = self._offline - offline
        for datadir in back:
            datadir.known_names = frozenset()
        self._offline = offline
        return not back

    def _keepers(self, subject: Datadir) -> list[Datadir]:
        """The siblings that can be asked for the list of a datadir."""
        return [d for d in self._datadirs if d is not subject and d.offline is None and d.has_own]

    def _kept(self, subject: Datadir) -> Iterator[Journal]:
        """The journals that are to be kept of a datadir."""
        for keeper in self._keepers(subject):
            if keeper.writable and subject.marked_as is not None:
                key = (keeper.path, subject.marked_as)
                if key not in self._journals:
                    self._journals[key] = Journal(keeper.own_fd, subject.marked_as)
                yield self._journals[key]

    # --- writing ---

    def _write_noted(self, deadline: float = math.inf) -> None:
        """Write down what was noted, in batches, until a moment."""
        while self._noted and time.monotonic() < deadline and not self._closed:
            batch: dict[Datadir, dict[str, None]] = {}
            with contextlib.suppress(IndexError):
                for _ in range(_BATCH):
                    datadir, name = self._noted.popleft()
                    batch.setdefault(datadir, {})[name] = None
            for datadir, noted in batch.items():
                if datadir.offline is None:
                    self._append(datadir, [line for line in self._lines_now(datadir, noted) if line])
        self._noted_before = 0

    def _lines_now(self, datadir: Datadir, noted: Iterable[str]) -> Iterator[bytes | None]:
        for number, name in enumerate(noted, 1):
            yield _line_now(datadir, name)
            if number % _SLICE == 0:
                self._breathe()

    def _append(self, subject: Datadir, lines: Sequence[bytes]) -> None:
        for journal in self._kept(subject):
            with _told(subject):
                if not self._closed:
                    journal.append(lines)

    # --- looking ---

    def _look_at_all(self) -> None:
        """Compare the lists with the datadirs, and correct them."""
        for subject in self._datadirs:
            journals = list(self._kept(subject))
            if subject.offline is not None or not journals:
                continue
            there = None
            with _told(subject):
                there = self._statuses(subject)
            for journal in journals:
                if there is not None and not self._closing.is_set():
                    with _told(subject):
                        self._correct(subject, journal, there)

    def _statuses(self, subject: Datadir) -> dict[str, tuple[int, int]] | None:
        """Size and mtime of every image; None where the end comes before all were looked at."""
        there: dict[str, tuple[int, int]] = {}
        for entry in subject.entries():
            status = subject.find(entry.name)
            if status is not None:
                there[entry.name] = status.st_size, status.st_mtime_ns
            if len(there) % (4 * _SLICE) == 0 and self._breathe():
                return None
        return there

    def _correct(self, subject: Datadir, journal: Journal, there: Mapping[str, tuple[int, int]]) -> None:
        journal.tidy()
        listed = journal.read(self._breathe)
        lines: list[bytes] = []
        asked = 0
        lines.extend(line_of(name, None) for name in paced(listed, _PACE, self._breathe) if name not in there)
        for name, (size, mtime_ns) in paced(there.items(), _PACE, self._breathe):
            known = listed.get(name)
            if known is None or known.state == State.STALE or (known.size, known.mtime_ns) != (size, mtime_ns):
                line = _line_now(subject, name)
                asked += 1
                if line is not None and (known is None or line != line_of(name, known)):
                    lines.append(line)
                if asked % _SLICE == 0 and self._breathe():
                    break
        if not self._closed:
            journal.append(lines)

    def _breathe(self) -> bool:
        """Leave most of the time to others; True where the end has come."""
        return self._closing.wait(_BREATH_SECONDS)


def _line_now(datadir: Datadir, name: str) -> bytes | None:
    """The line for an image as it is; None where it can't be read."""
    try:
        return line_of(name, facts(datadir, name))
    except OSError as error:
        log.debug("image %r in %s is not listed: %s", name, datadir.path, error)
        return None


@contextlib.contextmanager
def _told(subject: Datadir) -> Iterator[None]:
    """A sibling that can't be written to (full, say) lacks some lines, until the next look."""
    try:
        yield
    except OSError as error:
        log.info("the list of datadir %s is not kept in a sibling: %s", subject.path, error)
