"""Which names an image can have: any 1 to 255 bytes of a file name but those kept for imgfs and libfuse.

Names are bytes; in Python they are `str` as os.fsdecode gives them (undecodable bytes as surrogates).
"""

import os

from imgfs.errors import InvalidName, NameTooLong, ReservedName

NAME_MAX = 255
RESERVED_PREFIXES = (".imgfs", ".fuse_hidden")
OWN_DIRECTORY = ".imgfs"


def is_reserved(name: str) -> bool:
    """Whether a name is kept for imgfs (`.imgfs*`) or for libfuse 2 (`.fuse_hidden*`), so never an image."""
    return name.startswith(RESERVED_PREFIXES)


def check(name: str) -> str:
    """Give the name back if an image can have it; raises InvalidName, NameTooLong or ReservedName."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise InvalidName(f"{name!r} is no name for an image: one plain file name is wanted")
    if len(name) > NAME_MAX // 4 and len(os.fsencode(name)) > NAME_MAX:  # a character has at most 4 bytes
        raise NameTooLong(f"the name {name[:40]!r}... is longer than {NAME_MAX} bytes")
    if is_reserved(name):
        raise ReservedName(f"{name!r} is refused: names with {' and '.join(RESERVED_PREFIXES)} in front are kept")
    return name
