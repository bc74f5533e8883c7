import numpy as np
import pytest
import torch

from bae_lens.functional import geometric_prior as module
from bae_lens.functional.geometric_prior import fit_prior, geometric_bits, rounded_bias, rounded_weight


def entropy(p):
    return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))


def words(*times):
    """How often (0, 0), (0, 1), (1, 0), (1, 1) occur."""
    pairs = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    return pairs.repeat_interleave(torch.tensor(times), dim=0)


def independent(n, d_sae, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rates = 0.5 * torch.rand(d_sae, generator=generator)
    return (torch.rand(n, d_sae, generator=generator) < rates).float()


def marginal_bits(code):
    p = code.double().mean(0)
    p = p[(p > 0) & (p < 1)]
    return entropy(p.numpy()).sum()


def test_two_features_by_hand():
    # The first fires in 1 of 2; the second then in 3 of 4, and else in 1 of 8: h(1/2) + (h(3/4) + h(1/8)) / 2.
    code = words(7 * 512, 512, 2 * 512, 6 * 512)
    weights = torch.tensor([[2.0, 3.0]])
    bits = geometric_bits(code, weights, weights.T)
    assert bits.joint == pytest.approx(1 + (entropy(3 / 4) + entropy(1 / 8)) / 2, rel=2e-3)
    assert bits.side == 2 * 16 / len(code)
    assert bits.total == bits.joint + bits.side


def test_only_features_before_count():
    """The second follows from the first, so that it takes no bits in this order; and the other way round."""
    code = words(500, 0, 0, 500)
    bits = geometric_bits(code, torch.ones(1, 2), torch.ones(2, 1))
    assert bits.joint == pytest.approx(1, abs=2e-3)
    blind = geometric_bits(code, torch.tensor([[1.0, 0.0]]), torch.ones(2, 1))  # nothing decoded lies along W_enc_1
    assert blind.joint == pytest.approx(2, abs=2e-3)


def test_values_are_decoded():
    """The second feature fires where the first has a large value, which its support alone does not say."""
    value = torch.tensor([1.0, 1.0, 3.0, 0.0]).repeat(256)
    acts = torch.stack([value, (value > 2) * 5.0], dim=1)
    weights = torch.ones(1, 2)
    assert geometric_bits(acts, weights, weights.T).joint == pytest.approx(entropy(3 / 4), abs=5e-3)
    assert geometric_bits((acts != 0).float(), weights, weights.T).joint > entropy(3 / 4) + 0.5


def test_independent_features_need_their_entropy():
    code = independent(8192, 40)
    W_dec = torch.randn(40, 16)
    assert geometric_bits(code, W_dec.T, W_dec).joint == pytest.approx(marginal_bits(code), rel=3e-3)


def test_a_code_that_is_known_needs_nothing():
    code = (torch.arange(4096) % 2 == 0).float()[:, None].repeat(1, 30)
    assert geometric_bits(code, torch.ones(1, 30), torch.ones(30, 1)).joint == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("always", [0.0, 1e4])
def test_what_follows_from_two_coins_needs_no_bits(always):
    """A third feature fires if both do: with large weights, around a mean that may be far from 0."""
    coins = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat(1024, 1)
    code = torch.cat([torch.ones(4096, 1), coins, coins.prod(1, keepdim=True)], dim=1)
    W_dec = torch.tensor([[always, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    W_enc = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    assert geometric_bits(code, W_enc, W_dec).joint == pytest.approx(2, abs=0.02)


@pytest.mark.parametrize("d_in", [1, 5])
def test_edges(d_in):
    one = torch.ones(3, 1)
    for code in (one, 0 * one, torch.tensor([[1.0, 0.0, 1.0]])):
        weights = torch.ones(d_in, code.shape[1])
        bits = geometric_bits(code, weights, weights.T)
        assert 0 <= bits.joint < 2 * code.shape[1]
    constant = torch.tensor([[1.0, 0.0, 1.0]]).repeat(5000, 1)
    weights = torch.ones(d_in, 3)
    assert geometric_bits(constant, weights, weights.T).joint < 2e-3


def test_no_bits_where_there_are_no_features():
    assert geometric_bits(torch.zeros(3, 0), torch.zeros(2, 0), torch.zeros(0, 2)).total == 0


def test_features_are_taken_some_at_a_time(monkeypatch):
    code, W_dec = independent(500, 23), torch.randn(23, 6)
    code[:, 7:] *= code[:, :16]
    whole = geometric_bits(code, W_dec.T, W_dec)
    for k in (1, 4, 22):
        monkeypatch.setattr(module, "FEATURES_AT_ONCE", k)
        assert geometric_bits(code, W_dec.T, W_dec).joint == pytest.approx(whole.joint, rel=1e-3)


def test_some_vectors_are_enough_to_learn_from(monkeypatch):
    code, W_dec = independent(8000, 20), torch.randn(20, 6)
    whole = geometric_bits(code, W_dec.T, W_dec)
    monkeypatch.setattr(module, "ROWS_OF_FIT", 1000)
    some = geometric_bits(code, W_dec.T, W_dec)
    assert whole.joint < some.joint < 1.02 * whole.joint


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_fit_finds_the_weights_that_made_the_bits(scale):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200_000, 3, generator=generator) + torch.tensor([0.0, 2.0, -3.0])
    weight, bias = torch.tensor([1.5, 0.5, 2.0]), torch.tensor([-2.0, -2.5, 3.0])
    on = torch.rand(scores.shape, generator=generator) < torch.sigmoid(weight * scores + bias)
    found = fit_prior(scale * scores, on)
    torch.testing.assert_close(scale * found[0], weight, rtol=0.03, atol=0.03)
    torch.testing.assert_close(found[1], bias + weight * scores.mean(0), rtol=0.03, atol=0.03)


def test_fit_is_the_most_likely():
    generator = torch.Generator().manual_seed(1)
    scores = 3 * torch.randn(3000, 8, generator=generator).double()
    on = torch.rand(scores.shape, generator=generator) < torch.sigmoid(scores * torch.linspace(0.05, 1, 8) - 2)
    weight, bias = fit_prior(scores, on)
    error = torch.sigmoid(weight * (scores - scores.mean(0)) + bias) - on.double()
    assert error.mean(0).abs().max() < 1e-4
    assert (error * scores).mean(0).abs().max() < 1e-3


def test_scores_that_do_not_vary_or_tell_without_fail():
    on = torch.arange(400)[:, None] % 4 == 0
    weight, bias = fit_prior(torch.full((400, 1), 7.0), on)
    assert weight.item() == 0
    assert bias.item() == pytest.approx(-np.log(3), rel=1e-2)
    weight, bias = fit_prior(on.float(), on)
    assert 8 < weight.item() < 60
    weight, bias = fit_prior(-on.float(), on)  # a feature never becomes rarer by what tells of it
    assert weight.item() == 0
    assert bias.item() == pytest.approx(-np.log(3), rel=1e-2)
    never, _ = fit_prior(torch.randn(400, 1), torch.zeros(400, 1, dtype=torch.bool))
    assert never.abs().item() < 1


def test_rounding_by_hand():
    weights = torch.tensor([0.0, 1.0, 1.06, 1.07, 15.4, 0.26, 0.99])
    assert rounded_weight(weights).tolist() == [0.0, 1.0, 1.0, 1.125, 15.0, 0.25, 1.0]
    assert rounded_bias(torch.tensor([0.1, 0.13, -3.4, -99.0])).tolist() == [0.0, 0.25, -3.5, -16.0]


def test_what_has_no_prior():
    with pytest.raises(ValueError, match="at least 1 vector"):
        geometric_bits(torch.zeros(0, 3), torch.zeros(2, 3), torch.zeros(3, 2))
