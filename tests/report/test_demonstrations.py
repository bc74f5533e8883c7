import json
from typing import Any

import pytest

from bae_lens.entropy.estimate import EntropyEstimate
from bae_lens.entropy.results import Cell, EntropyDynamics
from bae_lens.report.demonstrations import (
    common_explained_variance,
    demonstrations_chart,
    demonstrations_table,
    write_demonstrations,
)
from bae_lens.report.figures import draw


def group(curve: dict[int, list[tuple[float, float]]]) -> EntropyDynamics:
    """Bits and explained variance at the end of each demonstration, at prices 1, 2, ..."""
    cells = []
    for position, points in curve.items():
        for price, (bits, share) in enumerate(points, start=1):
            estimate = EntropyEstimate(bits, bits, (bits - 1, bits + 2), bits / 2, None, share, 10, 40, 4)
            cells.append(Cell("hook", position, float(price), estimate, estimate))
    ones = [1] * len(curve)  # all demonstrations end alike, so that more bits than tokens are no fault
    return EntropyDynamics(
        "model", ["hook"], list(curve), 10, 10, 3, 0, ones, 40, "shared", cells, positions_count="demonstrations"
    )


GROUPS = {
    "correct": group({1: [(20.0, 0.8), (10.0, 0.5)], 2: [(16.0, 0.8), (8.0, 0.5)]}),
    "shuffled": group({1: [(20.0, 0.8), (10.0, 0.5)], 2: [(36.0, 0.7), (12.0, 0.5)]}),
}


def test_groups_side_by_side_at_one_explained_variance():
    table = demonstrations_table(GROUPS, 0.5).splitlines()
    assert table[0] == "| demonstrations | 1 | 2 |"
    assert table[2] == "| hook, correct | 10 (9 to 12) | 8 (7 to 10) |"
    assert table[3] == "| hook, shuffled | 10 (9 to 12) | 12 (11 to 14) |"
    assert "at EV 0.5; prompts: 10 of correct (3 left out for outliers), 10 of shuffled" in table[-1]


def test_what_is_not_reached_or_says_more_of_the_code_shows():
    assert "| 16 (15 to 18) |\n| hook, shuffled | 20 (19 to 22) | - |" in demonstrations_table(GROUPS, 0.8)
    at_price = demonstrations_table(GROUPS, None)
    assert "| 36* (35 to 38, 0.70) |" in at_price
    assert at_price.endswith("*: bits that say more of the code than of the activations (near cap).")
    assert "*" not in demonstrations_table(GROUPS, 0.5)


def test_chart_has_a_curve_for_each_group():
    chart = demonstrations_chart(GROUPS, "hook", 0.5)
    correct, shuffled = chart.series
    assert [series.name for series in chart.series] == ["correct", "shuffled"]
    assert (correct.points, shuffled.points) == ([(1.0, 10.0), (2.0, 8.0)], [(1.0, 10.0), (2.0, 12.0)])
    assert correct.color != shuffled.color
    assert correct.opacities == [0.5, 0.5]
    assert correct.intervals == [(9.0, 12.0), (7.0, 10.0)]
    assert (chart.y_title, chart.x_ticks) == ("bits at EV 0.5", [1.0, 2.0])
    figure: Any = draw(chart)
    assert list(figure.layout.xaxis.tickvals) == [1, 2]


def test_marked_points_are_hollow():
    at_price = demonstrations_chart(GROUPS, "hook", None)
    assert [series.hollow for series in at_price.series] == [[False, False], [False, True]]
    assert at_price.series[1].notes[1] == "explained variance 0.70, near cap"


def test_groups_that_do_not_reach_the_explained_variance_have_no_curve():
    (correct,) = demonstrations_chart({"correct": GROUPS["correct"], "b": group({1: [(3.0, 0.1)]})}, "hook", 0.5).series
    assert correct.name == "correct"


def test_groups_are_compared_where_all_of_them_are():
    assert common_explained_variance(GROUPS) == 0.7
    alone = {"a": GROUPS["correct"], "b": group({1: [(3.0, 0.51)], 2: [(3.0, 0.63)]})}
    assert common_explained_variance({"a": alone["a"]}) == 0.8
    assert common_explained_variance(alone) is None


@pytest.mark.parametrize(("asked", "share"), [(None, 0.7), (0.6, 0.6)])
def test_files(tmp_path, asked, share):
    assert write_demonstrations(GROUPS, tmp_path, asked) == demonstrations_table(GROUPS, share)
    result = json.loads((tmp_path / "demonstrations.json").read_text())
    assert result["explained_variance"] == share
    assert EntropyDynamics.from_dict(result["groups"]["shuffled"]) == GROUPS["shuffled"]
    page = (tmp_path / "demonstrations.html").read_text()
    assert "<h1>Entropy by demonstration: model</h1>" in page
    assert page.count('id="figure-hook-') == 1
    assert "saturates" not in page
    assert (tmp_path / "demonstrations.png").read_bytes().startswith(b"\x89PNG")
