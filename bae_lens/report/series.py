"""What the figures of a comparison show, as plain numbers: `figures` draws them for a page, `png` as pictures."""

from dataclasses import dataclass, field
from itertools import cycle
from typing import Literal

from bae_lens.comparison.results import OPTIMIZED, REFITTED, Comparison, DictionaryResult, codes_of
from bae_lens.evaluation.metrics import RATE_BINS, rate_histogram
from bae_lens.functional.rate_distortion import RatePoint

COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288", "#999933", "#44AA99"
)  # fmt: skip
GRAY = "#767676"
EXPLAINED_VARIANCE = "explained variance (1 is perfect)"

Point = tuple[float | None, float | None]


@dataclass(frozen=True)
class Series:
    """Points that belong together."""

    name: str
    """In the legend; what has the same name is shown and hidden together."""
    points: list[Point]
    """None for both begins a new line."""
    color: str
    """As CSS writes it."""
    style: Literal["line", "dashed", "dotted", "steps", "marks", "open marks", "marked line"] = "line"
    """How the points are drawn."""
    symbol: Literal["circle", "diamond"] = "circle"
    """Of marks."""
    notes: list[str] = field(default_factory=list)
    """On each point."""
    in_legend: bool = True
    """Whether the legend has an entry for it."""
    intervals: list[tuple[float, float]] = field(default_factory=list)
    """Of each point, from where to where its error bar goes: of y, or of x if `along_x`."""
    along_x: bool = False
    """Whether the error bars are horizontal."""
    opacities: list[float] = field(default_factory=list)
    """Of each mark, between 0 and 1; by default 1."""
    hollow: list[bool] = field(default_factory=list)
    """Whether each mark is only an outline; by default none is."""


@dataclass(frozen=True)
class Chart:
    """A figure's series and axes."""

    x_title: str
    """Under the horizontal axis."""
    y_title: str
    """Beside the vertical axis."""
    hover: str
    """What a page says of a point, in plotly's template."""
    series: list[Series]
    x_range: tuple[float, float] | None = None
    """By default what the series take."""
    y_range: tuple[float, float] | None = None
    """Likewise."""
    log_y: bool = False
    """Whether the vertical axis is logarithmic."""
    log_x: bool = False
    """Whether the horizontal one is."""
    x_ticks: list[float] = field(default_factory=list)
    """Where it is labeled; by default wherever suits."""
    asked_l0: float | None = None
    """Where a line marks the L0 that was asked for."""


def colors(comparison: Comparison) -> dict[str, str]:
    """A color for each dictionary, the same in every figure."""
    return dict(zip((dictionary.name for dictionary in comparison.dictionaries), cycle(COLORS), strict=False))


def by_hook(comparison: Comparison) -> dict[str, list[DictionaryResult]]:
    """Dictionaries by the hook at which they write, those of the comparison's hook first.

    Each hook has a figure of its own, because explained variance at different hooks is not comparable.
    """
    hooks = dict.fromkeys(dictionary.hook_name_out for dictionary in comparison.dictionaries)
    ordered = sorted(hooks, key=lambda hook: hook != comparison.experiment.hook_name)
    return {hook: [d for d in comparison.dictionaries if d.hook_name_out == hook] for hook in ordered}


def window(dictionaries: list[DictionaryResult]) -> tuple[float, float]:
    """Most bits and least explained variance to show: all dictionaries, not the far ends of the other curves."""
    points = [run.metrics.coded for dictionary in dictionaries for run in dictionary.runs]
    curves = [point.bits for dictionary in dictionaries for run in dictionary.runs for point in run.metrics.value_curve]
    most = max([*curves, *(1.5 * point.bits for point in points), 1.0])
    return 1.02 * most, min(point.explained_variance for point in points) - 0.1


def histogram_of_rates(dictionary: DictionaryResult) -> list[Point]:
    """Middles of the bins of `RATE_BINS`, and features that fire so often with the first seed; those that never do are
    in no bin.
    """
    counts = rate_histogram(dictionary.runs[0].metrics.code.firing_rates)
    return list(zip(((RATE_BINS[1:] + RATE_BINS[:-1]) / 2).tolist(), map(float, counts), strict=True))


def quality_by_bits(comparison: Comparison, hook: str) -> Chart:
    """Explained variance of the dictionaries that write at `hook` against bits per token.

    A dictionary with real values is a curve over quantization steps, marked where the table counts its bits, a binary
    one is a mark, one for each seed. At the comparison's own hook, what PCA with scalar quantization needs, what no
    code could do better for Gaussian activations, and what signs alone explain.
    """
    dictionaries, series = by_hook(comparison)[hook], _references(comparison, hook)
    for dictionary in dictionaries:
        if not dictionary.is_binary:
            lines = [point for run in dictionary.runs for point in [*_points(run.metrics.value_curve), (None, None)]]
            series.append(Series(dictionary.name, lines, colors(comparison)[dictionary.name], in_legend=False))
        series.append(_runs(comparison, dictionary, _points([run.metrics.coded for run in dictionary.runs])))
    most_bits, least = window(dictionaries)
    return Chart(
        f"bits per {comparison.experiment.unit}",
        EXPLAINED_VARIANCE,
        "%{x:.0f} bits, explained variance %{y:.3f}",
        series,
        x_range=(0.0, most_bits),
        y_range=(least, 1.02),
    )


