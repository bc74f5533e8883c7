"""Pictures of a comparison as PNG files: what `plots` shows, for where a page cannot go."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bae_lens.comparison.results import Comparison, DictionaryResult
from bae_lens.report.figures import AXES, GRAY, by_hook, coded, colors, rate_histogram, window

PICTURES_FOLDER = "pictures"
PANEL = (6.0, 4.8)  # inches
DOTS_PER_INCH = 150


def write_pictures(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes `folder/pictures/*.png` and returns their paths; the same comparison gives the same bytes."""
    home = folder / PICTURES_FOLDER
    home.mkdir(parents=True, exist_ok=True)
    pictures = {
        "explained_variance_by_bits": _panels(comparison, _quality_by_bits),
        "explained_variance_by_l0": _panels(comparison, _quality_by_l0),
        "firing_frequencies": _firing_frequencies(comparison),
    }
    return [_save(figure, home / f"{name}.png") for name, figure in pictures.items()]


def _panels(comparison: Comparison, draw: Callable[[Axes, Comparison, str], dict[str, Artist]]) -> Figure:
    """A panel for each hook at which dictionaries write, side by side."""
    hooks = by_hook(comparison)
    figure = Figure((PANEL[0] * len(hooks), PANEL[1]), layout="constrained")
    for axes, hook in zip(figure.subplots(1, len(hooks), squeeze=False)[0], hooks, strict=True):
        entries = draw(axes, comparison, hook)
        axes.set_ylabel(AXES["explained variance"])
        axes.set_title(f"at {hook}", fontsize="medium", parse_math=False)
        _finish(axes, entries)
    return figure


def _quality_by_bits(axes: Axes, comparison: Comparison, hook: str) -> dict[str, Artist]:
    """As `plots.quality_by_bits`."""
    entries: dict[str, Artist] = {}
    if hook == comparison.experiment.hook_name:
        for name, curve, style in (
            ("PCA, quantized", comparison.pca, "--"),
            ("Gaussian bound", comparison.gaussian_bound, ":"),
        ):
            (entries[name],) = axes.plot(*_transposed(curve), style, color=GRAY, linewidth=1.2)
    for dictionary in by_hook(comparison)[hook]:
        color = colors(comparison)[dictionary.name]
        for run in dictionary.runs:
            axes.plot(*_transposed(run.metrics.value_curve), color=color, linewidth=1)
        points = _transposed([coded(run.metrics) for run in dictionary.runs])
        entries[dictionary.name] = _mark(axes, *points, dictionary, color)
    most_bits, least = window(by_hook(comparison)[hook])
    axes.set(xlabel=AXES["bits"], xlim=(0, most_bits), ylim=(least, 1.02))
    return entries


def _quality_by_l0(axes: Axes, comparison: Comparison, hook: str) -> dict[str, Artist]:
    """As `plots.quality_by_l0`."""
    entries: dict[str, Artist] = {}
    for dictionary in by_hook(comparison)[hook]:
        color = colors(comparison)[dictionary.name]
        tried = [(trial.informative_l0, trial.explained_variance) for trial in dictionary.trials]
        axes.plot(*_transposed(tried), _symbol(dictionary), color=color, markerfacecolor="none", markersize=4)
        points = [(run.metrics.code.informative_l0, run.metrics.explained_variance) for run in dictionary.runs]
        entries[dictionary.name] = _mark(axes, *_transposed(points), dictionary, color)
    if comparison.experiment.l0 is not None:
        entries["L0 asked for"] = axes.axvline(comparison.experiment.l0, color=GRAY, linestyle=":", linewidth=1)
    axes.set_xlabel(AXES["L0"])
    axes.set_xlim(left=0)
    return entries


def _firing_frequencies(comparison: Comparison) -> Figure:
    """As `plots.firing_frequencies`."""
    figure = Figure(PANEL, layout="constrained")
    axes, entries = figure.subplots(), {}
    for dictionary in comparison.dictionaries:
        name = f"{dictionary.name} ({dictionary.runs[0].metrics.code.dead} never fire)"
        color = colors(comparison)[dictionary.name]
        (entries[name],) = axes.step(*rate_histogram(dictionary), where="mid", color=color)
    axes.set(xlabel=AXES["rate"], ylabel=AXES["features"])
    _finish(axes, entries)
    return figure


def _mark(axes: Axes, x: list[float], y: list[float], dictionary: DictionaryResult, color: str) -> Artist:
    style = {"color": color, "markersize": 8, "markeredgecolor": "white", "linestyle": "none"}
    return axes.plot(x, y, marker=_symbol(dictionary), **style)[0]


def _symbol(dictionary: DictionaryResult) -> str:
    return "o" if dictionary.runs[0].metrics.value_curve else "D"


def _transposed(points: Sequence[tuple[float, ...]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _finish(axes: Axes, entries: dict[str, Artist]) -> None:
    """Grid and legend. Names are set last and as they are: they may look like mathematics or like hidden artists."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(list(entries.values()), ["-"] * len(entries), fontsize="small")
    for text, name in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def _save(figure: Figure, path: Path) -> Path:
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    os.replace(partial, path)
    return path
