from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKSAE

from bae_lens import (
    BinaryTopK,
    BinaryTopKConfig,
    BinaryTopKTranscoder,
    BinaryTopKTranscoderConfig,
    TopKTranscoder,
    TrainingBinaryTopK,
    TrainingBinaryTopKConfig,
    TrainingBinaryTopKTranscoder,
    TrainingBinaryTopKTranscoderConfig,
    compress,
    decompress,
)
from bae_lens.saes.binary_code import is_binary
from bae_lens.saes.loading import load_bae, load_dictionary
from bae_lens.saes.saelens_compat import TrainStepInput


def binary_topk(k: int = 3, d_in: int = 6, d_sae: int = 12) -> BinaryTopK:
    sae = BinaryTopK(BinaryTopKConfig(d_in=d_in, d_sae=d_sae, k=k))
    for parameter in sae.parameters():
        parameter.data.normal_()
    return sae


def training(k: int = 3, d_in: int = 6, d_sae: int = 12, **config: Any) -> TrainingBinaryTopK:
    return TrainingBinaryTopK(TrainingBinaryTopKConfig(d_in=d_in, d_sae=d_sae, k=k, **config))


def step_input(x: torch.Tensor, step: int = 0) -> TrainStepInput:
    return TrainStepInput(x, {"entropy": 0.0, "covariance": 0.0}, None, step, False)


def test_the_k_largest_fire_as_far_as_they_are_positive():
    sae, x = binary_topk(), torch.randn(200, 6)
    pre, code = x @ sae.W_enc + sae.b_enc, sae.encode(x)
    assert is_binary(sae)
    for values, bits in zip(pre, code, strict=True):
        largest = values.topk(3).indices.tolist()
        assert bits.nonzero().flatten().tolist() == sorted(j for j in largest if values[j] >= 0)
    assert 1 < code.sum(1).mean() < 3
    assert torch.allclose(sae(x), code @ sae.W_dec + sae.b_dec, atol=1e-5)


def test_only_bits_that_were_chosen_have_the_gradient_of_the_sigmoid():
    sae, x = training(standardize_activations=False), torch.randn(20, 6)
    for parameter in sae.parameters():
        parameter.data.normal_()
    sae.training_forward_pass(step_input(x)).loss.backward()
    pre = (x @ sae.W_enc + sae.b_enc).detach()
    chosen = torch.zeros_like(pre).scatter_(1, pre.topk(3).indices, 1.0)
    code = chosen * (pre >= 0)
    error = code @ sae.W_dec + sae.b_dec - x
    of_bits = 2 * error @ sae.W_dec.T / len(x)
    smoothed = torch.sigmoid(pre)
    expected = of_bits * chosen * smoothed * (1 - smoothed)
    torch.testing.assert_close(sae.b_enc.grad, expected.sum(0).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.W_enc.grad, (x.T @ expected).detach(), rtol=1e-4, atol=1e-5)


