import json
from typing import Any

import pytest

from bae_lens.entropy.estimate import EntropyEstimate
from bae_lens.entropy.recovery import Recovery
from bae_lens.entropy.results import Cell, EntropyDynamics
from bae_lens.report.dynamics import dynamics_table, write_dynamics
from bae_lens.report.entropy import FAINTEST, opacity, recovery_chart, view_chart
from bae_lens.report.figures import draw


def result(curve: dict[int, list[tuple[float, float]]]) -> EntropyDynamics:
    cells = [
        Cell(
            "hook",
            position,
            float(i),
            EntropyEstimate(b, b, (b - 1, b + 1), b - 2, (b - 4, b - 1), share, 10, 40, 4),
            EntropyEstimate(b + 1, b + 1, (b, b + 2), b - 2, None, share + 0.01, 50, 40, 4),
        )
        for position, points in curve.items()
        for i, (b, share) in enumerate(points)
    ]
    return EntropyDynamics("model", ["hook"], list(curve), 50, 5, 3, 1, [2**60] * len(curve), 40, "shared", cells)


RISING = {1: 10.0, 2: 15.0, 4: 18.0, 8: 19.5, 16: 19.9}
DYNAMICS = result({p: [(2 * bits, 0.9), (bits, 0.8)] for p, bits in RISING.items()})


def test_recovered_entropy_shows_every_point_by_its_quality():
    good = Recovery(8, 64, 0, 8.0, 8.1, 8.0, 0.0, 9, 1.0, 1.0)
    bad = Recovery(48, 64, 0, 48.0, 60.0, 60.0, 0.5, 60, 0.6, 1.0)
    figure: Any = draw(recovery_chart({"ours": [good, bad]}))
    line, points = figure.data
    assert list(line.x) == list(line.y)
    assert (list(points.x), list(points.y)) == ([8.0, 48.0], [8.1, 60.0])
    assert list(points.marker.opacity) == [1.0, 0.5]
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")


@pytest.mark.parametrize(("share", "expected"), [(1.0, 1.0), (0.4, 0.4), (-3.0, FAINTEST)])
def test_opacity_stays_visible(share, expected):
    assert opacity(share) == expected


def test_a_view_has_its_curve_with_errors_and_saturation():
    view = DYNAMICS.views(0.8)[1]
    figure: Any = draw(view_chart(DYNAMICS, view))
    curve, level, point, ceiling = figure.data
    assert list(curve.y) == list(RISING.values())
    assert list(curve.error_y.array) == list(curve.error_y.arrayminus) == [1.0] * 5
    assert list(curve.marker.opacity) == [0.8] * 5
    assert curve.text[0] == "explained variance 0.80"
    (saturation,) = view.saturations
    assert (list(level.y), level.line.dash) == ([saturation.level] * 2, "dash")
    assert (list(point.x), list(point.y)) == ([saturation.position], [saturation.level])
    assert point.x[0] - point.error_x.arrayminus[0] == pytest.approx(saturation.position_interval[0])
    assert point.x[0] + point.error_x.array[0] == pytest.approx(min(32.0, saturation.position_interval[1]))
    assert (list(ceiling.x), list(ceiling.y)) == ([1], [60.0])
    assert list(figure.layout.xaxis.tickvals) == [1, 2, 4, 8, 16]


def test_a_curve_that_still_rises_has_no_level():
    dynamics = result({p: [(5.0 * p, 0.9), (float(p), 0.8)] for p in (1, 2, 4, 8)})
    assert not dynamics.views(0.8)[1].saturations[0].reached
    assert len(view_chart(dynamics, dynamics.views(0.8)[1]).series) == 2
    assert "bits at EV 0.8: hook rises, and has not saturated at the positions looked at" in dynamics_table(
        dynamics, dynamics.views(0.8)
    )


def test_joint_bits_have_their_own_errors():
    figure: Any = draw(view_chart(DYNAMICS, DYNAMICS.views(0.8)[0]))
    curve = figure.data[0]
    assert list(curve.y) == pytest.approx([bits - 2 for bits in RISING.values()])
    assert (curve.error_y.array[0], curve.error_y.arrayminus[0]) == pytest.approx((1.0, 2.0))


def test_marked_points_are_hollow():
    figure: Any = draw(view_chart(DYNAMICS, DYNAMICS.views()[-1]))
    assert list(figure.data[0].marker.symbol) == ["circle", "circle", *["circle-open"] * 3]
    assert figure.data[0].text[4] == "explained variance 0.90, near cap"


def test_positions_out_of_reach_are_left_out():
    dynamics = result({1: [(20.0, 0.75), (10.0, 0.5)], 2: [(9.0, 0.8)]})
    figure: Any = draw(view_chart(dynamics, dynamics.views(0.75)[1]))
    assert (list(figure.data[0].x), list(figure.data[0].y)) == ([1], [20.0])


def test_table_has_the_views_side_by_side_with_their_marks():
    lines = dynamics_table(DYNAMICS, DYNAMICS.views(0.8)).splitlines()
    assert lines[0] == "|  | position | 1 | 2 | 4 | 8 | 16 |"
    assert lines[3] == "|  | log2 of them | 60.0 | 60.0 | 60.0 | 60.0 | 60.0 |"
    assert lines[4] == "| hook | joint bits at EV 0.8 | 8 | 13 | 16 | 18 | 18 |"
    assert lines[5] == "|  | bits at EV 0.8 | 10 | 15 | 18 | 20 | 20 |"
    assert lines[6] == (
        "|  | bits at price 0, all windows | 21 (0.91) | 31 (0.91) | 37c (0.91) | 40c (0.91) | 41c (0.91) |"
    )
    assert lines[7].startswith("|  | bits at price 0, held-out windows | 20 (0.90) |")
    assert (
        "EV 0.8 is reached by 5 of 5 layers and positions; - where it is not. 50 windows of 5 documents, 3" in lines[9]
    )
    assert "; c: over 0.8 bits a feature" in lines[9]
    assert "w: " not in lines[9]
    assert lines[10].startswith("joint bits at EV 0.8: hook tends to 18 bits")
    assert "EV 0.9 is reached by 5 of 5 layers and positions, the most of any multiple of .05" in dynamics_table(
        DYNAMICS, DYNAMICS.views()
    )


def test_table_says_that_nothing_can_be_compared():
    dynamics = result({1: [(20.0, 0.72)], 2: [(9.0, 0.83)]})
    lines = dynamics_table(dynamics, dynamics.views()).splitlines()
    assert lines[4] == "| hook | bits at price 0, all windows | 21 (0.73) | 10 (0.84) |"
    assert (
        ". No explained variance is reached by cells in common; bits at different ones cannot be compared" in lines[7]
    )


def test_files_are_written(tmp_path):
    table = write_dynamics(DYNAMICS, tmp_path, 0.8)
    assert table == dynamics_table(DYNAMICS, DYNAMICS.views(0.8))
    page = (tmp_path / "dynamics.html").read_text()
    assert page.count('id="figure-view-') == 4
    assert "<h2>joint bits at EV 0.8</h2>" in page
    assert (tmp_path / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    assert EntropyDynamics.from_dict(json.loads((tmp_path / "dynamics.json").read_text())) == DYNAMICS
