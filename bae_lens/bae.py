"""The Binary Autoencoder as a SAELens architecture (Eq. 1-6): inference and training classes with their configs."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, no_type_check

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, SAEConfig, StandardSAE, StandardSAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from bae_lens.activation import FEATURES_PER_TOKEN, burstiness, flip_polarity, running_mean_weight, strongest_features
from bae_lens.binarize import SURROGATES, Surrogate, step
from bae_lens.covariance import covariance_penalty
from bae_lens.losses import (
    ENTROPY_FORMS,
    RECONSTRUCTIONS,
    EntropyForm,
    Reconstruction,
    marginal_entropy,
    reconstruction_error,
)

Preset = Literal["default", "paper", "authors"]

CONTROLLER_GAIN = 0.01  # largest relative change of the entropy coefficient in one step under `target_l0`


@no_type_check  # SAELens passes `metadata` as a plain dict when it loads a config, which a runtime type check refuses
@dataclass
class BAEConfig(SAEConfig):
    """Config of a `BAE` for inference. Raises ValueError for a width below 1 or `apply_b_dec_to_input=True`."""

    apply_b_dec_to_input: bool = False
    """Must be False: the BAE's encoder takes its input as it is (Eq. 1)."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "bae"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sizes(self)


class BAE(SAE[BAEConfig]):
    """Binary autoencoder: `feature_acts = step(x @ W_enc + b_enc)`, `sae_out = feature_acts @ W_dec + b_dec` (Eq. 1-2).

    `feature_acts` are 0 or 1 in the SAE's dtype. The buffer `prior` (d_sae,) is each feature's firing rate, the running
    mean over training or what `estimate_prior` measured, in float32 whatever the dtype of the weights.
    """

    b_enc: nn.Parameter
    prior: Tensor

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        _add_bias_and_prior(self, encoder_bias=0.0)

    @override
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """The code, 0 or 1. Raises ValueError if `x` is not d_in wide."""
        return self.hook_sae_acts_post(step(_pre_activation(self, x)))

    @override
    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        sae_out = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out), self.d_head)

    def activation_strength(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Strength `log2 |h - prior|` of each bit, in bits, at most 0 (section 4.1)."""
        return burstiness(feature_acts, self.prior)

    @torch.no_grad()
    def activated_features(
        self, x: Float[Tensor, "*batch d_in"], k: int = FEATURES_PER_TOKEN
    ) -> Int[Tensor, "*batch k"]:
        """Each token's k most strongly activated features, strongest first (section 4.1).

        -1 where fewer than k bits differ from what the prior makes more likely.
        """
        return strongest_features(self.activation_strength(self.encode(x)), k)

    @torch.no_grad()
    def estimate_prior(self, activations: Iterable[Float[Tensor, "*batch d_in"]]) -> Float[Tensor, " d_sae"]:
        """Sets `prior` to the mean code over `activations`, a tensor or an iterable of batches, and returns it.

        Counts are exact in float64 for any corpus. Raises ValueError if there are no activations.
        """
        fired = torch.zeros(self.cfg.d_sae, dtype=torch.float64)
        n = 0
        for batch in [activations] if isinstance(activations, Tensor) else activations:
            feature_acts = self.encode(batch.to(self.device)).reshape(-1, self.cfg.d_sae)
            fired += feature_acts.sum(0, dtype=torch.float64).cpu()
            n += len(feature_acts)
        if n == 0:
            raise ValueError("estimate_prior needs at least one activation, got none")
        self.prior.copy_(fired / n)
        return self.prior

    @torch.no_grad()
    def fold_polarity(self) -> Float[Tensor, " d_sae"]:
        """Makes every feature rare, in place: those with prior above 1/2 exchange 0 and 1, the output stays the same.

        Returns which features were flipped (1) or not (0).
        """
        flip = (self.prior > 0.5).to(self.prior.dtype)
        flip_polarity(flip, self.W_enc.data, self.b_enc.data, self.W_dec.data, self.b_dec.data, self.prior)
        return flip

    def to_graded_sae(self) -> StandardSAE:
        """A ReLU SAE with the same weights: it fires where the BAE does and says how far above the threshold.

        For tools that need graded activations. It is for looking at features: it does not reconstruct.
        """
        fields = {name: value for name, value in self.cfg.to_dict().items() if name not in ("architecture", "metadata")}
        graded = StandardSAE(StandardSAEConfig(**fields, metadata=self.cfg.metadata))
        graded.load_state_dict({name: value for name, value in self.state_dict().items() if name != "prior"})
        return graded

    @override
    def fold_W_dec_norm(self) -> None:
        _refuse_fold_of_decoder_norm()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BAE":
        return _apply_keeping_statistics(self, super()._apply, fn, recurse)


@no_type_check
@dataclass
class TrainingBAEConfig(TrainingSAEConfig):
    """Config of a `TrainingBAE`. Raises ValueError, naming rule and value, for values out of range."""

    apply_b_dec_to_input: bool = False
    """Must be False: the BAE's encoder takes its input as it is (Eq. 1)."""
    decoder_init_norm: float | None = 1.0
    """Norm of the decoder rows at the start; the encoder starts as their transpose."""
    entropy_coefficient: float = 0.3
    """Weight of the marginal entropy in bits (alpha_e of Eq. 5), from `entropy_start_step` on."""
    covariance_coefficient: float = 0.0
    """Weight of the covariance penalty (alpha_c of Eq. 5), from the first step on; 0 leaves it out."""
    entropy_start_step: int = 0
    """Training step at which the entropy is switched on. `preset` computes it from the length of the run."""
    target_l0: float | None = None
    """If set, the entropy coefficient is steered so that this many features fire per token: each step multiplies it by
    `exp(0.01 * clip(L0 / target_l0 - 1, -1, 1))`, starting at `entropy_coefficient`."""
    surrogate: Surrogate = "sigmoid"
    """Gradient through the step (Eq. 6); see `step`."""
    entropy: EntropyForm = "bernoulli"
    """Form of the entropy (Eq. 4); see `marginal_entropy`."""
    reconstruction: Reconstruction = "sum"
    """Convention of the reconstruction loss (Eq. 3); coefficients are relative to it. See `reconstruction_error`."""
    apply_encoder_bias: bool = True
    """False holds the encoder bias at 0, the form of the paper's Eq. 1."""
    encoder_bias_init: float = -2.0
    """Encoder bias at the start, in units of the pre-activation. At 0 half of all features start, and stay, on."""
    prior_decay: float = 0.99
    """Decay per step of the running mean `prior`."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "bae"

    @classmethod
    def preset(
        cls, name: Preset, *, d_in: int, d_sae: int, training_steps: int, **overrides: Any
    ) -> "TrainingBAEConfig":
        """Named hyperparameters for a run of `training_steps` optimiser steps; keywords override single fields.

        - `"default"`: ours, for language-model activations scaled to mean squared norm d_in (batch 512, lr 4e-3,
          entropy from 5 % of training).
        - `"paper"`: the formulas as published: no encoder bias, sigmoid surrogate, norm loss (batch 512, lr 5e-4,
          entropy from 25 %). The entropy is the Bernoulli form, without which the paper's benchmark does not come out.
        - `"authors"`: what their code computes: encoder bias, squashed gradient, mean squared error (same settings).
        """
        published = {"entropy_coefficient": 1e-7, "covariance_coefficient": 1e-7, "encoder_bias_init": 0.0}
        presets: dict[str, tuple[float, dict[str, Any]]] = {
            "default": (0.05, {}),
            "paper": (0.25, {**published, "reconstruction": "l2_norm", "apply_encoder_bias": False}),
            "authors": (0.25, {**published, "reconstruction": "mean", "surrogate": "reference"}),
        }
        if name not in presets:
            raise ValueError(f"preset must be one of {', '.join(presets)}, got {name!r}")
        entropy_from, values = presets[name]
        values = {"entropy_start_step": round(entropy_from * training_steps), **values, **overrides}
        return cls(d_in=d_in, d_sae=d_sae, **values)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sizes(self)
        for name in ("entropy_coefficient", "covariance_coefficient", "entropy_start_step"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if self.target_l0 is not None and not 0 < self.target_l0 < self.d_sae:
            raise ValueError(f"target_l0 must lie between 0 and d_sae = {self.d_sae}, got {self.target_l0}")
        if not 0 <= self.prior_decay < 1:
            raise ValueError(f"prior_decay must lie in [0, 1), got {self.prior_decay}")
        if not self.apply_encoder_bias and self.encoder_bias_init != 0:
            raise ValueError(f"encoder_bias_init must be 0 without an encoder bias, got {self.encoder_bias_init}")
        for name, choices in (
            ("surrogate", SURROGATES),
            ("entropy", ENTROPY_FORMS),
            ("reconstruction", RECONSTRUCTIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


class TrainingBAE(TrainingSAE[TrainingBAEConfig]):
    """A `BAE` with its training loss (Eq. 5). Buffers `prior` and `entropy_multiplier` are part of every checkpoint."""

    b_enc: nn.Parameter
    prior: Tensor
    entropy_multiplier: Tensor
    """What `target_l0` has made of the entropy coefficient so far, as a factor; () in float32."""

    def __init__(self, cfg: TrainingBAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.mse_loss_fn = partial(reconstruction_error, convention=cfg.reconstruction)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        _add_bias_and_prior(self, self.cfg.encoder_bias_init)
        self.b_enc.requires_grad_(self.cfg.apply_encoder_bias)
        self.register_buffer("entropy_multiplier", torch.ones((), device=self.device))

    @override
    def encode_with_hidden_pre(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"]]:
        hidden_pre = _pre_activation(self, x)
        return self.hook_sae_acts_post(step(hidden_pre, self.cfg.surrogate)), hidden_pre

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"entropy": self.cfg.entropy_coefficient, "covariance": self.cfg.covariance_coefficient}

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Raises ValueError for a batch of one row, which has no statistics, or with NaN or infinite activations."""
        _check_batch(step_input)
        output = super().training_forward_pass(step_input)
        with torch.no_grad():
            rate = _firing_rate(output.feature_acts)
            output.metrics = {
                "entropy_bits": marginal_entropy(rate),
                "entropy_coefficient": self._entropy_coefficient(step_input, rate.dtype),
                "constant_features": ((rate == 0) | (rate == 1)).sum(),
            }
            self._update_statistics(rate, step_input.n_training_steps)
        return output

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        rate = _firing_rate(feature_acts)
        coefficient = self._entropy_coefficient(step_input, rate.dtype)
        losses = {"entropy_loss": coefficient * marginal_entropy(rate, self.cfg.entropy)}
        if self.cfg.covariance_coefficient > 0:
            losses["covariance_loss"] = step_input.coefficients["covariance"] * covariance_penalty(feature_acts)
        return losses

    def _entropy_coefficient(self, step_input: TrainStepInput, dtype: torch.dtype) -> Float[Tensor, ""]:
        """The coefficient in force at this step: 0 before `entropy_start_step`, then steered by `target_l0`."""
        started = step_input.n_training_steps >= self.cfg.entropy_start_step
        return self.entropy_multiplier.to(dtype) * (step_input.coefficients["entropy"] * started)

    def _update_statistics(self, rate: Float[Tensor, " d_sae"], n_training_steps: int) -> None:
        self.prior.lerp_(rate.to(self.prior.dtype), running_mean_weight(n_training_steps, self.cfg.prior_decay))
        if self.cfg.target_l0 is not None and n_training_steps >= self.cfg.entropy_start_step:
            excess = (rate.sum() / self.cfg.target_l0 - 1).clamp(-1, 1)
            self.entropy_multiplier.mul_(torch.exp(CONTROLLER_GAIN * excess))

    def to_inference(self) -> BAE:
        """A `BAE` with a copy of the weights, as `save_inference_model` and `SAE.load_from_disk` would give it back."""
        bae = BAE.from_dict(self.cfg.get_inference_sae_cfg_dict())
        state_dict = {name: value.clone() for name, value in self.state_dict().items()}
        self.process_state_dict_for_saving_inference(state_dict)
        bae.load_state_dict(state_dict)
        return bae

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        del state_dict["entropy_multiplier"]

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict.setdefault("entropy_multiplier", torch.ones((), device=state_dict["W_enc"].device))

    @override
    def fold_W_dec_norm(self) -> None:
        _refuse_fold_of_decoder_norm()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TrainingBAE":
        return _apply_keeping_statistics(self, super()._apply, fn, recurse)


def _check_sizes(cfg: SAEConfig) -> None:
    for name in ("d_in", "d_sae"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(cfg, name)}")
    if cfg.apply_b_dec_to_input:
        raise ValueError("apply_b_dec_to_input must be False for a BAE, whose encoder takes its input as it is")


def _add_bias_and_prior(sae: BAE | TrainingBAE, encoder_bias: float) -> None:
    sae.b_enc = nn.Parameter(torch.full((sae.cfg.d_sae,), encoder_bias, dtype=sae.dtype, device=sae.device))
    sae.register_buffer("prior", torch.zeros(sae.cfg.d_sae, device=sae.device))


def _pre_activation(sae: BAE | TrainingBAE, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
    """`x @ W_enc + b_enc` of the normalised input (Eq. 2)."""
    width = x.shape[-1] * x.shape[-2] if sae.hook_z_reshaping_mode else x.shape[-1]
    if width != sae.cfg.d_in:
        raise ValueError(f"this BAE takes activations {sae.cfg.d_in} wide (d_in), got {width}; check the hook")
    return sae.hook_sae_acts_pre(sae.process_sae_in(x) @ sae.W_enc + sae.b_enc)


def _firing_rate(feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " d_sae"]:
    """Mean code of the batch, in at least float32."""
    return feature_acts.mean(0, dtype=torch.promote_types(feature_acts.dtype, torch.float32))


def _check_batch(step_input: TrainStepInput) -> None:
    x = step_input.sae_in
    if x.shape[0] < 2:
        raise ValueError(f"a training batch needs at least 2 rows to have statistics, got {x.shape[0]}")
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).any(-1).sum())
        raise ValueError(
            f"activations must be finite, but {bad} of {x.shape[0]} rows of the batch at training step "
            f"{step_input.n_training_steps} hold NaN or infinity; check the model's dtype (float16 overflows)"
        )


def _refuse_fold_of_decoder_norm() -> None:
    raise NotImplementedError("a binary code cannot absorb a scale: folding W_dec_norm would change the output")


def _apply_keeping_statistics(
    sae: Any, apply: Callable[..., Any], fn: Callable[[Tensor], Tensor], recurse: bool
) -> Any:
    """`nn.Module._apply` (which is behind `.to`), except that buffers stay in float32 when the weights change dtype.

    They are running statistics, whose small updates bfloat16 would lose.
    """
    statistics = {name: buffer for name, buffer in sae.named_buffers(recurse=False) if not buffer.is_meta}
    apply(fn, recurse)
    for name, buffer in statistics.items():
        setattr(sae, name, buffer.to(getattr(sae, name).device, torch.float32))
    return sae
