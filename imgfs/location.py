"""Locations: `file://` URIs of backing files, both ways, exactly.

Percent-encoding follows RFC 3986 over the bytes of the path, so every name survives. Whether a location lies in a
datadir is the store's business; here it is only taken apart.
"""

import os
from urllib.parse import quote_from_bytes, unquote_to_bytes

from imgfs.errors import BadLocation

SCHEMES = ("file", "filesystem")


def to_uri(path: str) -> str:
    """The location of the file at an absolute path."""
    return "file://" + quote_from_bytes(os.fsencode(path), safe="/")


def to_path(location: str) -> str:
    """The absolute path that a location names (Glance behaviour 15).

    Raises BadLocation for another scheme, an empty or relative path, `.` and `..` components, and NUL bytes.
    """
    scheme, separator, rest = location.partition("://")
    if not separator or scheme.lower() not in SCHEMES:
        raise BadLocation(f"{location!r} is no location: it must start with file:// or filesystem://")
    try:
        path = os.fsdecode(unquote_to_bytes(os.fsencode(rest.strip())))
    except UnicodeEncodeError:
        raise BadLocation(f"{location!r} is refused: it has half a surrogate pair") from None
    if not path.startswith("/") or path.endswith("/"):
        raise BadLocation(f"{location!r} names no file: the path must be absolute")
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")[1:]):
        raise BadLocation(f"{location!r} is refused: its path is not a plain one")
    return path
