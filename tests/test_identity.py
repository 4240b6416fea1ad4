"""Markers: who a datadir is, told from what was found at the configured paths; and that none is ever half written."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from imgfs import DatadirConfig, identity
from imgfs.errors import DatadirError
from imgfs.identity import Found, Judgement, Marker, decode, judge, look, new_identity, write
from tests.conftest import wait_until

STORE, OTHER = new_identity(), new_identity()
D1, D2, D3 = new_identity(), new_identity(), new_identity()
TABLE = {D1: "/a", D2: "/b"}


def at(path: str, datadir: str | None = None, members: Mapping[str, str] = TABLE, **more: object) -> Found:
    """What a look at a path found; no datadir: no marker."""
    generation, store = more.get("generation", 0), more.get("store", STORE)
    marker = Marker(store, datadir, members, generation) if datadir else None  # type: ignore[arg-type]
    return Found(DatadirConfig(path), marker, more.get("obstacle"))  # type: ignore[arg-type]


def said(judgement: Judgement) -> list[tuple[str | None, bool]]:
    """Of each datadir, who it is and whether it is there."""
    return [(v.identity, v.absence is None) for v in judgement.verdicts]


def test_store_without_markers_is_new() -> None:
    judgement = judge([at("/a"), at("/b")])
    assert judgement.store is None
    assert said(judgement) == [(None, True), (None, True)]


def test_all_are_known_where_they_were() -> None:
    judgement = judge([at("/a", D1), at("/b", D2)])
    assert (judgement.store, judgement.members) == (STORE, TABLE)
    assert said(judgement) == [(D1, True), (D2, True)]
    assert [v.moved_from for v in judgement.verdicts] == [None, None]


def test_known_path_without_marker_is_absent_and_named() -> None:
    judgement = judge([at("/a", D1), at("/b")])
    assert said(judgement) == [(D1, True), (D2, False)]
    assert [(v.path, v.absence) for v in judgement.absent] == [
        ("/b", "its disk is not mounted (/b has no marker of imgfs)")
    ]


def test_directory_that_is_gone_or_can_not_be_read_is_absent_where_it_is_known() -> None:
    judgement = judge([at("/a", D1), at("/b", obstacle="it can't be opened: Input/output error")])
    assert said(judgement) == [(D1, True), (D2, False)]
    assert judgement.absent[0].absence == "it can't be opened: Input/output error"
    assert said(judge([at("/a", D1), at("/c", obstacle="there is no such directory")])) == [(D1, True), (None, True)]


def test_path_that_nobody_knows_joins() -> None:
    assert said(judge([at("/a", D1), at("/b", D2), at("/c")])) == [(D1, True), (D2, True), (None, True)]
    assert said(judge([at("/a", D1), at("/b", D2), at("/c", D3, {D3: "/c"})]))[2] == (D3, True)


def test_identities_count_not_paths() -> None:
    moved = judge([at("/new", D1), at("/b", D2)])
    assert said(moved) == [(D1, True), (D2, True)]
    assert moved.verdicts[0].moved_from == "/a"
    swapped = judge([at("/b", D1), at("/a", D2)])
    assert said(swapped) == [(D1, True), (D2, True)]
    assert [v.moved_from for v in swapped.verdicts] == ["/a", "/b"]


def test_path_of_a_moved_datadir_does_not_become_a_new_one() -> None:
    judgement = judge([at("/a"), at("/b", D1)])
    assert said(judgement) == [(D2, False), (D1, True)]


def test_path_of_a_moved_datadir_is_free_for_a_new_one_once_nobody_is_missed() -> None:
    assert said(judge([at("/a"), at("/b", D1, {D1: "/a"})])) == [(None, True), (D1, True)]


def test_disk_of_another_store_is_absent_not_served() -> None:
    foreign = at("/b", D3, {D3: "/elsewhere"}, store=OTHER)
    for judgement in (judge([at("/a", D1), foreign]), judge([foreign, at("/a", D1)])):
        assert judgement.store == STORE
        assert [(v.path, v.identity, v.absence) for v in judgement.absent] == [
            ("/b", D2, "what is there belongs to another store")
        ]


def test_markers_of_two_stores_that_claim_as_much_are_refused_with_what_to_do() -> None:
    with pytest.raises(DatadirError, match=r"/a and /b belong to different stores.*--adopt"):
        judge([at("/a", D1, {D1: "/a"}), at("/b", D2, {D2: "/b"}, store=OTHER)])


def test_of_two_copies_of_a_datadir_the_one_in_its_place_counts() -> None:
    judgement = judge([at("/copy", D1), at("/a", D1), at("/b", D2)])
    assert said(judgement) == [(None, False), (D1, True), (D2, True)]
    assert judgement.absent[0].absence == "what is there is a copy of the datadir at /a, with the same identity"


def test_latest_table_counts() -> None:
    old = {D1: "/a", D2: "/b", D3: "/c"}
    judgement = judge([at("/a", D1, old, generation=1), at("/b", D2, TABLE, generation=2), at("/c")])
    assert judgement.members == TABLE
    assert said(judgement)[2] == (None, True)


def test_marker_survives_its_form() -> None:
    marker = Marker(STORE, D1, {D1: "/a\udcff", D2: "/b"}, 7)
    assert decode(marker.encode()) == marker


@pytest.mark.parametrize(
    "stored",
    [b"", b"{", b"[]", b"[" * 100_000, b'{"version": 1}', b'{"version": 2}', b"null", b"\xff",
     b'{"version": 1, "store": "' + b"x" * 1_000_000 + b'"}',
     json.dumps({"version": 1, "store": STORE, "datadir": D1, "members": {D1: "relative"}, "generation": 0}).encode(),
     json.dumps({"version": 1, "store": STORE, "datadir": D1, "members": [D1], "generation": 0}).encode(),
     json.dumps({"version": 1, "store": STORE, "datadir": D1, "members": {}, "generation": "9" * 5000}).encode(),
     json.dumps({"version": 1, "store": STORE, "datadir": D1, "members": {}, "generation": -1}).encode(),
     b'{"version": 1, "store": "%s", "datadir": "%s", "members": {}, "generation": Infinity}' % ((b"0" * 32,) * 2)],
)  # fmt: skip
def test_what_is_no_marker_is_taken_for_a_damaged_one(tmp_path: Path, stored: bytes) -> None:
    assert decode(stored) is None
    (tmp_path / ".imgfs").mkdir()
    (tmp_path / ".imgfs/marker").write_bytes(stored)
    found = look(DatadirConfig(str(tmp_path)))
    assert found.marker is None
    assert "damaged" in str(found.obstacle)


@pytest.mark.parametrize("kind", ["symlink", "pipe", "directory"])
def test_marker_is_no_other_file_than_a_regular_one(tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").write_bytes(Marker(STORE, D1, {}).encode())
    place = tmp_path / "d"
    (place / ".imgfs").mkdir(parents=True)
    if kind == "symlink":
        (place / ".imgfs/marker").symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(place / ".imgfs/marker")
    else:
        (place / ".imgfs/marker").mkdir()
    assert look(DatadirConfig(str(place))).marker is None


def test_look_changes_nothing(tmp_path: Path) -> None:
    assert look(DatadirConfig(f"{tmp_path}/none")).obstacle == "there is no such directory"
    assert look(DatadirConfig(str(tmp_path))) == Found(DatadirConfig(str(tmp_path)))
    assert os.listdir(tmp_path) == []


def test_killed_writer_leaves_the_old_marker_or_the_new(tmp_path: Path) -> None:
    """kill -9 at random moments while markers are written over and over."""
    writer = (
        "import os, sys\n"
        "from imgfs.identity import Marker, write\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "number = int(sys.argv[4])\n"
        "while True:\n"
        "    number += 1\n"
        "    write(Marker(sys.argv[2], sys.argv[3], {sys.argv[3]: '/' + 'x' * 3000}, number), fd)\n"
        "    print(number, flush=True)\n"
    )
    seen = 0
    for _ in range(6):
        arguments = [sys.executable, "-c", writer, tmp_path, STORE, D1, str(seen)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            told = [process.stdout.readline() for _ in range(3)]
            process.send_signal(signal.SIGKILL)
            told += process.stdout.readlines()
        last = max(int(line) for line in told if line.endswith(b"\n"))
        marker = decode((tmp_path / identity.MARKER).read_bytes())
        assert marker is not None
        assert last <= marker.generation <= last + 1
        seen = marker.generation
    fd = os.open(tmp_path, os.O_RDONLY)
    write(Marker(STORE, D1, {}, 0), fd)
    os.close(fd)
    wait_until(lambda: os.listdir(tmp_path) == [identity.MARKER])
