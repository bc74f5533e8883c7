import numpy as np
import pytest

from bae_lens.entropy.saturation import fit_saturation


def test_saturation_of_a_known_curve():
    positions = np.array([1.0, 2, 4, 8, 16, 32, 64, 128])
    bits = 100 - 60 * np.exp(-(positions - 1) / 10)
    found = fit_saturation("hook", positions, bits, np.full(8, 0.5))
    assert found is not None
    assert found.level == pytest.approx(100, abs=0.1)
    assert found.position == pytest.approx(1 + 10 * np.log(20), rel=0.03)
    assert found.reached
    assert found.level_interval[0] < 100 < found.level_interval[1] < 102
    assert found.position_interval[0] < found.position < found.position_interval[1]


def test_a_curve_that_goes_on_rising_has_not_saturated():
    positions = np.array([1.0, 2, 4, 8, 16])
    found = fit_saturation("hook", positions, 10 + positions, np.full(5, 0.1))
    assert found is not None
    assert not found.reached
    assert found.position_interval[1] > 100


def test_no_saturation_of_three_points_or_of_a_falling_curve():
    assert fit_saturation("hook", np.arange(1.0, 4), np.arange(3.0), np.ones(3)) is None
    assert fit_saturation("hook", np.arange(1.0, 6), -np.arange(5.0), np.ones(5)) is None


def test_a_curve_that_rises_no_more_than_its_errors_is_not_fitted():
    positions, bits = np.array([1.0, 2, 4, 8, 16, 32]), np.array([100.0, 103, 99, 104, 101, 102])
    assert fit_saturation("hook", positions, bits, np.full(6, 5.0)) is None


def test_errors_that_the_curve_belies_widen_the_intervals():
    positions, bits = np.array([1.0, 2, 4, 8, 16, 32, 64, 128]), np.array([40.0, 52, 55, 73, 78, 96, 97, 103])
    widths = []
    for errors in (0.1, 1.0):
        found = fit_saturation("hook", positions, bits, np.full(8, errors))
        assert found is not None
        widths.append(found.level_interval[1] - found.level_interval[0])
    assert widths[0] > 1
    assert widths[0] == pytest.approx(widths[1], rel=0.2)
