"""Figures of entropies: recovered against true, and by position and layer."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import plotly.graph_objects as go

from bae_lens.plots import COLOURS, LAYOUT
from bae_lens.recovery import Recovery

FAINTEST = 0.15  # opacity of a point that reconstructs nothing


def recovered_entropy(recipes: Mapping[str, Sequence[Recovery]]) -> go.Figure:
    """Estimated against true bits, fainter the worse the reconstruction; the line is where they agree (Fig. 2)."""
    figure = go.Figure()
    most = max(max(row.bits, row.true_bits) for rows in recipes.values() for row in rows)
    figure.add_scatter(x=[1, most], y=[1, most], mode="lines", line={"color": "grey", "dash": "dot"}, name="exact")
    for (name, rows), colour in zip(recipes.items(), cycle(COLOURS), strict=False):
        figure.add_scatter(
            x=[row.true_bits for row in rows],
            y=[row.bits for row in rows],
            name=name,
            mode="markers",
            marker={"color": colour, "size": 11, "opacity": [opacity(1 - row.fvu) for row in rows]},
            text=[f"{row.d_sae} features, FVU {row.fvu:.2g}" for row in rows],
        )
    figure.update_layout(**LAYOUT, xaxis_title="true entropy (bits)", yaxis_title="estimated entropy (bits)")
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    return figure


def opacity(explained_variance: float) -> float:
    """1 for a perfect reconstruction, `FAINTEST` for none."""
    return max(FAINTEST, min(1.0, explained_variance))
