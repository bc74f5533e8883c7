import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sae_lens import SAE, Transcoder
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata, TrainingSAE, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from bae_lens import (
    BinaryTranscoder,
    TopKTranscoder,
    TrainingBAE,
    TrainingBAEConfig,
    TrainingBinaryTranscoder,
    TrainingBinaryTranscoderConfig,
    TrainingTopKTranscoder,
    TrainingTopKTranscoderConfig,
    TrainingTranscoder,
    TrainingTranscoderConfig,
)
from bae_lens.functional.rate_control import INTEGRAL

pytestmark = pytest.mark.usefixtures("one_thread")

D_IN, D_SAE, D_OUT, BATCH = 6, 24, 10, 32
KINDS = ("relu", "topk", "binary")
CONFIGS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "relu": (TrainingTranscoderConfig, {"l1_coefficient": 0.7}),
    "topk": (TrainingTopKTranscoderConfig, {"k": 4}),
    "binary": (
        TrainingBinaryTranscoderConfig,
        {"encoder_bias_init": -0.5, "tangent_rate": 1.0, "standardize_activations": False},
    ),
}
SAVED = {"relu": Transcoder, "topk": TopKTranscoder, "binary": BinaryTranscoder}


def make(kind: str, **overrides: Any) -> Any:
    config_class, defaults = CONFIGS[kind]
    config = config_class(**{"d_in": D_IN, "d_sae": D_SAE, "d_out": D_OUT, **defaults, **overrides})
    sae_class = {"relu": TrainingTranscoder, "topk": TrainingTopKTranscoder, "binary": TrainingBinaryTranscoder}[kind]
    return sae_class(config)


def arbitrary(kind: str, **overrides: Any) -> Any:
    """A transcoder in float64 whose every weight is drawn."""
    sae = make(kind, dtype="float64", **overrides)
    for parameter in sae.parameters():
        parameter.data.normal_()
    return sae


