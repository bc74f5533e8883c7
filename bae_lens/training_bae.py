"""Training of the Binary Autoencoder inside SAELens (Eq. 3-6): the loss, its schedule, and the running prior."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, no_type_check

import torch
from jaxtyping import Float
from sae_lens import TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from bae_lens.activation import running_mean_weight
from bae_lens.bae import (
    BAE,
    add_bias_and_prior,
    apply_keeping_statistics,
    check_sizes,
    decode,
    pre_activation,
    process_sae_in,
    refuse_fold_of_decoder_norm,
)
from bae_lens.binarize import SURROGATES, Surrogate, step
from bae_lens.covariance import code_times_signs, covariance_penalty
from bae_lens.losses import (
    ENTROPY_FORMS,
    RECONSTRUCTIONS,
    EntropyForm,
    Reconstruction,
    marginal_entropy,
    reconstruction_error,
)
from bae_lens.parallel import add_parts, gather_rows

Preset = Literal["default", "paper", "authors"]

CONTROLLER_GAIN = 0.01  # largest relative change of the entropy coefficient in one step under `target_l0`
CONTROLLER_RANGE = (1e-6, 1e6)  # of that factor, should the target be out of reach


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
    covariance_sample: int | None = None
    """Features drawn anew in each step for an unbiased estimate of the penalty; None takes all. See
    `covariance_penalty`."""
    entropy_start_step: int = 0
    """Training step at which the entropy is switched on. `preset` computes it from the length of the run.
    (SAELens saves mid-run checkpoints before it counts the step: a run resumed from one counts one step less.)"""
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
        - `"authors"`: the formulas of their code: encoder bias, squashed gradient, mean squared error (same settings).

        The published presets start at SAELens' own initial weights, and train in its trainer, which clips gradients.
        """
        published = {
            "entropy_coefficient": 1e-7,
            "covariance_coefficient": 1e-7,
            "encoder_bias_init": 0.0,
            "decoder_init_norm": None,
        }
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
        check_sizes(self)
        for name in ("entropy_coefficient", "covariance_coefficient", "entropy_start_step"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if self.target_l0 is not None and not 0 < self.target_l0 < self.d_sae:
            raise ValueError(f"target_l0 must lie between 0 and d_sae = {self.d_sae}, got {self.target_l0}")
        if self.target_l0 is not None and self.entropy_coefficient == 0:
            raise ValueError("target_l0 steers the entropy coefficient, which must then be positive, got 0")
        if self.covariance_sample is not None and not 2 <= self.covariance_sample <= self.d_sae:
            bounds = f"between 2 and d_sae = {self.d_sae}"
            raise ValueError(f"covariance_sample must lie {bounds}, got {self.covariance_sample}")
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
    """A `BAE` with its training loss (Eq. 5). Buffers `prior` and `entropy_multiplier` are part of every checkpoint.

    Of several processes, see `parallel`, each passes its own rows of a batch forward, and gets the code, the losses and
    the metrics of the whole batch, so that all keep the same statistics.
    """

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
        add_bias_and_prior(self, self.cfg.encoder_bias_init)
        self.b_enc.requires_grad_(self.cfg.apply_encoder_bias)
        self.register_buffer("entropy_multiplier", torch.ones((), device=self.device))

    @override
    def process_sae_in(self, sae_in: Float[Tensor, "*input"]) -> Float[Tensor, "*batch d_in"]:
        return process_sae_in(self, sae_in)

    @override
    def encode_with_hidden_pre(
        self, x: Float[Tensor, "*input"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"]]:
        hidden_pre = pre_activation(self, self.b_enc, x)
        return self.hook_sae_acts_post(step(hidden_pre, self.cfg.surrogate)), hidden_pre

    @override
    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*output"]:
        return decode(self, feature_acts)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"entropy": self.cfg.entropy_coefficient, "covariance": self.cfg.covariance_coefficient}

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Raises ValueError for a batch of one row, which has no statistics, or with NaN or infinite activations."""
        _check_finite(step_input)
        output = self.reconstruct(step_input)
        with torch.no_grad():
            rate = _firing_rate(output.feature_acts)
            output.metrics = {
                "entropy_bits": marginal_entropy(rate),
                "entropy_coefficient": self._entropy_coefficient(step_input, rate.dtype),
                "constant_features": ((rate == 0) | (rate == 1)).sum(),
            }
            self._update_statistics(rate, step_input.n_training_steps)
        return output

    def reconstruct(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Code, reconstruction and losses of a batch, without a trace in the running statistics."""
        return self.reconstruct_target(step_input.sae_in, step_input)

    def reconstruct_target(self, target: Float[Tensor, "batch _"], step_input: TrainStepInput) -> TrainStepOutput:
        """Code, reconstruction of the target and losses, the code and the losses being those of the whole batch."""
        feature_acts, hidden_pre = self.encode_with_hidden_pre(step_input.sae_in)
        sae_out = self.decode(feature_acts)
        error = gather_rows(self.mse_loss_fn(sae_out, target).sum(-1))
        code = gather_rows(feature_acts, sent_as=torch.uint8)
        if len(code) < 2:
            raise ValueError(f"a training batch needs at least 2 rows to have statistics, got {len(code)}")
        losses = {"mse_loss": error.mean(), **self.calculate_aux_loss(step_input, code, hidden_pre, sae_out)}
        return TrainStepOutput(target, sae_out, code, hidden_pre, torch.stack([*losses.values()]).sum(), losses)

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        rate = _firing_rate(feature_acts)
        coefficient = self._entropy_coefficient(step_input, rate.dtype)
        losses = {"entropy_loss": coefficient * marginal_entropy(rate, self.cfg.entropy)}
        if self.cfg.covariance_coefficient > 0:
            drawing = torch.Generator().manual_seed(step_input.n_training_steps)
            times_signs = partial(add_parts, code_times_signs)
            penalty = covariance_penalty(feature_acts, self.cfg.covariance_sample, drawing, times_signs)
            losses["covariance_loss"] = step_input.coefficients["covariance"] * penalty
        return losses

    def _entropy_coefficient(self, step_input: TrainStepInput, dtype: torch.dtype) -> Float[Tensor, ""]:
        """The coefficient in force at this step: 0 before `entropy_start_step`, then steered by `target_l0`."""
        started = step_input.n_training_steps >= self.cfg.entropy_start_step
        return self.entropy_multiplier.to(dtype) * (step_input.coefficients["entropy"] * started)

    def _update_statistics(self, rate: Float[Tensor, " d_sae"], n_training_steps: int) -> None:
        # Replaced, not changed in place: a compiled backward pass may still read the old value.
        weight = running_mean_weight(n_training_steps, self.cfg.prior_decay)
        self.prior = self.prior.lerp(rate.to(self.prior.dtype), weight)
        if self.cfg.target_l0 is not None and n_training_steps >= self.cfg.entropy_start_step:
            excess = (rate.sum() / self.cfg.target_l0 - 1).clamp(-1, 1)
            factor = self.entropy_multiplier * torch.exp(CONTROLLER_GAIN * excess).to(self.entropy_multiplier.dtype)
            self.entropy_multiplier = factor.clamp(*CONTROLLER_RANGE)

    def to_inference(self) -> BAE:
        """A `BAE` with a copy of the weights, as `save_inference_model` and `SAE.load_from_disk` would give it back."""
        bae = BAE.from_dict(self.cfg.get_inference_sae_cfg_dict())
        state_dict = dict(self.state_dict())
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
        refuse_fold_of_decoder_norm()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TrainingBAE":
        return apply_keeping_statistics(self, super()._apply, fn, recurse)


def _firing_rate(feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " d_sae"]:
    """Mean code of the batch, in at least float32."""
    return feature_acts.mean(0, dtype=torch.promote_types(feature_acts.dtype, torch.float32))


def _check_finite(step_input: TrainStepInput) -> None:
    x = step_input.sae_in
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).any(-1).sum())
        raise ValueError(
            f"activations must be finite, but {bad} of {x.shape[0]} rows of the batch at training step "
            f"{step_input.n_training_steps} hold NaN or infinity; check the model's dtype (float16 overflows)"
        )