def quality_with_help(comparison: Comparison, hook: str) -> Chart:
    """The same with every help: codes chosen for the decoders, features coded jointly.

    A dictionary with real values has two curves, dashed that of its encoder's features with the best values.
    """
    dictionaries, series = by_hook(comparison)[hook], _references(comparison, hook)
    marks, curves = [], []
    styles: dict[str, Literal["dashed", "line"]] = {REFITTED: "dashed", OPTIMIZED: "line"}
    for dictionary in dictionaries:
        color = colors(comparison)[dictionary.name]
        for name, style in styles.items():
            codes = codes_of(dictionary).get(name, [])
            lines = [point for code in codes for point in [*_points(code.joint_value_curve), (None, None)]]
            if lines and not dictionary.is_binary:
                series.append(Series(dictionary.name, lines, color, style, in_legend=False))
            curves += [point.bits for code in codes for point in code.joint_value_curve]
        coded = [code.jointly_coded for code in codes_of(dictionary).get(OPTIMIZED, [])]
        series.append(_runs(comparison, dictionary, _points(coded)))
        marks += coded
    return Chart(
        f"bits per {comparison.experiment.unit}, features coded jointly",
        EXPLAINED_VARIANCE,
        "%{x:.0f} bits, explained variance %{y:.3f}",
        series,
        x_range=(0.0, 1.02 * max([*curves, *(1.5 * point.bits for point in marks), 1.0])),
        y_range=(min((point.explained_variance for point in marks), default=0.0) - 0.1, 1.02),
    )


def _references(comparison: Comparison, hook: str) -> list[Series]:
    """What needs no dictionary, at the comparison's own hook."""
    if hook != comparison.experiment.hook_name:
        return []
    references = [
        Series("PCA, quantized", _points(comparison.pca), GRAY, "dashed"),
        Series("Gaussian bound", _points(comparison.gaussian_bound), GRAY, "dotted"),
        Series("signs", _points(comparison.sign_coding), GRAY, "line"),
        Series("random features", _points(comparison.random_coding), GRAY, "marked line", "diamond"),
    ]
    return [reference for reference in references if reference.points]


def quality_by_l0(comparison: Comparison, hook: str) -> Chart:
    """Explained variance of the dictionaries that write at `hook` against informative L0, values not quantized.

    What was tried and measured on the tuning documents is small and open. A line marks the L0 that was asked for.
    """
    series = []
    for dictionary in by_hook(comparison)[hook]:
        runs = _runs(
            comparison,
            dictionary,
            [(run.metrics.code.informative_l0, run.metrics.explained_variance) for run in dictionary.runs],
        )
        if dictionary.trials:
            tried: list[Point] = [(trial.informative_l0, trial.explained_variance) for trial in dictionary.trials]
            notes = ["tried"] * len(tried)
            series.append(Series(dictionary.name, tried, runs.color, "open marks", runs.symbol, notes, in_legend=False))
        series.append(runs)
    return Chart(
        f"informative L0 (features per {comparison.experiment.unit})",
        EXPLAINED_VARIANCE,
        "L0 %{x:.1f}, explained variance %{y:.3f}",
        series,
        asked_l0=comparison.experiment.l0,
    )


def firing_frequencies(comparison: Comparison) -> Chart:
    """How often features fire: features by log10 of their firing rate on held-out tokens (Fig. 4 of the paper)."""
    return Chart(
        f"log10 of the firing rate (share of {comparison.experiment.unit}s)",
        "features",
        "%{y} features about 10<sup>%{x:.2f}</sup>",
        [
            Series(
                f"{dictionary.name} ({dictionary.runs[0].metrics.code.dead} never fire)",
                histogram_of_rates(dictionary),
                colors(comparison)[dictionary.name],
                "steps",
            )
            for dictionary in comparison.dictionaries
        ],
    )


def training_curves(comparison: Comparison, quantity: str, title: str) -> Chart:
    """One quantity of the first seed's curves by training step; losses are on standardized activations."""
    return Chart(
        "training step",
        title,
        "step %{x}: %{y:.3g}",
        [
            Series(
                dictionary.name,
                _steps(dictionary, quantity),
                colors(comparison)[dictionary.name],
            )
            for dictionary in comparison.dictionaries
            if dictionary.pretrained is None
        ],
        log_y=True,
    )


def _runs(comparison: Comparison, dictionary: DictionaryResult, points: list[Point]) -> Series:
    """A mark for each seed, by whose form binary dictionaries are told from the others."""
    symbol = "diamond" if dictionary.is_binary else "circle"
    notes = [f"seed {run.seed}" if dictionary.pretrained is None else "pretrained" for run in dictionary.runs]
    return Series(dictionary.name, points, colors(comparison)[dictionary.name], "marks", symbol, notes)


def _steps(dictionary: DictionaryResult, quantity: str) -> list[Point]:
    curve = dictionary.runs[0].curve
    return [(float(point["step"]), float(point[quantity])) for point in curve if quantity in point]


def _points(curve: list[RatePoint]) -> list[Point]:
    return [(point.bits, point.explained_variance) for point in curve]
