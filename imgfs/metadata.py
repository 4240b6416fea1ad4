"""The metadata file: which labels the images of a datadir carry (Glance behaviour 13).

The file holds one JSON object or a list of them, each with strings `id` and `mountpoint`. A datadir gets the object
whose mountpoint is the longest whole-path prefix of its files, so /mnt/a never speaks for /mnt/ab.
"""

import json
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, cast

import jsonschema

Metadata = dict[str, Any]


class MetadataError(ValueError):
    """The metadata file can't be read, is no JSON, or is not of the form its schema asks for."""


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a metadata file, as it ships with imgfs."""
    text = resources.files("imgfs").joinpath("metadata.schema.json").read_text(encoding="utf-8")
    return cast(dict[str, Any], json.loads(text))


def load(path: Path) -> list[Metadata]:
    """The objects of a metadata file, checked. Raises MetadataError with one line that says what is wrong."""
    try:
        document = json.loads(path.read_bytes())
        problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(document))
    except OSError as error:
        raise MetadataError(f"{str(path)[:200]}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise MetadataError(f"{path}: is not valid JSON: {error}") from None
    if problem is not None:
        raise MetadataError(f"{path}: {problem.json_path}: {problem.message[:200]}")
    return cast(list[Metadata], document) if isinstance(document, list) else [document]


def match(objects: list[Metadata], datadir: str) -> Metadata | None:
    """A fresh copy of the object that speaks for the files of a datadir, or None."""
    inside = PurePosixPath(datadir)
    fitting = [o for o in objects if inside.is_relative_to(PurePosixPath(o["mountpoint"]))]
    if not fitting:
        return None
    best = max(fitting, key=lambda o: len(PurePosixPath(o["mountpoint"]).parts))
    return cast(Metadata, json.loads(json.dumps(best)))
