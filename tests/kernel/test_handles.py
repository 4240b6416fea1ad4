"""How opens of one inode may stand beside each other (fs/fuse/iomode.c), and who holds a backing id."""

import os

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from imgfs.kernel.abi import FOPEN_DIRECT_IO, FOPEN_NOFLUSH, FOPEN_PASSTHROUGH
from imgfs.kernel.handles import Handles


class Backing:
    """The kernel's side of backing ids."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.next = 0
        self.refuses = False

    def register(self, _fd: int) -> int:
        if self.refuses:
            return 0
        self.next += 1
        self.open.add(self.next)
        return self.next

    def unregister(self, backing_id: int) -> None:
        self.open.remove(backing_id)


@pytest.fixture
def backing() -> Backing:
    return Backing()


@pytest.fixture
def handles(backing: Backing) -> Handles:
    return Handles(backing.register, backing.unregister)


def test_readers_at_rest_share_one_backing_id_until_the_last_is_gone(handles: Handles, backing: Backing) -> None:
    modes = [handles.add(fh, 2, os.O_RDONLY, 9) for fh in (1, 2, 3)]
    assert {mode.backing_id for mode in modes} == {1}
    assert all(mode.open_flags == FOPEN_PASSTHROUGH | FOPEN_NOFLUSH for mode in modes)
    for fh in (1, 3):
        handles.remove(fh)
    assert backing.open == {1}
    handles.remove(2)
    assert backing.open == set()


def test_writer_beside_passed_through_readers_takes_their_backing_id_and_direct_io(handles: Handles) -> None:
    reader = handles.add(1, 2, os.O_RDONLY, 9)
    writer = handles.add(2, 2, os.O_RDWR, None)
    assert writer.backing_id == reader.backing_id
    assert writer.open_flags & (FOPEN_PASSTHROUGH | FOPEN_DIRECT_IO) == FOPEN_PASSTHROUGH | FOPEN_DIRECT_IO
    assert not writer.open_flags & FOPEN_NOFLUSH


def test_reader_beside_a_writer_is_direct_and_has_no_backing_id(handles: Handles, backing: Backing) -> None:
    handles.add(1, 2, os.O_WRONLY, None)
    mode = handles.add(2, 2, os.O_RDONLY, 9)
    assert mode.open_flags & (FOPEN_PASSTHROUGH | FOPEN_DIRECT_IO) == FOPEN_DIRECT_IO
    assert backing.open == set()


def test_inode_is_not_passed_through_while_an_open_without_backing_id_is_left(handles: Handles) -> None:
    handles.add(1, 2, os.O_WRONLY, None)
    handles.add(2, 2, os.O_RDONLY, 9)
    handles.remove(1)
    assert handles.add(3, 2, os.O_RDONLY, 9).backing_id == 0
    handles.remove(2)
    handles.remove(3)
    assert handles.add(4, 2, os.O_RDONLY, 9).backing_id == 1


def test_refused_registration_falls_back_to_cached_reads(handles: Handles, backing: Backing) -> None:
    backing.refuses = True
    assert not handles.add(1, 2, os.O_RDONLY, 9).open_flags & (FOPEN_PASSTHROUGH | FOPEN_DIRECT_IO)
    backing.refuses = False
    assert not handles.add(2, 2, os.O_RDONLY, 9).open_flags & (FOPEN_PASSTHROUGH | FOPEN_DIRECT_IO)
    assert not handles.add(3, 2, os.O_RDWR, None).open_flags & FOPEN_DIRECT_IO


def test_unknown_handle_is_ebadf(handles: Handles) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        handles.get(7)
    handles.remove(7)


class HandlesModel(RuleBasedStateMachine):
    """Opens and releases in any order: never a mixture that the kernel answers with EIO, never a leaked id."""

    def __init__(self) -> None:
        super().__init__()
        self.backing = Backing()
        self.handles = Handles(self.backing.register, self.backing.unregister)
        self.modes: dict[int, tuple[int, int, int]] = {}
        self.next = 0

    @rule(node=st.integers(2, 3), writes=st.booleans(), at_rest=st.booleans(), refuses=st.booleans())
    def open(self, node: int, writes: bool, at_rest: bool, refuses: bool) -> None:
        self.next += 1
        self.backing.refuses = refuses
        flags = os.O_RDWR if writes else os.O_RDONLY
        mode = self.handles.add(self.next, node, flags, 9 if at_rest else None)
        self.modes[self.next] = (node, *mode)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.modes:
            fh = data.draw(st.sampled_from(sorted(self.modes)))
            del self.modes[fh]
            self.handles.remove(fh)

    @invariant()
    def kernel_accepts(self) -> None:
        for node in (2, 3):
            opens = [(flags, backing) for n, flags, backing in self.modes.values() if n == node]
            assert len({backing for _flags, backing in opens}) <= 1
            assert all(bool(flags & FOPEN_PASSTHROUGH) == bool(backing) for flags, backing in opens)
        assert self.backing.open == {backing for _n, _f, backing in self.modes.values() if backing}


TestHandlesModel = HandlesModel.TestCase
