import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bae_lens.entropy.estimate import EntropyEstimate
from bae_lens.entropy.results import Cell, EntropyDynamics, marks_of, saturations


def estimate(bits: float, share: float = 0.5) -> EntropyEstimate:
    return EntropyEstimate(bits, bits, (0.9 * bits, 1.2 * bits), bits / 2, (0.4 * bits, 0.7 * bits), share, 10, 100, 4)


def result(curve: dict[int, list[tuple[float, float]]], hook: str = "hook", **values: Any) -> EntropyDynamics:
    """Bits and explained variance by position and price; of all windows twice the bits, and .01 more explained."""
    cells = [
        Cell(hook, position, float(i), estimate(bits, share), estimate(2 * bits, share + 0.01))
        for position, points in curve.items()
        for i, (bits, share) in enumerate(points)
    ]
    return replace(
        EntropyDynamics("model", [hook], list(curve), 10, 5, 0, 0, [2**40] * len(curve), 100, "shared", cells), **values
    )


CURVES = {1: [(20.0, 0.75), (10.0, 0.5)], 2: [(16.0, 0.8), (12.0, 0.7)], 4: [(9.0, 0.9), (3.0, 0.8)]}


def test_curve_at_one_explained_variance_by_hand():
    first, second = result(CURVES).curve("hook", 0.75)
    assert (first.position, first.bits, first.explained_variance) == (1, 20.0, 0.75)
    bits = 12 + 4 * np.log(0.3 / 0.25) / np.log(0.3 / 0.2)
    assert second.position == 2
    assert second.bits == pytest.approx(bits)
    assert second.interval == pytest.approx((0.9 * bits, 1.2 * bits))


def test_joint_curve_at_one_explained_variance():
    second = result(CURVES).curve("hook", 0.75, joint=True)[1]
    bits = 12 + 4 * np.log(0.3 / 0.25) / np.log(0.3 / 0.2)
    assert second.bits == pytest.approx(bits / 2)
    assert second.interval == pytest.approx((0.4 * bits, 0.7 * bits))


def test_joint_bits_are_interpolated_along_their_own_curve():
    # The coarse code repeats itself: more bits one by one, fewer jointly.
    dynamics = result({1: [(20.0, 0.8), (10.0, 0.5)]})
    coarse = replace(dynamics.cells[1].estimate, corrected_bits=30.0)
    dynamics = replace(dynamics, cells=[dynamics.cells[0], replace(dynamics.cells[1], estimate=coarse)])
    assert dynamics.curve("hook", 0.5) == []
    assert dynamics.curve("hook", 0.5, joint=True)[0].bits == 5.0
    assert dynamics.common_explained_variance() == 0.8


def test_curve_at_the_lowest_price_and_at_another():
    dynamics = result(CURVES)
    assert [(p.bits, p.explained_variance) for p in dynamics.curve_at_price("hook")] == [
        (20, 0.75),
        (16, 0.8),
        (9, 0.9),
    ]
    assert [p.bits for p in dynamics.curve_at_price("hook", 1.0)] == [10, 12, 3]
    everything = dynamics.curve_at_price("hook", all_windows=True)
    assert [(p.bits, p.explained_variance) for p in everything] == [(40, 0.76), (32, 0.81), (18, 0.91)]


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (CURVES, 0.8),  # .8 is reached at 2 and 4, .75 and .7 at 1 and 2
        ({1: [(2.0, 0.83), (1.0, 0.62)]}, 0.8),
        ({1: [(2.0, 0.83), (1.0, 0.62)], 2: [(2.0, 0.72), (1.0, 0.2)]}, 0.7),
        ({1: [(2.0, 0.62)]}, None),
        ({1: [(2.0, -0.3), (1.0, -0.5)]}, None),
    ],
)
def test_common_explained_variance_is_the_largest_that_most_cells_reach(curve, expected):
    assert result(curve).common_explained_variance() == expected


def test_views_are_compared_where_most_cells_reach():
    joint, marginal, paper, unseen = result(CURVES).views()
    assert [view.explained_variance for view in (joint, marginal, paper, unseen)] == [0.8, 0.8, None, None]
    assert [view.name for view in (joint, marginal)] == ["joint bits at EV 0.8", "bits at EV 0.8"]
    assert [view.name for view in (paper, unseen)] == [
        "bits at price 0, all windows",
        "bits at price 0, held-out windows",
    ]
    assert [(p.position, p.bits) for p in marginal.curves["hook"]] == [(2, 16.0), (4, 3.0)]
    assert [(p.position, p.bits) for p in joint.curves["hook"]] == [(2, 8.0), (4, 1.5)]
    assert [p.bits for p in paper.curves["hook"]] == [40, 32, 18]
    assert [p.bits for p in unseen.curves["hook"]] == [20, 16, 9]
    assert [p.position for p in result(CURVES).views(0.75)[1].curves["hook"]] == [1, 2]


