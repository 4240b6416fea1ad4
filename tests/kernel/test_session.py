"""One request, one reply: the session over a device that only writes down what it is told."""

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.kernel import Found, KernelSession, RequestContext, abi, replies
from imgfs.kernel.opcodes import OPCODES, SILENT
from imgfs.status import Status, Together

FILE = Together(0o100644, 1, *[0] * 7)
STATUS = Status(FILE, ino=1, identity=1, blksize=1)


class Recorder:
    """In place of a `Device`."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, Any]] = []

    def reply(self, unique: int, payload: Any) -> None:
        self.replies.append((unique, bytes(payload)))

    def refuse(self, unique: int, code: int) -> None:
        self.replies.append((unique, code))

    open_backing = refuse


def operations(op: str, *_args: Any) -> Any:
    """Operations that do little, some of it wrong."""
    answers: dict[str, Any] = {
        **dict.fromkeys(("find", "status"), STATUS),
        "statx": (STATUS, None),
        "open": 3,
        "create": 4,
        "read": b"data",
        "readdir": [".", "..", "a"],
    }
    if op == "unlink":
        raise FileNotFoundError(errno.ENOENT, "no such image")
    if op == "statfs":
        raise ValueError("a bug")
    if op == "lseek":
        raise OSError("without an errno")
    return answers.get(op)


class Notes:
    """In place of a `Notifier`."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, notification: bytes) -> None:
        self.sent.append(notification)


class Talk:
    """A session, without a mount, that is handed bytes."""

    def __init__(self, **options: float) -> None:
        self.context = RequestContext()
        self.session = KernelSession(operations, "/", context=self.context, **options)  # type: ignore[arg-type]
        self.device = Recorder()

    def raw(self, data: bytes) -> list[tuple[int, Any]]:
        self.device.replies.clear()
        self.session._answer(self.device, data)  # type: ignore[arg-type]
        return self.device.replies

    def say(self, opcode: int, body: bytes = b"", nodeid: int = 1, unique: int = 8) -> Any:
        header = abi.fuse_in_header.pack(40 + len(body), opcode, unique, nodeid, 5, 6, 7, 0, 0)
        replies = self.raw(header + body)
        assert len(replies) <= 1
        assert not replies or replies[0][0] == unique
        return replies[0][1] if replies else None


@given(st.integers(0, 60) | st.integers(0, 2**32 - 1), st.binary(max_size=120), st.integers(0, 3))
def test_every_request_gets_exactly_one_reply(opcode: int, body: bytes, nodeid: int) -> None:
    answer = Talk().say(opcode, body, nodeid)
    silent = opcode in SILENT
    assert (answer is None) == silent


def test_unknown_opcodes_get_enosys() -> None:
    talk = Talk()
    for opcode in set(range(1, 80)) - OPCODES.keys() - SILENT:
        assert talk.say(opcode, bytes(100)) == errno.ENOSYS


def test_malformed_requests_get_eio(caplog: pytest.LogCaptureFixture) -> None:
    assert Talk().say(abi.FUSE_LOOKUP, b"no end") == errno.EIO
    assert "malformed lookup" in caplog.text


def test_a_wrong_length_gets_eio_and_half_a_header_nothing() -> None:
    talk = Talk()
    assert talk.raw(abi.fuse_in_header.pack(99, 1, 8, 1, 0, 0, 0, 0, 0)) == [(8, errno.EIO)]
    assert talk.raw(b"\0" * 10) == []


def test_errors_become_errnos(caplog: pytest.LogCaptureFixture) -> None:
    talk = Talk()
    assert talk.say(abi.FUSE_UNLINK, b"a\0") == errno.ENOENT
    assert not caplog.records
    assert talk.say(abi.FUSE_STATFS) == errno.EIO
    assert "a bug" in caplog.text
    talk.say(abi.FUSE_LOOKUP, b"a\0")
    assert talk.say(abi.FUSE_LSEEK, abi.fuse_lseek_in.pack(3, 0, 0), nodeid=2) == errno.EIO


