"""The handshake with kernels old, new and poor."""

import pytest

from imgfs.kernel import abi
from imgfs.kernel.negotiation import UnsupportedProtocol, Wants, init_out, negotiate
from imgfs.kernel.requests import InitIn

EVERYTHING = (1 << 43) - 1
WANTS = Wants()


def test_a_kernel_of_today_gives_passthrough_and_large_requests() -> None:
    agreed = negotiate(InitIn(7, 45, 131072, EVERYTHING), WANTS)
    assert (agreed.minor, agreed.passthrough, agreed.max_stack_depth) == (45, True, 1)
    assert (agreed.max_write, agreed.max_pages) == (1 << 20, 256)


def test_passthrough_excludes_the_writeback_cache() -> None:
    assert not negotiate(InitIn(7, 45, 131072, EVERYTHING), WANTS).flags & abi.FUSE_WRITEBACK_CACHE


def test_locks_stay_with_the_kernel() -> None:
    assert not negotiate(InitIn(7, 45, 131072, EVERYTHING), WANTS).flags & abi.FUSE_POSIX_LOCKS


def test_a_newer_kernel_is_told_our_minor_version() -> None:
    assert negotiate(InitIn(7, 99, 131072, EVERYTHING), WANTS).minor == abi.FUSE_KERNEL_MINOR_VERSION


def test_a_newer_major_version_is_told_ours() -> None:
    assert negotiate(InitIn(8, 0, 131072, 0), WANTS).major == 7


def test_a_kernel_that_speaks_only_7_31_works_without_passthrough() -> None:
    agreed = negotiate(InitIn(7, 31, 131072, (1 << 27) - 1), WANTS)
    assert (agreed.minor, agreed.passthrough, agreed.max_stack_depth) == (31, False, 0)
    assert agreed.flags < 1 << 32
    assert agreed.max_write == 1 << 20


def test_a_kernel_without_max_pages_gets_small_requests() -> None:
    agreed = negotiate(InitIn(7, 27, 131072, abi.FUSE_ASYNC_READ), WANTS)
    assert (agreed.max_write, agreed.max_pages, agreed.flags) == (131072, 0, abi.FUSE_ASYNC_READ)


def test_second_flag_word_means_nothing_without_init_ext() -> None:
    assert not negotiate(InitIn(7, 41, 131072, abi.FUSE_PASSTHROUGH), WANTS).passthrough


def test_passthrough_is_not_asked_for_unwanted() -> None:
    assert not negotiate(InitIn(7, 45, 131072, EVERYTHING), Wants(passthrough=False)).passthrough


@pytest.mark.parametrize("version", [(6, 99), (7, 22), (7, 0)])
def test_an_ancient_kernel_is_refused(version: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedProtocol, match=r"7\.23 is needed"):
        negotiate(InitIn(*version, 4096, 0), WANTS)


def test_reply_to_init_splits_the_flags() -> None:
    data = init_out(negotiate(InitIn(7, 45, 131072, EVERYTHING), WANTS))
    assert len(data) == 64
    fields = abi.fuse_init_out.unpack(data)
    assert fields[3] & abi.FUSE_INIT_EXT
    assert fields[10] == (abi.FUSE_PASSTHROUGH | abi.FUSE_DIRECT_IO_ALLOW_MMAP) >> 32
    assert fields[11] == 1
