"""Figures of a comparison for a page, and what they show: the pictures show the same."""

from html import escape
from itertools import cycle
from typing import Any

import numpy as np
import plotly.graph_objects as go

from bae_lens.comparison.results import Comparison, DictionaryResult
from bae_lens.evaluation.metrics import DictionaryMetrics
from bae_lens.functional.rate_distortion import RatePoint

COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288", "#999933", "#44AA99"
)  # fmt: skip
GRAY = "#767676"
RATE_BINS = np.linspace(-5, 0, 21)  # log10 of the firing rate
AXES = {
    "bits": "bits per token",
    "explained variance": "explained variance (1 is perfect)",
    "L0": "informative L0 (features per token)",
    "rate": "log10 of the firing rate (share of tokens)",
    "features": "features",
}


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


def coded(metrics: DictionaryMetrics) -> RatePoint:
    """A dictionary's point with its values quantized as the table counts them; a binary code has none."""
    if not metrics.value_curve:
        return RatePoint(metrics.bits, metrics.explained_variance)
    return min(metrics.value_curve, key=lambda point: abs(point.bits - metrics.bits))


def window(dictionaries: list[DictionaryResult]) -> tuple[float, float]:
    """Most bits and least explained variance to show: all dictionaries, not the far ends of the other curves."""
    points = [coded(run.metrics) for dictionary in dictionaries for run in dictionary.runs]
    curves = [point.bits for dictionary in dictionaries for run in dictionary.runs for point in run.metrics.value_curve]
    most = max([*curves, *(1.5 * point.bits for point in points), 1.0])
    return 1.02 * most, min(point.explained_variance for point in points) - 0.1


def rate_histogram(dictionary: DictionaryResult) -> tuple[list[float], list[int]]:
    """Middles of the bins of `RATE_BINS`, and features that fire so often with the first seed; those that never do are
    in no bin.
    """
    rates = np.array(dictionary.runs[0].metrics.code.firing_rates)
    counts, _ = np.histogram(np.log10(rates[rates > 0]).clip(RATE_BINS[0]), RATE_BINS)
    return ((RATE_BINS[1:] + RATE_BINS[:-1]) / 2).tolist(), counts.tolist()


def quality_by_bits(comparison: Comparison, hook: str) -> go.Figure:
    """Explained variance of the dictionaries that write at `hook` against bits per token.

    A dictionary with real values is a curve over quantization steps, marked where the table counts its bits, a binary
    one is a mark, one for each seed. At the comparison's own hook, what PCA with scalar quantization needs and what no
    code could do better for Gaussian activations.
    """
    figure, dictionaries = go.Figure(), by_hook(comparison)[hook]
    if hook == comparison.experiment.hook_name:
        _add_reference(figure, "PCA, quantized", comparison.pca, "dash")
        _add_reference(figure, "Gaussian bound", comparison.gaussian_bound, "dot")
    for dictionary in dictionaries:
        color = colors(comparison)[dictionary.name]
        lines = [point for run in dictionary.runs for point in [*run.metrics.value_curve, (None, None)]]
        if any(run.metrics.value_curve for run in dictionary.runs):
            x, y = zip(*lines, strict=True)
            figure.add_scatter(
                x=x, y=y, **_group(dictionary, False), mode="lines", line={"color": color, "width": 1.5},
                hoverinfo="skip",
            )  # fmt: skip
        points = [coded(run.metrics) for run in dictionary.runs]
        _add_runs(figure, dictionary, color, [point.bits for point in points], points, "%{x:.0f} bits")
    most_bits, least = window(dictionaries)
    lay_out(figure, AXES["bits"], AXES["explained variance"])
    return figure.update_xaxes(range=[0, most_bits]).update_yaxes(range=[least, 1.02])


