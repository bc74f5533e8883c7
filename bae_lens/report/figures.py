"""Charts as interactive figures for a page."""

import math
from html import escape
from typing import Any

import plotly.graph_objects as go

from bae_lens.report.series import GRAY, Chart, Series

DASHES = {"line": "solid", "dashed": "dash", "dotted": "dot"}


def draw(chart: Chart) -> go.Figure:
    """The chart; what is in the legend hides with all that has its name."""
    figure = go.Figure()
    for series in chart.series:
        note = ", %{text}" if series.notes else ""
        figure.add_scatter(
            x=[x for x, _ in series.points],
            y=[y for _, y in series.points],
            name=escape(series.name),
            legendgroup=series.name,
            showlegend=series.in_legend,
            text=series.notes or None,
            hovertemplate=f"{chart.hover}<extra>%{{fullData.name}}{note}</extra>",
            **_error_bars(series),
            **_look(series),
        )
    if chart.asked_l0 is not None:
        line = {"color": GRAY, "dash": "dot", "width": 1}
        figure.add_vline(chart.asked_l0, line=line, name="L0 asked for", showlegend=True)
        figure.update_xaxes(rangemode="tozero")
    figure.update_xaxes(range=chart.x_range).update_yaxes(range=chart.y_range)
    if chart.x_ticks:
        figure.update_xaxes(tickvals=chart.x_ticks)
    if chart.log_x:
        figure.update_xaxes(type="log")
        if chart.x_range is not None:
            figure.update_xaxes(range=[math.log10(x) for x in chart.x_range])
    if chart.log_y:
        figure.update_yaxes(type="log", exponentformat="power")
    return lay_out(figure, chart.x_title, chart.y_title)


def _error_bars(series: Series) -> dict[str, Any]:
    if not series.intervals:
        return {}
    axis = 0 if series.along_x else 1
    bounds = [(point[axis] or 0.0, *interval) for point, interval in zip(series.points, series.intervals, strict=True)]
    below, above = [at - low for at, low, _ in bounds], [high - at for at, _, high in bounds]
    bars = {"array": above, "arrayminus": below, "width": 2, "thickness": 1}
    return {"error_x" if series.along_x else "error_y": bars}


def _look(series: Series) -> dict[str, Any]:
    """Of a series, in plotly's words."""
    if series.style in ("marks", "marked line"):
        line = {"color": series.color, "width": 1.5}
        # A hollow mark has the outline of its color, a full one of the background.
        symbols = [f"{series.symbol}-open" if hollow else series.symbol for hollow in series.hollow]
        look = {"color": series.color, "size": 11 if series.style == "marks" else 9, "symbol": symbols or series.symbol}
        if not any(series.hollow):
            look["line"] = {"color": "white", "width": 1}
        if series.opacities:
            look["opacity"] = series.opacities
        return {"mode": "markers" if series.style == "marks" else "lines+markers", "marker": look, "line": line}
    if series.style == "open marks":
        return {
            "mode": "markers",
            "marker": {"color": series.color, "size": 7, "symbol": f"{series.symbol}-open"},
        }
    if series.style == "steps":
        return {"mode": "lines", "line": {"color": series.color, "shape": "hvh"}}
    return {"mode": "lines", "line": {"color": series.color, "width": 1.5, "dash": DASHES[series.style]}}


def lay_out(figure: go.Figure, x_title: str, y_title: str) -> go.Figure:
    """The look of all figures; the legend above, with room for as many lines as it may take."""
    traces: Any = figure.data
    entries = sum(trace.showlegend is not False for trace in traces)
    return figure.update_layout(
        template="plotly_white",
        paper_bgcolor="rgba(0, 0, 0, 0)",  # so that they stand on a page of any color
        plot_bgcolor="rgba(0, 0, 0, 0)",
        margin={"l": 60, "r": 15, "t": 20, "b": 50},
        height=380 + 12 * entries,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "xanchor": "left"},
        showlegend=True,
        xaxis_title=x_title,
        yaxis_title=y_title,
    )
