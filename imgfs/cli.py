"""The command line: arguments in, exit codes out (0 good, 1 it failed, 2 command line or configuration wrong).

The only module that prints, and that sets up logging: to stderr in the foreground, to syslog or a file otherwise.
"""

import argparse
import logging
import logging.handlers
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from imgfs import copies, daemon, inspection, membership, mount_options, mounts, privileges
from imgfs.catalogue import Listed
from imgfs.config import Config, ConfigError, load
from imgfs.errors import ImgfsError, InvalidValue, MountError
from imgfs.version import VERSION

log = logging.getLogger(__name__)

GOOD, FAILED, WRONG = 0, 1, 2
SYSLOG = "/dev/log"
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    parsed = _parser().parse_args(arguments)
    _log_to(logging.StreamHandler(), "imgfs: %(levelname)s: %(message)s", parsed.verbose)
    try:
        run: Callable[[argparse.Namespace], int] = parsed.run
        return run(parsed)
    except ConfigError as error:
        for problem in error.problems:
            _complain(str(problem))
        return WRONG
    except InvalidValue as error:
        _complain(str(error))
        return WRONG
    except ImgfsError as error:
        _complain(str(error))
        return FAILED
    except OSError as error:
        _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror))
        return FAILED
    except KeyboardInterrupt:
        _complain("interrupted")
        return FAILED


