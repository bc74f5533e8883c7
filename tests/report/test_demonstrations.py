import json
from typing import Any

import pytest

from bae_lens.entropy.estimate import EntropyEstimate
from bae_lens.entropy.results import Cell, EntropyDynamics
from bae_lens.report.demonstrations import (
    common_explained_variance,
    demonstrations_figure,
    demonstrations_table,
    write_demonstrations,
)


def group(curve: dict[int, list[tuple[float, float]]]) -> EntropyDynamics:
    """Bits and explained variance at the end of each demonstration, at prices 1, 2, ..."""
    cells = []
    for position, points in curve.items():
        for price, (bits, share) in enumerate(points, start=1):
            estimate = EntropyEstimate(bits, bits, (bits - 1, bits + 2), bits / 2, None, share, 10, 40, 4)
            cells.append(Cell("hook", position, float(price), estimate, estimate, ["near cap"] if bits == 36 else []))
    return EntropyDynamics("model", ["hook"], list(curve), 10, 10, 3, 0, [1] * len(curve), 40, "shared", cells)


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


def test_figure_has_a_curve_for_each_group():
    figure: Any = demonstrations_figure(GROUPS, 0.5)
    correct, shuffled = figure.data
    assert (list(correct.x), list(correct.y), list(shuffled.y)) == ([1, 2], [10.0, 8.0], [10.0, 12.0])
    assert correct.line.color == shuffled.line.color
    assert correct.line.dash != shuffled.line.dash
    assert list(correct.marker.opacity) == [0.5, 0.5]
    assert (list(correct.error_y.array), list(correct.error_y.arrayminus)) == ([2.0, 2.0], [1.0, 1.0])
    at_price: Any = demonstrations_figure(GROUPS, None)
    assert at_price.data[1].text[1] == "explained variance 0.70, near cap"


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
    assert "demonstrations in the prompt" in (tmp_path / "demonstrations.html").read_text()
