"""The lists that datadirs keep of each other: current soon, corrected at each start, never trusted."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgfs import ImageStore, catalogue, load
from imgfs.catalogue import Journal, Listed, latest, line_of, parse
from imgfs.errors import DatadirOffline
from imgfs.identity import new_identity
from tests.clients import fill
from tests.conftest import Mounter, attribute, wait_until, write_config

SUBJECT = new_identity()
ONE = Listed(5, 7, "active", "0" * 32, "sha512", "1" * 128)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[int]:
    """A directory like `.imgfs`, as a descriptor."""
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noted is written down soon."""
    monkeypatch.setattr(catalogue, "FLUSH_SECONDS", 0.01)


def listed(tmp_path: Path, subject: str = "high", keeper: str = "low") -> dict[str, Listed]:
    """What a datadir lists of another."""
    fd = os.open(tmp_path / keeper / ".imgfs", os.O_RDONLY)
    try:
        return Journal(fd, identity_of(tmp_path / subject)).read()
    finally:
        os.close(fd)


def identity_of(place: Path) -> str:
    found = json.loads((place / ".imgfs/marker").read_text())["datadir"]
    assert isinstance(found, str)
    return found


def summary(found: dict[str, Listed]) -> dict[str, tuple[int, str, str]]:
    return {name: (facts.size, facts.state, facts.checksum) for name, facts in found.items()}


def active(content: bytes) -> tuple[int, str, str]:
    return len(content), "active", hashlib.md5(content).hexdigest()


# --- a journal ---


def test_journal_gives_what_was_appended(own: int) -> None:
    journal = Journal(own, SUBJECT)
    assert journal.read() == {}
    journal.append([line_of("a", ONE), line_of("b\udcff\n", ONE)])
    journal.append([line_of("a", None), line_of("c", Listed(0, 0))])
    assert Journal(own, SUBJECT).read() == {"b\udcff\n": ONE, "c": Listed(0, 0)}


def test_torn_last_line_costs_that_line_only(own: int, tmp_path: Path) -> None:
    Journal(own, SUBJECT).append([line_of("a", ONE), line_of("b", ONE)])
    file = tmp_path / f"catalogue-{SUBJECT}"
    os.truncate(file, file.stat().st_size - 20)
    journal = Journal(own, SUBJECT)
    assert journal.read() == {"a": ONE}
    journal.append([line_of("c", ONE)])
    assert journal.read() == {"a": ONE, "c": ONE}


def test_long_journal_is_written_anew(own: int, tmp_path: Path) -> None:
    journal = Journal(own, SUBJECT)
    journal.append([line_of("stays", ONE)])
    for number in range(catalogue.SPARE_LINES):
        journal.append([line_of(f"x{number}", ONE), line_of(f"x{number}", None)])
    file = tmp_path / f"catalogue-{SUBJECT}"
    assert len(file.read_bytes().splitlines()) <= catalogue.SPARE_LINES + 4
    assert journal.read() == {"stays": ONE}
    assert os.listdir(tmp_path) == [file.name]


