from typing import Any

import pytest
import torch
from sae_lens import SAE, SkipTranscoder
from sae_lens.saes.sae import SAEMetadata, TrainStepInput

from bae_lens import (
    BinaryTranscoder,
    TopKTranscoder,
    TrainingBinaryTranscoder,
    TrainingBinaryTranscoderConfig,
    TrainingTopKTranscoder,
    TrainingTopKTranscoderConfig,
    TrainingTranscoder,
    TrainingTranscoderConfig,
    edit,
    evaluate_dictionary,
)
from bae_lens.saes.skip import skip_output
from bae_lens.saes.standardization import PairStandardization, Standardization

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, D_OUT = 6, 24, 10
TRAINED: dict[str, Any] = {
    "relu": (TrainingTranscoder, TrainingTranscoderConfig, {"l1_coefficient": 0.7}, SkipTranscoder),
    "topk": (TrainingTopKTranscoder, TrainingTopKTranscoderConfig, {"k": 4}, TopKTranscoder),
    "binary": (TrainingBinaryTranscoder, TrainingBinaryTranscoderConfig, {}, BinaryTranscoder),
}


def arbitrary(kind: str, d_in: int = D_IN, d_out: int = D_OUT, hooks: str = "a=>b", **overrides: Any) -> Any:
    """A transcoder with a skip connection, in training, whose every weight is drawn."""
    sae_class, config_class, defaults, _ = TRAINED[kind]
    values = {"d_in": d_in, "d_sae": D_SAE, "d_out": d_out, "skip": True, "metadata": SAEMetadata(hook_name=hooks)}
    sae = sae_class(config_class(**{**values, "dtype": "float64", **defaults, **overrides}))
    for parameter in sae.parameters():
        parameter.data.normal_()
    return sae


def pairs(n: int = 40) -> torch.Tensor:
    return torch.randn(n, D_IN + D_OUT, dtype=torch.float64) * 3 + 2


def step(sae: Any, batch: torch.Tensor, number: int = 0) -> Any:
    return sae.training_forward_pass(
        TrainStepInput(batch, {"l1": 0.7, "entropy": 0.3, "covariance": 0}, None, number, False)
    )


@pytest.mark.parametrize("kind", TRAINED)
def test_it_begins_with_nothing(kind):
    sae_class, config_class, defaults, _ = TRAINED[kind]
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, d_out=D_OUT, skip=True, **defaults))
    assert sae.W_skip.shape == (D_OUT, D_IN)
    assert not sae.W_skip.any()
    assert not hasattr(sae_class(config_class(d_in=D_IN, d_sae=D_SAE, d_out=D_OUT, **defaults)), "W_skip")


def test_by_hand():
    sae = arbitrary("relu", d_in=2, d_out=1)
    for parameter in sae.parameters():
        parameter.data.zero_()
    sae.b_dec.data.fill_(0.5)
    sae.W_skip.data.copy_(torch.tensor([[2.0, -3.0]]))
    batch = torch.tensor([[1.0, 4.0, 0.0]], dtype=torch.float64)
    assert step(sae, batch).sae_out.item() == 2 * 1 - 3 * 4 + 0.5
    assert step(sae, batch).losses["mse_loss"].item() == 9.5**2


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_it_is_added_in_training_and_gets_a_gradient(kind):
    sae, batch = arbitrary(kind), pairs()
    x, y = batch.split([D_IN, D_OUT], dim=-1)
    output = step(sae, batch)
    expected = sae.decode(sae.encode(x)) + x @ sae.W_skip.T
    torch.testing.assert_close(output.sae_out, expected)
    output.losses["mse_loss"].backward()
    torch.testing.assert_close(sae.W_skip.grad, 2 * (expected - y).detach().T @ x / len(x))


def test_the_binary_one_s_is_in_standardized_units():
    sae, batch = arbitrary("binary", standardize_activations=True), pairs()
    for number in range(3):
        output = step(sae, batch + number, number)
    x = (batch + 2)[:, :D_IN]
    source, target = sae.standardization.source, sae.standardization.target
    standardized = sae.encode(x) @ sae.W_dec + sae.b_dec + source(x) @ sae.W_skip.T
    torch.testing.assert_close(output.sae_out, target.raw(standardized), rtol=1e-6, atol=1e-6)


