from typing import Any

import numpy as np
import pytest
import sae_lens.evals
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig, Transcoder, TranscoderConfig
from sae_lens.evals import EvalConfig, get_eval_everything_config
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

from bae_lens import (
    BAE,
    BAEConfig,
    BinaryTranscoder,
    BinaryTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
    run_evals,
)
from bae_lens.evaluation.metrics import RATE_BINS, evaluate_dictionary

pytestmark = pytest.mark.usefixtures("one_thread")

HOOK, HOOK_Z = "blocks.0.hook_resid_post", "blocks.0.attn.hook_z"
HOOK_IN, HOOK_OUT = "blocks.0.mlp.hook_in", "blocks.1.mlp.hook_post"
BATCHES, PROMPTS = 3, 4
EVERYTHING = EvalConfig(
    batch_size_prompts=PROMPTS,
    n_eval_reconstruction_batches=2,
    n_eval_sparsity_variance_batches=BATCHES,
    compute_kl=True,
    compute_ce_loss=True,
    compute_l2_norms=True,
    compute_sparsity_metrics=True,
    compute_variance_metrics=True,
    compute_featurewise_density_statistics=True,
)


def metadata(hook_name: str, hook_name_out: str | None = None) -> SAEMetadata:
    return SAEMetadata(hook_name=hook_name, hook_name_out=hook_name_out, context_size=16, prepend_bos=True)


@pytest.fixture
def make_store(tiny_model: HookedSAETransformer, tiny_dataset: Dataset) -> Any:
    """Makes a store of activations that begins at the first text."""

    def make(sae: Any) -> ActivationsStore:
        return ActivationsStore.from_sae(
            tiny_model, sae, tiny_dataset, store_batch_size_prompts=PROMPTS, total_tokens=1000
        )

    return make


@pytest.fixture
def sae() -> StandardSAE:
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=40, apply_b_dec_to_input=False, metadata=metadata(HOOK)))
    sae.b_enc.data.normal_()
    return sae


@pytest.fixture
def bae() -> BAE:
    bae = BAE(BAEConfig(d_in=16, d_sae=40, metadata=metadata(HOOK)))
    bae.b_enc.data.normal_()
    return bae


@pytest.fixture
def transcoder(tiny_model: HookedSAETransformer) -> Transcoder:
    """From the first layer's MLP input into the second layer's MLP, with a decoder fitted by least squares."""
    cfg = TranscoderConfig(
        d_in=16, d_sae=60, d_out=32, apply_b_dec_to_input=False, metadata=metadata(HOOK_IN, HOOK_OUT)
    )
    sae = Transcoder(cfg)
    sae.b_enc.data.normal_()
    tokens = torch.cat([torch.zeros(100, 1, dtype=torch.long), torch.randint(4, 64, (100, 15))], dim=1)
    _, cache = tiny_model.run_with_cache(tokens)
    x, y = (cache[hook][:, 1:].flatten(0, 1) for hook in (HOOK_IN, HOOK_OUT))
    design = torch.cat([sae.encode(x).detach(), torch.ones(len(x), 1)], dim=1)
    solution = torch.linalg.lstsq(design, y, driver="gelsd").solution
    sae.W_dec.data, sae.b_dec.data = solution[:-1].contiguous(), solution[-1].contiguous()
    return sae


def read(store: ActivationsStore, *counts: int) -> list[torch.Tensor]:
    """The tokens of so many batches, one after another, as `run_evals` reads them from a fresh store."""
    return [torch.cat([store.get_batch_tokens(PROMPTS) for _ in range(count)]) for count in counts]


def test_sae_has_the_metrics_of_sae_lens(tiny_model, sae, make_store):
    metrics, features = run_evals(sae, make_store(sae), tiny_model, ActivationScaler(), EVERYTHING)
    expected, expected_features = sae_lens.evals.run_evals(
        sae, make_store(sae), tiny_model, ActivationScaler(), EVERYTHING
    )
    assert metrics.keys() - expected.keys() == {"code"}
    assert {group: metrics[group] for group in expected} == expected
    np.testing.assert_equal({name: features[name] for name in expected_features}, expected_features)  # NaN too
    assert features.keys() - expected_features.keys() == {"firing_rate", "firing_rate_histogram"}


