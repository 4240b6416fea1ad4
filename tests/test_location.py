"""Locations: file:// URIs of backing files, exact both ways, and never outside a datadir."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs import ImageStore
from imgfs.errors import BadLocation, ImageNotFound, ImgfsError
from imgfs.location import to_path, to_uri

OpenStore = Callable[..., ImageStore]

NAMES = [
    "plain",
    "a?b",
    "a#b",
    "100%",
    "%41",
    "a b",
    " leading and trailing ",
    "new\nline",
    "tab\t",
    "semi;colon:at@and&plus+",
    "snowman ☃ é",
    os.fsdecode(b"\xff\xfe not UTF-8"),
    os.fsdecode(bytes(set(range(1, 256)) - {ord("/")})),
    "..a",
    "~",
]


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_exact(name: str) -> None:
    path = f"/srv/images/{name}"
    uri = to_uri(path)
    assert uri.isascii()
    assert uri.isprintable()
    assert not set(uri) & set(' ?#"<>')
    assert to_path(uri) == path


def test_encoding_is_that_of_rfc_3986() -> None:
    assert to_uri(os.fsdecode(b"/srv/a b?c#d%e\xff-._~")) == "file:///srv/a%20b%3Fc%23d%25e%FF-._~"


@pytest.mark.parametrize(
    "location",
    ["file:///srv/x", "filesystem:///srv/x", "FILE:///srv/x", "Filesystem:///srv/x"],
)
def test_both_schemes_name_the_same_file(location: str) -> None:
    assert to_path(location) == "/srv/x"


@pytest.mark.parametrize(
    ("location", "path"), [("file:///a?b", "/a?b"), ("file:///a#b", "/a#b"), ("file:///a b", "/a b")]
)
def test_unquoted_characters_are_not_lost(location: str, path: str) -> None:
    assert to_path(location) == path


REFUSED = {
    "empty": "",
    "scheme alone": "file://",
    "empty path": "filesystem://",
    "root": "file:///",
    "a directory": "file:///srv/",
    "relative": "file://srv/x",
    "host": "file://localhost/srv/x",
    "no scheme": "/srv/x",
    "one slash": "file:/srv/x",
    "http": "http://host/srv/x",
    "rbd": "rbd://pool/image",
    "scheme alike": "files:///srv/x",
    "traversal": "file:///srv/../etc/passwd",
    "traversal at the end": "file:///srv/..",
    "traversal quoted": "file:///srv/%2e%2e/etc/passwd",
    "traversal with a quoted slash": "filesystem:///srv/..%2Fetc%2Fpasswd",
    "dot": "file:///srv/./x",
    "double slash": "file:///srv//x",
    "double slash in front": "file:////srv/x",
    "NUL": "file:///srv/x%00",
    "half a surrogate pair": "file:///srv/\ud800",
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_location_of_a_file(case: str) -> None:
    with pytest.raises(BadLocation):
        to_path(REFUSED[case])


# --- in a store ---


@pytest.mark.parametrize("name", [n for n in NAMES if len(os.fsencode(n)) < 255])
def test_location_of_an_image_leads_back_to_it(open_store: OpenStore, name: str) -> None:
    store = open_store(["odd ?#% dir"])
    location = store.add(name, [b"x"]).location
    assert location == store.location(name)
    assert store.resolve(location) == name
    assert store.resolve(location.replace("file://", "filesystem://")) == name
    assert Path(to_path(location)).read_bytes() == b"x"


OUTSIDE = {
    "elsewhere": "file:///etc/passwd",
    "below a datadir": "file://{base}/high/sub/x",
    "above a datadir": "file://{base}/high",
    "beside a datadir": "file://{base}/secret",
    "out of a datadir": "file://{base}/high/../secret",
    "out of a datadir, quoted": "filesystem://{base}/high/%2e%2e/secret",
    "out of a datadir, quoted slash": "filesystem://{base}/high/..%2Fsecret",
    "alike a datadir": "file://{base}/high2/x",
    "the room of imgfs": "file://{base}/high/.imgfs/x",
    "a name kept by imgfs": "file://{base}/high/.imgfs-x",
    "through a symlink": "file://{base}/high/link",
    "a directory": "file://{base}/high/sub",
    "a pipe": "file://{base}/high/pipe",
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_location_that_is_no_image_of_the_store_is_refused(open_store: OpenStore, tmp_path: Path, case: str) -> None:
    store = open_store()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "high/sub").mkdir()
    (tmp_path / "high/sub/x").touch()
    (tmp_path / "high2").mkdir()
    (tmp_path / "high2/x").touch()
    (tmp_path / "high/.imgfs/x").touch()
    (tmp_path / "high/.imgfs-x").touch()
    (tmp_path / "high/link").symlink_to("../secret")
    os.mkfifo(tmp_path / "high/pipe")
    with pytest.raises(ImgfsError) as caught:
        store.resolve(OUTSIDE[case].format(base=tmp_path))
    assert isinstance(caught.value, BadLocation | ImageNotFound) or case == "a name kept by imgfs"


def test_location_of_an_absent_image_is_not_found(open_store: OpenStore, tmp_path: Path) -> None:
    with pytest.raises(ImageNotFound):
        open_store().resolve(f"file://{tmp_path}/high/none")


def test_location_through_the_real_path_of_a_linked_datadir_is_known(open_store: OpenStore, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    store = open_store(["link"])
    assert store.add("x", [b"x"]).location == f"file://{tmp_path}/link/x"
    assert store.resolve(f"file://{tmp_path}/disk/x") == "x"
