"""The configuration: a YAML file in, frozen values out, or every problem of the file at once.

The form is checked by `config.schema.json`; what a schema can't say (hash names, permissions, datadirs that
contradict each other, the metadata file) is checked here. Each problem names the file, the line and the key.
"""

import difflib
import json
import logging
import math
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

import jsonschema

from imgfs import hashing, yaml_document
from imgfs import metadata as labels

log = logging.getLogger(__name__)

_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


class Mode(StrEnum):
    """What a datadir is used for."""

    READ_WRITE = "rw"
    NO_CREATE = "nc"
    READ_ONLY = "ro"


class Reseal(StrEnum):
    """When stale images are sealed anew."""

    ON_DEMAND = "on_demand"
    BACKGROUND = "background"


class MissingDatadirs(StrEnum):
    """What a mount does where the disk of a datadir is not there."""

    REFUSE = "refuse"
    DEGRADE = "degrade"


@dataclass(frozen=True, slots=True)
class DatadirConfig:
    """One backing directory: an absolute path, its priority (higher is preferred), mode, bytes to keep free."""

    path: str
    priority: int = 0
    mode: Mode = Mode.READ_WRITE
    min_free_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Config:
    """A checked configuration. `file_perm` 0 leaves permissions alone; `timeout_seconds` 0 waits forever."""

    datadirs: tuple[DatadirConfig, ...]
    store_id: str | None = None
    file_perm: int = 0
    metadata: tuple[labels.Metadata, ...] | None = None
    hashing_algo: str = "sha512"
    chunk_size_bytes: int = 64 << 10
    thin_provisioning: bool = False
    write_once: bool = False
    reseal: Reseal = Reseal.ON_DEMAND
    timeout_seconds: float = 0
    missing_datadirs: MissingDatadirs = MissingDatadirs.DEGRADE


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `key` is a dotted path in the file, `line` counts from 1."""

    file: str
    line: int
    key: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: "
        return f"{where}{self.key}: {self.message}" if self.key else f"{where}{self.message}"


class ConfigError(ValueError):
    """The configuration is wrong; `problems` lists everything that is, a line each in `str(error)`."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


# JSON Schema calls 1.0 an integer; a priority or a size written so is a mistake.
_Validator = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ),
)