def batches(start: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
    """An endless stream of pairs of which the target is a function of the input; depends on the number alone."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(D_IN, 8, generator=generator), torch.randn(8, D_OUT, generator=generator)
    for number in itertools.count(start):
        x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(1 + number))
        yield torch.cat([x, (x @ first).relu() @ second], dim=-1).to(dtype)


def step_input(pairs: torch.Tensor, dead: torch.Tensor | None = None, step: int = 0, **coefficients: float) -> Any:
    return TrainStepInput(pairs, {"l1": 0.7, "entropy": 0.3, "covariance": 0.01, **coefficients}, dead, step, False)


def trainer(sae: TrainingSAE[Any], steps: int, data: Iterator[torch.Tensor] | None = None, **overrides: Any) -> Any:
    config: dict[str, Any] = {
        "total_training_samples": steps * BATCH,
        "train_batch_size_samples": BATCH,
        "lr": 1e-2,
        "lr_end": 1e-2,
        **overrides,
    }
    return SAETrainer(SAETrainerConfig(**config), sae, data or batches())


def state(sae: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in sae.state_dict().items()}


def squared_error(sae: Any, pairs: torch.Tensor) -> float:
    with torch.no_grad():
        return (sae(pairs[:, :D_IN]).float() - pairs[:, D_IN:].float()).square().sum(-1).mean().item()


@pytest.fixture
def pairs() -> torch.Tensor:
    return torch.randn(BATCH, D_IN + D_OUT, dtype=torch.float64)


class TestLoss:
    @pytest.mark.parametrize("kind", KINDS)
    def test_shapes_when_the_hooks_differ_in_width(self, kind, pairs):
        sae = arbitrary(kind)

        output = sae.training_forward_pass(step_input(pairs))

        assert {name: tuple(parameter.shape) for name, parameter in sae.named_parameters()} == {
            "W_enc": (D_IN, D_SAE),
            "b_enc": (D_SAE,),
            "W_dec": (D_SAE, D_OUT),
            "b_dec": (D_OUT,),
        }
        assert output.feature_acts.shape == (BATCH, D_SAE)
        assert output.sae_out.shape == (BATCH, D_OUT)
        assert output.sae_in.equal(pairs[:, D_IN:])
        assert sae.encode(torch.randn(3, 2, D_IN)).shape == (3, 2, D_SAE)

    def test_relu_terms_and_gradients_are_those_of_the_formulas(self, pairs):
        sae = arbitrary("relu")
        x, y = pairs.split([D_IN, D_OUT], dim=-1)

        output = sae.training_forward_pass(step_input(pairs, l1=0.7))
        output.loss.backward()

        W_enc, b_enc, W_dec, b_dec = weights = [
            getattr(sae, name).detach().clone().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        ]
        code = (x @ W_enc + b_enc).clamp(min=0)
        error = ((code @ W_dec + b_dec - y) ** 2).sum() / BATCH
        sparsity = 0.7 * (code * (W_dec**2).sum(1).sqrt()).sum() / BATCH
        torch.testing.assert_close(output.losses, {"mse_loss": error, "l1_loss": sparsity})
        torch.testing.assert_close(output.loss, error + sparsity)
        expected = torch.autograd.grad(error + sparsity, weights)
        for parameter, gradient in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)

    @pytest.mark.parametrize("rescale", [True, False])
    def test_topk_terms_and_gradients_are_those_of_the_formulas(self, pairs, rescale):
        sae = arbitrary("topk", rescale_acts_by_decoder_norm=rescale)
        x, y = pairs.split([D_IN, D_OUT], dim=-1)
        dead = torch.arange(D_SAE) < 7

        output = sae.training_forward_pass(step_input(pairs, dead))
        output.loss.backward()

        W_enc, b_enc, W_dec, b_dec = weights = [
            getattr(sae, name).detach().clone().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        ]
        norms = (W_dec**2).sum(1).sqrt() if rescale else torch.ones(D_SAE, dtype=torch.float64)
        strength = (x @ W_enc + b_enc) * norms
        threshold = strength.sort(-1, descending=True).values[:, 3:4]
        code = torch.where(strength >= threshold, strength, 0).clamp(min=0)
        out = (code / norms) @ W_dec + b_dec
        error = ((out - y) ** 2).sum() / BATCH
        # as many dead features as half the width of the target help where the others fail
        k_aux = D_OUT // 2
        of_dead = torch.where(dead, strength, -torch.inf)
        chosen = of_dead >= of_dead.sort(-1, descending=True).values[:, k_aux - 1 : k_aux]
        revived = (torch.where(chosen, strength, 0) / norms) @ W_dec
        revival = sae.cfg.aux_loss_coefficient * ((revived - (y - out).detach()) ** 2).sum() / BATCH
        torch.testing.assert_close(output.losses, {"mse_loss": error, "auxiliary_reconstruction_loss": revival})
        expected = torch.autograd.grad(error + revival, weights)
        for parameter, gradient in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)

    @pytest.mark.parametrize("k", [1, 4, D_SAE])
    def test_at_most_k_features_fire(self, pairs, k):
        sae = arbitrary("topk", k=k)

        fired = (sae.encode(pairs[:, :D_IN]).to_dense() > 0).sum(-1)

        positive = ((pairs[:, :D_IN] @ sae.W_enc + sae.b_enc) > 0).sum(-1)
        assert fired.equal(positive.clamp(max=k))
        assert fired.max() > k / 2

    def test_binary_code_is_that_of_a_bae_with_the_same_encoder(self, pairs):
        sae = arbitrary("binary", standardize_activations=True, tangent_rate=0.03)
        bae = TrainingBAE(TrainingBAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="float64"))
        bae.load_state_dict({**state(bae), "W_enc": sae.W_enc, "b_enc": sae.b_enc})
        x = pairs[:, :D_IN]

        transcoded = sae.training_forward_pass(step_input(pairs))
        encoded = bae.training_forward_pass(step_input(x))

        assert transcoded.feature_acts.equal(encoded.feature_acts)
        torch.testing.assert_close(transcoded.losses["entropy_loss"], encoded.losses["entropy_loss"])
        assert transcoded.metrics.keys() == encoded.metrics.keys()
        assert sae.prior.equal(bae.prior)
        assert sae.prior.any()

    def test_binary_terms_and_gradients_are_those_of_the_formulas(self, pairs):
        sae = arbitrary("binary", covariance_coefficient=0.01)
        x, y = pairs.split([D_IN, D_OUT], dim=-1)

        output = sae.training_forward_pass(step_input(pairs, entropy=0.3, covariance=0.01))
        output.loss.backward()

        W_enc, b_enc, W_dec, b_dec = weights = [
            getattr(sae, name).detach().clone().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        ]
        hidden_pre = x @ W_enc + b_enc
        smooth = torch.sigmoid(hidden_pre)
        code = (hidden_pre >= 0).double() + (smooth - smooth.detach())
        error = ((code @ W_dec + b_dec - y) ** 2).sum() / BATCH
        rate = code.mean(0)
        varies = ((rate > 0) & (rate < 1)).detach()
        p = rate[varies]
        entropy = 0.3 * -(p * p.log2() + (1 - p) * (1 - p).log2()).sum()
        centered = code - rate
        covariance = (centered.T @ centered / (BATCH - 1))[varies][:, varies]
        penalty = 0.01 * (covariance.abs().sum() - covariance.diagonal().abs().sum())
        torch.testing.assert_close(output.losses["mse_loss"], error)
        torch.testing.assert_close(output.losses["entropy_loss"], entropy)
        torch.testing.assert_close(output.losses["covariance_loss"], penalty)
        assert output.losses.keys() == {"mse_loss", "entropy_loss", "covariance_loss"}
        expected = torch.autograd.grad(error + entropy + penalty, weights)
        for parameter, gradient in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)

    def test_binary_entropy_is_switched_on_and_steered_as_in_a_bae(self, pairs):
        sae = arbitrary("binary", entropy_start_step=5, target_l0=2.0)

        early = sae.training_forward_pass(step_input(pairs, step=4))
        assert early.losses["entropy_loss"] == 0
        assert sae.entropy_multiplier == 1
        late = sae.training_forward_pass(step_input(pairs, step=5))
        assert late.losses["entropy_loss"] > 0
        assert float(sae.entropy_multiplier) == pytest.approx(math.exp(INTEGRAL))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("width", [D_IN, D_OUT, D_IN + D_OUT + 1])
    def test_batch_of_another_width_is_refused(self, kind, width):
        with pytest.raises(ValueError, match=rf"input and target side by side, 6 \+ 10 wide, got {width}; see paired"):
            make(kind).training_forward_pass(step_input(torch.zeros(4, width)))


class TestStart:
    @pytest.mark.parametrize("kind", KINDS)
    def test_encoder_gives_standardized_inputs_variance_one_and_decoder_has_the_norm_asked_for(self, kind):
        sae = make(kind, decoder_init_norm=0.3)
        torch.testing.assert_close(sae.W_enc.norm(dim=0), torch.ones(D_SAE))
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((D_SAE,), 0.3))
        assert sae.b_dec.eq(0).all()
        assert sae.b_enc.eq(-0.5 if kind == "binary" else 0).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_decoder_norm_can_be_left_as_drawn(self, kind):
        norms = make(kind, decoder_init_norm=None).W_dec.norm(dim=1)
        assert norms.std() > 0.01

    def test_paper_preset_trains_without_encoder_bias(self):
        config = TrainingBinaryTranscoderConfig.preset("paper", d_in=D_IN, d_sae=D_SAE, d_out=D_OUT, training_steps=8)
        assert type(config) is TrainingBinaryTranscoderConfig
        assert not TrainingBinaryTranscoder(config).b_enc.requires_grad


class TestTrainer:
    @pytest.mark.parametrize("kind", KINDS)
    def test_fit_learns_the_map(self, kind):
        sae = make(kind, **{"relu": {"l1_coefficient": 0.01}, "topk": {}, "binary": {"entropy_coefficient": 0.0}}[kind])
        held_out = next(batches(10_000))
        before = squared_error(sae, held_out)
        trainer(sae, 120, lr=3e-2, lr_end=3e-2).fit()
        assert squared_error(sae, held_out) < 0.4 * before

    @pytest.mark.parametrize("kind", KINDS)
    def test_resuming_ends_with_the_same_weights_as_never_stopping(self, kind, tmp_path):
        overrides = {"entropy_start_step": 8, "target_l0": 4.0} if kind == "binary" else {}
        whole = make(kind, **overrides)
        initial = state(whole)
        trainer(whole, 20, feature_sampling_window=1000, dead_feature_window=2).fit()

        interrupted = make(kind, **overrides)
        interrupted.load_state_dict(initial)
        checkpoint = {"save_final_checkpoint": True, "checkpoint_path": str(tmp_path), "dead_feature_window": 2}
        trainer(interrupted, 10, **checkpoint).fit()

        resumed = make(kind, **overrides)
        second = trainer(resumed, 20, batches(10), dead_feature_window=2)
        second.load_trainer_state(tmp_path / f"final_{10 * BATCH}")
        resumed.load_weights_from_checkpoint(tmp_path / f"final_{10 * BATCH}")
        second.fit()

        assert second.n_training_steps == 20
        torch.testing.assert_close(state(resumed), state(whole), rtol=0, atol=0)
        assert not torch.equal(resumed.W_enc, initial["W_enc"])

    @pytest.mark.parametrize("kind", KINDS)
    def test_explained_variance_that_is_logged_is_of_the_target(self, kind):
        sae = make(kind)
        output = trainer(sae, 1).step(next(batches()))
        assert output.sae_in.shape == output.sae_out.shape == (BATCH, D_OUT)

    @pytest.mark.parametrize("kind", KINDS)
    def test_autocast_trains_like_float32(self, kind):
        overrides = {"use_sparse_activations": False} if kind == "topk" else {}
        plain, autocast = make(kind, **overrides), make(kind, **overrides)
        autocast.load_state_dict(state(plain))
        losses = [trainer(plain, 1).step(next(batches())), trainer(autocast, 1, autocast=True).step(next(batches()))]
        torch.testing.assert_close(losses[1].loss.float(), losses[0].loss, rtol=0.02, atol=0)
        trainer(autocast, 60, autocast=True, lr=3e-2, lr_end=3e-2).fit()
        assert squared_error(autocast, next(batches(10_000))) < 0.7 * losses[0].losses["mse_loss"]

    @pytest.mark.parametrize("kind", KINDS)
    def test_bfloat16_weights_train(self, kind):
        sae = make(kind, dtype="bfloat16", **({"use_sparse_activations": False} if kind == "topk" else {}))
        held_out = next(batches(10_000, torch.bfloat16))
        before = squared_error(sae, held_out)
        trainer(sae, 60, batches(dtype=torch.bfloat16), lr=3e-2, lr_end=3e-2).fit()
        assert {parameter.dtype for parameter in sae.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for buffer in sae.buffers()} <= {torch.float32}
        assert squared_error(sae, held_out) < 0.7 * before


class TestSaving:
    @pytest.mark.parametrize("hooks", [("a=>b", None), ("a", "b")], ids=["as a pair", "apart"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_saved_transcoder_loads_for_inference_with_equal_outputs(self, kind, hooks, tmp_path):
        sae = make(kind, metadata=SAEMetadata(hook_name=hooks[0], hook_name_out=hooks[1]))
        trainer(sae, 10).fit()
        trained, x = state(sae), next(batches(1000))[:, :D_IN]

        sae.save_inference_model(tmp_path)
        loaded = SAE.load_from_disk(tmp_path)

        assert type(loaded) is SAVED[kind]
        assert (loaded.cfg.metadata.hook_name, loaded.cfg.metadata.hook_name_out) == ("a", "b")
        assert (loaded.cfg.d_in, loaded.cfg.d_sae, loaded.cfg.d_out) == (D_IN, D_SAE, D_OUT)
        torch.testing.assert_close(loaded(x), sae(x), rtol=1e-5, atol=1e-6)
        assert (loaded.encode(x) != 0).equal(sae.encode(x).to_dense() != 0)
        torch.testing.assert_close(state(sae), trained, rtol=0, atol=0)
        if kind == "topk":
            assert loaded.cfg.k == 4
        else:
            torch.testing.assert_close(loaded.encode(x), sae.encode(x), rtol=0, atol=0)

    def test_topk_saved_without_rescaling_is_the_same(self, tmp_path):
        sae = make("topk", rescale_acts_by_decoder_norm=False, decoder_init_norm=0.1)
        trainer(sae, 10).fit()
        sae.save_inference_model(tmp_path)
        x = next(batches(1000))[:, :D_IN]
        torch.testing.assert_close(SAE.load_from_disk(tmp_path).encode(x), sae.encode(x).to_dense())

    def test_binary_prior_is_saved(self, tmp_path):
        sae = make("binary")
        trainer(sae, 10).fit()
        sae.save_inference_model(tmp_path)
        assert state(SAE.load_from_disk(tmp_path))["prior"].equal(sae.prior)
        assert sae.prior.any()

    @pytest.mark.parametrize("kind", KINDS)
    def test_checkpoint_loads_as_it_was(self, kind, tmp_path):
        sae = make(kind)
        trainer(sae, 3).fit()
        sae.save_model(tmp_path)
        loaded = TrainingSAE.load_from_disk(tmp_path)
        assert type(loaded) is type(sae)
        assert loaded.cfg == sae.cfg
        torch.testing.assert_close(state(loaded), state(sae), rtol=0, atol=0)


class TestConfigErrors:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"d_in": 0}, "d_in must be at least 1, got 0"),
            ({"d_sae": 0}, "must be at least 1, got 0|k must"),
            ({"d_out": 0}, "d_out must be at least 1, got 0"),
            ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be False"),
            (
                {"normalize_activations": "layer_norm"},
                r"normalize_activations must be 'none' for a tr.* got 'layer",
            ),
            ({"normalize_activations": "expected_average_only_in"}, "normalize_activations must be 'none'"),
            ({"reshape_activations": "hook_z"}, "reshape_activations must be 'none' for a transcoder"),
        ],
    )
    def test_what_a_transcoder_cannot_have_is_refused(self, kind, overrides, message):
        with pytest.raises(ValueError, match=message):
            make(kind, **overrides)

    @pytest.mark.parametrize("k", [0, D_SAE + 1])
    def test_k_must_be_a_number_of_features(self, k):
        with pytest.raises(ValueError, match=f"k must lie between 1 and d_sae = {D_SAE}, got {k}"):
            make("topk", k=k)

    def test_a_bae_s_own_rules_hold_for_the_binary_one(self):
        with pytest.raises(ValueError, match="target_l0 must lie between 0 and d_sae"):
            make("binary", target_l0=30.0)