def test_unknown_inodes_are_stale() -> None:
    assert Talk().say(abi.FUSE_GETATTR, bytes(16), nodeid=77) == errno.ESTALE


def test_lookup_counts_until_forgotten() -> None:
    talk = Talk()
    entry = talk.say(abi.FUSE_LOOKUP, b"a\0")
    assert entry[:8] == (2).to_bytes(8, "little")
    assert talk.say(abi.FUSE_FORGET, (1).to_bytes(8, "little"), nodeid=2) is None
    assert talk.say(abi.FUSE_GETATTR, bytes(16), nodeid=2) == errno.ESTALE


@pytest.mark.parametrize("removed_here", [True, False])
def test_the_kernel_need_not_ask_again_about_what_a_request_removed(removed_here: bool) -> None:
    talk = Talk()
    session, notes = talk.session, Notes()
    session._notifier, session._has_epochs = notes, True  # type: ignore[assignment]
    there = True
    watcher = threading.Thread(
        target=lambda: session.look_again("a", lambda: Found(1, 1) if there else None, data=False)
    )

    def remove(op: str, *args: Any) -> Any:
        nonlocal there
        if op != "unlink":
            return operations(op, *args)
        there = False
        watcher.start()
        watcher.join(0.2)  # it is told while the request is under way
        return None

    session._filesystem._call = remove
    talk.say(abi.FUSE_LOOKUP, b"a\0")
    if removed_here:
        talk.say(abi.FUSE_UNLINK, b"a\0")
    else:
        remove("unlink")
    watcher.join()
    assert (replies.inc_epoch() in notes.sent) is not removed_here


def test_reading_the_directory_goes_on_where_it_stopped() -> None:
    talk = Talk()
    (fh,) = talk.say(abi.FUSE_OPENDIR, bytes(8))[:1]
    names, offset = [], 0
    while data := talk.say(abi.FUSE_READDIR, abi.fuse_read_in.pack(fh, offset, 32, 0, 0, 0)):
        _ino, offset, length, _kind = abi.fuse_dirent.unpack_from(data)
        names.append(data[24 : 24 + length])
    assert names == [b".", b"..", b"a"]


def test_attribute_values_obey_the_callers_size() -> None:
    talk = Talk()
    talk.session._filesystem._call = lambda op, *_args: b"12345"
    name = b"user.x\0"
    assert talk.say(abi.FUSE_GETXATTR, abi.fuse_getxattr_in.pack(0) + name) == abi.fuse_getxattr_out.pack(5)
    assert talk.say(abi.FUSE_GETXATTR, abi.fuse_getxattr_in.pack(4) + name) == errno.ERANGE
    assert talk.say(abi.FUSE_GETXATTR, abi.fuse_getxattr_in.pack(5) + name) == b"12345"


def test_operations_see_caller_and_interrupt_of_their_own_request() -> None:
    talk = Talk()
    seen: list[Any] = []

    def statfs(_op: str, *_args: Any) -> Any:
        seen.append((talk.context.caller(), talk.context.interrupted()))
        talk.context.interrupt(8)
        seen.append(talk.context.interrupted())
        raise InterruptedError(errno.EINTR, "interrupted")

    talk.session._filesystem._call = statfs
    assert talk.say(abi.FUSE_STATFS) == errno.EINTR
    assert seen == [((5, 6, 7), False), True]
    assert talk.say(abi.FUSE_STATFS, unique=10) == errno.EINTR
    assert seen[2] == ((5, 6, 7), False)


def test_an_interrupt_may_overtake_its_request() -> None:
    talk = Talk()
    seen: list[bool] = []

    def statfs(_op: str, *_args: Any) -> Any:
        seen.append(talk.context.interrupted())
        raise InterruptedError(errno.EINTR, "interrupted")

    talk.session._filesystem._call = statfs
    talk.say(abi.FUSE_INTERRUPT, (8).to_bytes(8, "little"), unique=9)
    talk.say(abi.FUSE_STATFS, unique=8)
    talk.say(abi.FUSE_STATFS, unique=10)
    assert seen == [True, False]


