"""A program that works on a store until it is killed, and notes what it does.

It uses a mount (`--mount`) or the Python API (`--config`). Each thread has names of its own, so that what happened
to a name is a sequence. A note is written before each step and after it, with the position of the disks' log at that
moment: nothing of a step can be on a disk before the one, and all that a step promised is durable from the other on.
"""

import argparse
import contextlib
import ctypes
import errno
import hashlib
import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from imgfs import ImageStore, load
from imgfs.attributes import PREFIX

THREADS = 3
NAMES = "abcd"
SIZES = (0, 1, 4096, 40_000, 300_000, 1_000_000, 3_000_000)
MOST_BYTES = 14 << 20  # what a thread keeps of images
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Client(Protocol):
    """What can be done with images; every method raises OSError."""

    def create(self, name: str, content: bytes, expected: dict[str, int | str]) -> None: ...

    def rewrite(self, name: str, content: bytes, offset: int, truncate: bool) -> None: ...

    def digest(self, name: str) -> str: ...

    def delete(self, name: str) -> None: ...

    def rename(self, old: str, new: str) -> None: ...

    def exchange(self, one: str, other: str) -> None: ...

    def touch(self, name: str) -> None: ...

    def sync(self) -> None: ...


class Mounted:
    """Through system calls."""

    def __init__(self, mountpoint: Path, transport: str) -> None:
        # Through a descriptor: when the mount is taken away, the same path leads to what it covered.
        self._path = Path(f"/proc/self/fd/{os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)}")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.exchanges = transport == "kernel"

    def create(self, name: str, content: bytes, expected: dict[str, int | str]) -> None:
        path = self._path / name
        with open(path, "xb", buffering=0) as file:
            for key, value in expected.items():
                os.setxattr(path, f"{PREFIX}expect.{key}", str(value).encode())
            _write_all(file.write, content)

    def rewrite(self, name: str, content: bytes, offset: int, truncate: bool) -> None:
        fd = os.open(self._path / name, os.O_WRONLY | (os.O_TRUNC if truncate else 0))
        with open(fd, "wb", buffering=0) as file:
            file.seek(offset)
            _write_all(file.write, content)

    def digest(self, name: str) -> str:
        return os.getxattr(self._path / name, PREFIX + "checksum").decode()

    def delete(self, name: str) -> None:
        os.unlink(self._path / name)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._path / old, self._path / new)

    def exchange(self, one: str, other: str) -> None:
        paths = [os.fsencode(self._path / name) for name in (one, other)]
        if self._libc.renameat2(-100, paths[0], -100, paths[1], 2):
            raise OSError(ctypes.get_errno(), "renameat2")

    def touch(self, name: str) -> None:
        os.utime(self._path / name)

    def sync(self) -> None:
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class InProcess:
    """Through the Python API."""

    exchanges = True

    def __init__(self, config: Path) -> None:
        self._store = ImageStore(load(config))

    def create(self, name: str, content: bytes, expected: dict[str, int | str]) -> None:
        handle = self._store.create(name)
        try:
            if "size" in expected:
                self._store.expect_size(handle.image, int(expected["size"]))
            if "checksum" in expected:
                handle.image.expect(checksum=expected["checksum"])
            _write_from(handle.write, content, 0)
        finally:
            self._store.close_handle(handle)

    def rewrite(self, name: str, content: bytes, offset: int, truncate: bool) -> None:
        handle = self._store.open(name, os.O_WRONLY | (os.O_TRUNC if truncate else 0))
        try:
            _write_from(handle.write, content, offset)
        finally:
            self._store.close_handle(handle)

    def digest(self, name: str) -> str:
        return self._store.digests(name).checksum

    def delete(self, name: str) -> None:
        self._store.delete(name)

    def rename(self, old: str, new: str) -> None:
        self._store.rename(old, new)

    def exchange(self, one: str, other: str) -> None:
        self._store.exchange(one, other)

    def touch(self, name: str) -> None:
        with self._store.image(name) as image:
            now = self._store.status(name)[1].st_mtime_ns + 1_000_000_007
            image.set_times((now, now))

    def sync(self) -> None:
        self._store.sync()


def _write_all(write: Callable[[Any], int | None], content: bytes) -> None:
    for at in range(0, len(content), 1 << 17):
        view = memoryview(content)[at : at + (1 << 17)]
        while view:
            view = view[write(view) or 0 :]


def _write_from(write: Callable[[memoryview, int], int], content: bytes, offset: int) -> None:
    """A disk that is full takes less than it is given; the next write tells."""
    view, done = memoryview(content), 0
    while done < len(view):
        done += write(view[done : done + (1 << 17)], offset + done)


class Notebook:
    """The notes, one JSON object in a line, each with the position of the disks' log."""

    def __init__(self, notes: Path, log: Path) -> None:
        self._fd = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._log = log

    def position(self) -> int:
        return self._log.stat().st_size

    def note(self, **fields: Any) -> None:
        os.write(self._fd, (json.dumps(fields) + "\n").encode())


