import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from bae_lens.comsem.agreement import (
    Agreement,
    Estimate,
    compare_scores,
    difference,
    estimate,
    mean,
    preference,
    rank_correlation,
    spearman,
)


def test_rank_correlation_by_hand():
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * (1 + 1 + 1 + 1) / (4 * 15) = 0.6
    assert rank_correlation([0.1, 0.3, 0.5, 0.9], [0.2, 0.0, 0.9, 0.8]).value == pytest.approx(0.6)
    # Ties at their mean rank: 1.5 1.5 3 against 1 2 3, deviations (-.5 -.5 1) and (-1 0 1): 1.5 / sqrt(1.5 * 2)
    assert rank_correlation([0.0, 0.0, 1.0], [1.0, 2.0, 3.0]).value == pytest.approx(0.8660254)


def test_only_the_order_counts_and_both_must_be_known():
    x = [0.1, None, 0.2, 0.9, 0.4]
    y = [1.0, 5.0, 4.0, 100.0, None]
    found = rank_correlation(x, y)
    assert (found.value, found.n) == (pytest.approx(1), 3)


@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 2.0], [2.0, 1.0]), ([0.5] * 20, list(range(20))), (list(range(20)), [1] * 20), ([], [])]
)
def test_too_few_or_constant_scores_have_no_correlation(x, y):
    x, y = ([float(value) for value in values] for values in (x, y))
    found = rank_correlation(x, y)
    assert (found.value, found.interval, str(found)) == (None, None, "\u2013")


def test_spearman_is_scipys_along_any_axis():
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 5, (2, 3, 30)).astype(float)
    for row in range(3):
        assert spearman(x, y)[row] == pytest.approx(stats.spearmanr(x[row], y[row])[0])
    np.testing.assert_allclose(spearman(x.T, y.T, axis=0), spearman(x, y))
    assert spearman(np.zeros(4), np.arange(4.0)) == 0


def test_intervals_need_ten_features_and_hold_what_is_true():
    generator = np.random.default_rng(1)
    x = generator.standard_normal(200)
    y = x + generator.standard_normal(200)  # Pearson's is 1 / sqrt(2), Spearman's 6 / pi * asin(r / 2) = 0.690
    found = rank_correlation(list(x), list(y))
    assert found.interval is not None
    low, high = found.interval
    assert low < 6 / np.pi * np.arcsin(2**-0.5 / 2) < high
    assert high - low == pytest.approx(4 * (1 - 0.69**2) / np.sqrt(200), rel=0.3)
    assert rank_correlation(list(x[:9]), list(y[:9])).interval is None
    assert rank_correlation(list(x[:10]), list(y[:10])).interval is not None
    assert found == rank_correlation(list(x), list(y)), "the same at each call"


def test_an_interval_of_a_mean_has_the_width_that_is_known():
    values = list(np.random.default_rng(2).standard_normal(400))
    found = estimate(values, mean)
    assert found.value == pytest.approx(np.mean(values))
    assert found.interval is not None
    half = 1.96 * np.std(values) / 20
    assert found.interval == (pytest.approx(found.value - half, abs=0.02), pytest.approx(found.value + half, abs=0.02))
    assert estimate([None, None], mean).value is None


def test_an_estimate_is_shown_with_its_interval_and_without_a_negative_zero():
    assert str(Estimate(-0.001, (-0.014, 0.126), 20)) == "0.00 (-0.01 to 0.13)"
    assert str(Estimate(0.5, None, 4)) == "0.50"


def test_difference_and_preference_by_hand():
    assert difference([0.1, None, 0.5], [0.4, 1.0, 0.4]).value == pytest.approx(0.1)
    # Higher, equal, lower, higher: (1 + 1/2 + 0 + 1) / 4
    assert preference([0.9, 0.5, 0.2, 1.0], [0.1, 0.5, 0.3, 0.9]).value == 0.625


