"""The command line of the benchmarks: measure, and write the report; or only write it again."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import figures, machine
from benchmarks.contenders import CONTENDERS
from benchmarks.measuring import Run
from benchmarks.workloads import TINY, WORKLOADS

# Below 10 minutes with the installation of the peers before it and the report after it.
MINUTES = 8.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Gives the exit code: 0 good, 1 it failed or was interrupted, 2 the command line is wrong."""
    parsed = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unmount and clean up, as after Ctrl-C
    try:
        results = figures.load(parsed.report) if parsed.report else _measure(parsed)
        _write(results, parsed)
    except KeyboardInterrupt:
        _say("interrupted; nothing is left mounted, and no report was written")
        return 1
    return 1 if "failed" in results.facts else 0


def _measure(parsed: argparse.Namespace) -> figures.Results:
    if os.geteuid() != 0:
        raise SystemExit("benchmarks: passthrough and mounting need root; run it as root")
    wanted = [each for each in CONTENDERS if each.name in (parsed.contender or [c.name for c in CONTENDERS])]
    present = [contender for contender in wanted if contender.is_installed()]
    for contender in set(wanted) - set(present):
        _say(f"{contender.name} is left out: {contender.needs} is not installed (tools/setup.sh bench installs it)")
    known = TINY if parsed.tiny else WORKLOADS
    workloads = [workload for workload in known if workload.name in (parsed.only or [w.name for w in known])]
    parsed.where.mkdir(parents=True, exist_ok=True)
    run = Run(present, parsed.minutes * 60, _say)
    results = run.measure(workloads, parsed.rounds, parsed.where.resolve())
    results.facts = machine.facts(parsed.where)
    if run.failed:
        results.facts["failed"] = ", ".join(
            f"{contender} in {workload}" for workload, contender in sorted(run.failed)
        )
    return results


def _write(results: figures.Results, parsed: argparse.Namespace) -> None:
    from benchmarks import report  # noqa: PLC0415  # matplotlib takes a second to import, and memory

    report.write(results, parsed.output)
    if parsed.readme:
        report.update_readme(results, parsed.readme, parsed.output)
    _say(f"{parsed.output / 'results.md'} is written")


def _say(message: str) -> None:
    print(f"benchmarks: {message}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure imgfs beside a bare directory and its peers, in turns, and write tables and plots.",
        epilog="Workloads: " + "; ".join(f"{each.name}: {each.summary}" for each in WORKLOADS),
    )
    names = [each.name for each in WORKLOADS]
    parser.add_argument("--only", action="append", metavar="WORKLOAD", choices=names,
                        help="only this one; may be given several times")  # fmt: skip
    parser.add_argument("--contender", action="append", metavar="NAME", choices=[c.name for c in CONTENDERS],
                        help=f"only this one; several times: {', '.join(c.name for c in CONTENDERS)}")  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, help="how often everybody has their turn (default: 3 to 5, as it takes)"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES,
                        help="when rounds after the first are left out (default: %(default)s)")  # fmt: skip
    parser.add_argument("--where", type=Path, default=Path("/var/tmp"),
                        help="a directory on the filesystem to measure on (default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"),
                        help="where results.md, results.json and the plots go (default: %(default)s)")  # fmt: skip
    parser.add_argument("--readme", type=Path, help="a file whose overview is to be replaced, too")
    parser.add_argument("--report", type=Path, metavar="RESULTS", help="a results.json to write the report of again")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it works")
    return parser


if __name__ == "__main__":
    sys.exit(main())
