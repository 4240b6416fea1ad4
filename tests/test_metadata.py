"""The metadata file: which labels the images of a datadir carry, and what is refused as one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgfs import ConfigError, ImageStore
from imgfs.metadata import MetadataError, load, match

A = {"id": "a", "mountpoint": "/mnt/a"}
AB = {"id": "ab", "mountpoint": "/mnt/ab"}
DEEP = {"id": "deep", "mountpoint": "/mnt/a/deep"}
ROOT = {"id": "root", "mountpoint": "/"}

OpenStore = Callable[..., ImageStore]


@pytest.fixture
def labels(tmp_path: Path) -> Callable[[Any], str]:
    """Call it with an object (or bytes as they are) to have it written as the metadata file; gives its path."""

    def write(document: Any) -> str:
        file = tmp_path / "labels.json"
        file.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        return str(file)

    return write


# --- which object ---


@pytest.mark.parametrize(
    ("datadir", "expected"),
    [
        ("/mnt/a", "a"),
        ("/mnt/a/images", "a"),
        ("/mnt/ab", "ab"),
        ("/mnt/ab/images", "ab"),
        ("/mnt/abc", None),
        ("/mnt", None),
        ("/mnt/a/deep", "deep"),
        ("/mnt/a/deep/er", "deep"),
        ("/mnt/a/deeper", "a"),
        ("/srv/mnt/a", None),
    ],
)
@pytest.mark.parametrize("objects", [[A, AB, DEEP], [DEEP, AB, A]])
def test_longest_whole_path_prefix_wins(objects: list[dict[str, Any]], datadir: str, expected: str | None) -> None:
    found = match(objects, datadir)
    assert (found and found["id"]) == expected


def test_mountpoint_of_root_holds_everything_nobody_else_does() -> None:
    assert match([ROOT, A], "/mnt/ab") == ROOT
    assert match([ROOT, A], "/mnt/a/b") == A


def test_trailing_slash_of_a_mountpoint_is_of_no_account() -> None:
    assert match([{"id": "a", "mountpoint": "/mnt/a/"}], "/mnt/a") is not None
    assert match([{"id": "a", "mountpoint": "/mnt/a/"}], "/mnt/ab") is None


def test_match_gives_fresh_copies() -> None:
    objects = [A | {"tags": ["x", {"y": "z"}]}]
    first = match(objects, "/mnt/a")
    assert first is not None
    first["id"] = "changed"
    first["tags"][1]["y"] = "changed"
    assert match(objects, "/mnt/a") == A | {"tags": ["x", {"y": "z"}]}


# --- in a store ---


def test_single_object_labels_the_images_it_holds(
    open_store: OpenStore, labels: Callable[[Any], str], tmp_path: Path
) -> None:
    found = {"id": "one", "mountpoint": str(tmp_path), "share": ["nfs", {"host": "h1"}]}
    store = open_store(metadata_file=labels(found))
    assert store.add("x", [b"x"]).metadata == found
    assert store.metadata("x") == found


def test_list_labels_each_image_by_its_datadir(
    open_store: OpenStore, labels: Callable[[Any], str], tmp_path: Path
) -> None:
    near, far = ({"id": i, "mountpoint": f"{tmp_path}/mnt/{i}"} for i in ("a", "ab"))
    store = open_store(["mnt/a:2", {"path": "mnt/ab", "priority": 1}], metadata_file=labels([near, far]))
    (tmp_path / "mnt/ab/beside").write_bytes(b"x")
    assert store.add("x", [b"x"]).metadata == near
    assert store.metadata("beside") == far


def test_store_id_is_added(open_store: OpenStore, labels: Callable[[Any], str], tmp_path: Path) -> None:
    found = {"id": "one", "mountpoint": str(tmp_path)}
    assert open_store(metadata_file=labels(found), store_id="s1").add("x", [b"x"]).metadata == found | {"store": "s1"}


def test_metadata_handed_out_is_the_callers_own(
    open_store: OpenStore, labels: Callable[[Any], str], tmp_path: Path
) -> None:
    store = open_store(metadata_file=labels({"id": "one", "mountpoint": str(tmp_path), "tags": ["x"]}))
    store.add("x", [b"x"]).metadata["tags"].append("changed")
    assert store.metadata("x")["tags"] == ["x"]
    assert store.add("y", [b"y"]).metadata["tags"] == ["x"]


@pytest.mark.parametrize("objects", [[], [A], A])
def test_none_matching_is_empty_with_one_warning_for_each_datadir(
    open_store: OpenStore,
    labels: Callable[[Any], str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    objects: Any,
) -> None:
    store = open_store(metadata_file=labels(objects))
    assert [store.add(name, [b"x"]).metadata for name in "xyz"] == [{}, {}, {}]
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 2
    assert {w.split()[-1] for w in warnings} == {f"{tmp_path}/high", f"{tmp_path}/low"}


def test_without_metadata_file_there_is_no_warning(open_store: OpenStore, caplog: pytest.LogCaptureFixture) -> None:
    assert open_store().add("x", [b"x"]).metadata == {}
    assert caplog.records == []


# --- what is refused ---

INVALID_JSON = {
    "no JSON": b"{",
    "empty": b"",
    "trailing comma": b'{"id": "a", "mountpoint": "/a",}',
    "no UTF-8": b'{"id": "\xff", "mountpoint": "/a"}',
    "100,000 lists deep": b"[" * 100_000 + b"]" * 100_000,
    "100,000 objects deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "900 lists deep in a value": b'{"id": "a", "mountpoint": "/a", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
}
NO_LABELS = {
    "a string": "a",
    "a number": 7,
    "null": None,
    "no id": {"mountpoint": "/a"},
    "no mountpoint": {"id": "a"},
    "id a number": {"id": 7, "mountpoint": "/a"},
    "mountpoint a list": {"id": "a", "mountpoint": ["/a"]},
    "mountpoint relative": {"id": "a", "mountpoint": "a"},
    "value a number": A | {"x": 7},
    "value null": A | {"x": None},
    "value true": A | {"x": True},
    "number in a list": A | {"x": ["y", 7]},
    "number in an object": A | {"x": {"y": {"z": 7}}},
    "not a number": A | {"x": float("nan")},
    "second of a list": [A, {"id": "b"}],
    "list in a list": [[A]],
}


@pytest.mark.parametrize("case", INVALID_JSON)
def test_invalid_json_is_refused_in_one_line(labels: Callable[[Any], str], case: str) -> None:
    file = labels(INVALID_JSON[case])
    with pytest.raises(MetadataError) as caught:
        load(Path(file))
    assert str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("case", NO_LABELS)
def test_schema_violation_is_refused(labels: Callable[[Any], str], case: str) -> None:
    with pytest.raises(MetadataError, match=r"labels\.json: \$"):
        load(Path(labels(NO_LABELS[case])))


def test_schema_violation_names_where_it_is(labels: Callable[[Any], str]) -> None:
    with pytest.raises(MetadataError, match=r"labels\.json: \$\[1\]\.x\[0\]: 7 is not of type"):
        load(Path(labels([A, AB | {"x": [7]}])))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MetadataError, match="can't be read: No such file or directory"):
        load(tmp_path / "none.json")


@pytest.mark.parametrize("document", [b"{", {"id": "a"}])
def test_store_with_bad_metadata_file_does_not_open(
    open_store: OpenStore, labels: Callable[[Any], str], tmp_path: Path, document: Any
) -> None:
    with pytest.raises(ConfigError, match=r"imgfs\.yaml:\d+: metadata_file: "):
        open_store(metadata_file=labels(document))
    assert not (tmp_path / "high").exists()


def test_labels_far_from_ascii_survive(open_store: OpenStore, labels: Callable[[Any], str], tmp_path: Path) -> None:
    found = {"id": "straße ☃", "mountpoint": str(tmp_path)}
    assert open_store(metadata_file=labels(json.dumps(found, ensure_ascii=False).encode())).add(
        "x", [b""]
    ).metadata == found  # fmt: skip
