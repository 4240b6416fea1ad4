"""Nodeids and names, by example and against a model."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from imgfs.kernel.nodes import Nodes


def test_a_path_keeps_its_nodeid_while_referenced() -> None:
    nodes = Nodes()
    first = nodes.look_up("/a")
    assert nodes.look_up("/a") is first
    nodes.forget([(first.nodeid, 1)])
    assert nodes.get(first.nodeid) is first
    nodes.forget([(first.nodeid, 1)])
    with pytest.raises(OSError, match="Stale"):
        nodes.get(first.nodeid)


def test_a_nodeid_is_never_given_out_twice() -> None:
    nodes = Nodes()
    first = nodes.look_up("/a")
    nodes.forget([(first.nodeid, 1)])
    assert nodes.look_up("/a").nodeid != first.nodeid


def test_an_unlinked_node_lives_without_a_name_until_forgotten() -> None:
    nodes = Nodes()
    old = nodes.look_up("/a")
    nodes.unlink("/a")
    new = nodes.look_up("/a")
    assert (old.path, new.path) == (None, "/a")
    nodes.forget([(old.nodeid, 1)])
    assert nodes.find("/a") is new


def test_rename_takes_the_name_from_what_was_there() -> None:
    nodes = Nodes()
    a, b = nodes.look_up("/a"), nodes.look_up("/b")
    nodes.rename("/a", "/b")
    assert (a.path, b.path, nodes.find("/a"), nodes.find("/b")) == ("/b", None, None, a)


def test_exchange_swaps_names_known_or_not() -> None:
    nodes = Nodes()
    a, b = nodes.look_up("/a"), nodes.look_up("/b")
    nodes.exchange("/a", "/b")
    assert (a.path, b.path) == ("/b", "/a")
    nodes.exchange("/b", "/unknown")
    assert (a.path, nodes.find("/b")) == ("/unknown", None)


def test_the_root_is_never_forgotten() -> None:
    nodes = Nodes()
    nodes.forget([(1, 10**9), (99, 1)])
    assert nodes.get(1).path == "/"


def test_a_path_is_unsteady_while_it_changes() -> None:
    nodes = Nodes()
    with nodes.changing("/a", "/b"), nodes.changing("/a"):
        assert not nodes.steady("/a") and not nodes.steady("/b") and nodes.steady("/c")
    assert nodes.steady("/a")
    nodes.wait_steady("/a", 0)


PATHS = st.sampled_from([f"/{name}" for name in "abcd"])


class NodesModel(RuleBasedStateMachine):
    """What the kernel would believe: which node each name leads to, and how often it was told of it."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = Nodes()
        self.names: dict[str, int] = {}
        self.lookups: dict[int, int] = {}

    @rule(path=PATHS)
    def look_up(self, path: str) -> None:
        nodeid = self.nodes.look_up(path).nodeid
        assert self.names.setdefault(path, nodeid) == nodeid
        self.lookups[nodeid] = self.lookups.get(nodeid, 0) + 1

    @rule(path=PATHS)
    def unlink(self, path: str) -> None:
        self.nodes.unlink(path)
        self.names.pop(path, None)

    @rule(old=PATHS, new=PATHS)
    def rename(self, old: str, new: str) -> None:
        self.nodes.rename(old, new)
        if old != new:
            self.names.pop(new, None)
            if old in self.names:
                self.names[new] = self.names.pop(old)

    @rule(one=PATHS, other=PATHS)
    def exchange(self, one: str, other: str) -> None:
        self.nodes.exchange(one, other)
        first, second = self.names.pop(one, None), self.names.pop(other, None)
        self.names.update({p: n for p, n in ((other, first), (one, second)) if n is not None})

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        if not self.lookups:
            return
        nodeid = data.draw(st.sampled_from(sorted(self.lookups)))
        count = data.draw(st.integers(1, self.lookups[nodeid]))
        self.nodes.forget([(nodeid, count)])
        self.lookups[nodeid] -= count
        if not self.lookups[nodeid]:
            del self.lookups[nodeid]
            self.names = {path: other for path, other in self.names.items() if other != nodeid}

    @invariant()
    def agrees(self) -> None:
        assert len(self.nodes) == 1 + len(self.lookups)
        for path, nodeid in self.names.items():
            assert self.nodes.get(nodeid).path == path
        for nodeid in self.lookups.keys() - set(self.names.values()):
            assert self.nodes.get(nodeid).path is None


TestNodesModel = NodesModel.TestCase
