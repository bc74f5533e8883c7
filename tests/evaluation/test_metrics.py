import math

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig

from bae_lens import BinaryTranscoder, BinaryTranscoderConfig
from bae_lens.evaluation.metrics import CodeCounter, activated_features, evaluate_dictionary, firing_rates


def test_metrics_of_a_known_code(identity_bae):
    # columns: always on, dead, on for 2 of 8, on for 6 of 8, and 8 rows
    codes = torch.tensor([[1, 0, i < 2, i < 6] for i in range(8)], dtype=torch.float32)
    bae = identity_bae(4)
    metrics = evaluate_dictionary(bae, codes, batch_size=3)
    assert metrics.code.n_tokens == 8
    assert metrics.explained_variance == 1
    assert metrics.code.firing_rates == [1, 0, 0.25, 0.75]
    assert metrics.code.l0 == 2.0
    assert metrics.code.informative_l0 == 0.5
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))  # 0.8113 bits, twice
    assert metrics.code.support_bits == pytest.approx(2 * quarter)
    assert (metrics.code.dead, metrics.code.always_on, metrics.code.dense) == (1, 1, 2)
    assert metrics.is_binary
    assert not bae.prior.any()  # as it was


def test_explained_variance_is_one_minus_error_over_variance(identity_bae):
    bae = identity_bae(2)
    x = torch.tensor([[0.0, 0.8], [1.0, 0.0], [0.0, 1.0], [1.4, 0.0]])
    # errors 0.2^2 + 0.4^2 = 0.2; means 0.6 and 0.45
    # squared distances 0.36 + 0.16 + 0.36 + 0.64 and 0.35^2 + 2 * 0.45^2 + 0.55^2
    expected = 1 - 0.2 / (1.52 + 0.1225 + 0.405 + 0.3025)
    assert evaluate_dictionary(bae, x).explained_variance == pytest.approx(expected, rel=1e-6)


def test_feature_activated_needs_eight_instances(identity_bae):
    codes = torch.zeros(100, 3)
    codes[:8, 0] = 1
    codes[8:15, 1] = 1
    assert evaluate_dictionary(identity_bae(3), codes).code.feature_activated == 1


def test_bae_counts_surprising_zeros_as_activated_and_a_relu_sae_its_ten_largest_positive(identity_bae):
    bae = identity_bae(2)
    bae.prior.copy_(torch.tensor([0.9, 0.1]))
    assert activated_features(bae, torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist() == [[-1, -1], [0, 1]]
    sae = StandardSAE(StandardSAEConfig(d_in=2, d_sae=12))
    strengths = torch.tensor([[0.0, 3, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11], [0.0] * 11 + [1]])
    assert activated_features(sae, strengths).tolist() == [[11, 10, 9, 8, 7, 6, 5, 4, 1, 3], [11] + [-1] * 9]


def test_bae_that_never_fires_is_measured(identity_bae):
    code = evaluate_dictionary(identity_bae(3), torch.rand(9, 3) / 4).code
    assert (code.l0, code.dead, code.feature_activated, code.support_bits) == (
        0,
        3,
        0,
        0,
    )


def test_strength_is_relative_to_the_firing_rates_on_these_activations(identity_bae):
    x = torch.zeros(100, 2)
    x[:90, 0] = 1
    assert evaluate_dictionary(identity_bae(2), x).code.feature_activated == 1  # by the 10 rows where it is silent
    assert evaluate_dictionary(identity_bae(2), x[:90]).code.feature_activated == 0


def test_firing_rates_are_shares_of_all_rows():
    codes = [torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.5]])]
    assert firing_rates(iter(codes)).tolist() == pytest.approx([2 / 3, 1 / 3])
    with pytest.raises(ValueError, match="no activations to evaluate on"):
        firing_rates([])


def test_a_dead_code_of_values_is_not_binary():
    sae = StandardSAE(StandardSAEConfig(d_in=2, d_sae=4))
    sae.b_enc.data.fill_(-100.0)
    metrics = evaluate_dictionary(sae, torch.randn(20, 2))
    assert (metrics.is_binary, metrics.value_curve, metrics.code.dead) == (False, [], 4)


def test_nothing_to_evaluate_on_is_refused(identity_bae):
    with pytest.raises(ValueError, match="no activations"):
        evaluate_dictionary(identity_bae(2), torch.zeros(0, 2))


def test_a_real_code_is_measured_by_what_it_writes():
    sae = StandardSAE(StandardSAEConfig(d_in=5, d_sae=12, apply_b_dec_to_input=False))
    for parameter in sae.parameters():
        parameter.data.normal_()
    x = torch.randn(100, 5)
    metrics = evaluate_dictionary(sae, x, batch_size=33)
    out, target = sae(x).double(), x.double()
    fired = sae.encode(x) > 0
    squared_error = (out - target).square().sum(1)
    assert metrics.mean_squared_error == pytest.approx(squared_error.mean().item(), rel=1e-6)
    variance = (target - target.mean(0)).square().sum()
    assert metrics.explained_variance == pytest.approx((1 - squared_error.sum() / variance).item(), rel=1e-6)
    angles = (out * target).sum(1) / out.norm(dim=1) / target.norm(dim=1)
    assert metrics.cosine_similarity == pytest.approx(angles.mean().item(), rel=1e-6)
    assert metrics.l2_ratio == pytest.approx((out.norm(dim=1) / target.norm(dim=1)).mean().item(), rel=1e-6)
    assert metrics.code.l0 == pytest.approx(fired.double().sum(1).mean().item())
    assert metrics.code.firing_rates == pytest.approx(fired.double().mean(0).tolist())
    assert metrics.value_bits > 0
    assert metrics.bits == metrics.code.support_bits + metrics.value_bits
    chosen = [point for point in metrics.value_curve if point.bits == pytest.approx(metrics.bits)]
    assert chosen[0].explained_variance > metrics.explained_variance - 0.01


def test_transcoder_is_compared_with_its_targets():
    sae = BinaryTranscoder(BinaryTranscoderConfig(d_in=4, d_sae=10, d_out=6))
    for parameter in sae.parameters():
        parameter.data.normal_()
    x, y = torch.randn(50, 4), torch.randn(50, 6)
    metrics = evaluate_dictionary(sae, x, y, batch_size=16)
    error = (sae(x) - y).square().sum()
    expected = 1 - error / (y - y.mean(0)).square().sum()
    assert metrics.explained_variance == pytest.approx(expected.item(), rel=1e-5)
    assert not sae.prior.any()  # as it was
    assert (metrics.value_bits, metrics.value_curve, metrics.bits) == (0, [], metrics.code.support_bits)


def test_bae_that_folds_to_rare_features_has_the_same_metrics(identity_bae):
    x = (torch.rand(200, 6) < torch.tensor([0.05, 0.2, 0.5, 0.8, 0.95, 1])).float()
    bae = identity_bae(6)
    before = evaluate_dictionary(bae, x)
    bae.estimate_prior(x)
    bae.fold_polarity()
    after = evaluate_dictionary(bae, x)
    assert after.code.l0 == pytest.approx(before.code.informative_l0) == pytest.approx(after.code.informative_l0)
    assert after.code.support_bits == pytest.approx(before.code.support_bits)
    assert after.code.dense == before.code.dense == 3
    assert after.code.feature_activated == before.code.feature_activated
    assert (before.code.always_on, before.code.dead, after.code.always_on, after.code.dead) == (1, 0, 0, 1)


def test_code_of_no_token_has_no_metrics(identity_bae):
    with pytest.raises(ValueError, match="there are no activations to evaluate on"):
        CodeCounter(identity_bae(4)).metrics()
