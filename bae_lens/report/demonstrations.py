"""Entropy against the number of demonstrations in the prompt, for groups of prompts side by side."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

import plotly.graph_objects as go

from bae_lens.entropy.results import CurvePoint, EntropyDynamics
from bae_lens.report.entropy import opacity
from bae_lens.report.figures import lay_out
from bae_lens.report.series import COLORS
from bae_lens.storage import write_json, write_text

DASHES = ("solid", "dash", "dot", "dashdot")


def write_demonstrations(
    groups: Mapping[str, EntropyDynamics], folder: Path, explained_variance: float | None = None
) -> str:
    """Writes `demonstrations.json` and its figure `demonstrations.html` into the folder, and returns the table.

    All groups are compared at one explained variance: by default the lowest of those that suit one of them, or, if one
    has none, each at its lowest price.
    """
    share = common_explained_variance(groups) if explained_variance is None else explained_variance
    contents = {group: dynamics.to_dict() for group, dynamics in groups.items()}
    write_json(folder / "demonstrations.json", {"explained_variance": share, "groups": contents}, indent=1)
    page = demonstrations_figure(groups, share).to_html(include_plotlyjs=True, config={"displayModeBar": False})
    write_text(folder / "demonstrations.html", page)
    return demonstrations_table(groups, share)


def common_explained_variance(groups: Mapping[str, EntropyDynamics]) -> float | None:
    """The lowest of the groups' own; None if one of them has none."""
    shares = [dynamics.common_explained_variance() for dynamics in groups.values()]
    return None if None in shares else min(share for share in shares if share is not None)


def demonstrations_table(groups: Mapping[str, EntropyDynamics], explained_variance: float | None) -> str:
    """Bits by hook, group and demonstration in Markdown, with their 95 % intervals."""
    first = next(iter(groups.values()))
    rows = [
        ["demonstrations", *map(str, first.positions)],
        ["---", *["---:"] * len(first.positions)],
    ]
    marks = set[str]()
    for hook in first.hook_names:
        for group, dynamics in groups.items():
            points = {point.position: point for point in _points(dynamics, hook, explained_variance)}
            found = [points.get(position) for position in first.positions]
            marks |= {mark for point in points.values() for mark in point.marks}
            rows.append([f"{hook}, {group}", *("-" if p is None else _entry(p, explained_variance) for p in found)])
    quality = (
        "each at its lowest price, explained variance after the interval"
        if explained_variance is None
        else f"at EV {explained_variance:g}"
    )
    sizes = ", ".join(
        f"{dynamics.n_windows} of {group} ({dynamics.outliers} left out for outliers)"
        for group, dynamics in groups.items()
    )
    note = f"Bits per activation vector at the end of each demonstration, {quality}; prompts: {sizes}."
    if marks:
        note += f" *: bits that say more of the code than of the activations ({', '.join(sorted(marks))})."
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", note])


def demonstrations_figure(groups: Mapping[str, EntropyDynamics], explained_variance: float | None) -> go.Figure:
    """A color a hook, a dash a group; fainter the worse the reconstruction."""
    figure = go.Figure()
    first = next(iter(groups.values()))
    for hook, color in zip(first.hook_names, cycle(COLORS), strict=False):
        for (group, dynamics), dash in zip(groups.items(), cycle(DASHES), strict=False):
            points = _points(dynamics, hook, explained_variance)
            figure.add_scatter(
                x=[point.position for point in points],
                y=[point.bits for point in points],
                name=f"{hook}, {group}",
                mode="lines+markers",
                line={"color": color, "dash": dash},
                marker={"size": 9, "opacity": [opacity(point.explained_variance) for point in points]},
                text=[", ".join([f"explained variance {p.explained_variance:.2f}", *p.marks]) for p in points],
                error_y={
                    "type": "data",
                    "array": [point.interval[1] - point.bits for point in points],
                    "arrayminus": [point.bits - point.interval[0] for point in points],
                    "width": 2,
                },
            )
    at = "" if explained_variance is None else f" at explained variance {explained_variance:g}"
    return lay_out(figure, "demonstrations in the prompt", f"entropy (bits){at}")


def _points(dynamics: EntropyDynamics, hook: str, explained_variance: float | None) -> list[CurvePoint]:
    return dynamics.curve_at_price(hook) if explained_variance is None else dynamics.curve(hook, explained_variance)


def _entry(point: CurvePoint, explained_variance: float | None) -> str:
    low, high = point.interval
    share = f", {point.explained_variance:.2f}" if explained_variance is None else ""
    mark = "*" if point.marks else ""
    return f"{point.bits:.0f}{mark} ({low:.0f} to {high:.0f}{share})"
