"""Entropy dynamics as files and as a table."""

import math
from dataclasses import asdict
from pathlib import Path

from bae_lens.entropy.results import NEAR_CAP, OVERFITTED, CurvePoint, EntropyDynamics, Mark, View
from bae_lens.entropy.saturation import Saturation
from bae_lens.markdown import markdown_table
from bae_lens.report.entropy import view_chart
from bae_lens.report.figures import draw
from bae_lens.report.html import embed, render
from bae_lens.report.png import write_panels
from bae_lens.storage import write_json, write_text

SIGNS: dict[Mark, str] = {"near cap": "c", "few windows": "w", "more bits than tokens": "t"}
MEANINGS = {
    "c": f"over {NEAR_CAP:g} bits a feature, so that more features would take more",
    "w": f"explains over {OVERFITTED:g} more of all windows than of those held out: too few of them",
    "t": "more bits than log2 of the distinct tokens, all that a state follows from at position 1",
}


def write_dynamics(dynamics: EntropyDynamics, folder: Path, explained_variance: float | None = None) -> str:
    """Writes `dynamics.json`, its figures `dynamics.html` and `dynamics.png` into the folder, and returns the table."""
    views = dynamics.views(explained_variance)
    write_json(folder / "dynamics.json", {**dynamics.to_dict(), "views": [asdict(view) for view in views]}, indent=1)
    charts = {view.name: view_chart(dynamics, view) for view in views}
    figures = {name: embed(draw(chart), f"view-{i}") for i, (name, chart) in enumerate(charts.items())}
    page = render("dynamics", model=dynamics.model, figures=figures, explanation=_explanation(dynamics, views))
    write_text(folder / "dynamics.html", page)
    write_panels(charts, folder / "dynamics.png", columns=2)
    return dynamics_table(dynamics, views)


def dynamics_table(dynamics: EntropyDynamics, views: list[View]) -> str:
    """These views of every hook side by side in Markdown, and where their curves saturate."""
    distinct = dynamics.distinct_tokens
    headings = ["", "position", *map(str, dynamics.positions)]
    rows = [
        ["", "distinct tokens", *map(str, distinct)],
        ["", "log2 of them", *(f"{math.log2(n):.1f}" for n in distinct)],
    ]
    for hook in dynamics.hook_names:
        for i, view in enumerate(views):
            points = {point.position: point for point in view.curves[hook]}
            found = [points.get(position) for position in dynamics.positions]
            entries = ("-" if point is None else _entry(point, view) for point in found)
            rows.append([hook if i == 0 else "", view.name, *entries])
    saturating = [f"{view.name}: {_sentence(found)}" for view in views for found in view.saturations]
    return "\n".join([markdown_table(headings, rows, 2), "", _explanation(dynamics, views), *saturating])


def _entry(point: CurvePoint, view: View) -> str:
    signs = "".join(SIGNS[mark] for mark in point.marks)
    share = f" ({point.explained_variance:.2f})" if view.explained_variance is None else ""
    return f"{point.bits:.0f}{signs}{share}"


def _explanation(dynamics: EntropyDynamics, views: list[View]) -> str:
    """What was measured, at which explained variance, and what the signs on bits say."""
    share, n_points = views[0].explained_variance, sum(map(len, views[0].curves.values()))
    n_cells = len(dynamics.hook_names) * len(dynamics.positions)
    most = "" if share != dynamics.common_explained_variance() else ", the most of any multiple of .05"
    compared = (
        "No explained variance is reached by cells in common; bits at different ones cannot be compared"
        if share is None
        else f"EV {share:g} is reached by {n_points} of {n_cells} layers and positions{most}; - where it is not"
    )
    used = {SIGNS[mark] for view in views for points in view.curves.values() for p in points for mark in p.marks}
    marked = "".join(f"; {sign}: {meaning}" for sign, meaning in MEANINGS.items() if sign in used)
    return (
        f"Bits per activation vector by position, explained variance (EV) in brackets where it differs. {compared}. "
        f"{dynamics.n_windows} windows of {dynamics.n_documents} documents, {dynamics.outliers} left out for outliers, "
        f"{dynamics.too_short} documents too short; {dynamics.dictionaries} dictionaries of {dynamics.d_sae} "
        f"features{marked}."
    )


def _sentence(s: Saturation) -> str:
    if not s.reached:
        return f"{s.hook_name} rises, and has not saturated at the positions looked at"
    low, high = s.level_interval
    first, last = s.position_interval
    return (
        f"{s.hook_name} tends to {s.level:.0f} bits ({low:.0f} to {high:.0f}) and has 95 % of its rise by position "
        f"{s.position:.0f} ({first:.0f} to {last:.0f})"
    )
