import math

import pytest
import torch

from bae_lens.functional.explained_variance import ExplainedVariance


def accumulated(target: torch.Tensor, sae_out: torch.Tensor, batch_size: int) -> ExplainedVariance:
    variance = ExplainedVariance()
    for batch in zip(target.split(batch_size), sae_out.split(batch_size), strict=True):
        variance.add(*batch)
    return variance


def test_one_minus_error_over_variance_by_hand():
    target = torch.tensor([[0.0, 0.8], [1.0, 0.0], [0.0, 1.0], [1.4, 0.0]])
    code = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    # errors 0.2^2 + 0.4^2; means 0.6 and 0.45; distances 0.36 + 0.16 + 0.36 + 0.64 and 0.35^2 + 2 * 0.45^2 + 0.55^2
    for batch_size in (1, 3, 4):
        variance = accumulated(target, code, batch_size)
        assert (variance.n, variance.varies) == (4, True)
        assert variance.error == pytest.approx(0.2)
        assert variance.variance == pytest.approx(2.35)
        assert variance.squares == pytest.approx(0.64 + 1 + 1 + 1.96)
        assert variance.explained == pytest.approx(1 - 0.2 / 2.35)


def test_a_far_mean_cancels_nothing():
    target = torch.randn(500, 3, dtype=torch.float64) + 1e6
    expected = (target - target.mean(0)).square().sum().item()
    assert accumulated(target, target, 64).variance == pytest.approx(expected, rel=1e-9)
    assert accumulated(target, target, 64).explained == 1


def test_vectors_that_are_all_the_same_have_no_variance_to_explain():
    same = torch.full((5, 2), 0.1)
    variance = accumulated(same, same + 1, 2)
    assert not variance.varies
    assert variance.error == pytest.approx(10)
    assert math.isnan(variance.explained)
