"""Figures of a comparison."""

from itertools import cycle

import numpy as np
import plotly.graph_objects as go
from plotly.colors import qualitative

from bae_lens.results import Comparison

COLOURS = qualitative.Safe
RATE_BINS = np.linspace(-5, 0, 41)  # log10 of the firing rate
LAYOUT = {
    "template": "plotly_white",
    "margin": {"l": 60, "r": 20, "t": 60, "b": 50},
    "height": 400,
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02},
}


def firing_frequencies(comparison: Comparison) -> go.Figure:
    """How often features fire: features by log10 of their firing rate on held-out tokens (Fig. 4 of the paper)."""
    figure = go.Figure()
    for dictionary, colour in zip(comparison.dictionaries, cycle(COLOURS), strict=False):
        rates = np.array(dictionary.runs[0].metrics.code.firing_rates)
        counts, _ = np.histogram(np.log10(rates[rates > 0]).clip(RATE_BINS[0]), RATE_BINS)
        never = f" ({dictionary.runs[0].metrics.code.never_on} never fire)"
        figure.add_scatter(
            x=(RATE_BINS[1:] + RATE_BINS[:-1]) / 2, y=counts, name=dictionary.name + never, line={"color": colour}
        )
    figure.update_layout(**LAYOUT, xaxis_title="log10 of the firing rate", yaxis_title="features")
    return figure


def training_curves(comparison: Comparison, quantity: str, title: str) -> go.Figure:
    """One quantity of the curves by training step; losses are on standardised activations."""
    figure = go.Figure()
    for dictionary, colour in zip(comparison.dictionaries, cycle(COLOURS), strict=False):
        figure.add_scatter(
            x=[point["step"] for point in dictionary.runs[0].curve],
            y=[point[quantity] for point in dictionary.runs[0].curve],
            name=dictionary.name,
            line={"color": colour},
        )
    figure.update_layout(**LAYOUT, xaxis_title="training step", yaxis_title=title)
    figure.update_yaxes(type="log")
    return figure


def quality_by_bits(comparison: Comparison) -> go.Figure:
    """Explained variance against the bits it takes to say which features fire; values of real codes come on top."""
    figure = go.Figure()
    for dictionary, colour in zip(comparison.dictionaries, cycle(COLOURS), strict=False):
        figure.add_scatter(
            x=[dictionary.runs[0].metrics.bits],
            y=[dictionary.runs[0].metrics.explained_variance],
            name=dictionary.name,
            mode="markers",
            marker={"color": colour, "size": 14},
        )
    figure.update_layout(**LAYOUT, xaxis_title="support bits per token", yaxis_title="explained variance")
    figure.update_xaxes(rangemode="tozero")
    return figure
