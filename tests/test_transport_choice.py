"""Which transport a mount of root gets, and what it says of it."""

from collections.abc import Callable

import pytest

from tests.clients import assert_sealed, md5, new_image
from tests.conftest import Mounted, attribute


@pytest.mark.parametrize("mount", ["auto"], indirect=True)
@pytest.mark.parametrize("options, expected", [((), "on"), (("--no-passthrough",), "off")], ids=["on", "off"])
def test_auto_takes_the_kernel_transport(
    mount: Callable[..., Mounted], options: tuple[str, ...], expected: str
) -> None:
    images = mount(options=options)
    said = f"kernel, passthrough {expected}"
    assert attribute(images.path, "transport") == said
    images.wait_for_log(f"is served by transport {said}")
    assert_sealed_image(images)


@pytest.mark.parametrize("mount", ["fusepy"], indirect=True)
def test_fusepy_is_taken_where_it_is_asked_for(mount: Callable[..., Mounted]) -> None:
    images = mount()
    assert attribute(images.path, "transport") == "fusepy"
    images.wait_for_log("is served by transport fusepy")
    assert_sealed_image(images)


def assert_sealed_image(images: Mounted) -> None:
    """An image that is written is sealed."""
    assert_sealed(images / "a", md5(new_image(images / "a")))