HOSTILE = {
    "deep": b"[" * 100_000,
    "deep line": b"[" * 3000 + b"\n",
    "not JSON": b"\xff\xfe{]\n",
    "other forms": b'1\nnull\n"a"\n{}\n[]\n[1]\n[["a"]]\n[null,1,2,"active"]\n',
    "names that can't be": b'["../x",1,1,"stale"]\n["",1,1,"stale"]\n[".imgfs",1,1,"stale"]\n["\\u0000",1,1,""]\n',
    "sizes": b'["a",-1,1,"stale"]\n["a",1e999,1,"stale"]\n["a",' + b"9" * 4000 + b',1,"stale"]\n["a",[],1,"stale"]\n',
    "states": b'["a",1,1,"good"]\n["a",1,1,[]]\n["a",1]\n["a",1,1,"active","x","y","z","w"]\n',
    "digests": b'["a",1,1,"active","\\u001b[2J","",""]\n["a",1,1,"active",1,2,3]\n',
    "one long line": b"x" * 2_000_000,
    "zeros": bytes(2_000_000),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.timeout(20)
def test_what_is_no_line_is_passed_over(own: int, tmp_path: Path, case: str) -> None:
    file = tmp_path / f"catalogue-{SUBJECT}"
    file.write_bytes(line_of("before", ONE) + HOSTILE[case])
    journal = Journal(own, SUBJECT)
    journal.append([line_of("after", ONE)])
    assert journal.read() == {"before": ONE, "after": ONE}


def test_endless_journal_is_read_to_a_limit(own: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "LARGEST_BYTES", 1 << 20)
    file = tmp_path / f"catalogue-{SUBJECT}"
    file.write_bytes(line_of("before", ONE))
    os.truncate(file, 1 << 40)
    assert Journal(own, SUBJECT).read() == {"before": ONE}


@pytest.mark.parametrize("kind", ["symlink", "pipe", "directory"])
def test_journal_is_no_other_file_than_a_regular_one(own: int, tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"catalogue-{SUBJECT}"
    if kind == "symlink":
        (tmp_path / "elsewhere").write_bytes(line_of("a", ONE))
        file.symlink_to("elsewhere")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    for call in (Journal(own, SUBJECT).read, lambda: Journal(own, SUBJECT).append([line_of("b", ONE)])):
        with pytest.raises(OSError):
            call()
    if kind == "symlink":
        assert (tmp_path / "elsewhere").read_bytes() == line_of("a", ONE)


def test_line_survives_its_form() -> None:
    assert parse(line_of("a", ONE)) == ("a", ONE)
    assert parse(line_of("a", None)) == ("a", None)


def test_killed_writer_loses_no_line_but_the_last(tmp_path: Path) -> None:
    """kill -9 at random moments while lines are appended and the journal is written anew."""
    writer = (
        "import os, sys\n"
        "from imgfs import catalogue\n"
        "catalogue.SPARE_LINES = 20\n"
        "journal = catalogue.Journal(os.open(sys.argv[1], os.O_RDONLY), sys.argv[2])\n"
        "number = len(journal.read())\n"
        "while True:\n"
        "    gone = [catalogue.line_of(f'gone{number}', line) for line in (catalogue.Listed(1, 1), None)]\n"
        "    journal.append([catalogue.line_of(f'kept{number}', catalogue.Listed(number, 1)), *gone])\n"
        "    number += 1\n"
        "    print(number, flush=True)\n"
    )
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", writer, tmp_path, SUBJECT], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            told = [process.stdout.readline() for _ in range(60)]
            process.send_signal(signal.SIGKILL)
            told += process.stdout.readlines()
        last = max(int(line) for line in told if line.endswith(b"\n"))
        found = {name for name in Journal(fd, SUBJECT).read() if name.startswith("kept")}
        assert {f"kept{number}" for number in range(last)} <= found
        assert len(found) <= last + 1
    os.close(fd)


# --- a store's ---


@pytest.mark.usefixtures("at_once")
def test_lists_follow_seals_removals_and_renames(open_store: Callable[..., ImageStore], tmp_path: Path) -> None:
    store = open_store()
    store.add("a", [b"one"])
    wait_until(lambda: summary(listed(tmp_path)) == {"a": active(b"one")}, "the line")
    assert listed(tmp_path)["a"].os_hash_value == hashlib.sha512(b"one").hexdigest()
    store.rename("a", "b")
    wait_until(lambda: summary(listed(tmp_path)) == {"b": active(b"one")}, "the rename")
    store.add("c", [b"two"])
    store.exchange("b", "c")
    wait_until(lambda: summary(listed(tmp_path)) == {"c": active(b"one"), "b": active(b"two")}, "the exchange")
    store.delete("b")
    wait_until(lambda: list(listed(tmp_path)) == ["c"], "the removal")
    assert listed(tmp_path, "low", "high") == {}


@pytest.mark.usefixtures("at_once")
def test_image_renamed_over_one_elsewhere_is_listed_once(
    open_store: Callable[..., ImageStore], tmp_path: Path
) -> None:
    store = open_store()
    (tmp_path / "low/x").write_bytes(b"old")
    store.digests("x")
    wait_until(lambda: summary(listed(tmp_path, "low", "high")) == {"x": active(b"old")})
    store.add("new", [b"new"])
    store.rename("new", "x")
    wait_until(lambda: listed(tmp_path, "low", "high") == {}, "the end of the old one")
    wait_until(lambda: summary(listed(tmp_path)) == {"x": active(b"new")}, "the new one")


@pytest.mark.usefixtures("at_once")
def test_what_happened_directly_is_found_at_the_next_start(
    open_store: Callable[..., ImageStore], tmp_path: Path
) -> None:
    store = open_store()
    for name in ("gone", "changed", "stays"):
        store.add(name, [b"old"])
    wait_until(lambda: len(listed(tmp_path)) == 3)
    store.close()
    (tmp_path / "high/gone").unlink()
    (tmp_path / "high/changed").write_bytes(b"newer")
    (tmp_path / "high/new").write_bytes(b"x" * 9)
    again = ImageStore(load(tmp_path / "imgfs.yaml"))
    wanted = {"stays": active(b"old"), "changed": (5, "stale", ""), "new": (9, "stale", "")}
    wait_until(lambda: summary(listed(tmp_path)) == wanted, "the look")
    again.digests("new")
    wait_until(lambda: summary(listed(tmp_path))["new"] == active(b"x" * 9), "the seal")
    again.close()


def test_what_was_noted_is_written_when_the_store_closes(tmp_path: Path) -> None:
    with ImageStore(load(write_config(tmp_path))) as store:
        store.add("a", [b"one"])
    assert summary(listed(tmp_path)) == {"a": active(b"one")}


@pytest.mark.usefixtures("at_once")
def test_names_of_a_datadir_that_goes_offline_are_known(
    open_store: Callable[..., ImageStore], tmp_path: Path
) -> None:
    store = open_store()
    store.add("there", [b"1"])
    wait_until(lambda: "there" in listed(tmp_path))
    high = store.datadirs[0]
    high.go_offline("unplugged")
    wait_until(lambda: "there" in high.known_names, "the list")
    for refused in (store.status, store.create, store.open, store.delete):
        with pytest.raises(DatadirOffline):
            refused("there")
    high.come_back()
    wait_until(lambda: not high.known_names)
    assert store.status("there")[0] is high


@pytest.mark.usefixtures("at_once")
def test_full_sibling_costs_its_list_only(
    filesystem: Callable[..., Path], tmp_path: Path, open_store: Callable[..., ImageStore]
) -> None:
    small = filesystem("tmpfs", 4)
    store = open_store([f"{tmp_path}/high:3", {"path": str(small), "priority": 1, "mode": "nc"}, f"{tmp_path}/low:2"])
    fill(small, 0)
    for number in range(20):
        store.add(f"x{number}", [b"x"])
    wait_until(lambda: len(listed(tmp_path)) == 20, "the list in the other sibling")


def test_latest_list_counts(tmp_path: Path) -> None:
    with ImageStore(load(write_config(tmp_path, ["a:3", "b:2", "c:1"]))) as store:
        a, b, c = store.datadirs
        for keeper, name, mtime in ((b, "old", 1), (c, "new", 2)):
            assert keeper.has_own
            assert a.marked_as is not None
            Journal(keeper.own_fd, a.marked_as).append([line_of(name, ONE)])
            os.utime(f"catalogue-{a.marked_as}", (mtime, mtime), dir_fd=keeper.own_fd)
        assert list(latest(a.marked_as, [b, c])) == ["new"]


def test_store_of_one_datadir_keeps_no_list(tmp_path: Path) -> None:
    with ImageStore(load(write_config(tmp_path, ["only"]))) as store:
        store.add("a", [b"one"])
    assert os.listdir(tmp_path / "only/.imgfs") == ["marker"]


def test_lists_follow_what_programs_do(mount: Mounter) -> None:
    images = mount()
    (images / "a").write_bytes(b"one")
    attribute(images / "a", "checksum")
    base = images.datadirs[0].parent
    wait_until(lambda: summary(listed(base)) == {"a": active(b"one")}, "the line")
    (images / "a").unlink()
    (images / "b").write_bytes(b"two")
    images.unmount()
    assert summary(listed(base)) == {"b": active(b"two")}
