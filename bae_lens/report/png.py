"""Charts as PNG files, for where a page cannot go."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bae_lens.comparison.results import Comparison
from bae_lens.report.series import (
    GRAY,
    Chart,
    Series,
    by_hook,
    firing_frequencies,
    quality_by_bits,
    quality_by_l0,
    quality_with_help,
)
from bae_lens.storage import written_whole

PICTURES_FOLDER = "pictures"
PANEL = (6.0, 4.8)  # inches
DOTS_PER_INCH = 150
LINES = {"line": "-", "dashed": "--", "dotted": ":"}
SYMBOLS = {"circle": "o", "diamond": "D"}


def write_pictures(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes `folder/pictures/*.png` and returns their paths; dictionaries that write at one hook share a panel."""
    home = folder / PICTURES_FOLDER
    home.mkdir(parents=True, exist_ok=True)
    hooks = by_hook(comparison)
    charts = {"explained_variance_by_bits": quality_by_bits, "explained_variance_by_l0": quality_by_l0}
    if comparison.experiment.every_help:
        charts["explained_variance_with_every_help"] = quality_with_help
    pictures = {
        name: {_title(comparison, hook): chart(comparison, hook) for hook in hooks} for name, chart in charts.items()
    }
    pictures["firing_frequencies"] = {"": firing_frequencies(comparison)}
    return [write_panels(panels, home / f"{name}.png") for name, panels in pictures.items()]


def _title(comparison: Comparison, hook: str) -> str:
    return comparison.experiment.dataset if comparison.experiment.model is None else f"at {hook}"


def write_panels(panels: dict[str, Chart], path: Path, columns: int | None = None) -> Path:
    """Charts by their titles, side by side, or in rows of so many; returns the path."""
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    figure = Figure((PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, chart) in zip(places, panels.items(), strict=False):
        draw(axes, chart)
        axes.set_title(title, fontsize="medium", parse_math=False)
    for axes in places[len(panels) :]:
        axes.remove()
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return path


def draw(axes: Axes, chart: Chart) -> None:
    """The chart, with a grid and a legend."""
    entries: dict[str, Artist] = {}
    if chart.log_x:
        axes.set_xscale("log")
    if chart.x_ticks:
        axes.set_xticks(chart.x_ticks, [f"{tick:g}" for tick in chart.x_ticks])
        axes.minorticks_off()
    for series in chart.series:
        artist = _plot(axes, series)
        if series.in_legend:
            entries[series.name] = artist
    if chart.asked_l0 is not None:
        entries["L0 asked for"] = axes.axvline(chart.asked_l0, color=GRAY, linestyle=":", linewidth=1)
        axes.set_xlim(left=0)
    axes.set(xlabel=chart.x_title, ylabel=chart.y_title, yscale="log" if chart.log_y else "linear")
    axes.set(xlim=chart.x_range, ylim=chart.y_range)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _name(axes, entries)


def _plot(axes: Axes, series: Series) -> Artist:
    """The series, with its error bars; returns what stands for it in the legend."""
    x, y = zip(*series.points, strict=True)
    if series.intervals:
        at = np.array(x if series.along_x else y)
        bars = np.abs(np.array(series.intervals).T - at)
        direction = {"xerr" if series.along_x else "yerr": bars}
        axes.errorbar(x, y, **direction, fmt="none", ecolor=series.color, elinewidth=1, capsize=2, alpha=0.6)
    look = _look(series)
    if not (series.opacities or series.hollow):
        (artist,) = axes.plot(x, y, **look)
        return artist
    axes.plot(x, y, **{**look, "marker": "none"})
    edges = [to_rgba(series.color, alpha) for alpha in series.opacities or [1.0] * len(x)]
    hollow = series.hollow or [False] * len(x)
    faces = ["white" if outline else edge for edge, outline in zip(edges, hollow, strict=True)]
    axes.scatter(x, y, s=36, c=faces, edgecolors=edges, marker=look["marker"], zorder=3)
    return Line2D([], [], **look)


def _look(series: Series) -> dict[str, Any]:
    """Of a series, in matplotlib's words."""
    symbol = SYMBOLS[series.symbol]
    if series.style == "marks":
        mark = {"marker": symbol, "markersize": 8, "markeredgecolor": "white"}
        return {"color": series.color, "linestyle": "none", **mark}
    if series.style == "marked line":
        return {"color": series.color, "marker": symbol, "markersize": 6, "linewidth": 1.2}
    if series.style == "open marks":
        mark = {"marker": symbol, "markersize": 4, "markerfacecolor": "none"}
        return {"color": series.color, "linestyle": "none", **mark}
    if series.style == "steps":
        return {"color": series.color, "drawstyle": "steps-mid"}
    return {"color": series.color, "linestyle": LINES[series.style], "linewidth": 1.2}


def _name(axes: Axes, entries: dict[str, Artist]) -> None:
    """The legend. Names are set last and as they are: they may look like mathematics or like hidden artists."""
    legend = axes.legend(list(entries.values()), ["-"] * len(entries), fontsize="small")
    for text, name in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
