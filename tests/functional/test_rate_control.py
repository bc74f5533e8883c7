import math

import pytest
import torch

from bae_lens import marginal_entropy
from bae_lens.functional.rate_control import (
    INTEGRAL,
    PROPORTIONAL,
    RANGE,
    controlled_coefficient,
    excess,
    excess_bits,
    excess_l0,
    updated_multiplier,
)


@pytest.mark.parametrize(("target", "excess"), [(3.0, 0.0), (4.0, -0.25), (2.0, 0.5), (1.0, 1.0), (300.0, -0.99)])
def test_excess_of_features(target, excess):
    assert excess_l0(torch.tensor([0.5, 0.5, 1.0, 1.0]), target).item() == pytest.approx(excess)


def test_excess_of_bits_is_that_of_the_entropy_where_the_batch_is_like_the_past():
    prior = torch.rand(200, dtype=torch.float64) * 0.1

    excess = excess_bits(prior, prior, 60.0)

    assert excess.item() == pytest.approx(marginal_entropy(prior).item() / 60 - 1)


def test_bits_are_not_underestimated_by_rare_features_that_are_silent_in_a_batch():
    prior = torch.full((4096,), 1 / 256, dtype=torch.float64)
    code = torch.rand(100, 512, 4096, generator=torch.Generator().manual_seed(0)) < 1 / 256
    rates = code.double().mean(1)
    truth = marginal_entropy(prior).item()

    excess = torch.stack([excess_bits(rate, prior, truth) for rate in rates])

    assert marginal_entropy(rates).mean() / truth - 1 < -0.03
    assert abs(excess.mean()) < 0.002


def test_before_any_feature_fired_there_are_no_bits():
    assert excess_bits(torch.zeros(5), torch.zeros(5), 2.0) == -1


def test_excess_is_over_the_target_that_is_set():
    rate, prior = torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.0])

    assert excess(rate, prior, None, None) == 0
    assert excess(rate, prior, 2.0, None) == excess_l0(rate, 2.0) == -0.25
    assert excess(rate, prior, None, 2.0) == excess_bits(rate, prior, 2.0) == 0.5  # 2 bits a feature, so 3 of 2 bits


def test_one_step_worked_by_hand():
    multiplier, excess = torch.tensor(2.0), torch.tensor(-0.5)

    assert controlled_coefficient(multiplier, excess).item() == pytest.approx(2 * math.exp(-PROPORTIONAL / 2))
    assert updated_multiplier(multiplier, excess).item() == pytest.approx(2 * math.exp(-INTEGRAL / 2))
    assert updated_multiplier(torch.tensor(RANGE[1]), torch.tensor(1.0)) == RANGE[1]
    assert updated_multiplier(torch.tensor(RANGE[0]), torch.tensor(-1.0)) == RANGE[0]


@pytest.mark.parametrize("lag", [1, 30])
@pytest.mark.parametrize("start", [0.02, 50.0])
def test_holds_a_rate_that_answers_late_and_drifts(lag, start):
    """The rate follows `30 / coefficient^0.7` with a lag, and a code that improves needs a falling coefficient."""
    multiplier, l0, errors = torch.tensor(1.0), 200.0, []
    for step in range(1500):
        excess = excess_l0(torch.tensor([l0]), 32.0)
        coefficient = start * controlled_coefficient(multiplier, excess).item()
        multiplier = updated_multiplier(multiplier, excess)
        l0 += (30 * math.exp(-step / 3000) * coefficient**-0.7 - l0) / lag
        errors.append(l0 / 32 - 1)

    assert max(map(abs, errors[500:])) < 0.02
