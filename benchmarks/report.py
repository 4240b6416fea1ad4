"""What a run has found, for people: results.md, results.json beside it, the part of README.md between its markers."""

import os
from pathlib import Path

from benchmarks import figures, plots
from benchmarks.figures import Figures, Results, Row, Spread

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
_IN_README = ("imgfs", "imgfs-fusepy", "mergerfs", "fusepy", "mfusepy")


def write(results: Results, directory: Path) -> None:
    """Everything that can be made of the results, in one directory."""
    directory.mkdir(parents=True, exist_ok=True)
    figures.save(results, directory / "results.json")
    results = figures.load(directory / "results.json")  # rounded, so that it can be made again
    shown = plots.draw_all(results, directory)
    (directory / "results.md").write_text("\n".join(_page(results, shown)) + "\n")


def update_readme(results: Results, readme: Path, directory: Path) -> None:
    """Put the overview between the markers in a README, with paths relative to it. Raises SystemExit without them."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"benchmarks: {readme} has no {BEGIN} ... {END}; add them where the overview should be")
    inside = "\n".join(_overview(results, os.path.relpath(directory, readme.parent)))
    readme.write_text(f"{before}{BEGIN}\n{inside}\n{END}{after}")


def _page(results: Results, shown: list[str]) -> list[str]:
    lines = [
        "# Benchmark results",
        "",
        "Written by `make bench`; its figures are in [results.json](results.json).",
        "",
    ]
    lines += _table(["", ""], [[name, value] for name, value in results.facts.items()], "---")
    lines += ["", "Who takes part:", ""]
    lines += [f"- **{name}**: {summary}" for name, summary in results.contenders.items()]
    lines += ["", *_HOW_TO_READ, ""]
    lines += [f"![{name}]({name}.svg)\n" for name in shown]
    for workload in results.rows:
        lines += _workload(results, workload)
    return lines + _growth(results)


_HOW_TO_READ = (
    "The contenders take turns; each round measures each of them once, on a fresh mount. A cell has the median of",
    "all rounds, and below it how many times the reference's time that is in the same round: 1.00 is as fast, 2.00",
    "takes twice as long, for rates (MiB/s) as well; in brackets the fastest and the slowest round. The reference is",
    "the bare directory, for adding with digests the limit.",
)


def _workload(results: Results, workload: str) -> list[str]:
    rows = results.rows[workload]
    names = [name for name in results.contenders if any(name in found for found in rows.values())]
    rounds = max(len(values) for found in rows.values() for values in found.values())
    lines = ["", f"## {workload}", "", f"{results.workloads[workload]}. Rounds: {rounds}.", ""]
    cells = [
        [f"{row.name}, {row.unit}", *(_cell(results, workload, row, found, name) for name in names)]
        for row, found in rows.items()
    ]
    return lines + _table(["", *names], cells)


def _cell(results: Results, workload: str, row: Row, found: Figures, contender: str) -> str:
    if contender not in found:
        return ""
    median = _number(figures.spread(found[contender]).median)
    ratio = results.ratio(workload, row, contender)
    if ratio is None or contender == results.references[workload]:
        return f"**{median}**"
    return f"**{median}**<br>{_ratio(ratio)}"


def _growth(results: Results) -> list[str]:
    """The slopes of the curves whose points are far enough apart."""
    curves = [name for name in plots.GROWING if any(len(results.curve(name, c)[0]) > 1 for c in results.contenders)]
    names = [c for c in results.contenders if any(len(results.curve(name, c)[0]) > 1 for name in curves)]
    if not curves:
        return []
    lines = ["", "## How cost grows", ""]
    lines += [
        "The exponent of the growth (slope in a log-log plot; 1 is proportional, 0 is constant) with the number"
    ]
    lines += ["of images, or with their size.", ""]
    return lines + _table(["", *names], [[plots.GROWING[curve], *_slopes(results, curve, names)] for curve in curves])


def _slopes(results: Results, curve: str, names: list[str]) -> list[str]:
    points = [results.curve(curve, name) for name in names]
    return [f"{figures.slope(at, [y.median for y in ys]):.2f}" if len(at) > 1 else "" for at, ys in points]


def _overview(results: Results, plots_at: str) -> list[str]:
    names = [name for name in _IN_README if name in results.contenders]
    facts = results.facts
    lines = [f"![Times the bare directory's time]({plots_at}/overview.svg)", ""]
    lines += [f"How many times the bare directory's time; medians, the files below in memory ({facts['kernel']},"]
    lines += [f"{facts['filesystem'].split()[0]}, {facts['machine']}). [All figures]({plots_at}/results.md)"]
    lines += ["are made by `make bench`.", ""]
    cells = [
        [row.name, *(_short(results.ratio(workload, row, name)) for name in names)]
        for workload, row in results.headlines()
    ]
    who = "; ".join(f"*{name}*: {results.contenders[name]}" for name in names)
    return [*lines, *_table(["", *names], cells), "", f"{who}.", *_adding(results)]


def _adding(results: Results) -> list[str]:
    """One sentence about the largest image."""
    rows = results.rows.get("add", {})
    if not rows:
        return []
    row = max(rows, key=lambda row: row.at)
    times = {name: _short(results.ratio("add", row, name)) for name in rows[row] if name != "limit"}
    listed = ", ".join(f"{name} {ratio}" for name, ratio in times.items())
    return [
        "",
        f"Adding {row.at:,.0f} MiB until the digests are known, in times of what hashing alone takes: {listed}.",
    ]


def _table(head: list[str], rows: list[list[str]], alignment: str = "---:") -> list[str]:
    lines = [head, ["---", *[alignment] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _short(ratio: Spread | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f}"


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _number(value: float) -> str:
    """Three digits, or all of a longer whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