Probe = Callable[[Sequence[DatadirConfig]], Mapping[str, str]]


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a configuration, as it ships with imgfs."""
    text = resources.files("imgfs").joinpath("config.schema.json").read_text(encoding="utf-8")
    return cast(dict[str, Any], json.loads(text))


def parse_size(value: int | str) -> int:
    """Bytes of a size as the schema allows it: a whole number, or one with KiB, MiB, GiB or TiB."""
    text = str(value)
    unit = text[-3:]
    return int(text[:-3]) * _UNITS[unit] if unit in _UNITS else int(text)


def parse_datadir(text: str) -> tuple[str, int]:
    """Glance's spelling `PATH[:PRIORITY]`, split at the last colon (Glance behaviour 2).

    Raises ValueError where the path is empty or the priority is no whole number of 0 or more.
    """
    path, colon, priority = text.strip().rpartition(":")
    if not colon:
        path, priority = priority, ""
    path, priority = path.strip(), priority.strip()
    if priority and not (priority.isascii() and priority.isdigit()):
        raise ValueError(
            f"priority {_short.repr(priority)} must be a whole number, 0 or more "
            "(a path that contains a colon goes into the mapping form, as path:)"
        )
    return path, int(priority or 0)


def load(file: str | os.PathLike[str], probe: Probe | None = None) -> Config:
    """Read and check a configuration file.

    `probe` is asked which of the datadirs can't be used, by path, and why, so that such reasons come together with
    the rest. Raises ConfigError with every problem found, the reading of the file included.
    """
    return _Loader(Path(file), probe).load()


@dataclass
class _Loader:
    file: Path
    probe: Probe | None
    problems: list[Problem] = field(default_factory=list)
    document: yaml_document.Document = field(default_factory=lambda: yaml_document.Document(None))

    def load(self) -> Config:
        data = self._read()
        values = {key: value for key, value in data.items() if not self._broken((key,))}
        config = Config(
            datadirs=self._datadirs(data),
            store_id=values.get("store_id"),
            file_perm=self._file_perm(values.get("file_perm", "0")),
            metadata=self._metadata(values.get("metadata_file")),
            hashing_algo=self._hashing_algo(values.get("hashing_algo", "sha512")),
            chunk_size_bytes=self._chunk_size(values.get("chunk_size", "64KiB")),
            thin_provisioning=values.get("thin_provisioning", False),
            write_once=values.get("write_once", False),
            reseal=Reseal(values.get("reseal", Reseal.ON_DEMAND)),
            timeout_seconds=self._timeout(values.get("timeout", 0)),
            missing_datadirs=MissingDatadirs(values.get("missing_datadirs", MissingDatadirs.DEGRADE)),
        )
        if self.problems:
            raise ConfigError(sorted(self.problems, key=lambda problem: problem.line))
        return config

    def _read(self) -> dict[str, Any]:
        try:
            text = self.file.read_text(encoding="utf-8")
            self.document = yaml_document.parse(text, verbatim={("file_perm",)})
        except OSError as error:
            raise ConfigError([Problem(str(self.file), 1, "", f"can't be read: {error.strerror}")]) from None
        except UnicodeDecodeError:
            raise ConfigError([Problem(str(self.file), 1, "", "is not UTF-8 text")]) from None
        except yaml_document.YamlError as error:
            raise ConfigError([Problem(str(self.file), error.line, "", f"is not valid YAML: {error}")]) from None
        for path, line in self.document.duplicates:
            self._add(path, "is there twice; keep one", line)
        for violation in _Validator(schema()).iter_errors(self.document.data):
            self._add_schema_error(violation)
        return self.document.data if isinstance(self.document.data, dict) else {}

    def _add(self, path: yaml_document.Path, message: str, line: int | None = None) -> None:
        where = line or self.document.line(path)
        self.problems.append(Problem(str(self.file), where, _dotted(path), message))

    def _add_schema_error(self, error: jsonschema.ValidationError) -> None:
        path = tuple(error.absolute_path)
        properties = cast(dict[str, Any], error.schema).get("properties", {})
        if error.validator == "additionalProperties":
            for key in cast(dict[str, Any], error.instance).keys() - properties.keys():
                self._add((*path, key), _unknown_key(key, list(properties)))
        elif error.validator == "required":
            missing = set(cast(list[str], error.validator_value)) - cast(dict[str, Any], error.instance).keys()
            self._add(path, f"{', '.join(sorted(missing))} is missing")
        else:
            wanted = cast(dict[str, Any], error.schema).get("description", error.message)
            self._add(path, f"must be {wanted}, not {_short.repr(error.instance)}")

    def _broken(self, path: yaml_document.Path) -> bool:
        """Whether something is known to be wrong at a path or below it."""
        key = _dotted(path)
        return any(p.key == key or p.key.startswith((key + ".", key + "[")) for p in self.problems)

    def _datadirs(self, data: dict[str, Any]) -> tuple[DatadirConfig, ...]:
        if ("datadir" in data) == ("datadirs" in data):
            which = "both datadir and datadirs are given" if "datadir" in data else "no datadir is given"
            self._add((), f"{which}; give either datadir: PATH or datadirs: with a list")
        located = [*self._single_datadir(data), *self._listed_datadirs(data)]
        kept = list(self._without_repetition(located))
        reasons = self.probe([datadir for _, datadir in kept]) if self.probe else {}
        for path, datadir in kept:
            if datadir.path in reasons:
                self._add(path, reasons[datadir.path])
        return tuple(datadir for _, datadir in kept)

    def _single_datadir(self, data: dict[str, Any]) -> Iterator[tuple[yaml_document.Path, DatadirConfig]]:
        if isinstance(data.get("datadir"), str):
            yield from self._located(("datadir",), data["datadir"].strip())

    def _listed_datadirs(self, data: dict[str, Any]) -> Iterator[tuple[yaml_document.Path, DatadirConfig]]:
        items = data.get("datadirs")
        for index, item in enumerate(items if isinstance(items, list) else []):
            where: yaml_document.Path = ("datadirs", index)
            if self._broken(where):
                continue
            if isinstance(item, str):
                try:
                    path, priority = parse_datadir(item)
                except ValueError as error:
                    self._add(where, str(error))
                    continue
                yield from self._located(where, path, priority)
            else:
                yield from self._located(
                    where,
                    item["path"].strip(),
                    item.get("priority", 0),
                    Mode(item.get("mode", Mode.READ_WRITE)),
                    parse_size(item.get("min_free", 0)),
                )

    def _located(
        self,
        where: yaml_document.Path,
        path: str,
        priority: int = 0,
        mode: Mode = Mode.READ_WRITE,
        min_free_bytes: int = 0,
    ) -> Iterator[tuple[yaml_document.Path, DatadirConfig]]:
        if not path or "\0" in path:
            self._add(where, "the path is empty; name a directory" if not path else "a path has no NUL bytes")
            return
        yield where, DatadirConfig(self._absolute(path), priority, mode, min_free_bytes)

    def _without_repetition(
        self, located: list[tuple[yaml_document.Path, DatadirConfig]]
    ) -> Iterator[tuple[yaml_document.Path, DatadirConfig]]:
        """Glance behaviour 3, and no datadir inside another."""
        seen: dict[str, DatadirConfig] = {}
        for where, datadir in located:
            real = os.path.realpath(datadir.path)
            same = seen.get(real)
            if same is not None:
                self._repeated(where, datadir, same)
                continue
            for other, config in seen.items():
                if Path(real).is_relative_to(other) or Path(other).is_relative_to(real):
                    self._add(where, f"{datadir.path} and {config.path} lie one inside the other")
            seen[real] = datadir
            yield where, datadir

    def _repeated(self, where: yaml_document.Path, datadir: DatadirConfig, same: DatadirConfig) -> None:
        if datadir.priority != same.priority:
            self._add(where, f"{datadir.path} is there twice, with priorities {same.priority} and "
                             f"{datadir.priority}; keep one")  # fmt: skip
        elif (datadir.mode, datadir.min_free_bytes) != (same.mode, same.min_free_bytes):
            self._add(where, f"{datadir.path} is there twice, with different settings; keep one")
        else:
            line = self.document.line(where)
            log.warning("%s:%d: datadir %s is there twice; it is used once", self.file, line, datadir.path)

    def _file_perm(self, digits: str) -> int:
        perm = int(digits, 8)
        if perm <= 0:
            return 0
        if perm > 0o7777 or not perm & 0o400:
            self._add(("file_perm",), f"{_short.repr(digits)} does not let the owner read; use 0640, say")
        return perm

    def _metadata(self, name: str | None) -> tuple[labels.Metadata, ...] | None:
        if name is None:
            return None
        try:
            return tuple(labels.load(Path(self._absolute(name))))
        except labels.MetadataError as error:
            self._add(("metadata_file",), str(error))
            return None

    def _hashing_algo(self, name: str) -> str:
        algo = name.strip().lower()
        if not hashing.usable_algorithm(algo):
            self._add(("hashing_algo",), f"{_short.repr(name)} is no hash algorithm of fixed size known here; "
                                         "use sha512, say")  # fmt: skip
        return algo

    def _chunk_size(self, value: int | str) -> int:
        size = parse_size(value)
        if size < 1:
            self._add(("chunk_size",), "must be at least 1")
        return size

    def _timeout(self, seconds: float) -> float:
        if not math.isfinite(seconds):
            self._add(("timeout",), f"must be a number of seconds, 0 or more, not {seconds}")
        return seconds

    def _absolute(self, path: str) -> str:
        return os.path.abspath(self.file.parent / path)


def _dotted(path: yaml_document.Path) -> str:
    text = ""
    for part in path:
        shown = f"[{part}]" if isinstance(part, int) else part if len(part) <= 60 else part[:57] + "..."
        text += f".{shown}" if text and isinstance(part, str) else shown
    return text


def _unknown_key(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}"
    return f"unknown key; {hint}"
