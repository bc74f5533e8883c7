from typing import Any

import pytest

from bae_lens.entropy.results import Cell, EntropyDynamics
from bae_lens.entropy.estimate import EntropyEstimate
from bae_lens.entropy.recovery import Recovery
from bae_lens.report.entropy import FAINTEST, entropy_by_position, opacity, recovered_entropy


def result(curve: dict[int, list[tuple[float, float]]]) -> EntropyDynamics:
    cells = [
        Cell("hook", position, float(i), EntropyEstimate(b, b, (b - 1, b + 1), 2.0, 2, share, 10, 4, 4), 0.5)
        for position, points in curve.items()
        for i, (b, share) in enumerate(points)
    ]
    return EntropyDynamics("model", ["hook"], list(curve), 10, 5, 0, 0, [8] * len(curve), 4, cells)


def test_recovered_entropy_shows_every_point_by_its_quality():
    good = Recovery(8, 64, 0, 8.0, 8.1, 8.0, 0.0, 9, 1.0, 1.0)
    bad = Recovery(48, 64, 0, 48.0, 60.0, 60.0, 0.5, 60, 0.6, 1.0)
    figure: Any = recovered_entropy({"ours": [good, bad]})
    line, points = figure.data
    assert list(line.x) == list(line.y)
    assert (list(points.x), list(points.y)) == ([8.0, 48.0], [8.1, 60.0])
    assert list(points.marker.opacity) == [1.0, 0.5]


@pytest.mark.parametrize(("share", "expected"), [(1.0, 1.0), (0.4, 0.4), (-3.0, FAINTEST)])
def test_opacity_stays_visible(share, expected):
    assert opacity(share) == expected


def test_curve_with_its_errors_and_saturation():
    rising = {1: 10.0, 2: 15.0, 4: 18.0, 8: 19.5, 16: 19.9}
    figure: Any = entropy_by_position(result({p: [(bits, 0.8)] for p, bits in rising.items()}))
    curve, joint, ceiling = figure.data
    assert list(curve.y) == list(rising.values())
    assert list(curve.error_y.array) == [1.0] * 5
    assert list(curve.marker.opacity) == [0.8] * 5
    assert list(joint.y) == [bits - 2 for bits in rising.values()]
    assert (list(ceiling.x), list(ceiling.y)) == ([1, 2, 4, 8, 16], [3.0] * 5)
    assert len(figure.layout.shapes) == 1


def test_positions_out_of_reach_are_left_out():
    figure: Any = entropy_by_position(
        result({1: [(10.0, 0.5), (20.0, 0.75)], 2: [(9.0, 0.8)]}), explained_variance=0.75
    )
    assert (list(figure.data[0].x), list(figure.data[0].y)) == ([1], [20.0])


def test_points_at_one_explained_variance_show_it():
    figure: Any = entropy_by_position(
        result({1: [(10.0, 0.5), (20.0, 0.75)], 2: [(9.0, 0.2), (30.0, 0.9)]}), explained_variance=0.6
    )
    curve = figure.data[0]
    assert list(curve.marker.opacity) == [0.6, 0.6]
    assert list(curve.text) == ["explained variance 0.60"] * 2
    assert list(curve.error_y.array) == pytest.approx([1.0, 1.0])
