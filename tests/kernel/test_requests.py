"""Parsing: whatever comes, a parser gives a value or MalformedRequest."""

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgfs.kernel import abi, requests
from imgfs.kernel.opcodes import OPCODES
from imgfs.kernel.requests import HEADER_SIZE, MalformedRequest

HEADER = bytes(HEADER_SIZE)
PARSERS = sorted({opcode.parse for opcode in OPCODES.values()}, key=str)


@given(st.binary(max_size=300))
def test_no_parser_raises_anything_but_its_own_error(body: bytes) -> None:
    for parse in PARSERS:
        with contextlib.suppress(MalformedRequest):
            parse(HEADER + body)


@given(st.binary(max_size=100))
def test_header_of_anything_is_a_header_or_malformed(data: bytes) -> None:
    with contextlib.suppress(MalformedRequest):
        assert requests.parse_header(data).len == len(data)


def test_lookup_takes_the_name_before_its_nul() -> None:
    # header: 45 bytes, FUSE_LOOKUP, unique 6, nodeid 1, uid 1000, gid 100, pid 42
    data = bytes.fromhex(
        "2d000000 01000000 0600000000000000 0100000000000000 e8030000 64000000 2a000000 0000 0000 61ff622d00"
    )
    header = requests.parse_header(data)
    assert (header.opcode, header.unique, header.nodeid, header.uid, header.gid, header.pid) == (
        1,
        6,
        1,
        1000,
        100,
        42,
    )
    assert requests.parse_name(data) == (b"a\xffb-",)


@pytest.mark.parametrize("body", [b"", b"name", b"\0", b"\0\0"])
def test_name_that_is_empty_or_unended_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedRequest):
        requests.parse_name(HEADER + body)


def test_rename2_has_two_names_and_flags() -> None:
    data = HEADER + abi.fuse_rename2_in.pack(1, 2) + b"old\0new\0"
    assert requests.parse_rename2(data) == (1, 2, b"old", b"new")


def test_write_gives_a_view_without_a_copy() -> None:
    payload = os.urandom(100)
    data = HEADER + abi.fuse_write_in.pack(3, 4096, 100, 0, 0, 0) + payload
    request = requests.parse_write(data)
    assert request.data.obj is data
    assert (bytes(request.data), request.fh, request.offset) == (payload, 3, 4096)


@pytest.mark.parametrize("size", [0, 99, 101, 1 << 31])
def test_write_whose_size_is_not_that_of_its_data_is_malformed(size: int) -> None:
    with pytest.raises(MalformedRequest):
        requests.parse_write(HEADER + abi.fuse_write_in.pack(3, 0, size, 0, 0, 0) + bytes(100))


def test_attribute_value_may_hold_nul_bytes() -> None:
    data = HEADER + abi.fuse_setxattr_in.pack(5, 1) + b"user.x\0" + b"a\0b\0c"
    assert requests.parse_setxattr(data) == (1, b"user.x", b"a\0b\0c")


def test_forgets_more_than_fit_are_malformed() -> None:
    body = abi.fuse_forget_one.pack(2, 1)
    assert requests.parse_batch_forget(HEADER + abi.fuse_batch_forget_in.pack(1) + body).items == [(2, 1)]
    with pytest.raises(MalformedRequest):
        requests.parse_batch_forget(HEADER + abi.fuse_batch_forget_in.pack(1 << 31) + body)


def test_init_has_flags2_only_where_the_kernel_says_so() -> None:
    old = HEADER + abi.fuse_init_in.pack(7, 31, 131072, 1)
    assert requests.parse_init(old).flags == 1
    new = HEADER + abi.fuse_init_in.pack(7, 41, 131072, abi.FUSE_INIT_EXT) + abi.fuse_init_in_flags2.pack(32)
    assert requests.parse_init(new + bytes(44)).flags == abi.FUSE_INIT_EXT | abi.FUSE_PASSTHROUGH