def test_outside_a_request_the_caller_is_this_process() -> None:
    assert RequestContext().caller() == (os.geteuid(), os.getegid(), os.getpid())
    assert not RequestContext().interrupted()


class Renaming:
    """Operations of which the first `op` falls into a rename of /a to /b."""

    def __init__(self, talk: Talk, op: str) -> None:
        self.talk, self.op = talk, op
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, op: str, *args: Any) -> Any:
        self.calls.append((op, *args))
        if op == self.op and len([call for call in self.calls if call[0] == op]) == 1:
            self.talk.session._nodes.rename("/a", "/b")
        return operations(op, *args)


def test_an_open_that_a_rename_overtook_is_done_again_by_the_new_name() -> None:
    talk = Talk()
    talk.say(abi.FUSE_LOOKUP, b"a\0")
    talk.session._filesystem._call = renaming = Renaming(talk, "open")
    talk.say(abi.FUSE_OPEN, bytes(8), nodeid=2)
    assert renaming.calls[:3] == [("open", "/a", 0), ("release", "/a", 3), ("open", "/b", 0)]
    assert len(talk.session._handles) == 1


def test_attributes_that_a_rename_overtook_are_asked_again_by_the_new_name() -> None:
    talk = Talk()
    talk.say(abi.FUSE_LOOKUP, b"a\0")
    talk.session._filesystem._call = renaming = Renaming(talk, "status")
    talk.say(abi.FUSE_GETATTR, bytes(16), nodeid=2)
    assert renaming.calls == [("status", "/a", None), ("status", "/b", None)]


def test_a_lookup_that_a_rename_overtook_does_not_lend_its_attributes_to_another_inode() -> None:
    talk = Talk()
    talk.say(abi.FUSE_LOOKUP, b"a\0")
    talk.session._filesystem._call = renaming = Renaming(talk, "find")
    entry = talk.say(abi.FUSE_LOOKUP, b"a\0")
    assert len(renaming.calls) == 2
    assert entry[:8] != (2).to_bytes(8, "little")


@pytest.mark.parametrize("look_again", [
    lambda session: session.look_again("a", lambda: None, data=False, gone=True),
    lambda session: session.look_again_at_all(),
])  # fmt: skip
def test_a_lookup_that_a_direct_removal_overtook_looks_again(look_again: Callable[[KernelSession], None]) -> None:
    """It has found the file, which then goes, and all that is known of it by now is forgotten, before it says so."""
    talk = Talk()
    talk.session._notifier = Notes()  # type: ignore[assignment]
    asked: list[str] = []

    def find(op: str, *args: Any) -> Any:
        if op != "find":
            return operations(op, *args)
        asked.append(args[0])
        if len(asked) > 1:
            return None
        look_again(talk.session)
        return STATUS

    talk.session._filesystem._call = find
    assert talk.say(abi.FUSE_LOOKUP, b"a\0") == errno.ENOENT
    assert len(talk.session._nodes) == 1
    assert asked == ["/a", "/a"]


def test_a_lookup_beside_another_of_the_same_name_ends_and_leaves_nothing() -> None:
    talk = Talk()
    other, begun = Recorder(), []
    lookup = abi.fuse_in_header.pack(42, abi.FUSE_LOOKUP, 10, 1, 5, 6, 7, 0, 0) + b"a\0"

    def find(op: str, *args: Any) -> Any:
        if op == "find" and not begun:
            begun.append(op)
            beside = threading.Thread(target=talk.session._answer, args=(other, lookup))
            beside.start()
            beside.join()
        return operations(op, *args)

    talk.session._filesystem._call = find
    assert talk.say(abi.FUSE_LOOKUP, b"a\0") == other.replies[0][1]
    assert not talk.session._filesystem._looking