def changed(report, seed=1, features=slice(None), **fields):
    """As if it had been made otherwise: with other scores, and other features."""
    dictionary = report.dictionaries[0]
    kept = [replace(feature, **fields) for feature in dictionary.features[features]]
    return replace(
        report, settings={**report.settings, "seed": seed}, dictionaries=[replace(dictionary, features=kept)]
    )


def test_what_overlaps_is_compared_and_what_does_not_is_counted(report):
    other = changed(report, features=slice(1, None), detection=None)
    other.dictionaries[0].features.append(replace(other.dictionaries[0].features[0], feature=17))
    (change,) = compare_scores({"a": report, "b": other}).changes
    assert (change.first, change.second, change.differ) == ("a", "b", ["seed"])
    assert (change.n_both, change.n_only_first, change.n_only_second) == (3, 1, 1)
    measures = {stability.measure: stability for stability in change.measures}
    assert set(measures) == {"score", "balanced_accuracy", "fuzzing"}, "detection is known of one of them only"
    assert (measures["score"].correlation.value, measures["score"].difference.value) == (pytest.approx(1), 0)


def test_features_of_other_models_and_dictionaries_are_others(report):
    for unlike in (
        replace(report, model="another"),
        replace(report, dictionaries=[replace(report.dictionaries[0], weights="others")]),
    ):
        (change,) = compare_scores({"a": report, "b": unlike}).changes
        assert (change.n_both, change.n_only_first, change.n_only_second, change.measures) == (0, 4, 4, [])


def test_what_differs_between_runs_is_named(report):
    other = replace(report, judge="other", explainer="other", setting="paper", dataset="elsewhere")
    (change,) = compare_scores({"a": report, "b": other}).changes
    assert change.differ == ["judge", "explainer", "setting", "text"]
    assert compare_scores({"a": report, "b": report}).changes[0].differ == []


def test_controls_are_over_the_features_of_which_all_are_known(report):
    dictionary = report.dictionaries[0]
    asked = [
        replace(dictionary.features[0], detection=0.9, with_other={"detection": 0.5}, with_vague={"detection": 0.9}),
        replace(dictionary.features[1], detection=0.7, with_other={"detection": 0.8}, with_vague={"detection": 0.5}),
        replace(dictionary.features[2], detection=0.1, with_other={"detection": None}, with_vague={"detection": 0.5}),
        dictionary.features[3],
    ]
    (run,) = compare_scores({"a": replace(report, dictionaries=[replace(dictionary, features=asked)])}).runs
    (control,) = run.controls
    assert control.measure == "detection"
    assert [control.right.value, control.other.value, control.vague.value] == pytest.approx([0.8, 0.65, 0.7])
    assert (control.over_other.value, control.over_vague.value, control.right.n) == (0.5, 0.75, 2)


def test_pairs_are_by_dictionary_and_of_all_and_only_of_what_was_measured(report):
    two = replace(report, dictionaries=[*report.dictionaries, replace(report.dictionaries[0], name="twin")])
    (run,) = compare_scores({"a": two}).runs
    assert list(run.pairs) == ["all dictionaries", "known", "twin"]
    assert [(pair.first, pair.second) for pair in run.pairs["twin"]] == [
        ("detection", "score"),
        ("detection", "balanced_accuracy"),
        ("detection", "fuzzing"),
        ("score", "balanced_accuracy"),
        ("score", "fuzzing"),
        ("balanced_accuracy", "fuzzing"),
    ]
    assert run.pairs["all dictionaries"][0].correlation.n == 8
    assert list(run.means) == ["known", "twin", "random tokens"]
    assert run.means["known"]["score"].value == 0.75


def test_tables_and_numbers_come_back_from_json(report):
    found = compare_scores({"a": report, "b": changed(report)})
    assert Agreement.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert "| detection and score | 1.00 | 1.00 |" in found.table()
    assert "| differ in | seed |" in found.table()
    assert "| features in both | 4 |" in found.table()
    with pytest.raises(ValueError, match="this agreement is no Agreement of this version"):
        Agreement.from_dict({"runs": 1})
    with pytest.raises(ValueError, match="there are no ComSem reports"):
        compare_scores({})
