"""Figures of a ComSem report."""

from itertools import cycle

import plotly.graph_objects as go

from bae_lens.comsem.firing_rates import bin_edges
from bae_lens.comsem.results import ComSemReport
from bae_lens.comsem.table1 import Table1
from bae_lens.report.figures import lay_out
from bae_lens.report.series import COLORS


def table1_shares(table: Table1) -> go.Figure:
    """Table 1 as shares of each dictionary's features, with intervals; scores of chosen features as shares of those."""
    rows = [row for row in table.rows if row.d_sae]
    names = [row.name + table.mark for row in rows]
    figure = go.Figure()
    figure.add_bar(x=names, y=[row.feature_activated / row.d_sae for row in rows], name="Feature Activated")
    for title, share, interval in (
        ("score > 0", "share_above_zero", "above_zero_interval"),
        ("score = 1", "share_perfect", "perfect_interval"),
    ):
        scale = [1.0 if table.chosen else row.scoreable / row.d_sae for row in rows]
        at = [(getattr(row, share) or 0.0) * of_all for row, of_all in zip(rows, scale, strict=True)]
        bounds = [
            tuple(bound * of_all for bound in getattr(row, interval) or (0.0, 0.0))
            for row, of_all in zip(rows, scale, strict=True)
        ]
        above = [high - y for y, (_, high) in zip(at, bounds, strict=True)]
        below = [y - low for y, (low, _) in zip(at, bounds, strict=True)]
        figure.add_bar(x=names, y=at, name=title, error_y={"array": above, "arrayminus": below, "thickness": 1})
    figure.update_layout(barmode="group", colorway=COLORS).update_yaxes(range=[0, 1.02])
    return lay_out(figure, "", "share of the features")


def score_distribution(report: ComSemReport) -> go.Figure:
    """Share of each dictionary's features with at least a given score; random tokens dashed."""
    figure = go.Figure()
    groups = [(dictionary.name, dictionary.scores, "solid") for dictionary in report.dictionaries]
    random_scores = [feature.score for feature in report.random_features if feature.score is not None]
    for (name, scores, dash), color in zip(
        [*groups, ("random tokens", random_scores, "dash")], cycle(COLORS), strict=False
    ):
        if scores:
            values = sorted({0.0, 1.0, *scores})
            shares = [sum(score >= value for score in scores) / len(scores) for value in values]
            line = {"color": color, "dash": dash, "shape": "vh"}
            figure.add_scatter(x=values, y=shares, name=name + report.mark, line=line)
    lay_out(figure, "score, at least", "share of the features")
    return figure


def score_by_frequency(report: ComSemReport, measure: str, title: str) -> go.Figure:
    """Mean of a measure by firing rate, in half decades; the size of a point grows with the features in its bin."""
    figure = go.Figure()
    for dictionary, color in zip(report.dictionaries, cycle(COLORS), strict=False):
        bins = dictionary.by_frequency(measure)
        figure.add_scatter(
            x=[(bin_edges(number)[0] * bin_edges(number)[1]) ** 0.5 for number in bins],
            y=[value for _, value in bins.values()],
            text=[f"{n} features" for n, _ in bins.values()],
            name=dictionary.name + report.mark,
            mode="lines+markers",
            line={"color": color},
            marker={"size": [6 + 3 * min(n, 100) ** 0.5 for n, _ in bins.values()], "opacity": 0.7},
        )
    lay_out(figure, "firing rate", title)
    figure.update_xaxes(type="log")
    return figure