class Script:
    """Operations that write down what they are called with; `answers` say what some of them do, by name."""

    def __init__(self, talk: Talk, **answers: Callable[..., Any]) -> None:
        self.answers = answers
        self.calls: list[tuple[Any, ...]] = []
        talk.session._filesystem._call = self

    def __call__(self, op: str, *args: Any) -> Any:
        self.calls.append((op, *args))
        return self.answers[op](*args) if op in self.answers else operations(op, *args)

    def of(self, *ops: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in ops]


def rename(talk: Talk) -> None:
    """b to a, by a request."""
    assert talk.say(abi.FUSE_RENAME, abi.fuse_rename_in.pack(1) + b"b\0a\0") == b""


def test_an_image_that_was_replaced_is_reached_until_the_kernel_forgets_it() -> None:
    """Whoever has just looked it up asks for more by its inode, and its name never was missing."""
    talk = Talk()
    talk.say(abi.FUSE_LOOKUP, b"a\0")
    script = Script(talk, open=lambda *_: len(script.calls), getxattr=lambda *_: b"value")
    rename(talk)
    opened = script.calls.index(("open", "/a", os.O_RDONLY)) + 1
    assert talk.say(abi.FUSE_GETXATTR, abi.fuse_getxattr_in.pack(9) + b"user.x\0", nodeid=2) == b"value"
    assert script.calls[-1] == ("getxattr", None, "user.x", 0, opened)
    talk.say(abi.FUSE_OPEN, bytes(8), nodeid=2)
    assert ("open", None, 0, opened) in script.calls
    assert not script.of("release")
    assert talk.say(abi.FUSE_FORGET, (1).to_bytes(8, "little"), nodeid=2) is None
    assert script.of("release") == [("release", None, opened)]


@pytest.mark.parametrize("known", [True, False])
def test_a_rename_that_fails_keeps_no_handle(known: bool) -> None:
    talk = Talk()
    if known:
        talk.say(abi.FUSE_LOOKUP, b"a\0")

    def fail(*_args: Any) -> None:
        raise PermissionError(errno.EPERM, "no")

    script = Script(talk, rename=fail)
    assert talk.say(abi.FUSE_RENAME, abi.fuse_rename_in.pack(1) + b"b\0a\0") == errno.EPERM
    assert len(script.of("open")) == len(script.of("release")) == known


def test_a_rename_is_done_where_the_replaced_image_can_not_be_opened() -> None:
    talk = Talk()
    talk.say(abi.FUSE_LOOKUP, b"a\0")

    def fail(*_args: Any) -> None:
        raise OSError(errno.EIO, "it failed an expectation")

    script = Script(talk, open=fail)
    rename(talk)
    assert script.of("rename", "release") == [("rename", "/b", "/a")]
    assert talk.say(abi.FUSE_GETXATTR, abi.fuse_getxattr_in.pack(9) + b"user.x\0", nodeid=2) == errno.ESTALE


def test_attributes_are_asked_again_where_the_handle_that_was_asked_is_closed_meanwhile() -> None:
    talk = Talk()
    talk.say(abi.FUSE_LOOKUP, b"a\0")
    talk.say(abi.FUSE_OPEN, bytes(8), nodeid=2)

    def status(_path: str | None, fh: int | None) -> Status:
        if fh is not None:
            talk.session._handles.remove(fh)
            raise OSError(errno.EBADF, "closed")
        return STATUS

    script = Script(talk, status=status)
    assert len(talk.say(abi.FUSE_GETATTR, bytes(16), nodeid=2)) == abi.fuse_attr_out.size
    assert script.of("status") == [("status", "/a", 3), ("status", "/a", None)]


