"""The configuration: every key read, every problem told with its file, line and key, all of them at once."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from imgfs import Config, ConfigError, DatadirConfig, Mode, Reseal, load, membership
from imgfs.config import MissingDatadirs, Probe, parse_size

LABELS = '{"id": "a", "mountpoint": "/"}'
MESSAGE_BYTES = 1000  # nobody reads a longer line


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    """Call it with the text of a configuration to have it loaded."""
    (tmp_path / "labels.json").write_text(LABELS)

    def read(text: str, probe: Probe | None = None) -> Config:
        (tmp_path / "imgfs.yaml").write_text(text)
        return load(tmp_path / "imgfs.yaml", probe)

    return read


@pytest.fixture
def problems(config: Callable[..., Config], tmp_path: Path) -> Callable[..., list[str]]:
    """Call it with a text that is wrong to get its problems, the directory of the file left out."""

    def refused(text: str, probe: Probe | None = None) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            config(text, probe)
        assert str(caught.value) == "\n".join(map(str, caught.value.problems))
        assert all(len(line) < MESSAGE_BYTES for line in str(caught.value).splitlines())
        return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]

    return refused


# --- what is read ---


def test_every_key_is_read(config: Callable[..., Config], tmp_path: Path) -> None:
    found = config("""
        store_id: ssd-pool
        datadirs:
          - nvme:200
          - path: /srv/hdd
            priority: 100
            mode: nc
            min_free: 20GiB
        file_perm: "0640"
        metadata_file: labels.json
        hashing_algo: sha256
        chunk_size: 1MiB
        thin_provisioning: true
        write_once: true
        reseal: background
        missing_datadirs: refuse
        timeout: 7.5
    """)
    assert found == Config(
        datadirs=(
            DatadirConfig(str(tmp_path / "nvme"), 200),
            DatadirConfig("/srv/hdd", 100, Mode.NO_CREATE, 20 << 30),
        ),
        store_id="ssd-pool",
        file_perm=0o640,
        metadata=({"id": "a", "mountpoint": "/"},),
        hashing_algo="sha256",
        chunk_size_bytes=1 << 20,
        thin_provisioning=True,
        write_once=True,
        reseal=Reseal.BACKGROUND,
        missing_datadirs=MissingDatadirs.REFUSE,
        timeout_seconds=7.5,
    )


def test_defaults_are_those_of_the_documentation(config: Callable[..., Config], tmp_path: Path) -> None:
    found = config("datadir: images")
    assert found == Config(datadirs=(DatadirConfig(str(tmp_path / "images"), 0, Mode.READ_WRITE, 0),))
    assert (found.store_id, found.file_perm, found.metadata) == (None, 0, None)
    assert (found.hashing_algo, found.chunk_size_bytes) == ("sha512", 65536)
    assert (found.thin_provisioning, found.write_once) == (False, False)
    assert (found.reseal, found.timeout_seconds) == (Reseal.ON_DEMAND, 0)
    assert found.missing_datadirs is MissingDatadirs.DEGRADE


def test_a_configuration_can_not_be_changed(config: Callable[..., Config]) -> None:
    with pytest.raises(AttributeError):
        config("datadir: images").file_perm = 0o777  # type: ignore[misc]


@pytest.mark.parametrize("written", ["640", "0640", '"0640"', "'640'", "00640"])
def test_file_perm_is_octal_however_it_is_written(config: Callable[..., Config], written: str) -> None:
    assert config(f"datadir: a\nfile_perm: {written}").file_perm == 0o640


@pytest.mark.parametrize("written", ["0", "000", '"0"', "-1", "-640"])
def test_file_perm_of_zero_or_less_leaves_permissions_alone(config: Callable[..., Config], written: str) -> None:
    assert config(f"datadir: a\nfile_perm: {written}").file_perm == 0


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [("1", 1), ("4096", 4096), ("64KiB", 65536), ('"64 KiB"', 65536), ("3MiB", 3 << 20), ("2GiB", 2 << 30),
     ("5TiB", 5 << 40), ('"512"', 512)],
)  # fmt: skip
def test_sizes_take_bytes_and_binary_units(config: Callable[..., Config], written: str, size_bytes: int) -> None:
    found = config(f"chunk_size: {written}\ndatadirs: [{{path: a, min_free: {written}}}]")
    assert (found.chunk_size_bytes, found.datadirs[0].min_free_bytes) == (size_bytes, size_bytes)


def test_size_of_bare_number_and_of_text_agree() -> None:
    assert parse_size(1 << 20) == parse_size("1048576") == parse_size("1MiB") == 1 << 20


@pytest.mark.parametrize(
    ("written", "path", "priority"),
    [
        ("/srv/a", "/srv/a", 0),
        ("/srv/a:", "/srv/a", 0),
        ("/srv/a:0", "/srv/a", 0),
        ("/srv/a:200", "/srv/a", 200),
        ("/srv/a:007", "/srv/a", 7),
        ("  /srv/a : 200  ", "/srv/a", 200),
        ("/srv/a b:1", "/srv/a b", 1),
        ("/srv/a:b:3", "/srv/a:b", 3),
        ("/srv//a/../b/:3", "/srv/b", 3),
    ],
)
def test_datadir_in_glance_spelling(config: Callable[..., Config], written: str, path: str, priority: int) -> None:
    assert config(f'datadirs: ["{written}"]').datadirs == (DatadirConfig(path, priority),)


@pytest.mark.parametrize("path", ["/srv/a:b", "/srv/a:5", "/srv/:"])
def test_path_with_a_colon_goes_into_the_mapping_form(config: Callable[..., Config], path: str) -> None:
    assert config(f'datadirs: [{{path: "{path}"}}]').datadirs == (DatadirConfig(path),)
    assert config(f'datadir: "{path}"').datadirs == (DatadirConfig(path),)


def test_relative_paths_are_relative_to_the_file(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    found = config("datadirs: [a, ./b/, ../c]\nmetadata_file: labels.json")
    assert [d.path for d in found.datadirs] == [f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path.parent}/c"]
    assert found.metadata is not None


def test_loading_creates_nothing(config: Callable[..., Config], tmp_path: Path) -> None:
    config("datadirs: [a, b]", membership.unusable)
    assert sorted(os.listdir(tmp_path)) == ["imgfs.yaml", "labels.json"]


@pytest.mark.parametrize("second", ["images:7", "./images:7", "images/:7", "link:7"])
def test_same_datadir_twice_is_used_once_with_a_warning(
    config: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture, second: str
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("images")
    assert config(f"datadirs:\n- images:7\n- {second}\n").datadirs == (DatadirConfig(f"{tmp_path}/images", 7),)
    (warning,) = caplog.messages
    assert warning.startswith(f"{tmp_path}/imgfs.yaml:3: ")
    assert "there twice" in warning


# --- what is refused ---

BAD = {
    "unknown key": (
        "datadir: a\nfile_prem: 640\n",
        ["imgfs.yaml:2: file_prem: unknown key; did you mean file_perm?"],
    ),
    "unknown key far from any": ("x: 1\ndatadir: a\n", ["imgfs.yaml:1: x: unknown key; the keys are store_id, "]),
    "unknown key of a datadir": (
        "datadirs:\n  - path: a\n    prio: 3\n",
        ["imgfs.yaml:3: datadirs[0].prio: unknown key; did you mean priority?"],
    ),
    "duplicate key": (
        "datadir: a\nwrite_once: true\nwrite_once: false\n",
        ["imgfs.yaml:3: write_once: is there twice; keep one"],
    ),
    "duplicate key of a datadir": (
        "datadirs:\n- path: a\n  path: b\n",
        ["imgfs.yaml:3: datadirs[0].path: is there twice; keep one"],
    ),
    "both forms": ("datadir: a\ndatadirs: [b]\n", ["imgfs.yaml:1: both datadir and datadirs are given; "]),
    "neither form": ("store_id: a\n", ["imgfs.yaml:1: no datadir is given; "]),
    "empty file": ("", ["imgfs.yaml:1: must be a mapping", "imgfs.yaml:1: no datadir is given; "]),
    "a list": ("- a\n", ["imgfs.yaml:1: must be a mapping", "imgfs.yaml:1: no datadir is given; "]),
    "no datadir in the list": (
        "datadirs: []\n",
        ["imgfs.yaml:1: datadirs: must be a list of datadirs, at least one"],
    ),
    "datadirs no list": ("datadirs: a\n", ["imgfs.yaml:1: datadirs: must be a list of datadirs"]),
    "datadir no text": ("datadir: 7\n", ["imgfs.yaml:1: datadir: must be the path of a directory, not 7"]),
    "datadir null": ("datadir:\n", ["imgfs.yaml:1: datadir: must be the path of a directory, not None"]),
    "item no text": ("datadirs:\n- a\n- 7\n", ["imgfs.yaml:3: datadirs[1]: must be PATH[:PRIORITY] or a mapping"]),
    "empty path": ("datadir: ''\n", ["imgfs.yaml:1: datadir: the path is empty"]),
    "blank path": ("datadirs:\n- a\n- '  :5'\n", ["imgfs.yaml:3: datadirs[1]: the path is empty"]),
    "empty path in the mapping form": ("datadirs:\n- path: ''\n", ["imgfs.yaml:2: datadirs[0]: the path is empty"]),
    "path missing": ("datadirs:\n- mode: rw\n", ["imgfs.yaml:2: datadirs[0]: path is missing"]),
    "NUL in a path": ('datadir: "a\\0b"\n', ["imgfs.yaml:1: datadir: a path has no NUL bytes"]),
    "negative priority": ("datadirs:\n- a:-1\n", ["imgfs.yaml:2: datadirs[0]: priority '-1' must be a whole number"]),
    "priority no number": ("datadirs:\n- a:high\n", ["imgfs.yaml:2: datadirs[0]: priority 'high' must be a whole "]),
    "priority a fraction": ("datadirs:\n- a:1.5\n", ["imgfs.yaml:2: datadirs[0]: priority '1.5' must be a whole "]),
    "priority in other digits": ("datadirs:\n- a:²\n", ["imgfs.yaml:2: datadirs[0]: priority '²' must be a whole "]),
    "negative priority in the mapping form": (
        "datadirs:\n- path: a\n  priority: -1\n",
        ["imgfs.yaml:3: datadirs[0].priority: must be a whole number, 0 or more, not -1"],
    ),
    "priority a word in the mapping form": (
        "datadirs:\n- path: a\n  priority: high\n",
        ["imgfs.yaml:3: datadirs[0].priority: must be a whole number, 0 or more, not 'high'"],
    ),
    "unknown mode": ("datadirs:\n- path: a\n  mode: wo\n", ["imgfs.yaml:3: datadirs[0].mode: must be rw, nc or ro"]),
    "min_free negative": (
        "datadirs:\n- {path: a, min_free: -1}\n",
        ["imgfs.yaml:2: datadirs[0].min_free: must be a "],
    ),
    "two priorities": (
        "datadirs:\n- a:1\n- ./a:2\n",
        ["imgfs.yaml:3: datadirs[1]: TMP/a is there twice, with priorities 1 and 2; keep one"],
    ),
    "two modes": (
        "datadirs:\n- a\n- {path: a, mode: ro}\n",
        ["imgfs.yaml:3: datadirs[1]: TMP/a is there twice, with different settings; keep one"],
    ),
    "nested": ("datadirs:\n- a\n- a/b\n", ["imgfs.yaml:3: datadirs[1]: TMP/a/b and TMP/a lie one inside the other"]),
    "nested, outer last": (
        "datadirs:\n- a/b\n- a\n",
        ["imgfs.yaml:3: datadirs[1]: TMP/a and TMP/a/b lie one inside "],
    ),
    "perm without owner-read": (
        "datadir: a\nfile_perm: 0240\n",
        ["imgfs.yaml:2: file_perm: '0240' does not let the "],
    ),
    "perm of no octal digits": ("datadir: a\nfile_perm: 0689\n", ["imgfs.yaml:2: file_perm: must be octal digits"]),
    "perm with letters": ("datadir: a\nfile_perm: u=rw\n", ["imgfs.yaml:2: file_perm: must be octal digits"]),
    "perm too large": ("datadir: a\nfile_perm: 10640\n", ["imgfs.yaml:2: file_perm: '10640' "]),
    "perm a list": ("datadir: a\nfile_perm: [640]\n", ["imgfs.yaml:2: file_perm: must be octal digits"]),
    "perm null": ("datadir: a\nfile_perm:\n", ["imgfs.yaml:2: file_perm: must be octal digits"]),
    "unknown hash": (
        "datadir: a\nhashing_algo: sha13\n",
        ["imgfs.yaml:2: hashing_algo: 'sha13' is no hash algorithm"],
    ),
    "hash of no fixed size": (
        "datadir: a\nhashing_algo: shake_128\n",
        ["imgfs.yaml:2: hashing_algo: 'shake_128' is "],
    ),
    "hash empty": ("datadir: a\nhashing_algo: ''\n", ["imgfs.yaml:2: hashing_algo: must be the name of a hash"]),
    "chunk_size zero": ("datadir: a\nchunk_size: 0\n", ["imgfs.yaml:2: chunk_size: must be at least 1"]),
    "chunk_size negative": ("datadir: a\nchunk_size: -1\n", ["imgfs.yaml:2: chunk_size: must be a whole number of "]),
    "chunk_size in other units": ("datadir: a\nchunk_size: 64KB\n", ["imgfs.yaml:2: chunk_size: must be a whole "]),
    "chunk_size a fraction": ("datadir: a\nchunk_size: 1.5MiB\n", ["imgfs.yaml:2: chunk_size: must be a whole "]),
    "chunk_size a float": ("datadir: a\nchunk_size: 4096.5\n", ["imgfs.yaml:2: chunk_size: must be a whole "]),
    "chunk_size a truth": ("datadir: a\nchunk_size: yes\n", ["imgfs.yaml:2: chunk_size: must be a whole number of "]),
    "switch a word": (
        "datadir: a\nwrite_once: sure\n",
        ["imgfs.yaml:2: write_once: must be true or false, not 'sure'"],
    ),
    "switch a number": ("datadir: a\nthin_provisioning: 1\n", ["imgfs.yaml:2: thin_provisioning: must be true or "]),
    "unknown word for missing datadirs": (
        "datadir: a\nmissing_datadirs: ignore\n",
        ["imgfs.yaml:2: missing_datadirs: must be refuse or degrade, not 'ignore'"],
    ),
    "unknown reseal": (
        "datadir: a\nreseal: now\n",
        ["imgfs.yaml:2: reseal: must be on_demand or background, not 'n"],
    ),
    "timeout negative": ("datadir: a\ntimeout: -1\n", ["imgfs.yaml:2: timeout: must be a number of seconds, 0 or m"]),
    "timeout a word": ("datadir: a\ntimeout: soon\n", ["imgfs.yaml:2: timeout: must be a number of seconds"]),
    "timeout no number": ("datadir: a\ntimeout: .nan\n", ["imgfs.yaml:2: timeout: must be a number of seconds"]),
    "timeout without end": ("datadir: a\ntimeout: .inf\n", ["imgfs.yaml:2: timeout: must be a number of seconds"]),
    "store_id a number": ("datadir: a\nstore_id: 7\n", ["imgfs.yaml:2: store_id: must be a non-empty string, not 7"]),
    "store_id empty": ("datadir: a\nstore_id: ''\n", ["imgfs.yaml:2: store_id: must be a non-empty string"]),
    "metadata missing": (
        "datadir: a\nmetadata_file: no.json\n",
        ["imgfs.yaml:2: metadata_file: TMP/no.json: can't be"],
    ),
    "metadata a directory": ("datadir: a\nmetadata_file: .\n", ["imgfs.yaml:2: metadata_file: TMP: can't be read: "]),
    "metadata no JSON": (
        "datadir: a\nmetadata_file: imgfs.yaml\n",
        ["imgfs.yaml:2: metadata_file: TMP/imgfs.yaml: is "],
    ),
    "no YAML": ("datadir: a\nstore_id: [\n", ["imgfs.yaml:3: is not valid YAML: "]),
    "a tab": ("datadir: a\n\tstore_id: b\n", ["imgfs.yaml:2: is not valid YAML: "]),
    "two documents": ("datadir: a\n---\ndatadir: b\n", ["imgfs.yaml:2: is not valid YAML: "]),
    "a list as key": ("datadir: a\n? [b]\n: c\n", ["imgfs.yaml:2: is not valid YAML: a key must be a plain word"]),
    "an unknown tag": ("datadir: !!python/object:os.system a\n", ["imgfs.yaml:1: is not valid YAML: "]),
    "an impossible date": ("datadir: a\nstore_id: 2024-13-45\n", ["imgfs.yaml:2: is not valid YAML: "]),
    "a control character": ("datadir: a\nstore_id: b\x01c\n", ["imgfs.yaml:2: is not valid YAML: "]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_file_line_and_key(problems: Callable[..., list[str]], tmp_path: Path, case: str) -> None:
    text, expected = BAD[case]
    found = problems(text)
    assert len(found) == len(expected), found
    for line, beginning in zip(found, expected, strict=True):
        assert line.replace(str(tmp_path), "TMP").startswith(beginning.replace("TMP/", ""))


def test_everything_that_is_wrong_is_told_at_once_in_order(problems: Callable[..., list[str]]) -> None:
    found = problems("""\
