"""Entropy dynamics as files and as a table."""

import math
from dataclasses import asdict
from pathlib import Path

from bae_lens.entropy.results import EntropyDynamics
from bae_lens.entropy.saturation import Saturation
from bae_lens.report.entropy import entropy_by_position
from bae_lens.storage import write_json, write_text


def write_dynamics(dynamics: EntropyDynamics, folder: Path, explained_variance: float | None = None) -> str:
    """Writes `dynamics.json` and its figure `dynamics.html` into the folder, and returns the table."""
    result = {
        **dynamics.to_dict(),
        "explained_variance": explained_variance,
        "saturations": [asdict(saturation) for saturation in dynamics.saturations(explained_variance)],
    }
    write_json(folder / "dynamics.json", result, indent=1)
    figure = entropy_by_position(dynamics, explained_variance)
    write_text(folder / "dynamics.html", figure.to_html(include_plotlyjs=True, config={"displayModeBar": False}))
    return dynamics_table(dynamics, explained_variance)


def dynamics_table(dynamics: EntropyDynamics, explained_variance: float | None = None) -> str:
    """Bits by hook and position in Markdown, what they are at most jointly, and where the curves saturate."""
    distinct = dynamics.distinct_tokens
    rows = [
        ["", *map(str, dynamics.positions)],
        ["---", *["---:"] * len(dynamics.positions)],
        ["distinct tokens", *map(str, distinct)],
        ["log2 of them", *(f"{math.log2(n):.1f}" for n in distinct)],
    ]
    for hook in dynamics.hook_names:
        points = {point.position: point for point in dynamics.curve(hook, explained_variance)}
        found = [points.get(position) for position in dynamics.positions]
        share = "" if explained_variance is not None else " ({:.2f})"
        rows.append([hook, *("-" if p is None else f"{p.bits:.0f}{share.format(p.explained_variance)}" for p in found)])
        rows.append(["at most jointly", *("-" if p is None else f"{p.joint_bits_bound:.0f}" for p in found)])
    quality = "explained variance in brackets" if explained_variance is None else f"at EV {explained_variance}"
    note = (
        f"Bits per activation vector by position, {quality}; {dynamics.n_windows} windows of {dynamics.n_documents} "
        f"documents, {dynamics.outliers} left out for outliers, {dynamics.too_short} documents too short."
    )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", note, *map(_sentence, dynamics.saturations(explained_variance))])


def _sentence(s: Saturation) -> str:
    low, high = s.level_interval
    first, last = s.position_interval
    return (
        f"{s.hook_name} tends to {s.level:.0f} bits ({low:.0f} to {high:.0f}) and has 95 % of its rise by position "
        f"{s.position:.0f} ({first:.0f} to {last:.0f}){'' if s.reached else ', beyond those looked at'}"
    )
