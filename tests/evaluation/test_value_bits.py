import math
from collections import Counter

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from bae_lens import evaluate_dictionary
from bae_lens.evaluation.value_bits import STEPS, cheapest_values, value_coding_curve
from bae_lens.functional.rate_distortion import RatePoint


def sae_with(W_enc: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor | None = None) -> StandardSAE:
    """A ReLU SAE with these weights and no encoder bias."""
    d_in, d_sae = W_enc.shape
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False, dtype="float64"))
    weights = {"W_enc": W_enc, "b_enc": torch.zeros(d_sae), "W_dec": W_dec}
    sae.load_state_dict({**weights, "b_dec": torch.zeros(d_in) if b_dec is None else b_dec})
    return sae


def test_bits_and_errors_are_those_of_a_direct_computation():
    sae = sae_with(torch.randn(4, 9), torch.randn(9, 4), torch.randn(4))
    x, y = torch.randn(60, 4).double(), torch.randn(60, 4).double()
    variance = (y - y.mean(0)).square().sum().item()

    coded = [(sae.encode(rows), target) for rows, target in zip(x.split(17), y.split(17), strict=True)]
    curve = value_coding_curve(sae, lambda: coded, support_bits=5.0, variance=variance)

    acts = sae.encode(x).detach()
    norms = sae.W_dec.detach().norm(dim=1)
    effects = acts * norms
    fired = effects[acts > 0]
    root_mean_square = (sum(value**2 for value in fired.tolist()) / len(fired)) ** 0.5
    assert len(curve) == len(STEPS)
    for point, relative_step in zip(curve, STEPS, strict=True):
        step = relative_step * root_mean_square
        table = Counter(round(value / step) for value in fired.tolist())
        bits = sum(-count * math.log2(count / len(fired)) for count in table.values()) / 60
        decoded = ((effects / step).round() * step / norms) @ sae.W_dec + sae.b_dec
        assert point.bits == pytest.approx(5 + bits)
        assert point.explained_variance == pytest.approx(1 - (decoded - y).square().sum().item() / variance)


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_each_batch_is_decoded_with_the_norms_of_its_own_vectors(normalization):
    sae = StandardSAE(
        StandardSAEConfig(d_in=6, d_sae=10, apply_b_dec_to_input=False, normalize_activations=normalization)
    )
    sae.W_dec.data.normal_()
    sae.W_enc.data.copy_(sae.W_dec.data.T)
    x = torch.randn(90, 6) * torch.rand(90, 1).mul(5).exp() + 3
    variance = (x.double() - x.double().mean(0)).square().sum().item()
    metrics = evaluate_dictionary(sae, x, batch_size=20)
    norms = sae.W_dec.detach().norm(dim=1)
    effects = sae.encode(x).detach() * norms
    root_mean_square = effects[effects > 0].double().square().mean().sqrt().item()
    assert len(metrics.value_curve) == len(STEPS)
    for point, relative_step in zip(metrics.value_curve, STEPS, strict=True):
        step = relative_step * root_mean_square
        sae.encode(x)
        decoded = sae.decode((effects / step).round() * step / norms).detach().double()
        assert point.explained_variance == pytest.approx(1 - (decoded - x).square().sum().item() / variance, abs=1e-5)


def test_finer_steps_cost_more_bits_and_lose_less():
    sae = sae_with(torch.eye(6), torch.eye(6))
    x = -torch.rand(500, 6).double().log()
    variance = (x - x.mean(0)).square().sum().item()
    curve = value_coding_curve(sae, lambda: [(sae.encode(x), x)], 0.0, variance)
    bits, explained = [point.bits for point in curve], [point.explained_variance for point in curve]
    assert list(STEPS) == sorted(STEPS, reverse=True)
    assert bits == sorted(bits)
    assert explained == sorted(explained)
    assert explained[-1] > 0.98 > 0.5 > explained[0]


def test_hand_number():
    # 1, 1, 2, 4 for one feature whose row has norm 2: effects 2, 2, 4, 8, whose mean square is 22. The step 2 sqrt(22)
    # makes 0, 0, 0, 1 of them: 0.8113 bits for each of four values over four tokens.
    sae = sae_with(torch.tensor([[1.0], [0]]), torch.tensor([[0.0, 2]]))
    x = torch.tensor([[1.0, 0], [1, 0], [2, 0], [4, 0]]).double()
    curve = value_coding_curve(sae, lambda: [(sae.encode(x), x)], support_bits=1.0, variance=1.0)
    assert STEPS[0] == 2
    assert curve[0].bits == pytest.approx(1 + 0.25 * 2 + 0.75 * math.log2(4 / 3))


def test_feature_that_does_not_fire_costs_nothing_and_zeros_are_not_coded():
    sae = sae_with(torch.eye(3), torch.eye(3))
    x = torch.zeros(1000, 3).double()
    x[:4, 0] = torch.tensor([1.0, 1, 2, 4])
    few, *_ = value_coding_curve(sae, lambda: [(sae.encode(x), x)], 0.0, 1.0)
    alone, *_ = value_coding_curve(sae, lambda: [(sae.encode(x[:4]), x[:4])], 0.0, 1.0)
    assert few.bits * 1000 == pytest.approx(alone.bits * 4)


def test_code_in_which_nothing_fires_has_no_curve():
    sae = sae_with(torch.eye(3), torch.eye(3))
    x = -torch.rand(9, 3).double()
    assert value_coding_curve(sae, lambda: [(sae.encode(x), x)], 3.0, 1.0) == []


def test_cheapest_values_are_the_fewest_bits_within_a_hundredth():
    curve = [RatePoint(10.0, 0.5), RatePoint(20.0, 0.793), RatePoint(30.0, 0.799), RatePoint(25.0, 0.795)]
    assert cheapest_values(curve, 0.80).bits == 20
    assert cheapest_values(curve, 0.804).bits == 25
    assert cheapest_values(curve, 0.9) == curve[-1]
