"""The main job on a real mount: an image goes in, is sealed, and comes out."""

import hashlib
import os
from collections.abc import Callable

from tests.conftest import Mounted, attribute

CONTENT = os.urandom(3_000_000)


def test_copied_image_reads_back_and_is_sealed(mount: Callable[..., Mounted]) -> None:
    images = mount()
    (images / "x").write_bytes(CONTENT)
    assert attribute(images / "x", "checksum") == hashlib.md5(CONTENT).hexdigest()
    assert attribute(images / "x", "os_hash_value") == hashlib.sha512(CONTENT).hexdigest()
    assert attribute(images / "x", "state") == "active"
    assert (images / "x").read_bytes() == CONTENT
    assert (images.datadirs[0] / "x").read_bytes() == CONTENT
