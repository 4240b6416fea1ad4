"""Which name the kernel means by a nodeid, and how often it was told.

Owns the two-way map between nodeids and paths ("/" or "/NAME", decoded by os.fsdecode) and the lookup counts
that FORGET takes down again. A path keeps its nodeid as long as the kernel holds a reference; a nodeid is
never given out twice. An image that was unlinked or replaced while referenced is a node whose path is None.
Knows nothing of attributes, handles or the wire. Every method takes the one lock for a moment; no I/O happens
under it.
"""

import errno
import os
import threading
from collections.abc import Iterable

from imgfs.kernel.abi import FUSE_ROOT_ID
from imgfs.waiters import Waiters

ROOT_PATH = "/"


class Node:
    """One inode as the kernel knows it; guarded by the lock of its `Nodes`, reading `path` is always safe."""

    __slots__ = ("ctime_ns", "ino", "kept", "lookups", "nodeid", "path")

    def __init__(self, nodeid: int, path: str, ino: int | None = None) -> None:
        self.nodeid = nodeid
        self.ino = ino  # of the file it was looked up for
        self.path: str | None = path
        self.kept: int | None = None  # a handle of the operations, to reach a file whose name was taken
        self.lookups = 0
        self.ctime_ns = 0  # of the file when the kernel was shown its attributes last


class Changing:
    """A change of what some paths mean, under way in a `with` block."""

    __slots__ = ("_nodes", "_paths")

    def __init__(self, nodes: "Nodes", paths: tuple[str, ...]) -> None:
        self._nodes, self._paths = nodes, paths

    def __enter__(self) -> None:
        self._nodes.begin_change(self._paths)

    def __exit__(self, *_: object) -> None:
        self._nodes.end_change(self._paths)


class Nodes:
    """All nodes of a session. Lookups count from LOOKUP, CREATE and READDIRPLUS replies."""

    def __init__(self) -> None:
        root = Node(FUSE_ROOT_ID, ROOT_PATH)
        self._by_id = {FUSE_ROOT_ID: root}
        self._by_path = {ROOT_PATH: root}
        self._next_nodeid = FUSE_ROOT_ID + 1
        self._lock = threading.Lock()
        self._changing: dict[str, int] = {}  # guarded by _lock: path -> how many change it
        self._waiters = Waiters(self._lock)

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, nodeid: int) -> Node:
        """The node; ESTALE for one that was never given out, or is forgotten."""
        node = self._by_id.get(nodeid)
        if node is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return node

    def find(self, path: str) -> Node | None:
        """The node of a path, without counting a lookup."""
        return self._by_path.get(path)

    def of_file(self, ino: int | None) -> list[Node]:
        """The nodes that were looked up for a file; more than one where it has several names."""
        with self._lock:
            return [node for node in self._by_id.values() if node.ino == ino]

    def paths(self) -> list[str]:
        """The paths that nodes have, but the root's."""
        with self._lock:
            return [path for path in self._by_path if path != ROOT_PATH]

    def look_up(self, path: str, ino: int | None = None) -> Node:
        """The node of a path, made if need be, with one more lookup counted.

        Where `ino` shows that another file has the name by now, the old node loses it: readers of the old file
        and of the new one must not share a page cache or a backing file.
        """
        with self._lock:
            node = self._by_path.get(path)
            if node is not None and None not in (node.ino, ino) and node.ino != ino:
                self._detach(node)
                node = None
            if node is None:
                node = Node(self._next_nodeid, path, ino)
                self._next_nodeid += 1
                self._by_id[node.nodeid] = self._by_path[path] = node
            node.lookups += 1
            return node

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> list[int]:
        """Take (nodeid, lookups) pairs off; a node without lookups is gone. The root stays.

        Gives the handles that were kept for those that are gone.
        """
        kept = []
        with self._lock:
            for nodeid, lookups in forgotten:
                node = self._by_id.get(nodeid)
                if node is None or nodeid == FUSE_ROOT_ID:
                    continue
                node.lookups -= lookups
                if node.lookups <= 0:
                    del self._by_id[nodeid]
                    self._detach(node)
                    if node.kept is not None:
                        kept.append(node.kept)
        return kept

    def unlink(self, path: str) -> Node | None:
        """The name is gone: its node, which is given back, has no path any more."""
        with self._lock:
            node = self._by_path.get(path)
            if node is not None:
                self._detach(node)
            return node

    def take_name(self, node: Node) -> None:
        """The name of a node leads to another file."""
        with self._lock:
            self._detach(node)

    def rename(self, old: str, new: str, kept: int | None = None) -> bool:
        """`old` is called `new` now, and what was `new` has no name (rename(2)), but a handle, where one is `kept`.

        Gives whether there is a node to keep it for.
        """
        if old == new:
            return False
        with self._lock:
            replaced = self._by_path.get(new)
            if replaced is not None:
                replaced.kept = kept
                self._detach(replaced)
            self._attach(self._by_path.pop(old, None), new)
            return replaced is not None

    def exchange(self, one: str, other: str) -> None:
        """Two names swapped (renameat2(2), RENAME_EXCHANGE)."""
        with self._lock:
            first, second = self._by_path.pop(one, None), self._by_path.pop(other, None)
            self._attach(first, other)
            self._attach(second, one)

    def changing(self, *paths: str) -> "Changing":
        """In a `with` block of this, what is learnt about one of the paths may belong to its old or new image."""
        return Changing(self, paths)

    def begin_change(self, paths: Iterable[str]) -> None:
        """What `changing` does first."""
        with self._lock:
            for path in paths:
                self._changing[path] = self._changing.get(path, 0) + 1

    def end_change(self, paths: Iterable[str]) -> None:
        """What it does in the end."""
        with self._lock:
            for path in paths:
                self._changing[path] -= 1
                if not self._changing[path]:
                    del self._changing[path]
            self._waiters.wake()

    def steady(self, path: str | None) -> bool:
        """Whether nobody is `changing` the path just now."""
        return path not in self._changing

    def wait_steady(self, path: str | None, timeout_s: float) -> None:
        """Wait until nobody changes the path, or the time is over."""
        with self._lock:
            self._waiters.wait_for(lambda: path not in self._changing, timeout_s)

    def _attach(self, node: Node | None, path: str) -> None:
        if node is not None:
            node.path = path
            self._by_path[path] = node

    def _detach(self, node: Node) -> None:
        if node.path is not None and self._by_path.get(node.path) is node:
            del self._by_path[node.path]
        node.path = None