class Worker:
    """One thread's work: steps chosen at random, among the names that are its own."""

    def __init__(self, client: Client, notebook: Notebook, seed: str, number: str) -> None:
        self._client = client
        self._notebook = notebook
        self._chance = random.Random(f"{seed} {number}")
        self._number = number
        self._names = [f"{number}-{letter}" for letter in NAMES]
        self._held: dict[str, bytes] = {}
        self._count = 0

    def run(self) -> None:
        """Go on until the store is gone; anything unexpected ends in a note."""
        try:
            while True:
                self._step()
        except Exception as error:
            if getattr(error, "errno", None) in (errno.ENOTCONN, errno.ECONNABORTED):
                return
            self._notebook.note(thread=self._number, error=repr(error))
            raise

    def _step(self) -> None:
        name = self._chance.choice(self._names)
        if name not in self._held:
            steps: list[Callable[[str], None]] = [self._create] * 3 + [self._replace]
        else:
            steps = [self._digest, self._digest, self._delete, self._rename, self._rename, self._replace,
                     self._rewrite, self._touch, self._sync, self._exchange]  # fmt: skip
        self._chance.choice(steps)(name)

    def _do(self, op: str, call: Callable[[], object], **details: Any) -> bool:
        """Note, do, note; False where it failed as it may (full disk, two datadirs)."""
        step = {"thread": self._number, "op": op, **details}
        self._notebook.note(begin=self._notebook.position(), **step)
        result = None
        failed = None
        try:
            result = call()
        except OSError as error:
            if error.errno not in (*FULL, errno.EXDEV):
                raise
            failed = errno.errorcode[error.errno]
        self._notebook.note(end=self._notebook.position(), thread=self._number, failed=failed, result=result)
        return failed is None

    def _content(self) -> bytes:
        self._count += 1
        room = MOST_BYTES - sum(len(content) for content in self._held.values())
        size = self._chance.choice([size for size in SIZES if size <= max(room, 1)])
        return self._named_content(size)

    def _named_content(self, size: int) -> bytes:
        """No two images of a run are alike, but for the tiny ones."""
        title = f"{self._number} {self._count} ".encode()
        return (title + self._chance.randbytes(max(0, size - len(title))))[: max(size, len(title))]

    def _create(self, name: str) -> None:
        content = self._content()
        expected: dict[str, int | str] = {}
        if self._chance.random() < 0.4:
            expected["size"] = len(content)
        if self._chance.random() < 0.4:
            expected["checksum"] = _md5(content)
        if self._do("create", lambda: self._client.create(name, content, expected), name=name, md5=_md5(content),
                    expected=bool(expected)):  # fmt: skip
            self._held[name] = content
            if self._chance.random() < 0.5:
                self._digest(name)

    def _replace(self, name: str) -> None:
        """As rsync does: a file beside it, complete or still being sealed, is renamed."""
        temporary = f"{self._number}-.{self._count}"
        self._create(temporary)
        if temporary in self._held:
            self._rename_to(temporary, name)
            if self._chance.random() < 0.5:
                self._digest(name)

    def _rewrite(self, name: str) -> None:
        self._digest(name)  # while it is not sealed, what is expected of it would be expected of the new bytes, too
        old = self._held[name]
        self._count += 1
        truncate = self._chance.random() < 0.3
        offset = 0 if truncate else self._chance.randrange(len(old) + 1)
        patch = self._named_content(self._chance.choice([100, 5000]))
        new = patch if truncate else old[:offset] + patch + old[offset + len(patch) :]
        self._held[name] = new
        if not self._do("rewrite", lambda: self._client.rewrite(name, patch, offset, truncate), name=name,
                        md5=_md5(new)):  # fmt: skip
            self._delete(name)

    def _digest(self, name: str) -> None:
        wanted = _md5(self._held[name])
        found: list[str] = []
        if self._do("digest", lambda: found.append(self._client.digest(name)), name=name, md5=wanted):
            assert found == [wanted], f"{name} has digest {found}, not {wanted}"

    def _delete(self, name: str) -> None:
        self._do("delete", lambda: self._client.delete(name), name=name)
        del self._held[name]

    def _rename(self, name: str) -> None:
        self._rename_to(name, self._chance.choice(self._names))

    def _rename_to(self, old: str, new: str) -> None:
        if self._do("rename", lambda: self._client.rename(old, new), name=old, new=new):
            self._held[new] = self._held.pop(old)

    def _exchange(self, name: str) -> None:
        other = self._chance.choice(self._names)
        if not getattr(self._client, "exchanges", False) or other not in self._held or other == name:
            return
        if self._do("exchange", lambda: self._client.exchange(name, other), name=name, new=other):
            self._held[name], self._held[other] = self._held[other], self._held[name]

    def _touch(self, name: str) -> None:
        self._do("touch", lambda: self._client.touch(name), name=name)

    def _sync(self, _name: str) -> None:
        self._do("sync", self._client.sync)


def _md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Work on a store until it is killed.")
    parser.add_argument("--seed", required=True)
    parser.add_argument("--life", required=True, help="what the names of this life begin with")
    parser.add_argument("--notes", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--mount", type=Path)
    parser.add_argument("--transport", default="kernel")
    arguments = parser.parse_args()
    client: Client
    client = Mounted(arguments.mount, arguments.transport) if arguments.mount else InProcess(arguments.config)
    notebook = Notebook(arguments.notes, arguments.log)
    threads = []
    for number in range(THREADS):
        worker = Worker(client, notebook, arguments.seed, f"{arguments.life}{number}")
        thread = threading.Thread(target=worker.run)
        thread.start()
        threads.append(thread)
    for thread in threads:
        with contextlib.suppress(RuntimeError):
            thread.join()


if __name__ == "__main__":
    main()
