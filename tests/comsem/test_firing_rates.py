from collections import Counter

import pytest

from bae_lens.comsem.firing_rates import bin_edges, common_bins, frequency_bin, frequency_matched


def test_bins_are_half_decades():
    assert [frequency_bin(rate) for rate in (1.0, 0.9, 0.33, 0.3, 0.1001, 0.0999, 1e-3 * 1.01, 0.0)] == [
        -1, -1, -1, -2, -2, -3, -6, -99,
    ]  # fmt: skip
    assert bin_edges(-2) == pytest.approx((0.1, 10**-0.5))


def test_matched_means_compare_dictionaries_at_the_same_rates():
    rare, common = 0.002, 0.2
    values = {"a": [(rare, 1.0)] * 3 + [(common, 0.0)], "b": [(rare, 0.8)] + [(common, 0.2)] * 3}
    # both have at least a quarter of their features in either bin, so both bins weigh a half
    assert frequency_matched(values) == {"a": pytest.approx(0.5), "b": pytest.approx(0.5)}
    assert frequency_matched({"a": [(rare, 1.0)], "b": [(common, 1.0)]}) == {"a": None, "b": None}
    assert frequency_matched({"a": [], "b": []}) == {"a": None, "b": None}


def test_common_bins_are_what_every_dictionary_can_give():
    rare, usual, often = 0.002, 0.02, 0.2
    rates = {"a": [rare] * 3 + [usual] * 5, "b": [rare] * 2 + [usual] * 9 + [often] * 4}
    assert common_bins(rates, None, 0) == {frequency_bin(rare): 2, frequency_bin(usual): 5}
    few = common_bins(rates, 3, 0)
    assert few.total() == 3
    assert few <= common_bins(rates, 7, 0) == common_bins(rates, None, 0)
    drawn = sum((common_bins(rates, 1, seed) for seed in range(70)), Counter())
    assert 8 < drawn[frequency_bin(rare)] < 35, "about 2 of 7"


def test_dictionaries_without_common_rates_are_refused():
    with pytest.raises(ValueError, match=r"a, b have no firing rates in common .* leave match_firing_rates out"):
        common_bins({"a": [0.2], "b": [0.002]}, None, 0)
