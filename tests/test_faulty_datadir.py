"""Every fault that a datadir may have, under every operation of a mount."""

from pathlib import Path

from tests.clients import assert_sealed, md5
from tests.conftest import FaultyMaker, Mounter, run


def test_directory_without_a_fault_is_a_good_datadir(faulty: FaultyMaker, mount: Mounter, tmp_path: Path) -> None:
    images = mount([faulty().path])
    content = b"good" * 300_000
    (images / "a").write_bytes(content)
    assert_sealed(images / "a", md5(content))
    (images / "a").rename(images / "b")
    run("setfattr", "-n", "user.x", "-v", "y", images / "b")
    assert_sealed(images / "b", md5(content))
    (images / "b").unlink()
    assert list(images.path.iterdir()) == []
