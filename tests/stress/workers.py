"""What works on a mount in the stress run: each in its thread, with names of its own, until it is told to end.

Every worker knows what its images must hold, and raises AssertionError as soon as one does not.
"""

import contextlib
import mmap
import os
import random
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from tests.clients import backing_file, digest, md5
from tests.conftest import attribute, run
from tests.test_model import fallocate

MOST_BYTES = 600_000
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16


class Worker(ABC):
    """Takes one step after another; `steps` counts them, so that a run that did nothing is seen."""

    def __init__(self, images: Path, scratch: Path, name: str, seed: str, transport: str) -> None:
        self.images = images
        self.scratch = scratch / name
        self.scratch.mkdir()
        self.name = name
        self.chance = random.Random(f"{seed} {name}")
        self.transport = transport
        self.steps = 0

    @abstractmethod
    def step(self) -> None:
        """Do something, and compare."""

    def finish(self) -> None:  # noqa: B027 - most have nothing open
        """Close what is open."""


class RandomAccess(Worker):
    """As fsx does: random changes of one image, compared with a model of its bytes."""

    def __init__(self, images: Path, scratch: Path, name: str, seed: str, transport: str) -> None:
        super().__init__(images, scratch, name, seed, transport)
        self.path = images / name
        self.model = bytearray()
        self.done: list[str] = []
        self.fds = [os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)]
        self.operations: list[Callable[[], object]] = [
            self.write, self.write, self.read, self.read, self.truncate, self.map_and_write, self.map_and_read,
            self.reopen, self.append, self.seal, self.sync, self.rename, self.write_in_order, self.replace,
        ]  # fmt: skip
        if transport == "kernel":
            self.operations += [self.punch, self.zero, self.allocate, self.copy_range]

    def step(self) -> None:
        operation = self.chance.choice(self.operations)
        self.done = [*self.done[-30:], operation.__name__]
        operation()

    def say(self, *numbers: int) -> None:
        """Have the numbers of a step told with its name, if a byte is wrong."""
        self.done[-1] += " " + " ".join(map(str, numbers))

    def finish(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def check(self, found: bytes, offset: int, how: str) -> None:
        """Compare bytes with the model."""
        expected = bytes(self.model[offset : offset + len(found)])
        if found != expected:
            wrong = [offset + at for at, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b]
            below = backing_file(self.path).read_bytes() == self.model
            raise AssertionError(
                f"{self.name}: {how} from {offset}: {len(wrong)} wrong bytes, {wrong[0]} to {wrong[-1]}; "
                f"the file in the datadir is {'right' if below else 'wrong, too'}: {self.done}"
            )

    @property
    def fd(self) -> int:
        return self.chance.choice(self.fds)

    def span(self) -> tuple[int, int]:
        """An offset and a length of at least 1."""
        offset = self.chance.randrange(MOST_BYTES)
        return offset, self.chance.randint(1, min(100_000, MOST_BYTES - offset))

    def put(self, offset: int, data: bytes) -> None:
        if offset > len(self.model):
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + len(data)] = data

    def write(self) -> None:
        offset, length = self.span()
        data = self.chance.randbytes(length)
        self.say(offset, length)
        assert os.pwrite(self.fd, data, offset) == length
        self.put(offset, data)

    def read(self) -> None:
        offset, length = self.span()
        found = os.pread(self.fd, length, offset)
        assert len(found) == max(0, min(length, len(self.model) - offset)), (
            f"{self.name}: {len(found)} bytes: {self.done}"
        )
        self.check(found, offset, "read")

    def truncate(self) -> None:
        size = self.chance.choice([0, self.chance.randrange(MOST_BYTES)])
        self.say(size)
        os.ftruncate(self.fd, size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def append(self) -> None:
        if len(self.model) < MOST_BYTES:
            data = self.chance.randbytes(self.chance.randint(1, 50_000))
            self.say(len(self.model), len(data))
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                assert os.write(fd, data) == len(data)
            finally:
                os.close(fd)
            self.model += data

    def map_and_write(self) -> None:
        if not self.model:
            return
        with mmap.mmap(self.fd, len(self.model)) as mapped:
            offset = self.chance.randrange(len(self.model))
            data = self.chance.randbytes(min(self.chance.randint(1, 20_000), len(self.model) - offset))
            self.say(offset, len(data))
            mapped[offset : offset + len(data)] = data
            mapped.flush()
        self.put(offset, data)

    def map_and_read(self) -> None:
        if self.model:
            with mmap.mmap(self.fd, len(self.model), prot=mmap.PROT_READ) as mapped:
                self.check(mapped[:], 0, "mapping")

    def reopen(self) -> None:
        """Open it once more, or close one."""
        if len(self.fds) > 3 or (len(self.fds) > 1 and self.chance.random() < 0.5):
            os.close(self.fds.pop(self.chance.randrange(len(self.fds))))
        else:
            self.fds.append(os.open(self.path, os.O_RDWR))

    def sync(self) -> None:
        os.fsync(self.fd)

    def seal(self) -> None:
        """Close it, have the digest, read it all as an image at rest, perhaps while it is written again."""
        self.finish()
        assert attribute(self.path, "checksum") == md5(self.model), f"{self.name}: wrong digest: {self.done}"
        reader = os.open(self.path, os.O_RDONLY)
        try:
            if self.chance.random() < 0.5:
                self.fds.append(os.open(self.path, os.O_RDWR))
                self.write()
            found = os.pread(reader, MOST_BYTES * 2, 0)
            assert len(found) == len(self.model)
            self.check(found, 0, "reader")
        finally:
            os.close(reader)
        if not self.fds:
            self.fds.append(os.open(self.path, os.O_RDWR))

    def rename(self) -> None:
        new = self.images / f"{self.name}.{self.steps}"
        os.rename(self.path, new)
        self.path = new

    def write_in_order(self) -> None:
        """Anew from the start, as cp does, so that the digests stream past."""
        self.finish()
        self.model = bytearray(self.chance.randbytes(self.chance.randrange(MOST_BYTES)))
        self.path.write_bytes(self.model)
        self.fds.append(os.open(self.path, os.O_RDWR))

    def replace(self) -> None:
        """Another image takes its name; the handles of the old one still show the old bytes."""
        content = self.chance.randbytes(self.chance.randrange(MOST_BYTES))
        other = self.images / f"{self.name}.new"
        other.write_bytes(content)
        os.rename(other, self.path)
        self.check(os.pread(self.fd, MOST_BYTES * 2, 0), 0, "replaced image")
        self.finish()
        self.model = bytearray(content)
        self.fds.append(os.open(self.path, os.O_RDWR))

    def punch(self) -> None:
        offset, length = self.span()
        fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
        self.zeroed(offset, min(offset + length, len(self.model)))

    def zero(self) -> None:
        offset, length = self.span()
        fallocate(self.fd, ZERO_RANGE | KEEP_SIZE, offset, length)
        self.zeroed(offset, min(offset + length, len(self.model)))

    def zeroed(self, start: int, end: int) -> None:
        if start < end:
            self.model[start:end] = bytes(end - start)

    def allocate(self) -> None:
        offset, length = self.span()
        fallocate(self.fd, 0, offset, length)
        self.model.extend(bytes(max(0, offset + length - len(self.model))))

    def copy_range(self) -> None:
        """Within the image, from one half to the other."""
        half = len(self.model) // 2
        if half < 2:
            return
        source, length = self.chance.randrange(half), self.chance.randint(1, half)
        length = min(length, half - source)
        copied = os.copy_file_range(self.fd, self.fd, length, source, half)
        self.put(half, bytes(self.model[source : source + copied]))


class Churn(Worker):
    """Small images come, are renamed, read, and go, some while they are open or being sealed."""

    def __init__(self, images: Path, scratch: Path, name: str, seed: str, transport: str) -> None:
        super().__init__(images, scratch, name, seed, transport)
        self.held: dict[Path, bytes] = {}

    def step(self) -> None:
        choices = [self.create] * 2 + (
            [self.remove, self.move, self.read, self.ask, self.remove_open] if self.held else []
        )
        self.chance.choice(choices)()

    def one(self) -> Path:
        return self.chance.choice(list(self.held))

    def create(self) -> None:
        path = self.images / f"{self.name}.{self.chance.randrange(20)}"
        content = self.chance.randbytes(self.chance.choice([0, 1, 5000, 200_000]))
        if path in self.held:
            path.write_bytes(content)
            self.held[path] = content
            return
        with open(path, "xb") as file:
            expects = bool(content) and self.chance.random() < 0.5
            if expects:
                os.setxattr(path, "user.imgfs.expect.size", str(len(content)).encode())
            file.write(content)
        self.held[path] = content
        if expects:
            self.ask(path)  # until it is sealed, the size would be expected of other bytes, too

    def remove(self) -> None:
        path = self.one()
        path.unlink()
        del self.held[path]

    def remove_open(self) -> None:
        path = self.one()
        with open(path, "rb") as file:
            path.unlink()
            assert file.read() == self.held.pop(path), f"{path.name}: removed while open"

    def move(self) -> None:
        old, new = self.one(), self.images / f"{self.name}.{self.chance.randrange(20)}"
        os.rename(old, new)
        self.held[new] = self.held.pop(old)

    def read(self) -> None:
        path = self.one()
        assert path.read_bytes() == self.held[path], f"{path.name} has other bytes"

    def ask(self, path: Path | None = None) -> None:
        path = path or self.one()
        assert attribute(path, "checksum") == md5(self.held[path]), f"{path.name} has another digest"


class Rsync(Worker):
    """Directories copied by rsync, again and again, in its several ways."""

    OPTIONS = (["-a"], ["-aX"], ["-a", "--inplace"], ["-aS", "--no-whole-file"], ["-a", "--checksum"])

    def step(self) -> None:
        for number in range(3):
            file = self.scratch / f"{self.name}.{number}"
            if self.chance.random() < 0.5 or not file.exists():
                file.write_bytes(
                    self.chance.randbytes(self.chance.randrange(400_000)) + bytes(self.chance.choice([0, 70_000]))
                )
        run("rsync", *self.chance.choice(self.OPTIONS), f"{self.scratch}/", self.images, "--omit-dir-times")
        for file in self.scratch.iterdir():
            copy = self.images / file.name
            assert digest(copy) == digest(file), f"{copy.name} is no true copy"
            assert attribute(copy, "checksum") == digest(file), f"{copy.name} has another digest"
            assert copy.stat().st_mtime_ns == file.stat().st_mtime_ns
        if self.chance.random() < 0.3:
            for file in self.scratch.iterdir():
                (self.images / file.name).unlink()


class Fio(Worker):
    """fio writes blocks in any order and verifies them."""

    def step(self) -> None:
        path = self.images / f"{self.name}.{self.steps % 2}"
        options = {
            "name": "stress", "filename": path, "size": "4m", "ioengine": "psync", "verify": "crc32c",
            "verify_fatal": 1, "bs": self.chance.choice(["4k", "16k", "128k", "1m"]),
            "rw": self.chance.choice(["randwrite", "write", "randrw"]), "direct": self.chance.choice([0, 1]),
            "fsync": self.chance.choice([0, 16]),
            "randseed": self.chance.randrange(1 << 30),
        }  # fmt: skip
        run("fio", *[f"--{key}={value}" for key, value in options.items()], cwd=self.scratch)
        assert attribute(path, "checksum") == digest(path), f"{path.name} has another digest"


class Looker(Worker):
    """Looks at everything that is there, whoever it belongs to, as monitoring does; what it sees may be gone."""

    def step(self) -> None:
        for name in self.chance.sample(names := os.listdir(self.images), min(5, len(names))):
            with contextlib.suppress(FileNotFoundError):
                path = self.images / name
                path.stat()
                os.listxattr(path)
                state = attribute(path, "state")
                assert state in ("saving", "active", "stale"), f"{name} is {state}"
                if self.transport == "kernel":  # libfuse 2: whoever has it open may see old pages then, see README
                    with open(path, "rb") as file:
                        file.seek(self.chance.randrange(1 + path.stat().st_size))
                        file.read(100_000)
        shutil.disk_usage(self.images)
        attribute(self.images, "datadirs")


WORKERS = (RandomAccess, RandomAccess, RandomAccess, Churn, Churn, Rsync, Fio, Looker)
