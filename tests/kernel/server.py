"""A loopback mount in a process of its own, driven by lines on its standard input.

Commands: `state` prints counters as JSON; `backs 0|1` says whether images may be passed through; `block OP` makes
that operation wait until `unblock OP`, or until the request is interrupted; `fail OP`; `notify OP`; `call METHOD
NAME`; `stop`;
`abort`.
"""

import errno
import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

from imgfs.kernel import KernelSession, MountOptions, RequestContext
from imgfs.kernel.device import Device
from tests.kernel.loopback import Loopback


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Server:
    def __init__(self, backing: str, mountpoint: str, options: dict[str, Any]) -> None:
        self.context = RequestContext()
        self.operations = Loopback(Path(backing))
        self.operations.hooks["getxattr"] = self._getxattr
        mount_options = MountOptions(**options.pop("mount", {"allow_other": os.geteuid() == 0}))
        self.session = KernelSession(self.operations, mountpoint, mount_options, context=self.context, **options)
        self.unblocked = threading.Event()
        self.interrupts = 0

    def _getxattr(self, _path: str, name: str, *_rest: Any) -> bytes | None:
        return str(self.context.caller().uid).encode() if name == "user.caller" else None

    def state(self, _argument: str) -> dict[str, Any]:
        return {
            "passthrough": self.session.passthrough,
            "calls": dict(self.operations.calls),
            "nodes": len(self.session._nodes),
            "handles": len(self.session._handles),
            "backing_ids": self.session._handles.backing_ids,
            "open_files": len(self.operations.open_files),
            "fds": len(list(Path("/proc/self/fd").iterdir())),
            "threads": len(self.session._readers),
            "interrupts": self.interrupts,
        }

    def backs(self, argument: str) -> None:
        self.operations.backs = argument == "1"

    def block(self, operation: str) -> None:
        self.unblocked.clear()

        def wait(*_args: Any) -> None:
            while not self.unblocked.wait(0.01):
                if self.context.interrupted():
                    self.interrupts += 1
                    raise InterruptedError(errno.EINTR, "interrupted")

        self.operations.hooks[operation] = wait

    def unblock(self, operation: str) -> None:
        self.operations.hooks.pop(operation, None)
        self.unblocked.set()

    def notify(self, operation: str) -> None:
        """Let the operation ask for every kind of notification about the name it works on."""

        def send(path: str, *_args: Any) -> None:
            self.session.name_added(path[1:])
            self.session.invalidate(path[1:], data=True)

        self.operations.hooks[operation] = send

    def fail(self, operation: str) -> None:
        def fail(*_args: Any) -> None:
            raise RuntimeError("a bug")

        self.operations.hooks[operation] = fail

    def call(self, argument: str) -> None:
        method, name = argument.split()
        getattr(self.session, method)(name)

    def stop(self) -> None:
        self.session.stop()

    def abort(self) -> None:
        self.session.abort()

    def commands(self) -> None:
        for line in sys.stdin:
            command, _, argument = line.strip().partition(" ")
            if command in ("stop", "abort"):
                say("null")  # the answer comes before the final state, which this brings about
                getattr(self, command)()
            else:
                say(json.dumps(getattr(self, command)(argument)))


def no_backing(_device: Device, _fd: int) -> int:
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    backing, mountpoint, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if options.pop("refuse_backing", False):
        Device.open_backing = no_backing  # type: ignore[method-assign]
    server = Server(backing, mountpoint, options)
    server.session.mount()
    threading.Thread(target=server.commands, daemon=True).start()
    server.session.run(lambda: say("ready"))
    say(json.dumps(server.state("")))


if __name__ == "__main__":
    main()