def test_sae_has_the_metrics_of_sae_lens_with_an_activation_scaler(tiny_model, sae, make_store):
    scaler = ActivationScaler(scaling_factor=2.5)
    metrics, _ = run_evals(sae, make_store(sae), tiny_model, scaler, EVERYTHING)
    expected, _ = sae_lens.evals.run_evals(sae, make_store(sae), tiny_model, scaler, EVERYTHING)
    assert {group: metrics[group] for group in expected} == expected
    _, tokens = read(make_store(sae), 2, BATCHES)
    _, cache = tiny_model.run_with_cache(tokens, prepend_bos=False)
    fired = sae.encode(2.5 * cache[HOOK][tokens >= 4]) > 0
    assert metrics["code"]["l0"] == pytest.approx(fired.float().sum(-1).mean().item(), rel=1e-5)
    plain, _ = run_evals(sae, make_store(sae), tiny_model, ActivationScaler(), EVERYTHING)
    assert plain["code"]["l0"] != pytest.approx(metrics["code"]["l0"], rel=1e-3)


def test_transcoder_is_compared_with_the_activations_at_its_output_hook(tiny_model, transcoder, make_store):
    metrics, _ = run_evals(transcoder, make_store(transcoder), tiny_model, ActivationScaler(), EVERYTHING)

    _, tokens = read(make_store(transcoder), 2, BATCHES)
    _, cache = tiny_model.run_with_cache(tokens, prepend_bos=False)
    content = tokens >= 4
    x, y = (cache[hook][content].double() for hook in (HOOK_IN, HOOK_OUT))
    out = transcoder(x.float()).detach().double()
    explained = 1 - (out - y).square().sum() / (y - y.mean(0)).square().sum()
    assert explained > 0.5
    assert metrics["reconstruction_quality"]["explained_variance"] == pytest.approx(explained.item(), abs=1e-3)
    cosine = torch.cosine_similarity(out, y, dim=-1).mean()
    assert metrics["reconstruction_quality"]["cossim"] == pytest.approx(cosine.item(), abs=1e-4)
    assert metrics["shrinkage"]["l2_norm_in"] == pytest.approx(y.norm(dim=-1).mean().item(), rel=1e-4)
    fired = transcoder.encode(x.float()) > 0
    assert metrics["sparsity"]["l0"] == pytest.approx(fired.sum(-1).float().mean().item(), rel=1e-5)
    assert transcoder.cfg.metadata.hook_name == HOOK_IN