def test_a_request_beside_the_release_of_the_last_handle_goes_by_the_name() -> None:
    """chmod(2) right after close(2): the operations know no such handle any more, but the release is not over yet."""
    talk, other = Talk(), Recorder()
    talk.say(abi.FUSE_LOOKUP, b"a\0")
    talk.say(abi.FUSE_OPEN, bytes(8), nodeid=2)
    chmod = abi.fuse_setattr_in.pack(abi.FATTR_MODE, *[0] * 9, 0o600, 0, 0)
    request = abi.fuse_in_header.pack(40 + len(chmod), abi.FUSE_SETATTR, 9, 2, 5, 6, 7, 0, 0) + chmod

    def known(*arguments: Any) -> Status:
        if arguments[-1] is not None:
            raise OSError(errno.EBADF, "closed")
        return STATUS

    script = Script(talk, status=known, chmod=known, release=lambda *_: talk.session._answer(other, request))  # type: ignore[arg-type]
    talk.say(abi.FUSE_RELEASE, abi.fuse_release_in.pack(3, 0, 0, 0), nodeid=2)
    assert script.of("chmod") == [("chmod", "/a", 0o600, None)]
    assert [len(reply) for _, reply in other.replies] == [abi.fuse_attr_out.size]


def test_an_error_of_the_callers_own_handle_is_shown() -> None:
    talk = Talk()
    talk.say(abi.FUSE_LOOKUP, b"a\0")

    def status(*_args: Any) -> None:
        raise OSError(errno.EBADF, "closed")

    script = Script(talk, status=status)
    request = abi.fuse_getattr_in.pack(abi.FUSE_GETATTR_FH, 7)
    assert talk.say(abi.FUSE_GETATTR, request, nodeid=2) == errno.EBADF
    assert script.of("status") == [("status", "/a", 7)]


@pytest.mark.parametrize("opcode", [abi.FUSE_OPEN, abi.FUSE_GETATTR])
def test_a_name_that_leads_to_another_file_is_to_be_looked_up_again(opcode: int) -> None:
    """The kernel does so at ESTALE; bytes of the new file must not be read under the old one's attributes."""
    talk = Talk()
    talk.say(abi.FUSE_LOOKUP, b"a\0")
    script = Script(talk, status=lambda *_: STATUS._replace(identity=2))
    assert talk.say(opcode, bytes(16 if opcode == abi.FUSE_GETATTR else 8), nodeid=2) == errno.ESTALE
    assert len(script.of("open")) == len(script.of("release"))
    assert not talk.session._handles.all()
    script.answers["find"] = script.answers["status"]
    assert talk.say(abi.FUSE_LOOKUP, b"a\0")[:8] == (3).to_bytes(8, "little")


def test_attributes_of_a_file_with_several_names_are_kept_for_a_moment_only() -> None:
    talk = Talk(entry_timeout=600, attr_timeout=600)
    linked = STATUS._replace(stat=FILE._replace(st_nlink=2))
    Script(talk, find=lambda *_: linked, status=lambda *_: linked)
    entry = abi.fuse_entry_out.unpack(talk.say(abi.FUSE_LOOKUP, b"a\0"))
    assert (entry[2], entry[3]) == (600, 1)
    assert abi.fuse_attr_out.unpack(talk.say(abi.FUSE_GETATTR, bytes(16), nodeid=2))[0] == 1


class Expired(Notes):
    """In place of a `Device` that is written notifications to."""

    notify = Notes.send


def test_an_open_of_a_file_that_changed_since_the_kernel_saw_it_has_it_ask_again() -> None:
    talk = Talk()
    device = talk.session._device = Expired()  # type: ignore[assignment]
    changed = STATUS._replace(stat=FILE._replace(st_ctime_ns=9))
    talk.say(abi.FUSE_LOOKUP, b"a\0")
    talk.say(abi.FUSE_OPEN, bytes(8), nodeid=2)
    assert not device.sent
    Script(talk, status=lambda *_: changed)
    talk.say(abi.FUSE_OPEN, bytes(8), nodeid=2)
    assert device.sent == [replies.inval_inode(2, -1, 0)]
    talk.say(abi.FUSE_GETATTR, bytes(16), nodeid=2)
    talk.say(abi.FUSE_OPEN, bytes(8), nodeid=2)
    assert len(device.sent) == 1
