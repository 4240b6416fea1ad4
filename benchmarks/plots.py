"""The plots, as SVG: no background of their own and middling colours, so that they can be read on light and dark."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.figures import Results, Spread, slope

GREY = "#808890"
COLOURS = {
    "bare": "#808890",
    "imgfs": "#3b82f6",
    "imgfs-no-passthrough": "#06b6d4",
    "imgfs-fusepy": "#8b5cf6",
    "mergerfs": "#22a75a",
    "fusepy": "#f97316",
    "mfusepy": "#ec4899",
    "limit": "#808890",
    "glance_store": "#dc5050",
}
OTHER_COLOUR = "#a3a300"
# The curves, and what they show.
_BY_IMAGES = {
    "start": "start of the mount, ms, by images",
    "stat of a name": "stat of a name, µs, by images",
    "ls -l": "ls -l, ms, by images",
    "resident memory": "resident memory, MiB, by images",
}
_BY_SIZE = {"adding": "adding with digests, s, by MiB"}
GROWING = _BY_IMAGES | _BY_SIZE
_AT_ONCE = {"readers": "MiB/s, by readers at once", "writers": "MiB/s, by writers at once"}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "imgfs",  # ids in the file depend on nothing but its content
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "legend.frameon": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "axes.titlecolor",
            "grid.color",
            "xtick.color",
            "ytick.color",
        ),
        GREY,
    ),
}


def draw_all(results: Results, directory: Path) -> list[str]:
    """Draw what there are figures for; gives the names of the plots."""
    draw: dict[str, Callable[[Results], Figure | None]] = {
        "overview": overview,
        "images": lambda results: _curves(results, _BY_IMAGES, log=True),
        "adding": lambda results: _curves(results, _BY_SIZE, log=True),
        "at-once": lambda results: _curves(results, _AT_ONCE, log=False),
    }
    drawn = []
    with mpl.rc_context(_STYLE):
        for name, plot in draw.items():
            figure = plot(results)
            if figure is not None:
                figure.savefig(directory / f"{name}.svg", transparent=True, metadata={"Date": None})
                plt.close(figure)
                drawn.append(name)
    return drawn


def overview(results: Results) -> Figure | None:
    """How many times the bare directory's time, for the headlines."""
    headlines = results.headlines()
    names = [name for name in results.contenders if any(results.ratio(w, row, name) for w, row in headlines)]
    names = [name for name in names if name != "bare"]
    if not headlines or not names:
        return None
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(headlines) + 1.6), layout="constrained")
    for number, name in enumerate(names):
        found = [(at, results.ratio(workload, row, name)) for at, (workload, row) in enumerate(headlines)]
        offset = 0.7 * (number / len(names) - 0.5)
        points = [(at + offset, ratio) for at, ratio in found if ratio is not None]
        middles = [ratio.median for _, ratio in points]
        axes.errorbar(middles, [at for at, _ in points], xerr=_bars([ratio for _, ratio in points]), label=name,
                      fmt="o", markersize=5, color=_colour(name))  # fmt: skip
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_yticks(range(len(headlines)), [row.name for _, row in headlines])
    axes.invert_yaxis()
    axes.set_xlabel("times the bare directory's time; further left is better; bars: fastest to slowest round")
    figure.legend(loc="outside upper center", ncols=len(names))
    return figure


def _curves(results: Results, titles: dict[str, str], log: bool) -> Figure | None:
    """A panel for each curve that was measured."""
    curves = [name for name in titles if any(len(results.curve(name, c)[0]) > 1 for c in results.contenders)]
    if not curves:
        return None
    columns = min(len(curves), 2)
    lines = -(-len(curves) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(5 * columns, 3.2 * lines), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(curves) :]:
        axes.set_axis_off()
    for name, axes in zip(curves, grid.flat, strict=False):
        _panel(results, name, axes, log)
        axes.set_title(titles[name])
    return figure


def _panel(results: Results, curve: str, axes: Axes, log: bool) -> None:
    """One curve of every contender; where the scales are logarithmic, with the slopes."""
    for name in results.contenders:
        at, found = results.curve(curve, name)
        if len(at) < 2:
            continue
        middles = [value.median for value in found]
        label = f"{name} {slope(at, middles):.2f}" if log else name
        axes.errorbar(at, middles, yerr=_bars(found), label=label, marker="o", markersize=4, color=_colour(name))
    axes.set_yscale("log")
    axes.set_xscale("log", base=10 if log else 2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_locator(NullLocator())
    title = "slopes" if log else None
    axes.legend(fontsize=7, title=title, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _bars(values: list[Spread]) -> list[list[float]]:
    """How far it is from the middle to the extremes, as errorbar() wants it."""
    return [[v.median - v.low for v in values], [v.high - v.median for v in values]]


def _colour(name: str) -> str:
    return COLOURS.get(name, OTHER_COLOUR)
