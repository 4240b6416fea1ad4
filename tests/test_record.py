"""Records: what is stored of a sealed image comes back, and holds only for the file it was made for."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from imgfs.hashing import Digests
from imgfs.record import Expectations, Record, State, decode

DIGESTS = Digests(3, "0" * 32, "sha512", "1" * 128)
EXPECTED = Expectations(size=3, checksum="0" * 32, os_hash_value="1" * 128)

RECORDS = [
    Record(State.ACTIVE, 1, DIGESTS),
    Record(State.FAILED, 2**63 - 1, DIGESTS, EXPECTED),
    Record(State.ACTIVE, -5, DIGESTS, Expectations(size=0)),
    Record(State.SAVING, expectations=EXPECTED),
    Record(State.SAVING, expectations=Expectations(checksum="0" * 32)),
    Record(State.ACTIVE, 0, Digests(0, "", "md5", "")),
]


@pytest.fixture
def status(tmp_path: Path) -> os.stat_result:
    """Of a file of three bytes."""
    (tmp_path / "x").write_bytes(b"abc")
    os.utime(tmp_path / "x", ns=(1, 1_234_567_890_123_456_789))
    return os.stat(tmp_path / "x")


@pytest.mark.parametrize("record", RECORDS)
def test_round_trip_is_exact(record: Record) -> None:
    assert decode(record.encode()) == record


def test_stored_form_is_json_that_fits_beside_the_inode() -> None:
    """ext4 keeps attributes in the inode or one block of 4 KiB; digests of 512 bits must leave room for others."""
    stored = Record(State.FAILED, 2**63 - 1, DIGESTS, EXPECTED).encode()
    assert stored.startswith(b'{"version":1,')
    assert len(stored) < 1024


def test_record_holds_for_the_file_it_was_made_for(status: os.stat_result) -> None:
    assert Record(State.ACTIVE, status.st_mtime_ns, DIGESTS).holds_for(status)
    assert Record(State.FAILED, status.st_mtime_ns, DIGESTS).holds_for(status)


@pytest.mark.parametrize("size", [0, 2, 4])
def test_record_does_not_hold_for_another_size(status: os.stat_result, size: int) -> None:
    assert not Record(State.ACTIVE, status.st_mtime_ns, replace(DIGESTS, size=size)).holds_for(status)


@pytest.mark.parametrize("difference_ns", [-1, 1, 10**9])
def test_record_does_not_hold_for_another_mtime_by_a_nanosecond(status: os.stat_result, difference_ns: int) -> None:
    assert not Record(State.ACTIVE, status.st_mtime_ns + difference_ns, DIGESTS).holds_for(status)


@pytest.mark.parametrize("state", [State.SAVING, State.STALE])
def test_unsealed_record_never_holds(status: os.stat_result, state: State) -> None:
    assert not Record(state, status.st_mtime_ns, DIGESTS).holds_for(status)
    assert not Record(State.ACTIVE, status.st_mtime_ns).holds_for(status)


def test_stamping_changes_the_mtime_alone(status: os.stat_result) -> None:
    record = Record(State.ACTIVE, 7, DIGESTS, EXPECTED)
    stamped = record.stamped(status.st_mtime_ns)
    assert stamped.holds_for(status)
    assert stamped.stamped(7) == record


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b"{}",
        b'{"version":2,"state":"active"}',
        b'{"version":1}',
        b'{"version":1,"state":"good"}',
        b'{"version":1,"state":"active","mtime_ns":"soon"}',
        b'{"version":1,"state":"active","mtime_ns":[1]}',
        b'{"version":1,"state":"active","digests":7}',
        b'{"version":1,"state":"active","digests":{"size":3}}',
        b'{"version":1,"state":"saving","expectations":{"colour":"blue"}}',
        b'{"version":1,"state":"saving","expectations":null}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"version":1,"state":"active","mtime_ns":1e400}',
        b'{"version":1,"state":"active","mtime_ns":' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_record_of_this_version_is_none(stored: bytes) -> None:
    assert decode(stored) is None


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("size", 4, "size is 3, expected 4"),
        ("size", 0, "size is 3, expected 0"),
        ("checksum", "f" * 32, f"checksum is {'0' * 32}, expected {'f' * 32}"),
        ("os_hash_value", "f" * 128, f"os_hash_value is {'1' * 128}, expected {'f' * 128}"),
    ],
)
def test_unmet_expectation_is_said(field: str, value: int | str, said: str) -> None:
    assert replace(EXPECTED, **{field: value}).unmet(DIGESTS) == said  # type: ignore[arg-type]


@pytest.mark.parametrize("expectations", [EXPECTED, Expectations(), Expectations(size=3)])
def test_expectations_that_are_met_say_nothing(expectations: Expectations) -> None:
    assert expectations.unmet(DIGESTS) is None