def test_following_the_means_changes_nothing_that_comes_out():
    sae = arbitrary("binary", standardize_activations=True)
    step(sae, pairs())
    x = pairs()[:, :D_IN]
    before, mean = sae(x), sae.standardization.source.mean.clone()
    sae._prepare(TrainStepInput(pairs() + 5, {}, None, 1, False))
    assert not sae.standardization.source.mean.allclose(mean)
    torch.testing.assert_close(sae(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_saved_gives_the_same(kind, tmp_path):
    sae, batch = arbitrary(kind), pairs()
    step(sae, batch)
    x = batch[:, :D_IN]
    expected = sae.decode(sae.encode(x)) + skip_output(sae, x)

    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)

    assert type(loaded) is TRAINED[kind][3]
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(loaded.decode(loaded.encode(x)), loaded(x))
    loaded.save_model(tmp_path / "again")
    assert SAE.load_from_disk(tmp_path / "again")(x).equal(loaded(x))


@pytest.mark.parametrize("kind", TRAINED)
def test_weights_absorb_the_standardizations_of_both_sides(kind):
    settings: dict[str, Any] = {"standardize_activations": False} if kind == "binary" else {}
    sae = arbitrary(kind, **settings)
    x = pairs()[:, :D_IN]
    source = Standardization(torch.randn(D_IN, dtype=torch.float64), 0.3)
    target = Standardization(torch.randn(D_OUT, dtype=torch.float64), 4.0)
    expected = (sae.decode(sae.encode(source(x))) + skip_output(sae, source(x))) / target.scale + target.mean
    PairStandardization(source, target).fold_into(sae)
    torch.testing.assert_close(sae.decode(sae.encode(x)) + skip_output(sae, x), expected)


@pytest.fixture
def saved(tmp_path) -> Any:
    def saved_one(kind: str, **arguments: Any) -> Any:
        sae = arbitrary(kind, dtype="float32", **arguments)
        sae.save_inference_model(tmp_path / kind)
        return SAE.load_from_disk(tmp_path / kind)

    return saved_one


@pytest.mark.parametrize("kind", TRAINED)
def test_measures_are_of_the_whole_output(kind, saved):
    sae, (x, y) = saved(kind), pairs(300).float().split([D_IN, D_OUT], dim=-1)
    y += x @ sae.W_skip.T.detach()
    metrics = evaluate_dictionary(sae, x, y)
    out = sae(x).detach().double()
    error = (y - out).square().sum()
    assert metrics.explained_variance == pytest.approx(
        1 - float(error / (y.double() - y.double().mean(0)).square().sum())
    )
    assert metrics.cosine_similarity == pytest.approx(float(torch.cosine_similarity(out, y.double()).mean()))
    assert metrics.optimized is not None
    assert metrics.optimized.explained_variance > metrics.explained_variance
    if kind != "binary":
        assert metrics.value_curve[-1].explained_variance == pytest.approx(metrics.explained_variance, rel=0.02)


def test_graded_view_keeps_it(saved):
    sae, x = saved("binary"), pairs()[:, :D_IN].float()
    graded = sae.to_graded_sae()
    assert (graded.encode(x) > 0).equal(sae.encode(x) > 0)
    torch.testing.assert_close(graded(x) - graded.decode(graded.encode(x)), x @ sae.W_skip.T)


@pytest.mark.parametrize("kind", TRAINED)
def test_in_a_model(kind, saved, tiny_model):
    hook_name, hook_name_out = "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"
    sae = saved(kind, d_in=16, d_out=16, hooks=f"{hook_name}=>{hook_name_out}")
    tokens = torch.randint(4, 64, (3, 12))
    _, cache = tiny_model.run_with_cache(tokens)
    expected = tiny_model.run_with_hooks(
        tokens,
        fwd_hooks=[(hook_name_out, lambda x, hook: sae(cache[hook_name]))],  # noqa: ARG005
    )
    with edit(tiny_model, sae, {}, keep_error=False):
        torch.testing.assert_close(tiny_model(tokens), expected)


def test_sae_lens_leaves_it_out_where_it_attaches_a_transcoder(saved, tiny_model):
    hook_name, hook_name_out = "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"
    sae = saved("relu", d_in=16, d_out=16, hooks=f"{hook_name}=>{hook_name_out}")
    tokens = torch.randint(4, 64, (3, 12))
    attached = tiny_model.run_with_saes(tokens, saes=[sae])
    sae.W_skip.data.zero_()
    torch.testing.assert_close(tiny_model.run_with_saes(tokens, saes=[sae]), attached)
