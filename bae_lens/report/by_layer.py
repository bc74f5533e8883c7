"""Comparisons at several hooks as one HTML page: what dictionaries do, layer by layer."""

from collections.abc import Callable
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from urllib.parse import quote

from bae_lens.activations.hook_names import layer_hook
from bae_lens.comparison.hook_results import HOOK_TABLE, HookComparisons, HookRow
from bae_lens.comparison.hooks import HOOKS_FOLDER
from bae_lens.report.card import without_folders
from bae_lens.report.explanations import EXPLANATIONS
from bae_lens.report.figures import draw
from bae_lens.report.html import embed, render
from bae_lens.report.page import HELP_EXPLANATIONS, REPORT_FILE
from bae_lens.report.series import COLORS, Chart, Series
from bae_lens.storage import write_text

MOST_TICKS = 12  # layers that an axis can name
PLACES = {
    "hook_resid_pre": "Residual stream before the layer",
    "hook_in": "Residual stream before the layer",
    "hook_resid_mid": "Residual stream between attention and MLP",
    "hook_resid_post": "Residual stream after the layer",
    "hook_out": "Residual stream after the layer",
    "hook_attn_out": "Output of attention",
    "attn.hook_out": "Output of attention",
    "attn.hook_z": "Attention heads",
    "mlp.hook_in": "Input of the MLP",
    "mlp.hook_post": "Inside the MLP",
    "hook_mlp_out": "Output of the MLP",
    "mlp.hook_out": "Output of the MLP",
}
MEASURES: dict[str, Callable[[HookRow], float | None]] = {
    "explained variance": lambda row: row.explained_variance,
    "CE recovered": lambda row: row.ce_recovered,
    "support bits": lambda row: row.support_bits,
    "value bits": lambda row: None if row.is_binary else row.value_bits,
    "joint bits": lambda row: row.joint_bits,
    "Feature Activated": lambda row: float(row.feature_activated),
    "dead": lambda row: float(row.dead),
    "dense": lambda row: float(row.dense),
}
"""What is drawn, by the heading of its column; None where there is nothing to draw."""
SHARES, COUNTS = ("explained variance", "CE recovered"), ("Feature Activated", "dead", "dense")
OWN_EXPLANATIONS = {
    "hook": "Of the comparison, with a link to its report.",
    "joint bits": HELP_EXPLANATIONS["joint bits"],
}


def write_layer_report(result: HookComparisons, folder: Path) -> Path:
    """Writes `report.html`, with its scripts inlined and links to the reports of all hooks, and returns its path."""
    charts = layer_charts(result)
    html = render(
        "by_layer",
        result=result,
        model=without_folders(str(result.experiment.model)),
        dataset=without_folders(result.experiment.dataset),
        colors=_colors(result),
        table=HOOK_TABLE,
        rows=list(result.by_dictionary.values()),
        explanations={heading: {**EXPLANATIONS, **OWN_EXPLANATIONS}[heading] for heading in HOOK_TABLE},
        reports={hook: f"{HOOKS_FOLDER}/{quote(hook)}/{REPORT_FILE}" for hook in result.hook_names},
        figures={
            measure: {place: embed(draw(chart), f"{i}-{j}") for j, (place, chart) in enumerate(panels.items())}
            for i, (measure, panels) in enumerate(charts.items())
        },
        places=PLACES,
        n_places=max(map(len, charts.values())),
        settings=_settings(result),
    )
    write_text(folder / REPORT_FILE, html)
    return folder / REPORT_FILE


def _settings(result: HookComparisons) -> dict[str, Any]:
    """What was asked for, without folders of this machine."""
    experiment = asdict(result.experiment)
    del experiment["hook_name"]
    names = {key: without_folders(str(experiment[key])) for key in ("model", "dataset")}
    return {**experiment, **names, "hook_names": result.hook_names}


def layer_charts(result: HookComparisons) -> dict[str, dict[str, Chart]]:
    """A chart over layers for each measure and each place in a layer where dictionaries write.

    Places are apart because what is explained and recovered at different ones cannot be compared.
    """
    places = list(dict.fromkeys(map(_place, result.rows)))
    charts = {
        measure: {place: _chart(result, measure, place) for place in places if _values(result, measure, place)}
        for measure in MEASURES
    }
    return {measure: panels for measure, panels in charts.items() if panels}


def _place(row: HookRow) -> str:
    """Where in its layer, or elsewhere, a dictionary writes."""
    at = layer_hook(row.hook_name_out)
    return row.hook_name_out if at is None else at.kind


def _layer(row: HookRow) -> int:
    at = layer_hook(row.comparison_hook)
    assert at is not None
    return at.layer


def _values(result: HookComparisons, measure: str, place: str) -> dict[str, list[tuple[int, list[float]]]]:
    """By dictionary, each of its layers from the first with what was measured there, by seed."""
    found: dict[str, list[tuple[int, list[float]]]] = {}
    for (_, name), rows in result.by_dictionary.items():
        known = [value for row in rows if (value := MEASURES[measure](row)) is not None]
        if _place(rows[0]) == place and len(known) == len(rows):
            found.setdefault(name, []).append((_layer(rows[0]), known))
    return {name: sorted(points) for name, points in found.items()}


def _chart(result: HookComparisons, measure: str, place: str) -> Chart:
    values, colors = _values(result, measure, place), _colors(result)
    binary = {row.dictionary for row in result.rows if row.is_binary}
    layers = sorted({float(layer) for points in values.values() for layer, _ in points})
    series = [
        Series(
            name,
            [(float(layer), mean(at_layer)) for layer, at_layer in points],
            colors[name],
            "marked line",
            "diamond" if name in binary else "circle",
            intervals=[_spread(at_layer) for _, at_layer in points] if len(result.experiment.seeds) > 1 else [],
        )
        for name, points in values.items()
    ]
    hover = f"layer %{{x:.0f}}: {measure} %{{y:{'.3f' if measure in SHARES else ',.0f'}}}"
    top = 1.1 * max(1.0, *(max(at_layer) for points in values.values() for _, at_layer in points))
    return Chart(
        "layer",
        measure,
        hover,
        series,
        y_range=(-0.04 * top, top) if measure in COUNTS else None,
        x_ticks=layers if len(layers) <= MOST_TICKS else [],
    )


def _spread(values: list[float]) -> tuple[float, float]:
    """A standard deviation to both sides of the mean; none of a pretrained dictionary, which has one seed."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return mean(values) - deviation, mean(values) + deviation


def _colors(result: HookComparisons) -> dict[str, str]:
    names = dict.fromkeys(row.dictionary for row in result.rows)
    return dict(zip(names, cycle(COLORS), strict=False))
