"""A directory served through FUSE that fails on command: the datadir of a bad day.

`Faulty` starts it in a process of its own and commands it; `python -m tests.faulty BACKING MOUNTPOINT` is that
process. Without a fault it is the directory below, extended attributes and subdirectories included. A fault names
operations of the request types ("write", "getattr", ...; "*": all of them), what they do from now on, and which files
are meant (a pattern of fnmatch): an errno by its name, `short` (half of what a write is given), `hang` (until
`heal`, whatever signal comes, as a dead disk does).
"""

import contextlib
import errno
import fnmatch
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imgfs import mounts
from imgfs.kernel import KernelSession, MountOptions, mount, replies, requests, session
from imgfs.kernel.filesystem import Entry, Filesystem
from imgfs.kernel.requests import Header
from tests.kernel.loopback import Loopback

ROOT = Path(__file__).parents[1]
WAIT_SECONDS = 30.0
NEVER_FAIL = frozenset({"release", "destroy", "passthrough_fd"})
CALLED = dict.fromkeys(("find", "status", "statx"), "getattr")  # what they are called here


class Faulty:
    """A faulty directory at `path`, over the directory `below`."""

    def __init__(self, below: Path, path: Path) -> None:
        self.below, self.path = below, path
        for directory in (below, path):
            directory.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faulty", below, path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self._line()
        self._connection = mount.connection_number(path)

    def fault(self, action: str, *operations: str, name: str = "*") -> None:
        """From now on, these operations on files of that name do this."""
        self._ask({"do": "fault", "action": action, "operations": operations or ("*",), "name": name})

    def heal(self) -> None:
        """Nothing fails any more; what hangs goes on."""
        self._ask({"do": "heal"})

    def hanging(self) -> int:
        """How many requests hang at this moment."""
        return int(self._ask({"do": "hanging"}))

    def calls(self) -> dict[str, int]:
        """How many requests of each kind there were."""
        return dict(self._ask({"do": "calls"}))

    def end(self) -> None:
        """End it, whatever hangs: who waits for an answer gets ENOTCONN."""
        if self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                self.heal()
        if mounts.is_imgfs(self.path):
            mount.abort(self.path, self._connection)
        self.process.kill()
        self.process.communicate()
        if mounts.is_imgfs(self.path):
            mounts.detach(str(self.path))

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"the faulty directory ended with {self.process.wait(WAIT_SECONDS)}"
        return line


class FaultyLoopback(Loopback):
    """The operations, each of which may fail first."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.faults: list[dict[str, Any]] = []
        self.healed = threading.Event()
        self.hanging = 0
        self.hanging_lock = threading.Lock()
        self.backs = False

    def __call__(self, op: str, *args: Any) -> Any:
        self.calls[CALLED.get(op, op)] += 1
        action = self._action(CALLED.get(op, op), args[0] if args else None)
        if action == "hang":
            self._hang()
        elif action == "short" and op == "write":
            args = (args[0], bytes(args[1])[: max(1, len(args[1]) // 2)], *args[2:])
        elif action and action != "short":
            code = getattr(errno, action)
            raise OSError(code, os.strerror(code))
        return getattr(self, op)(*args)

    def statx(self, path: str, fh: int | None = None) -> Any:
        """It does not tell when a file was made."""
        return self.status(path, fh), None

    def _action(self, op: str, path: str | None) -> str | None:
        if op in NEVER_FAIL:
            return None
        name = os.path.basename(path or "")
        for fault in self.faults:
            meant = op in fault["operations"] or fault["operations"] == ["*"]
            if meant and fnmatch.fnmatch(name, fault["name"]):
                return str(fault["action"])
        return None

    def _hang(self) -> None:
        with self.hanging_lock:
            self.hanging += 1
        self.healed.wait()
        with self.hanging_lock:
            self.hanging -= 1

    def fault(self, command: dict[str, Any]) -> None:
        self.healed.clear()
        self.faults.insert(0, command)

    def heal(self) -> None:
        self.faults = []
        self.healed.set()

    # What a tree needs beyond a flat directory

    def readdir(self, path: str, fh: int) -> Iterator[Any]:
        yield from (".", "..")
        with os.scandir(f"{self.directory}/{self._name(path)}") as entries:
            for entry in entries:
                kind = 0o040000 if entry.is_dir(follow_symlinks=False) else 0o100000
                yield entry.name, {"st_ino": entry.inode(), "st_mode": kind}, 0

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._name(path), mode & 0o7777, dir_fd=self.root)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._name(path), dir_fd=self.root)

    def fsyncdir(self, path: str) -> None:
        fd = os.open(self._name(path), os.O_RDONLY, dir_fd=self.root)
        os.fsync(fd)
        os.close(fd)


class TreeFilesystem(Filesystem):
    """The requests of a mount that has subdirectories."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._directories: dict[int, str] = {}

    def _child(self, header: Header, name: bytes) -> str:
        parent = self._nodes.get(header.nodeid).path
        if parent is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return f"{parent.rstrip('/')}/{os.fsdecode(name)}"

    def opendir(self, header: Header, _request: requests.OpenIn) -> bytes:
        number = next(self._listing_numbers)
        self._directories[number] = self._nodes.get(header.nodeid).path or "/"
        self._listings[number] = None
        return replies.open_out(number, 0)

    def _listing(self, request: requests.ReadIn) -> list[Entry]:
        listing = self._listings[request.fh]
        if listing is None or request.offset == 0:
            listing = []
            for item in self._call("readdir", self._directories[request.fh], 0):
                name, attr = (item, {"st_ino": 1, "st_mode": 0o040000}) if isinstance(item, str) else item[:2]
                listing.append(Entry(os.fsencode(name), attr["st_ino"], attr["st_mode"]))
            self._listings[request.fh] = listing
        return listing

    def _direntplus(self, header: Header, entry: Entry, offset: int) -> bytes:
        return replies.bare_direntplus(entry.ino, offset, entry.mode, entry.name)

    def fsyncdir(self, header: Header, _request: requests.FsyncIn) -> bytes:
        self._call("fsyncdir", self._nodes.get(header.nodeid).path or "/")
        return b""


def commands(operations: FaultyLoopback) -> None:
    """Do what each line of the standard input says; at its end, end."""
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "fault":
            operations.fault(command)
            say(True)
        elif command["do"] == "heal":
            operations.heal()
            say(True)
        else:
            say(operations.hanging if command["do"] == "hanging" else dict(operations.calls))
    os._exit(0)


def say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    below, path = sys.argv[1], sys.argv[2]
    session.Filesystem = TreeFilesystem  # type: ignore[misc]
    operations = FaultyLoopback(Path(below))
    served = KernelSession(
        operations, path, MountOptions(allow_other=True), passthrough=False, entry_timeout=0, attr_timeout=0
    )
    served.mount()
    threading.Thread(target=commands, args=(operations,), daemon=True).start()
    served.run(lambda: say("ready"))
    os._exit(0)


if __name__ == "__main__":
    main()
