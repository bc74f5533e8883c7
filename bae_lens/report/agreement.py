"""How ComSem's score and the others agree, as one HTML page that opens without a network."""

from pathlib import Path

import plotly.graph_objects as go

from bae_lens.comsem.agreement import MEASURES, Agreement, ScoredRun, ScorePair
from bae_lens.report.figures import lay_out
from bae_lens.report.html import embed, render
from bae_lens.report.series import COLORS, GRAY
from bae_lens.storage import write_text

PAGE_FILE = "agreement.html"
NAMES = {
    "detection": "detection",
    "intruder": "intruder",
    "score": "ComSem",
    "balanced_accuracy": "ComSem, balanced",
    "simulation": "simulation",
    "fuzzing": "fuzzing",
}
"""What the measures are called on the page."""
CHANCE = {"detection": 0.5, "intruder": 0.2, "balanced_accuracy": 0.5, "simulation": 0.0, "fuzzing": 0.5}


def write_agreement_report(agreement: Agreement, folder: Path) -> Path:
    """Writes `agreement.html`, with its scripts inlined, and returns its path."""
    html = render(
        "agreement",
        runs=agreement.runs,
        changes=agreement.changes,
        names=NAMES,
        chance=CHANCE,
        heatmaps=[
            {group: embed(correlations(pairs), f"pairs-{i}-{j}") for j, (group, pairs) in enumerate(run.pairs.items())}
            for i, run in enumerate(agreement.runs)
        ],
        explanations=[
            embed(explanation_controls(run), f"explanations-{number}") if run.controls else ""
            for number, run in enumerate(agreement.runs)
        ],
    )
    path = folder / PAGE_FILE
    write_text(path, html)
    return path


def correlations(pairs: list[ScorePair]) -> go.Figure:
    """Rank correlations of scores with one another, as a square; the upper half is that of the lower."""
    known = {frozenset((pair.first, pair.second)): pair.correlation for pair in pairs}
    present = [measure for measure in MEASURES if any(measure in pair for pair in known)]
    cells = [[known.get(frozenset((row, column))) for column in present] for row in present]
    figure = go.Figure(
        go.Heatmap(
            x=[NAMES[measure] for measure in present],
            y=[NAMES[measure] for measure in present],
            z=[[None if cell is None else cell.value for cell in row] for row in cells],
            text=[["" if cell is None or cell.value is None else f"{cell.value:.2f}" for cell in row] for row in cells],
            customdata=[["" if cell is None else f"{cell}, {cell.n} features" for cell in row] for row in cells],
            texttemplate="%{text}",
            hovertemplate="%{y} and %{x}: %{customdata}<extra></extra>",
            colorscale="RdBu",
            reversescale=True,
            zmin=-1,
            zmax=1,
            xgap=2,
            ygap=2,
            showscale=False,
        )
    )
    lay_out(figure, "", "").update_yaxes(autorange="reversed", showgrid=False).update_xaxes(showgrid=False)
    return figure.update_layout(height=90 + 52 * len(present), margin={"l": 130}, showlegend=False)


def explanation_controls(run: ScoredRun) -> go.Figure:
    """What each score gives to right explanations, to those of other features, and to one that says nothing."""
    figure = go.Figure()
    kinds = {"right": "its own", "other": "another's", "vague": "vague"}
    for (kind, name), color in zip(kinds.items(), COLORS, strict=False):
        estimates = [getattr(control, kind) for control in run.controls]
        intervals = [estimate.interval or (estimate.value, estimate.value) for estimate in estimates]
        figure.add_bar(
            x=[NAMES[control.measure] for control in run.controls],
            y=[estimate.value for estimate in estimates],
            name=name,
            marker_color=color,
            error_y={
                "array": [high - estimate.value for (_, high), estimate in zip(intervals, estimates, strict=True)],
                "arrayminus": [estimate.value - low for (low, _), estimate in zip(intervals, estimates, strict=True)],
                "color": GRAY,
                "thickness": 1.5,
                "width": 3,
            },
        )
    return lay_out(figure, "", "mean score with an explanation that is")