def _complain(message: str) -> None:
    print(f"imgfs: {message}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


def _log_to(handler: logging.Handler, form: str, verbosity: int) -> None:
    handler.setFormatter(logging.Formatter(form))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(_LEVELS[min(verbosity, len(_LEVELS) - 1)])


# --- mount ---


def _mount(parsed: argparse.Namespace) -> int:
    privileges.close_inherited_descriptors()
    os.umask(os.umask(0o022) | 0o022)  # before a log file is made
    config = load(parsed.config, membership.unusable)
    options = mount_options.parse(parsed.options)
    other = options.pop("allow_other", None) or parsed.allow_other
    request = daemon.MountRequest(
        config=config,
        mountpoint=parsed.mountpoint,
        allow_other=os.geteuid() == 0 if other is None else bool(other),
        options=options,
        transport=parsed.transport,
        passthrough=parsed.passthrough,
    )
    _require_transport(parsed.transport)
    if parsed.foreground:
        return _serve(request, lambda: log.info("mounted"))
    handler, form = _background_log(Path(parsed.log_file).absolute() if parsed.log_file else None)

    def log_in_background() -> None:
        if isinstance(handler, logging.NullHandler):
            log.warning("there is no syslog here: the daemon's log is lost; give --log-file to keep it")
        _log_to(handler, form, parsed.verbose)

    return daemon.in_background(lambda ready: _serve(request, ready), request.mountpoint, log_in_background)


def _serve(request: daemon.MountRequest, ready: Callable[[], None]) -> int:
    """The part of a mount that lasts; errors become one line here, as the process may be a child."""
    try:
        daemon.serve(request, ready)
    except ImgfsError as error:
        _complain(str(error))
        log.debug("the mount ended", exc_info=True)
        return FAILED
    return GOOD


def _require_transport(wanted: str) -> None:
    if not Path("/dev/fuse").exists():
        raise MountError("/dev/fuse is missing; load the kernel module: modprobe fuse")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MountError(f"/dev/fuse can't be opened by uid {os.geteuid()}; give access: chmod 666 /dev/fuse")
    daemon.choose_transport(wanted, passthrough=False)


def _background_log(log_file: Path | None) -> tuple[logging.Handler, str]:
    """Where the daemon logs once it is in the background, and in which form; opened before anything is mounted."""
    if log_file is not None:
        handler = logging.handlers.WatchedFileHandler(log_file, encoding="utf-8")
        return handler, "%(asctime)s imgfs[%(process)d]: %(levelname)s: %(message)s"
    if Path(SYSLOG).exists():
        facility = logging.handlers.SysLogHandler.LOG_DAEMON
        return logging.handlers.SysLogHandler(SYSLOG, facility), "imgfs[%(process)d]: %(levelname)s: %(message)s"
    return logging.NullHandler(), "%(message)s"


# --- the other commands ---


def _umount(parsed: argparse.Namespace) -> int:
    mounts.unmount(parsed.mountpoint, parsed.lazy)
    return GOOD


def _check(parsed: argparse.Namespace) -> int:
    if parsed.datadirs and not parsed.adopt:
        parsed.wrong("DATADIR goes with --adopt only")
    config = load(parsed.config, membership.unusable)
    if parsed.adopt:
        _adopt(config, membership.paths_of(config, parsed.datadirs))
    found = inspection.inspect(config)
    _say(f"{parsed.config}: {'good' if found.good else 'the configuration is good, the store is not complete'}")
    for line in (*_summary(config), *_findings(found)):
        _say(f"  {line}")
    return GOOD if found.good else FAILED


def _adopt(config: Config, paths: Sequence[str]) -> None:
    """Take in new or replaced datadirs, and say what that means for the images of those that were there."""
    adopted = membership.adopt(config, paths)
    if not adopted:
        _say("there is nothing to adopt: every datadir is there")
    for one in adopted:
        lost = len(inspection.images_of(one.replaced, config)) if one.replaced else 0
        _say(f"datadir {one.path} is a new one of this store now; {_count(lost)} of the one that was there "
             f"{'is' if lost == 1 else 'are'} listed as lost")  # fmt: skip


def _findings(found: inspection.Inspection) -> Iterator[str]:
    for verdict, listing in found.absent:
        yield membership.told(verdict)
        yield from _listed(f"{_count(len(listing))} known there", listing)
    for identity, listing in found.lost.items():
        yield from _listed(f"lost with datadir {identity}, which is no part of the store any more: "
                           f"{_count(len(listing))}", listing)  # fmt: skip
    for name, found_copies in found.doubled.items():
        yield f"image {name} lies in more than one datadir: {copies.described(found_copies)}; remove one there"


def _listed(head: str, listing: Mapping[str, Listed]) -> Iterator[str]:
    yield f"{head}:" if listing else head
    for name, facts in sorted(listing.items()):
        digests = f", md5 {facts.checksum}, {facts.os_hash_algo} {facts.os_hash_value}" if facts.checksum else ""
        yield f"  {name}: {facts.size} bytes, {facts.state}{digests}"


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"


def _say(line: str) -> None:
    """Print one line, whatever characters are in a name."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    print(shown.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8"))


def _summary(config: Config) -> list[str]:
    datadirs = [
        f"datadir {d.path}: priority {d.priority}, mode {d.mode}"
        for d in sorted(config.datadirs, key=lambda d: -d.priority)
    ]
    perm = f"{config.file_perm:04o}" if config.file_perm else "as created"
    return [*datadirs, f"permissions {perm}, digests md5 and {config.hashing_algo}"]


# --- arguments ---


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="imgfs",
        description="One directory of virtual-machine images over many disks.",
        epilog="Exit codes: 0 good, 1 it failed, 2 the command line or the configuration is wrong.",
    )
    parser.add_argument("--version", action="version", version=f"imgfs {VERSION}")
    parser.add_argument("-v", "--verbose", action="count", default=0,
                        help="log what is going on, not only warnings; -vv: each request, too")  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_mount(commands.add_parser("mount", help="mount a store", description="Mount a store at a directory."))
    _add_umount(commands.add_parser("umount", help="unmount a store", description="Unmount a store, and wait "
                                    "until its daemon has finished."))  # fmt: skip
    check = commands.add_parser("check", help="check a configuration and its datadirs", description="Say everything "
                                "that is wrong with a configuration, at once; which datadirs are missing, and what "
                                "lies there; which names lie in more than one. Nothing is changed, but by --adopt."
                                )  # fmt: skip
    check.add_argument("--adopt", action="store_true", help="make new datadirs of those that are missing or foreign: "
                       "their disks were replaced")  # fmt: skip
    check.add_argument("config", metavar="CONFIG", help="the configuration file (YAML)")
    check.add_argument("datadirs", metavar="DATADIR", nargs="*", help="adopt only these")
    check.set_defaults(run=_check, wrong=check.error)
    return parser


def _add_mount(mount: argparse.ArgumentParser) -> None:
    mount.add_argument("config", metavar="CONFIG", help="the configuration file (YAML)")
    mount.add_argument("mountpoint", metavar="MOUNTPOINT", help="an empty directory")
    mount.add_argument("-o", dest="options", metavar="OPTIONS", action="append", default=[],
                       help="mount options, comma-separated, as in fstab(5): ro, noatime, nosuid, ...")  # fmt: skip
    mount.add_argument("--foreground", action="store_true", help="stay in the foreground and log to stderr")
    mount.add_argument("--transport", choices=("auto", "kernel", "fusepy"), default="auto",
                       help="what carries the kernel's requests (default: auto)")  # fmt: skip
    mount.add_argument("--no-passthrough", dest="passthrough", action="store_false",
                       help="let every read come by the daemon, for comparison")  # fmt: skip
    mount.add_argument("--allow-other", action=argparse.BooleanOptionalAction, default=None,
                       help="other users may use the mount (default: for root)")  # fmt: skip
    mount.add_argument("--log-file", metavar="FILE", help="where the daemon logs in the background (default: syslog)")
    mount.set_defaults(run=_mount)


def _add_umount(umount: argparse.ArgumentParser) -> None:
    umount.add_argument("mountpoint", metavar="MOUNTPOINT", help="where the store is mounted")
    umount.add_argument("-l", "--lazy", action="store_true", help="detach it now, even if it is in use; do not wait")
    umount.set_defaults(run=_umount)


if __name__ == "__main__":
    sys.exit(main())
