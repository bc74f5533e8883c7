"""Entropy against the number of demonstrations in the prompt, for groups of prompts side by side."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from bae_lens.entropy.results import CurvePoint, EntropyDynamics
from bae_lens.markdown import markdown_table
from bae_lens.report.entropy import curve_series
from bae_lens.report.figures import draw
from bae_lens.report.html import embed, render
from bae_lens.report.png import write_panels
from bae_lens.report.series import COLORS, Chart
from bae_lens.storage import write_json, write_text


def write_demonstrations(
    groups: Mapping[str, EntropyDynamics], folder: Path, explained_variance: float | None = None
) -> str:
    """Writes `demonstrations.json`, its figures `demonstrations.html` and `demonstrations.png` into the folder, and
    returns the table.

    All groups are compared at one explained variance: by default the lowest of those that suit one of them, or, if one
    has none, each at its lowest price.
    """
    share = common_explained_variance(groups) if explained_variance is None else explained_variance
    contents = {group: dynamics.to_dict() for group, dynamics in groups.items()}
    write_json(folder / "demonstrations.json", {"explained_variance": share, "groups": contents}, indent=1)
    first = next(iter(groups.values()))
    charts = {hook: demonstrations_chart(groups, hook, share) for hook in first.hook_names}
    page = render(
        "demonstrations",
        model=first.model,
        figures={hook: embed(draw(chart), f"hook-{i}") for i, (hook, chart) in enumerate(charts.items())},
        explanation=_explanation(groups, share),
    )
    write_text(folder / "demonstrations.html", page)
    write_panels(charts, folder / "demonstrations.png", columns=min(2, len(charts)))
    return demonstrations_table(groups, share)


def common_explained_variance(groups: Mapping[str, EntropyDynamics]) -> float | None:
    """The lowest of the groups' own; None if one of them has none."""
    shares = [dynamics.common_explained_variance() for dynamics in groups.values()]
    return None if None in shares else min(share for share in shares if share is not None)


def demonstrations_table(groups: Mapping[str, EntropyDynamics], explained_variance: float | None) -> str:
    """Bits by hook, group and demonstration in Markdown, with their 95 % intervals."""
    first = next(iter(groups.values()))
    rows = list[list[str]]()
    marks = set[str]()
    for hook in first.hook_names:
        for group, dynamics in groups.items():
            points = {point.position: point for point in _points(dynamics, hook, explained_variance)}
            found = [points.get(position) for position in first.positions]
            marks |= {mark for point in points.values() for mark in point.marks}
            rows.append([f"{hook}, {group}", *("-" if p is None else _entry(p, explained_variance) for p in found)])
    note = _explanation(groups, explained_variance)
    if marks:
        note += f" *: bits that say more of the code than of the activations ({', '.join(sorted(marks))})."
    return "\n".join([markdown_table(["demonstrations", *map(str, first.positions)], rows), "", note])


def demonstrations_chart(
    groups: Mapping[str, EntropyDynamics], hook_name: str, explained_variance: float | None
) -> Chart:
    """Bits at one hook by demonstration, a curve a group, fainter the worse the reconstruction.

    Marks are hollow where the bits say more of the code than of the activations (`marks_of`).
    """
    curves = {group: _points(dynamics, hook_name, explained_variance) for group, dynamics in groups.items()}
    series = [
        curve_series(group, points, color)
        for (group, points), color in zip(curves.items(), cycle(COLORS), strict=False)
        if points
    ]
    at = "" if explained_variance is None else f" at EV {explained_variance:g}"
    hover = "demonstration %{x}: %{y:.1f} bits"
    ticks = [float(position) for position in next(iter(groups.values())).positions]
    return Chart("demonstrations in the prompt", f"bits{at}", hover, series, x_ticks=ticks)


def _points(dynamics: EntropyDynamics, hook: str, explained_variance: float | None) -> list[CurvePoint]:
    return dynamics.curve_at_price(hook) if explained_variance is None else dynamics.curve(hook, explained_variance)


def _explanation(groups: Mapping[str, EntropyDynamics], explained_variance: float | None) -> str:
    """What was measured, at which explained variance, and on how many prompts."""
    quality = (
        "each at its lowest price, at explained variances that differ"
        if explained_variance is None
        else f"at EV {explained_variance:g}"
    )
    sizes = ", ".join(
        f"{dynamics.n_windows} of {group} ({dynamics.outliers} left out for outliers)"
        for group, dynamics in groups.items()
    )
    return f"Bits per activation vector at the end of each demonstration, {quality}; prompts: {sizes}."


def _entry(point: CurvePoint, explained_variance: float | None) -> str:
    low, high = point.interval
    share = f", {point.explained_variance:.2f}" if explained_variance is None else ""
    mark = "*" if point.marks else ""
    return f"{point.bits:.0f}{mark} ({low:.0f} to {high:.0f}{share})"