def quality_by_l0(comparison: Comparison, hook: str) -> go.Figure:
    """Explained variance of the dictionaries that write at `hook` against informative L0, values not quantized.

    What was tried and measured on the tuning documents is small and open. A line marks the L0 that was asked for.
    """
    figure = go.Figure()
    for dictionary in by_hook(comparison)[hook]:
        color = colors(comparison)[dictionary.name]
        if dictionary.trials:
            figure.add_scatter(
                x=[trial.informative_l0 for trial in dictionary.trials],
                y=[trial.explained_variance for trial in dictionary.trials],
                **_group(dictionary, False),
                mode="markers",
                marker={"color": color, "size": 7, "symbol": f"{_symbol(dictionary)}-open"},
                hovertemplate="L0 %{x:.1f}, explained variance %{y:.3f}<extra>%{fullData.name}, tried</extra>",
            )
        points = [RatePoint(run.metrics.bits, run.metrics.explained_variance) for run in dictionary.runs]
        l0s = [run.metrics.code.informative_l0 for run in dictionary.runs]
        _add_runs(figure, dictionary, color, l0s, points, "L0 %{x:.1f}")
    if comparison.experiment.l0 is not None:
        line = {"color": GRAY, "dash": "dot", "width": 1}
        figure.add_vline(comparison.experiment.l0, line=line, name="L0 asked for", showlegend=True)
    lay_out(figure, AXES["L0"], AXES["explained variance"])
    return figure.update_xaxes(rangemode="tozero")


def firing_frequencies(comparison: Comparison) -> go.Figure:
    """How often features fire: features by log10 of their firing rate on held-out tokens (Fig. 4 of the paper)."""
    figure = go.Figure()
    for dictionary in comparison.dictionaries:
        rates, counts = rate_histogram(dictionary)
        never = dictionary.runs[0].metrics.code.dead
        figure.add_scatter(
            x=rates,
            y=counts,
            name=f"{escape(dictionary.name)} ({never} never fire)",
            mode="lines",
            line={"color": colors(comparison)[dictionary.name], "shape": "hvh"},
            hovertemplate="%{y} features about 10<sup>%{x:.2f}</sup><extra>%{fullData.name}</extra>",
        )
    return lay_out(figure, AXES["rate"], AXES["features"])


def training_curves(comparison: Comparison, quantity: str, title: str) -> go.Figure:
    """One quantity of the first seed's curves by training step; losses are on standardized activations."""
    figure = go.Figure()
    for dictionary in comparison.dictionaries:
        curve = [point for point in dictionary.runs[0].curve if quantity in point]
        figure.add_scatter(
            x=[point["step"] for point in curve],
            y=[point[quantity] for point in curve],
            name=escape(dictionary.name),
            mode="lines",
            line={"color": colors(comparison)[dictionary.name], "width": 1.5},
            hovertemplate="step %{x}: %{y:.3g}<extra>%{fullData.name}</extra>",
        )
    return lay_out(figure, "training step", title).update_yaxes(type="log", exponentformat="power")


def _add_reference(figure: go.Figure, name: str, curve: list[RatePoint], dash: str) -> None:
    figure.add_scatter(
        x=[point.bits for point in curve],
        y=[point.explained_variance for point in curve],
        name=name,
        mode="lines",
        line={"color": GRAY, "dash": dash, "width": 1.5},
        hovertemplate="%{x:.0f} bits, explained variance %{y:.3f}<extra>%{fullData.name}</extra>",
    )


def _add_runs(
    figure: go.Figure, dictionary: DictionaryResult, color: str, x: list[float], points: list[RatePoint], hover: str
) -> None:
    figure.add_scatter(
        x=x,
        y=[point.explained_variance for point in points],
        **_group(dictionary, True),
        mode="markers",
        marker={"color": color, "size": 11, "symbol": _symbol(dictionary), "line": {"color": "white", "width": 1}},
        text=[f"seed {run.seed}" for run in dictionary.runs],
        hovertemplate=hover + ", explained variance %{y:.3f}<extra>%{fullData.name}, %{text}</extra>",
    )


def _group(dictionary: DictionaryResult, in_legend: bool) -> dict[str, str | bool]:
    """Traces of a dictionary are shown and hidden together, by their one entry in the legend."""
    return {"name": escape(dictionary.name), "legendgroup": dictionary.name, "showlegend": in_legend}


def _symbol(dictionary: DictionaryResult) -> str:
    return "circle" if dictionary.runs[0].metrics.value_curve else "diamond"


def lay_out(figure: go.Figure, x_title: str, y_title: str) -> go.Figure:
    """The look of all figures; the legend above, with room for as many lines as it may take."""
    traces: Any = figure.data
    entries = sum(trace.showlegend is not False for trace in traces)
    return figure.update_layout(
        template="plotly_white",
        margin={"l": 60, "r": 15, "t": 20, "b": 50},
        height=380 + 12 * entries,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "xanchor": "left"},
        showlegend=True,
        xaxis_title=x_title,
        yaxis_title=y_title,
    )
