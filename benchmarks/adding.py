"""Adding an image so that its digests are known: by imgfs, by Glance's driver, and as fast as it can be done at all.

Each gives the seconds it took. The latter two run in a process of their own (`python -m benchmarks.adding HOW SOURCE
DIRECTORY`), which measures itself, so that starting Python does not count.
"""

import hashlib
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from benchmarks import programs

Add = Callable[[Path, Path], float]

NAME = "added"
BLOCK_BYTES = 1 << 20
QUEUED_BLOCKS = 64


def by_cp(source: Path, directory: Path) -> float:
    """cp into an imgfs, until the digest can be read."""
    start = time.perf_counter()
    programs.run("cp", source, directory / NAME)
    os.getxattr(directory / NAME, "user.imgfs.os_hash_value")
    return time.perf_counter() - start


def by_glance_store(source: Path, directory: Path) -> float:
    """The add of glance_store's filesystem driver, as glance-api calls it."""
    return _in_a_process("glance_store", source, directory)


def by_bare_threads(source: Path, directory: Path) -> float:
    """What hashing costs at least: one thread for each digest, beside one that copies."""
    return _in_a_process("limit", source, directory)


def _in_a_process(how: str, source: Path, directory: Path) -> float:
    return float(programs.run(sys.executable, "-m", "benchmarks.adding", how, source, directory))


def add_with_glance_store(source: Path, directory: Path) -> float:
    """The seconds of one add."""
    warnings.simplefilter("ignore")
    import glance_store  # noqa: PLC0415  # only where it is measured: its import takes a second
    from glance_store._drivers import filesystem  # noqa: PLC0415
    from oslo_config import cfg  # noqa: PLC0415

    conf = cfg.ConfigOpts()
    conf([])
    glance_store.register_opts(conf)
    conf.set_override("filesystem_store_datadir", str(directory), "glance_store")
    store = filesystem.Store(conf)
    store.configure()
    start = time.perf_counter()
    with source.open("rb") as file:
        store.add(NAME, file, source.stat().st_size, "sha512")
    return time.perf_counter() - start


def add_with_bare_threads(source: Path, directory: Path) -> float:
    """The seconds of copying and hashing, each in its own thread; hashlib and the copy run beside each other."""
    start = time.perf_counter()
    queues = [queue.Queue[bytes](QUEUED_BLOCKS) for _ in range(2)]
    hashing = [
        threading.Thread(target=_hash, args=(algorithm, blocks))
        for algorithm, blocks in zip(("md5", "sha512"), queues, strict=True)
    ]
    for thread in hashing:
        thread.start()
    with source.open("rb", buffering=0) as file, (directory / NAME).open("wb", buffering=0) as copy:
        while block := file.read(BLOCK_BYTES):
            copy.write(block)
            for blocks in queues:
                blocks.put(block)
    for blocks in queues:
        blocks.put(b"")
    for thread in hashing:
        thread.join()
    return time.perf_counter() - start


def _hash(algorithm: str, blocks: "queue.Queue[bytes]") -> str:
    digest = hashlib.new(algorithm)
    while block := blocks.get():
        digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    ways = {"glance_store": add_with_glance_store, "limit": add_with_bare_threads}
    print(ways[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3])))
