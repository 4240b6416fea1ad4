"""The `-o` options of a mount, as mount(8) and fstab(5) spell them, checked before anything is mounted."""

from imgfs.errors import InvalidValue

FLAGS = (
    "ro",
    "rw",
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "noexec",
    "exec",
    "noatime",
    "atime",
    "sync",
    "async",
    "dirsync",
)
"""What the kernel is told."""
FSTAB_ONLY = ("defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "_netdev", "nofail")
"""What concerns mount(8) and is passed over."""


TIMEOUTS = ("entry_timeout", "attr_timeout")
"""For how long the kernel may keep names and attributes, in seconds (mount.fuse3(8))."""


def _is_seconds(value: str) -> bool:
    return value.replace(".", "", 1).isdigit() and value.isascii()


def parse(texts: list[str]) -> dict[str, str | bool]:
    """The options of one or more comma-separated lists; `allow_other` may be among them.

    Raises InvalidValue that names an unknown one.
    """
    options: dict[str, str | bool] = {}
    for option in ",".join(texts).split(","):
        name, has_value, value = option.strip().partition("=")
        if not name or name in FSTAB_ONLY or name.startswith("x-") or name == "comment":
            continue
        if (name == "fsname" and has_value and value) or (name in TIMEOUTS and _is_seconds(value)):
            options[name] = value
        elif name in (*FLAGS, "allow_other") and not has_value:
            options[name] = True
        else:
            timeouts = [f"{timeout}=SECONDS" for timeout in TIMEOUTS]
            known = ", ".join((*FLAGS, "allow_other", "fsname=NAME", *timeouts))
            raise InvalidValue(f"unknown mount option {option.strip()!r}; there are {known}")
    return options
