"""Rows of figures, one figure for each contender and round; medians, ratios, slopes; results.json. Pure but for that.

All contenders of a row are measured in the same rounds, so the n-th figures of two of them belong together.
"""

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

UNITS_PER_SECOND = ("MiB/s", "thousand/s")  # of these more is better, of all others less

HEADLINES = (  # the rows that an overview shows: workload, start of the row's name
    ("read", "sequential read"),
    ("read", "random"),
    ("write", "write"),
    ("create", ""),
    ("names-1000", "stat"),
    ("names-1000", "ls -l"),
    ("sparse", ""),
)


@dataclass(frozen=True)
class Row:
    """What is measured. The rows of one `curve` differ in `at` only: a number of images, of processes, of MiB."""

    name: str
    unit: str
    curve: str = ""
    at: float = 0.0

    @property
    def is_rate(self) -> bool:
        """Whether more is better."""
        return self.unit in UNITS_PER_SECOND


Figures = dict[str, list[float]]  # contender -> its rounds


class Spread(NamedTuple):
    """The middle of some figures, and their extremes."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


@dataclass
class Results:
    """All that one run has measured, and what must be known to judge it."""

    facts: dict[str, str] = field(default_factory=dict)
    contenders: dict[str, str] = field(default_factory=dict)  # name -> summary
    workloads: dict[str, str] = field(default_factory=dict)  # name -> summary
    references: dict[str, str] = field(default_factory=dict)  # workload -> the contender to compare others with
    rows: dict[str, dict[Row, Figures]] = field(default_factory=dict)  # workload -> its rows

    def add(self, workload: str, contender: str, measured: dict[Row, float]) -> None:
        """Enter what one contender has done in one round."""
        rows = self.rows.setdefault(workload, {})
        for row, value in measured.items():
            rows.setdefault(row, {}).setdefault(contender, []).append(value)

    def ratio(self, workload: str, row: Row, contender: str) -> Spread | None:
        """How many times the reference's time (or memory) it takes; below 1 is better. None without a reference."""
        figures = self.rows[workload][row]
        reference = figures.get(self.references[workload])
        if reference is None or contender not in figures:
            return None
        pairs = zip(figures[contender], reference, strict=False)
        return spread([theirs / its if row.is_rate else its / theirs for its, theirs in pairs])

    def headlines(self) -> list[tuple[str, Row]]:
        """The rows that an overview shows, with their workloads; as far as they were measured."""
        return [
            (workload, row)
            for workload, start in HEADLINES
            for row in self.rows.get(workload, {})
            if row.name.startswith(start)
        ]

    def curve(self, name: str, contender: str) -> tuple[list[float], list[Spread]]:
        """The points of a curve, in order: where, and how much."""
        points = [
            (row.at, spread(figures[contender]))
            for rows in self.rows.values()
            for row, figures in rows.items()
            if row.curve == name and contender in figures
        ]
        points.sort()
        return [at for at, _ in points], [value for _, value in points]


def slope(xs: list[float], ys: list[float]) -> float:
    """The exponent with which y grows with x: that of the line through their logarithms (least squares)."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def save(results: Results, path: Path) -> None:
    """Write results.json, with five digits of each figure."""
    raw = {**vars(results), "rows": {name: _rows_as_list(rows) for name, rows in results.rows.items()}}
    path.write_text(json.dumps(raw, indent=1) + "\n")


def load(path: Path) -> Results:
    """Read results.json."""
    raw: dict[str, Any] = json.loads(path.read_text())
    rows = {name: _rows_from_list(listed) for name, listed in raw.pop("rows").items()}
    return Results(**raw, rows=rows)


def _rows_as_list(rows: dict[Row, Figures]) -> list[dict[str, Any]]:
    return [
        asdict(row) | {"figures": {name: [float(f"{v:.5g}") for v in values] for name, values in figures.items()}}
        for row, figures in rows.items()
    ]


def _rows_from_list(listed: list[dict[str, Any]]) -> dict[Row, Figures]:
    return {Row(**{k: v for k, v in row.items() if k != "figures"}): row["figures"] for row in listed}
