"""Figures of entropies: recovered against true, and by position and layer."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import plotly.graph_objects as go

from bae_lens.entropy.recovery import Recovery
from bae_lens.entropy.results import CurvePoint, EntropyDynamics
from bae_lens.report.figures import lay_out
from bae_lens.report.series import COLORS

FAINTEST = 0.15  # opacity of a point that reconstructs nothing


def recovered_entropy(recipes: Mapping[str, Sequence[Recovery]]) -> go.Figure:
    """Estimated against true bits, fainter the worse the reconstruction; the line is where they agree (Fig. 2)."""
    figure = go.Figure()
    most = max(max(row.bits, row.true_bits) for rows in recipes.values() for row in rows)
    figure.add_scatter(x=[1, most], y=[1, most], mode="lines", line={"color": "gray", "dash": "dot"}, name="exact")
    for (name, rows), color in zip(recipes.items(), cycle(COLORS), strict=False):
        figure.add_scatter(
            x=[row.true_bits for row in rows],
            y=[row.bits for row in rows],
            name=name,
            mode="markers",
            marker={"color": color, "size": 11, "opacity": [opacity(1 - row.fvu) for row in rows]},
            text=[f"{row.d_sae} features, FVU {row.fvu:.2g}" for row in rows],
        )
    lay_out(figure, "true entropy (bits)", "estimated entropy (bits)")
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    return figure


def entropy_by_position(dynamics: EntropyDynamics, explained_variance: float | None = None) -> go.Figure:
    """Corrected bits by position, a curve a hook, fainter the worse the reconstruction; saturations dashed (Fig. 3).

    Dotted in the same color is what the bits are at most jointly, and in gray the logarithm of the number of distinct
    tokens, which the entropy cannot exceed at position 1. With an explained variance, bits are what that would take;
    positions where the coefficients tried do not reach it are left out.
    """
    figure = go.Figure()
    saturations = {s.hook_name: s for s in dynamics.saturations(explained_variance)}
    for hook_name, color in zip(dynamics.hook_names, cycle(COLORS), strict=False):
        points = dynamics.curve(hook_name, explained_variance)
        figure.add_scatter(
            x=[point.position for point in points],
            y=[point.bits for point in points],
            name=hook_name,
            legendgroup=hook_name,
            mode="lines+markers",
            line={"color": color},
            marker={"size": 10, "opacity": [opacity(point.explained_variance) for point in points]},
            text=[f"explained variance {point.explained_variance:.2f}" for point in points],
            error_y=_error_bars(points),
        )
        figure.add_scatter(
            x=[point.position for point in points],
            y=[point.joint_bits_bound for point in points],
            name=f"{hook_name}, at most jointly",
            legendgroup=hook_name,
            showlegend=False,
            mode="lines",
            line={"color": color, "dash": "dot", "width": 1},
        )
        if hook_name in saturations:
            figure.add_hline(y=saturations[hook_name].level, line={"color": color, "dash": "dash", "width": 1})
    figure.add_scatter(
        x=dynamics.positions,
        y=[math.log2(n) for n in dynamics.distinct_tokens],
        name="log2 of distinct tokens",
        mode="lines",
        line={"color": "gray", "dash": "dot", "width": 1},
    )
    at = "" if explained_variance is None else f" at explained variance {explained_variance}"
    lay_out(figure, "position", f"entropy (bits){at}")
    figure.update_xaxes(type="log", tickvals=dynamics.positions)
    return figure


def _error_bars(points: Sequence[CurvePoint]) -> dict[str, Any]:
    above = [point.interval[1] - point.bits for point in points]
    below = [point.bits - point.interval[0] for point in points]
    return {"type": "data", "array": above, "arrayminus": below, "width": 2}


def opacity(explained_variance: float) -> float:
    """1 for a perfect reconstruction, `FAINTEST` for none."""
    return max(FAINTEST, min(1.0, explained_variance))