def test_without_an_explained_variance_in_common_two_views_are_left():
    assert [view.explained_variance for view in result({1: [(2.0, 0.62)]}).views()] == [None, None]


def test_saturations_are_those_of_the_curves_that_rise():
    rising = {p: [(b, 0.8), (b / 2, 0.5)] for p, b in {1: 10.0, 2: 15.0, 4: 18.0, 8: 19.5, 16: 19.9}.items()}
    dynamics = result(rising)
    (found,) = saturations({"hook": dynamics.curve("hook", 0.8), "short": dynamics.curve("hook", 0.8)[:3]})
    assert found.hook_name == "hook"
    assert found.level == pytest.approx(20, rel=0.05)
    assert [len(view.saturations) for view in dynamics.views()] == [1, 1, 1, 1]
    assert saturations({"hook": []}) == []


@pytest.mark.parametrize(
    ("bits", "share", "of_all", "tokens", "marks"),
    [
        (80.0, 0.7, 0.749, None, []),
        (80.1, 0.7, 0.7, None, ["near cap"]),
        (10.0, 0.7, 0.751, None, ["few windows"]),
        (10.0, 0.7, 0.7, 1024, []),
        (10.1, 0.7, 0.7, 1024, ["more bits than tokens"]),
        (81.0, 0.1, 0.9, 2, ["near cap", "few windows", "more bits than tokens"]),
    ],
)
def test_marks_by_their_rules(bits, share, of_all, tokens, marks):
    assert marks_of(bits, [(estimate(9.0, share), estimate(9.0, of_all))], tokens) == marks


def test_marks_are_those_of_the_bits_that_a_point_shows():
    # One by one 90 bits of 100 features, jointly half of them; over all windows twice as many.
    dynamics = result({1: [(90.0, 0.8), (20.0, 0.5)], 2: [(50.0, 0.8), (20.0, 0.5)]}, distinct_tokens=[2**60, 2])
    joint, marginal, paper, unseen = dynamics.views(0.8)
    assert [[p.marks for p in view.curves["hook"]] for view in (joint, marginal, paper, unseen)] == [
        [[], []],
        [["near cap", "more bits than tokens"], []],
        [["near cap", "more bits than tokens"], ["near cap"]],
        [["near cap", "more bits than tokens"], []],
    ]


def test_bits_between_two_cells_have_marks_of_their_own():
    dynamics = result({2: [(90.0, 0.8), (20.0, 0.5)]})
    (high,), (low,) = dynamics.curve("hook", 0.78), dynamics.curve("hook", 0.6)
    assert high.bits > 80 > low.bits
    assert (high.marks, low.marks) == (["near cap"], [])


def test_few_windows_mark_what_is_made_from_their_cells():
    dynamics = result({1: [(30.0, 0.9), (20.0, 0.75), (10.0, 0.5)]})
    learnt = replace(dynamics.cells[1], all_windows=estimate(20.0, 0.85))
    dynamics = replace(dynamics, cells=[dynamics.cells[0], learnt, dynamics.cells[2]])
    between, below = dynamics.curve("hook", 0.8), dynamics.curve("hook", 0.6, joint=True)
    assert [p.marks for p in (*between, *below)] == [["few windows"]] * 2
    assert dynamics.curve_at_price("hook", 0.0)[0].marks == dynamics.curve("hook", 0.9)[0].marks == []


def test_tokens_bound_the_bits_of_tokens_only():
    dynamics = result({1: [(20.0, 0.8)], 2: [(20.0, 0.8)]}, distinct_tokens=[2**15, 2**15])
    found = [dynamics.curve_at_price("hook"), dynamics.curve("hook", 0.8, joint=True)]
    assert [[p.marks for p in points] for points in found] == [[["more bits than tokens"], []], [[], []]]
    in_context = replace(dynamics, positions_count="demonstrations")
    assert in_context.curve_at_price("hook")[0].marks == []


def test_results_go_through_json_and_those_of_before_are_refused():
    dynamics = result(CURVES)
    values = json.loads(json.dumps(dynamics.to_dict()))
    assert EntropyDynamics.from_dict(values) == dynamics
    values["cells"][0]["marks"] = ["near cap"]  # cells of before had marks of their own
    del values["positions_count"]
    assert EntropyDynamics.from_dict(values) == dynamics
    del values["cells"][0]["all_windows"]
    with pytest.raises(ValueError, match=r"is no EntropyDynamics of this version of bae_lens .*; make it again"):
        EntropyDynamics.from_dict(values)
