import numpy as np
import pytest
from scipy import stats

from bae_lens.comsem.estimates import (
    Estimate,
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