def test_what_was_trained_is_saved_and_loaded(tmp_path):
    sae = training()
    optimizer = torch.optim.Adam(sae.parameters(), 1e-2)
    x = 3 + 2 * torch.randn(512, 6)
    losses = []
    for step in range(60):
        output = sae.training_forward_pass(step_input(x, step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.8 * losses[0]
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is BinaryTopK
    assert loaded.cfg.k == 3
    assert loaded.encode(x).equal(sae.encode(x))
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-4, atol=1e-4)
    assert loaded.encode(x).equal(sae.to_inference().encode(x))
    assert loaded.bit_price.isnan()  # k and no price decides how many bits there are
    assert loaded.prior.any()
    assert load_dictionary(tmp_path).encode(x).equal(loaded.encode(x))
    assert load_bae(tmp_path).encode(x).equal(loaded.encode(x))


def test_its_code_is_compressed(tmp_path):
    sae, x = binary_topk(), torch.randn(300, 6)
    compress(sae, x, tmp_path / "x.bae")
    torch.testing.assert_close(decompress(tmp_path / "x.bae", sae), sae(x))


def test_optimized_bits_start_at_the_k_largest():
    sae, x = binary_topk(), torch.randn(100, 6)
    sae.estimate_prior(x)
    with pytest.raises(ValueError, match="bit_price"):
        sae.encode_optimized(x)
    sae.bit_price.fill_(0.1)
    assert sae.encode_optimized(x, 0).equal(sae.encode(x))
    assert (sae.decode(sae.encode_optimized(x)) - x).square().sum() < (sae(x) - x).square().sum()


def test_graded_view_fires_on_the_same_features():
    sae, x = binary_topk(), torch.randn(100, 6)
    graded = sae.to_graded_sae()
    assert isinstance(graded, TopKSAE)
    assert (graded.encode(x) > 0).equal(sae.encode(x) > 0)


def test_what_a_topk_code_cannot_have():
    with pytest.raises(NotImplementedError, match="among the k largest"):
        binary_topk().fold_polarity()
    for k in (0, 13):
        with pytest.raises(ValueError, match=f"k must lie between 1 and d_sae = 12, got {k}"):
            binary_topk(k)
        with pytest.raises(ValueError, match=f"k must lie between 1 and d_sae = 12, got {k}"):
            training(k)
    with pytest.raises(ValueError, match="max_flips must be 0 for a binary_topk, whose bits have no price, got 8"):
        training(max_flips=8)
    with pytest.raises(ValueError, match="max_flips must be 0 for a binary_topk, whose bits have no price, got 1"):
        BinaryTopKConfig(d_in=6, d_sae=12, k=3, max_flips=1)
    assert binary_topk(12).encode(torch.randn(5, 6)).shape == (5, 12)
    assert (binary_topk(1).encode(torch.randn(50, 6)).sum(1) <= 1).all()


def test_a_transcoder_encodes_the_k_largest_and_writes_another_width():
    cfg = BinaryTopKTranscoderConfig(d_in=6, d_sae=12, d_out=4, k=3, skip=True)
    sae: Any = BinaryTopKTranscoder(cfg)
    x = torch.randn(100, 6)
    for parameter in sae.parameters():
        parameter.data.normal_()
    code, pre = sae.encode(x), x @ sae.W_enc + sae.b_enc
    assert code.bool().equal((pre >= pre.topk(3).values[:, -1:]) & (pre >= 0))
    torch.testing.assert_close(sae(x), code @ sae.W_dec + sae.b_dec + x @ sae.W_skip.T, rtol=1e-4, atol=1e-4)
    graded = sae.to_graded_sae()
    assert isinstance(graded, TopKTranscoder)
    assert (graded.encode(x) > 0).equal(code > 0)
    assert sae.W_skip.equal(graded.W_skip)
    with pytest.raises(NotImplementedError, match="its target is not known to encode"):
        sae.encode_optimized(x)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_trained_saved_and_loaded(tmp_path, skip):
    cfg = TrainingBinaryTopKTranscoderConfig(d_in=6, d_sae=12, d_out=4, k=3, skip=skip)
    assert (cfg.entropy_coefficient, cfg.encoder_bias_init) == (0.0, 0.0)  # as without a transcoder
    sae, x = TrainingBinaryTopKTranscoder(cfg), 3 + 2 * torch.randn(512, 6)
    pairs = torch.cat([x, 5 + 3 * (x @ torch.randn(6, 4)).tanh()], 1)
    optimizer, losses = torch.optim.Adam(sae.parameters(), 1e-2), []
    for step in range(60):
        output = sae.training_forward_pass(step_input(pairs, step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert output.feature_acts.sum(1).max() == 3
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is BinaryTopKTranscoder
    assert (loaded.cfg.k, loaded.cfg.d_out, loaded.cfg.skip) == (3, 4, skip)
    assert loaded.encode(x).equal(sae.encode(x))
    torch.testing.assert_close(loaded(x), sae(x), rtol=1e-4, atol=1e-4)
    assert loaded.bit_price.isnan()


def test_what_a_topk_transcoder_cannot_have():
    for config in (BinaryTopKTranscoderConfig, TrainingBinaryTopKTranscoderConfig):
        with pytest.raises(ValueError, match="k must lie between 1 and d_sae = 12, got 13"):
            config(d_in=6, d_sae=12, d_out=4, k=13)
        with pytest.raises(ValueError, match="max_flips must be 0 for a transcoder"):
            config(d_in=6, d_sae=12, d_out=4, k=3, max_flips=1)
    with pytest.raises(ValueError, match="d_out must be at least 1, got 0"):
        TrainingBinaryTopKTranscoderConfig(d_in=6, d_sae=12, d_out=0, k=3)