def test_cross_entropy_with_a_transcoder_is_that_of_a_manual_replacement(tiny_model, transcoder, make_store):
    transcoder.W_dec.data *= -2
    config = EvalConfig(
        batch_size_prompts=PROMPTS, n_eval_reconstruction_batches=1, compute_kl=True, compute_ce_loss=True
    )
    metrics, _ = run_evals(
        transcoder, make_store(transcoder), tiny_model, ActivationScaler(), config, exclude_special_tokens=False
    )

    (tokens,) = read(make_store(transcoder), 1)
    clean, cache = tiny_model.run_with_cache(tokens, prepend_bos=False)
    out = transcoder(cache[HOOK_IN])
    spliced = tiny_model.run_with_hooks(tokens, prepend_bos=False, fwd_hooks=[(HOOK_OUT, lambda x, hook: out)])  # noqa: ARG005
    losses = tiny_model.loss_fn(spliced, tokens, per_token=True)
    preservation = metrics["model_performance_preservation"]
    assert preservation["ce_loss_with_sae"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert preservation["ce_loss_with_sae"] != pytest.approx(preservation["ce_loss_without_sae"], rel=1e-3)
    divergence = (clean.softmax(-1) * (clean.log_softmax(-1) - spliced.log_softmax(-1))).sum(-1).mean()
    assert metrics["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(divergence.item(), rel=1e-3)


def test_sae_lens_own_evals_are_wrong_for_a_transcoder(tiny_model, make_store):
    """Why there is another: where both hooks are as wide as each other, nothing even fails."""
    cfg = TranscoderConfig(d_in=16, d_sae=32, d_out=16, apply_b_dec_to_input=False)
    mlp = tiny_model.blocks[0].mlp
    sae = Transcoder(cfg)
    sae.cfg.metadata = metadata(HOOK_IN, "blocks.0.hook_mlp_out")
    weights = {"W_enc": mlp.W_in, "b_enc": mlp.b_in, "W_dec": mlp.W_out, "b_dec": mlp.b_out}
    sae.load_state_dict({name: value.detach() for name, value in weights.items()})
    tiny_model.blocks[0].mlp.act_fn = torch.relu  # now the transcoder is the MLP
    ours, theirs = (
        evals(sae, make_store(sae), tiny_model, ActivationScaler(), EVERYTHING)[0]
        for evals in (run_evals, sae_lens.evals.run_evals)
    )
    assert ours["reconstruction_quality"]["explained_variance"] == pytest.approx(1, abs=1e-4)
    assert ours["model_performance_preservation"]["ce_loss_score"] == pytest.approx(1, abs=1e-3)
    assert theirs["reconstruction_quality"]["explained_variance"] < 0.5


@pytest.mark.parametrize("kind", ["topk", "binary"])
@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_every_transcoder_can_be_evaluated(tiny_model, make_store, kind, skip):
    sizes: dict[str, Any] = {"d_in": 16, "d_sae": 40, "d_out": 32, "skip": skip}
    sizes["metadata"] = metadata(HOOK_IN, HOOK_OUT)
    sae: Any = (
        TopKTranscoder(TopKTranscoderConfig(**sizes, k=5))
        if kind == "topk"
        else BinaryTranscoder(BinaryTranscoderConfig(**sizes))
    )
    if skip:
        sae.W_skip.data.normal_()
    metrics, _ = run_evals(sae, make_store(sae), tiny_model, ActivationScaler(), EVERYTHING)
    _, tokens = read(make_store(sae), 2, BATCHES)
    _, cache = tiny_model.run_with_cache(tokens, prepend_bos=False)
    x, y = (cache[hook][tokens >= 4] for hook in (HOOK_IN, HOOK_OUT))
    explained = 1 - (sae(x) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert metrics["reconstruction_quality"]["explained_variance"] == pytest.approx(explained.item(), abs=1e-3)
    l0 = (sae.encode(x) != 0).float().sum(-1).mean().item()
    assert metrics["sparsity"]["l0"] == pytest.approx(l0, rel=1e-5)
    assert metrics["code"]["l0"] == pytest.approx(l0, rel=1e-5)


def test_code_is_counted_on_the_tokens_of_the_variance_batches(tiny_model, bae, make_store):
    prior = torch.rand(40)
    bae.prior.copy_(prior)
    metrics, features = run_evals(bae, make_store(bae), tiny_model, ActivationScaler(), EVERYTHING)

    _, tokens = read(make_store(bae), 2, BATCHES)
    _, cache = tiny_model.run_with_cache(tokens, prepend_bos=False)
    x = cache[HOOK][tokens >= 4]
    rate = bae.encode(x).double().mean(0)
    assert torch.equal(bae.prior, prior)
    code = metrics["code"]
    assert code["n_tokens"] == len(x) < PROMPTS * BATCHES * 16
    assert code["l0"] == pytest.approx(rate.sum().item())
    rare = torch.minimum(rate, 1 - rate)
    assert code["informative_l0"] == pytest.approx(rare.sum().item())
    inside = rate[(rate > 0) & (rate < 1)]
    bits = -(inside * inside.log2() + (1 - inside) * (1 - inside).log2()).sum()
    assert code["support_bits"] == pytest.approx(bits.item())
    assert (code["dead"], code["always_on"]) == (int((rate == 0).sum()), int((rate == 1).sum()))
    assert code["dense"] == int((rare > 0.1).sum()) > 0
    assert features["firing_rate"] == pytest.approx(rate.tolist())
    assert "firing_rates" not in code
    assert code["feature_activated"] == evaluate_dictionary(bae, x).code.feature_activated
    histogram = features["firing_rate_histogram"]
    assert len(histogram) == len(RATE_BINS) - 1 == 20
    assert sum(histogram) == int((rate > 0).sum())
    logarithms = rate[rate > 0].log10()
    assert histogram[-1] == int((logarithms >= -0.25).sum())
    assert histogram[-2] == int(((logarithms >= -0.5) & (logarithms < -0.25)).sum())
    np.testing.assert_allclose(np.diff(RATE_BINS), 0.25)


@pytest.mark.parametrize(("excluded", "kept"), [(False, 64), ([4, 5, 6], None), (True, None)])
def test_tokens_can_be_excluded(tiny_model, sae, make_store, excluded, kept):
    config = EvalConfig(batch_size_prompts=PROMPTS, n_eval_sparsity_variance_batches=1)
    metrics, _ = run_evals(
        sae, make_store(sae), tiny_model, ActivationScaler(), config, exclude_special_tokens=excluded
    )
    (tokens,) = read(make_store(sae), 1)
    left_out = [0, 1, 2, 3] if excluded is True else excluded or []
    n = int((~torch.isin(tokens, torch.tensor(left_out, dtype=torch.long))).sum())
    assert metrics["code"]["n_tokens"] == n == (kept or n)
    assert n < 64 or not excluded


@pytest.mark.parametrize("wrong", [False, True])
def test_hooks_are_left_as_they_were(tiny_model, transcoder, make_store, wrong, monkeypatch):
    point, calls = tiny_model.hook_dict[HOOK_IN], []
    point.add_hook(lambda x, hook: calls.append(len(x)), is_permanent=True)  # noqa: ARG005
    before = list(point.fwd_hooks)
    if wrong:
        monkeypatch.setattr(sae_lens.evals, "get_sparsity_and_variance_metrics", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_evals(transcoder, make_store(transcoder), tiny_model, ActivationScaler(), EVERYTHING)
    else:
        run_evals(transcoder, make_store(transcoder), tiny_model, ActivationScaler(), EVERYTHING)
    assert point.fwd_hooks == before
    assert len(point._forward_hooks) == len(before)
    calls.clear()
    tiny_model(torch.zeros(2, 3, dtype=torch.long))
    assert calls == [2]


@pytest.mark.parametrize("attached", ["scaling_factor", "whitening"])
def test_activation_scaler_of_a_transcoder_is_refused(tiny_model, transcoder, make_store, attached):
    scaler = ActivationScaler()
    if attached == "whitening":
        scaler.estimate_whitening(16, iter([torch.randn(100, 16)]), n_batches_for_norm_estimate=1)
    else:
        scaler.scaling_factor = 2.0
    with pytest.raises(ValueError, match="input and output have different scales; fold the activation scaler first"):
        run_evals(transcoder, make_store(transcoder), tiny_model, scaler, EVERYTHING)


@pytest.mark.parametrize("binary", [False, True])
def test_heads_are_concatenated_and_the_reshaping_left_as_it_was(tiny_model, make_store, binary):
    classes: Any = (BAE, BAEConfig) if binary else (StandardSAE, StandardSAEConfig)
    sae_class, config_class = classes
    cfg = config_class(
        d_in=16, d_sae=40, apply_b_dec_to_input=False, reshape_activations="hook_z", metadata=metadata(HOOK_Z)
    )
    sae = sae_class(cfg)
    metrics, _ = run_evals(sae, make_store(sae), tiny_model, ActivationScaler(), EVERYTHING)
    expected, _ = sae_lens.evals.run_evals(sae, make_store(sae), tiny_model, ActivationScaler(), EVERYTHING)
    assert sae.hook_z_reshaping_mode
    assert metrics["reconstruction_quality"] == expected["reconstruction_quality"]
    _, tokens = read(make_store(sae), 2, BATCHES)
    _, cache = tiny_model.run_with_cache(tokens, prepend_bos=False)
    fired = sae.encode(cache[HOOK_Z])[tokens >= 4] != 0
    assert metrics["code"]["l0"] == pytest.approx(fired.float().sum(-1).mean().item(), rel=1e-5)


def test_default_config_measures_the_code(tiny_model, bae, make_store):
    metrics, _ = run_evals(bae, make_store(bae), tiny_model, ActivationScaler())
    assert metrics.keys() == {"token_stats", "code"}


def test_transcoder_between_widths_takes_the_config_of_everything(tiny_model, transcoder, make_store):
    config = get_eval_everything_config(PROMPTS, n_eval_reconstruction_batches=1)
    run_evals(transcoder, make_store(transcoder), tiny_model, ActivationScaler(), config)


def test_code_and_sparsity_are_of_the_same_tokens(tiny_model, sae, make_store):
    metrics, features = run_evals(sae, make_store(sae), tiny_model, ActivationScaler(), EVERYTHING)
    assert metrics["code"]["l0"] == pytest.approx(metrics["sparsity"]["l0"], rel=1e-5)
    assert features["firing_rate"] == pytest.approx(features["feature_density"], rel=1e-4)
