"""Several images written at once: none is left behind, and the daemon's memory stays small."""

import os
import threading
from pathlib import Path

from tests.clients import MIB, assert_sealed
from tests.conftest import Mounted, Mounter

WRITERS = 8
IMAGE_MIB = 48
MOST_MIB = 200


def write_all_at_once(mounted: Mounted) -> list[list[int]]:
    """Write WRITERS images; gives how far each was whenever one was done, in MiB."""
    block = os.urandom(MIB)
    written = [0] * WRITERS
    seen: list[list[int]] = []
    start = threading.Barrier(WRITERS)

    def write(number: int) -> None:
        with open(mounted / f"image-{number}", "xb", buffering=0) as image:
            start.wait()
            for _ in range(IMAGE_MIB):
                assert image.write(block) == MIB
                written[number] += 1
        seen.append(written.copy())

    threads = [threading.Thread(target=write, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def most_resident_mib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM"))


def test_images_written_at_once_come_along_alike_in_bounded_memory(mount: Mounter) -> None:
    mounted = mount()
    first_done = write_all_at_once(mounted)[0]
    assert min(first_done) > IMAGE_MIB / 3, f"some wait for others: {first_done} of {IMAGE_MIB} MiB"
    for number in range(WRITERS):
        assert_sealed(mounted / f"image-{number}")
    assert most_resident_mib(mounted.daemon.pid) < MOST_MIB
