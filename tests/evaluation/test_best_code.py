import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig, Transcoder, TranscoderConfig

from bae_lens import BAE, BAEConfig, BinaryTranscoder, BinaryTranscoderConfig, evaluate_dictionary
from bae_lens.evaluation import best_code
from bae_lens.evaluation.best_code import BestCode
from bae_lens.functional.losses import marginal_entropy


def random(sae):
    for parameter in sae.parameters():
        parameter.data.normal_()
    return sae


def relu(d_in=8, d_sae=24, **config):
    return random(StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False, **config)))


def bae(**config):
    sae = random(BAE(BAEConfig(d_in=8, d_sae=24, **config)))
    sae.b_enc.data.fill_(-4)  # on for about one vector in twelve
    return sae


def topk(k, d_in=8, d_sae=24, **config):
    return random(TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **config)))


def errors(sae, code, target):
    return (sae.decode(code) - target).square().sum(1)


@pytest.mark.parametrize(
    "sae",
    [relu(), topk(1), topk(5), topk(5, rescale_acts_by_decoder_norm=True)],
    ids=["ReLU", "k 1", "k 5", "rescaled"],
)
@torch.no_grad()
def test_no_vector_has_more_features_or_a_larger_error_than_the_encoder_gives(sae):
    x = torch.randn(200, 8)
    own, best = sae.encode(x), BestCode(sae)
    chosen, refitted = best(own, x), best.refit(own, x)
    assert (chosen >= 0).all()
    assert (chosen.count_nonzero(1) <= own.count_nonzero(1)).all()
    assert not refitted[own == 0].any()
    assert (errors(sae, refitted, x) <= errors(sae, own, x) + 1e-4).all()
    assert (errors(sae, chosen, x) <= errors(sae, refitted, x) + 1e-4).all()
    assert errors(sae, refitted, x).sum() < 0.95 * errors(sae, own, x).sum()
    assert errors(sae, chosen, x).sum() < 0.95 * errors(sae, refitted, x).sum()


@torch.no_grad()
def test_hand_number():
    # One feature of a row 2 (1, 0), encoded as 1: the best value for (3, 4) is 3/2, which leaves 4^2 of an error.
    sae = StandardSAE(StandardSAEConfig(d_in=2, d_sae=1, apply_b_dec_to_input=False))
    weights = {"W_enc": [[1 / 3], [0.0]], "b_enc": [0.0], "W_dec": [[2.0, 0.0]], "b_dec": [0.0, 0.0]}
    sae.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    x = torch.tensor([[3.0, 4.0]])
    chosen = BestCode(sae)(sae.encode(x), x)
    assert sae.encode(x).item() == pytest.approx(1)
    assert chosen.item() == pytest.approx(1.5)
    assert errors(sae, chosen, x).item() == pytest.approx(16)


@torch.no_grad()
def test_dead_features_and_codes_in_which_nothing_fires():
    sae = relu()
    sae.W_dec[3] = 0
    sae.b_enc[5] = -100
    x = torch.randn(50, 8)
    assert not BestCode(sae)(sae.encode(x), x)[:, 3].any()
    sae.b_enc.fill_(-100)
    assert not BestCode(sae)(sae.encode(x), x).any()


@torch.no_grad()
def test_vectors_with_too_many_features_keep_the_encoders_code(monkeypatch):
    sae, x = relu(), torch.randn(100, 8)
    own = sae.encode(x)
    monkeypatch.setattr(best_code, "MOST_FEATURES", 12)
    chosen, many = BestCode(sae)(own, x), own.count_nonzero(1) > 12
    assert 0 < many.sum() < 100
    assert chosen[many].equal(own[many])
    assert not chosen[~many].equal(own[~many])


@torch.no_grad()
def test_bits_are_those_of_the_dictionary_at_its_price():
    sae, x = bae(), torch.randn(200, 8)
    sae.estimate_prior(x)
    sae.bit_price.fill_(0.3)
    assert BestCode(sae)(sae.encode(x), x).equal(sae.encode_optimized(x))


@pytest.mark.parametrize("price", [torch.nan, 0.0])
@torch.no_grad()
def test_without_a_price_the_code_takes_as_many_bits_as_the_encoders(price):
    sae, x = bae(), torch.randn(1000, 8)
    sae.bit_price.fill_(price)
    own = sae.encode(x)
    chosen = BestCode(sae)(own, x)
    bits, own_bits = (marginal_entropy(code.double().mean(0)).item() for code in (chosen, own))
    assert 0.85 * own_bits < bits <= own_bits
    assert errors(sae, chosen, x).sum() < 0.7 * errors(sae, own, x).sum()


@torch.no_grad()
def test_a_transcoders_code_is_chosen_for_what_it_should_write():
    x, y = torch.randn(100, 4), torch.randn(100, 6)
    real = random(Transcoder(TranscoderConfig(d_in=4, d_sae=20, d_out=6, apply_b_dec_to_input=False)))
    binary = random(BinaryTranscoder(BinaryTranscoderConfig(d_in=4, d_sae=20, d_out=6)))
    for sae in (real, binary):
        own = sae.encode(x)
        assert errors(sae, BestCode(sae)(own, y), y).sum() < 0.8 * errors(sae, own, y).sum()


def test_both_codes_are_measured():
    sae, x = topk(5), torch.randn(300, 8)
    metrics = evaluate_dictionary(sae, x, batch_size=300)
    alone = evaluate_dictionary(sae, x, optimize=False)
    assert (alone.optimized, alone.refitted) == (None, None)
    assert alone.code == metrics.code
    optimized, refitted = metrics.optimized, metrics.refitted
    assert optimized is not None
    assert refitted is not None
    with torch.no_grad():
        code = BestCode(sae)(sae.encode(x), x)
    variance = (x.double() - x.double().mean(0)).square().sum()
    expected = 1 - errors(sae, code, x).double().sum() / variance
    assert optimized.explained_variance == pytest.approx(expected.item(), rel=1e-5)
    assert metrics.explained_variance < refitted.explained_variance < optimized.explained_variance
    assert optimized.code.firing_rates == pytest.approx((code != 0).double().mean(0).tolist())
    assert optimized.bits == optimized.code.support_bits + optimized.value_bits
    assert optimized.jointly_coded.bits == pytest.approx(optimized.code.joint_bits + optimized.value_bits)
    assert optimized.jointly_coded.explained_variance == optimized.coded.explained_variance
    curve, joint = optimized.value_curve, optimized.joint_value_curve
    less = optimized.code.support_bits - optimized.code.joint_bits
    assert [point.bits for point in joint] == pytest.approx([point.bits - less for point in curve])


def test_a_binary_code_has_no_values_to_refit():
    metrics = evaluate_dictionary(bae(), torch.randn(200, 8))
    assert metrics.refitted is None
    assert metrics.optimized is not None
    assert metrics.optimized.value_curve == []
    assert metrics.optimized.explained_variance > metrics.explained_variance


def test_a_norm_of_each_vector_leaves_no_code_to_choose():
    metrics = evaluate_dictionary(bae(normalize_activations="layer_norm"), torch.randn(20, 8))
    assert (metrics.optimized, metrics.refitted) == (None, None)


def test_targets_that_are_not_finite_are_refused():
    x = torch.randn(20, 8)
    x[3, 2] = torch.nan
    for sae in (relu(), bae()):
        with pytest.raises(ValueError, match="1 of 20 hold NaN"):
            evaluate_dictionary(sae, x)