file_perm: 0240
chunk_size: 0
hashing_algo: sha13
datadirs:
  - a:-1
  - b:1
  - b/c:2
  - path: d
    mode: wo
  - ""
metadata_file: none.json
reseal: now
reseal: later
colour: blue
""")
    keys = [line.split(": ")[:2] for line in found]
    assert keys == [
        ["imgfs.yaml:1", "file_perm"],
        ["imgfs.yaml:2", "chunk_size"],
        ["imgfs.yaml:3", "hashing_algo"],
        ["imgfs.yaml:5", "datadirs[0]"],
        ["imgfs.yaml:7", "datadirs[2]"],
        ["imgfs.yaml:9", "datadirs[3].mode"],
        ["imgfs.yaml:10", "datadirs[4]"],
        ["imgfs.yaml:11", "metadata_file"],
        ["imgfs.yaml:13", "reseal"],
        ["imgfs.yaml:13", "reseal"],
        ["imgfs.yaml:14", "colour"],
    ]


def test_reasons_of_the_datadirs_come_with_the_rest(problems: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    found = problems(
        "colour: blue\ndatadirs:\n- good\n- file\n- file/below\n- dangling\n- {path: gone, mode: ro}\n",
        membership.unusable,
    )
    assert found[0].startswith("imgfs.yaml:1: colour: unknown key")
    assert found[1:] == [
        "imgfs.yaml:4: datadirs[1]: file is not a directory",
        "imgfs.yaml:5: datadirs[2]: file/below and file lie one inside the other",
        "imgfs.yaml:5: datadirs[2]: file/below can't be used: Not a directory",
        "imgfs.yaml:6: datadirs[3]: dangling is a symlink to nowhere",
        "imgfs.yaml:7: datadirs[4]: gone does not exist; create it or take it out",
    ]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda file: None, os.strerror(errno.ENOENT)),
        (lambda file: file.mkdir(), os.strerror(errno.EISDIR)),
        (lambda file: file.write_bytes(b"store_id: \xff\n"), "is not UTF-8 text"),
    ],
)
def test_file_that_can_not_be_read_is_told(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    make(tmp_path / "imgfs.yaml")
    with pytest.raises(ConfigError, match=reason) as caught:
        load(tmp_path / "imgfs.yaml")
    assert str(caught.value).startswith(f"{tmp_path}/imgfs.yaml:1: ")


# --- hostile files ---

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
MILLION = "a" * 1_000_000
HOSTILE = {
    "alias bomb": BOMB + "datadir: a\n",
    "alias of itself": "datadirs: &a [*a]\n",
    "deep lists": "datadirs: " + "[" * 100_000,
    "deep lists, closed": "datadirs: " + "[" * 5_000 + "]" * 5_000,
    "deep mappings": "datadirs: " + "{a: " * 20_000,
    "deep blocks": "".join(" " * depth + "- \n" for depth in range(2_000)),
    "deep, but parsed": "datadirs: " + "[" * 200 + "]" * 200,
    "million characters as hash": f"datadir: a\nhashing_algo: {MILLION}\n",
    "million characters as size": f"datadir: a\nchunk_size: {MILLION}\n",
    "million digits as size": f"datadir: a\nchunk_size: {'9' * 1_000_000}\n",
    "million digits as priority": f"datadirs: ['a:{'9' * 1_000_000}']\n",
    "million digits as perm": f"datadir: a\nfile_perm: {'7' * 1_000_000}\n",
    "million characters as metadata file": f"datadir: a\nmetadata_file: {MILLION}\n",
    "million characters as datadir": f"datadir: {MILLION}\n",
    "million characters as key": f"datadir: a\n? {MILLION}\n: b\n",
    "half a surrogate pair as path": 'datadir: "a\\uD800"\n',
    "half a surrogate pair as store_id": 'datadir: a\nstore_id: "a\\uD800"\n',
    "half a surrogate pair as metadata file": 'datadir: a\nmetadata_file: "a\\uD800"\n',
    "half a surrogate pair as hash": 'datadir: a\nhashing_algo: "a\\uD800"\n',
    "NUL in the metadata file's path": 'datadir: a\nmetadata_file: "a\\0"\n',
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.timeout(20)
def test_hostile_file_is_refused_in_short_lines(problems: Callable[..., list[str]], case: str) -> None:
    assert problems(HOSTILE[case], membership.unusable)


@pytest.mark.parametrize("whole", ["65536.0", "6.5536e+4"])
def test_whole_number_written_as_a_float_is_no_traceback(problems: Callable[..., list[str]], whole: str) -> None:
    (found,) = problems(f"datadir: a\nchunk_size: {whole}\n")
    assert found.startswith("imgfs.yaml:2: chunk_size: must be a whole number of bytes")


def test_alias_of_a_plain_word_is_good(config: Callable[..., Config]) -> None:
    assert config("datadir: &a images\nstore_id: *a\n").store_id == "images"
