"""A YAML file as plain data that remembers the line of every key.

PyYAML does the parsing; this adds what a configuration needs: line numbers, duplicate keys as errors, scalars that
are to be read as they are written, and no way to make a small file grow (aliases of collections are refused).
"""

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]


class YamlError(ValueError):
    """The text is no YAML that can be used; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass
class Document:
    """Plain data, the line (from 1) of each path in it, and the duplicate keys as (path, line)."""

    data: Any
    lines: dict[Path, int] = field(default_factory=dict)
    duplicates: list[tuple[Path, int]] = field(default_factory=list)

    def line(self, path: Path) -> int:
        """The line of a path, or of what is nearest above it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def parse(text: str, verbatim: Collection[Path] = ()) -> Document:
    """Parse one document; scalars at the paths in `verbatim` stay strings as written. Raises YamlError."""
    try:
        loader = yaml.SafeLoader(text)
        return _Builder(loader, verbatim).build(loader.get_single_node())
    except yaml.reader.ReaderError as error:
        raise YamlError(text.count("\n", 0, error.position) + 1, str(error.reason)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(mark.line + 1 if mark else 1, str(error.problem or error.context)) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(1, str(error).splitlines()[0]) from None
    except RecursionError:
        raise YamlError(1, "nested too deeply") from None


class _Builder:
    def __init__(self, loader: yaml.SafeLoader, verbatim: Collection[Path]) -> None:
        self._loader = loader
        self._verbatim = verbatim
        self._seen: set[int] = set()
        self._document = Document(None)

    def build(self, node: yaml.Node | None) -> Document:
        if node is not None:
            self._document.data = self._value(node, ())
        return self._document

    def _value(self, node: yaml.Node, path: Path) -> Any:
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if id(node) in self._seen:
            raise YamlError(node.start_mark.line + 1, "an alias of a list or mapping is not supported")
        self._seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._mapping(node, path)

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        try:
            os.fsencode(node.value)
            return node.value if path in self._verbatim else self._loader.construct_object(node)
        except UnicodeEncodeError:
            raise YamlError(node.start_mark.line + 1, "a string with half a surrogate pair") from None
        except (ValueError, OverflowError) as error:
            raise YamlError(node.start_mark.line + 1, str(error)) from None

    def _mapping(self, node: yaml.Node, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError(line, "a key must be a plain word")
            key = str(key_node.value)
            if key in mapping:
                self._document.duplicates.append(((*path, key), line))
            self._document.lines[(*path, key)] = line
            mapping[key] = self._value(value_node, (*path, key))
        return mapping
