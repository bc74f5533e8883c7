"""Entropies as charts: recovered against true (Fig. 2), and by position and layer (Fig. 3)."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from bae_lens.entropy.recovery import Recovery
from bae_lens.entropy.results import CurvePoint, EntropyDynamics, View
from bae_lens.report.series import COLORS, GRAY, Chart, Point, Series

FAINTEST = 0.15  # opacity of a point that reconstructs nothing
BEYOND = 2.0  # times the last position is shown of where a curve saturates


def recovery_chart(recipes: Mapping[str, Sequence[Recovery]]) -> Chart:
    """Estimated against true bits, fainter the worse the reconstruction; the line is where they agree (Fig. 2)."""
    most = max(max(row.bits, row.true_bits) for rows in recipes.values() for row in rows)
    exact = Series("exact", [(1.0, 1.0), (most, most)], GRAY, "dotted")
    found = [
        Series(
            name,
            [(row.true_bits, row.bits) for row in rows],
            color,
            "marks",
            opacities=[opacity(1 - row.fvu) for row in rows],
            notes=[f"{row.d_sae} features, FVU {row.fvu:.2g}" for row in rows],
        )
        for (name, rows), color in zip(recipes.items(), cycle(COLORS), strict=False)
    ]
    hover = "%{x:.4g} bits, estimated %{y:.4g}"
    return Chart("true entropy (bits)", "estimated entropy (bits)", hover, [exact, *found], log_x=True, log_y=True)


def view_chart(dynamics: EntropyDynamics, view: View) -> Chart:
    """Bits by position, a curve a hook from dark to light, fainter the worse the reconstruction (Fig. 3).

    Marks are hollow where the bits say more of the code than of the activations (`marks_of`). Dashed is the level that
    a curve saturates at, if it does at the positions looked at, with a diamond where it has risen by 95 %. The
    logarithm of the number of distinct tokens at position 1 is what the bits cannot exceed there.
    """
    shades = [to_hex(color) for color in colormaps["viridis"](np.linspace(0, 0.9, len(dynamics.hook_names)))]
    of_hook = dict(zip(dynamics.hook_names, shades, strict=True))
    series = [curve_series(hook, points, of_hook[hook]) for hook, points in view.curves.items() if points]
    last = BEYOND * max(dynamics.positions)
    for found in (saturation for saturation in view.saturations if saturation.reached):
        color = of_hook[found.hook_name]
        low, high = (min(x, last) for x in found.position_interval)
        level: list[Point] = [(found.position, found.level), (last, found.level)]
        series.append(Series(found.hook_name, level, color, "dashed", in_legend=False))
        series.append(
            Series(
                found.hook_name,
                [(found.position, found.level)],
                color,
                "marks",
                symbol="diamond",
                in_legend=False,
                notes=["95 % of the rise"],
                intervals=[(low, high)],
                along_x=True,
            )
        )
    if 1 in dynamics.positions:
        most = math.log2(dynamics.distinct_tokens[dynamics.positions.index(1)])
        series.append(Series("log2 of distinct tokens", [(1.0, most)], GRAY, "marks", symbol="diamond"))
    ticks = [float(position) for position in dynamics.positions]
    return Chart("position", view.name, "position %{x}: %{y:.1f} bits", series, log_x=True, x_ticks=ticks)


def curve_series(name: str, points: Sequence[CurvePoint], color: str) -> Series:
    """Bits by position with their intervals, fainter the worse the reconstruction, marked points hollow."""
    return Series(
        name,
        [(float(point.position), point.bits) for point in points],
        color,
        "marked line",
        notes=[", ".join([f"explained variance {p.explained_variance:.2f}", *p.marks]) for p in points],
        intervals=[point.interval for point in points],
        opacities=[opacity(point.explained_variance) for point in points],
        hollow=[bool(point.marks) for point in points],
    )


def opacity(explained_variance: float) -> float:
    """1 for a perfect reconstruction, `FAINTEST` for none."""
    return max(FAINTEST, min(1.0, explained_variance))
