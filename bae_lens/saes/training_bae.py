"""Training of the Binary Autoencoder inside SAELens (Eq. 3-6): the loss, its schedule, and the running statistics."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from bae_lens.distributed import all_reduce_sum, gather_rows
from bae_lens.functional.binarize import step
from bae_lens.functional.covariance import code_times_signs, covariance_penalty
from bae_lens.functional.losses import marginal_entropy, reconstruction_error, tangent_entropy
from bae_lens.functional.outliers import is_outlier
from bae_lens.functional.rate_control import controlled_coefficient, excess_bits, excess_l0, updated_multiplier
from bae_lens.functional.strength import running_mean_weight
from bae_lens.saes.bae import (
    BAE,
    add_bias_and_prior,
    apply_keeping_statistics,
    decode,
    pre_activation,
    process_sae_in,
    refuse_fold_of_decoder_norm,
)
from bae_lens.saes.standardization import FOLDED, Standardization, folded, standardization_of
from bae_lens.saes.training_config import TrainingBAEConfig

RAW = -1.0  # as the scale of weights for activations as they are, which are not standardized any more


class TrainingBAE(TrainingSAE[TrainingBAEConfig]):
    """A `BAE` with its training loss (Eq. 5). Its statistics are buffers, and part of every checkpoint.

    The weights are for activations standardized by `input_mean` and `input_scale`; `to_inference`, saving for inference
    and `fold_standardization` make them weights for activations as they are.

    Of several processes, see `parallel`, each passes its own rows of a batch forward, and gets the code, the losses and
    the metrics of the whole batch, so that all keep the same statistics.
    """

    b_enc: nn.Parameter
    prior: Tensor
    entropy_multiplier: Tensor
    """What the target has made of the entropy coefficient so far, as a factor; () in float32."""
    input_mean: Tensor
    """Of what is encoded, (d_in,); found on the first batch, and a running mean from then on."""
    input_scale: Tensor
    """Factor that gives it mean squared norm d_in, (), found on the first batch. 0 while unknown and -1 of weights for
    activations as they are: both count as 1."""
    output_mean: Tensor
    """Of what is reconstructed, (d_out,)."""
    output_scale: Tensor
    """The factor for it, ()."""

    def __init__(self, cfg: TrainingBAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.mse_loss_fn = partial(reconstruction_error, convention=cfg.reconstruction)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.add_statistics()

    def add_statistics(self) -> None:
        """Gives a binary code under construction its bias and its buffers."""
        add_bias_and_prior(self, self.cfg.encoder_bias_init)
        self.b_enc.requires_grad_(self.cfg.apply_encoder_bias)
        for name, value in _statistics(self.W_enc, self.b_dec).items():
            self.register_buffer(name, value)

    @override
    def process_sae_in(self, sae_in: Float[Tensor, "*input"]) -> Float[Tensor, "*batch d_in"]:
        return self.standardized_input(process_sae_in(self, sae_in))

    def standardized_input(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """What the weights are for."""
        return (x - self.input_mean.to(x)) * _known(self.input_scale).to(x)

    @override
    def encode_with_hidden_pre(
        self, x: Float[Tensor, "*input"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"]]:
        hidden_pre = pre_activation(self, self.b_enc, x)
        return self.hook_sae_acts_post(step(hidden_pre, self.cfg.surrogate)), hidden_pre

    @override
    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*output"]:
        return decode(self, feature_acts, self._raw_output)

    def _raw_output(self, x: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_out"]:
        return x / _known(self.output_scale).to(x) + self.output_mean.to(x)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"entropy": self.cfg.entropy_coefficient, "covariance": self.cfg.covariance_coefficient}

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Raises ValueError for a batch of one row, which has no statistics, or with NaN or infinite activations."""
        _check_finite(step_input)
        self._standardize(step_input)
        output = self.reconstruct(step_input)
        with torch.no_grad():
            rate = _firing_rate(output.feature_acts)
            output.metrics = {
                "entropy_bits": marginal_entropy(rate),
                "entropy_coefficient": self._entropy_coefficient(step_input, rate),
                "constant_features": ((rate == 0) | (rate == 1)).sum(),
            }
            self._update_statistics(rate, step_input.n_training_steps)
        return output

    def input_and_target(self, batch: Float[Tensor, "*batch"]) -> tuple[Tensor, Tensor]:
        """What is encoded and what is to be reconstructed, of a training batch: for an SAE the same."""
        return batch, batch

    @torch.compiler.disable()
    @torch.no_grad()
    def _standardize(self, step_input: TrainStepInput) -> None:
        """Finds mean and scale on the first batch, and then keeps the mean up to date.

        How exactly inputs are centered matters: what is left of the mean turns a push that all tokens share, which the
        bias should answer, into a push on every weight of the encoder.
        """
        if not self.cfg.standardizes or self.input_scale == RAW:
            return
        sides = zip(("input", "output"), self.input_and_target(step_input.sae_in), strict=True)
        batch = {side: self.reshape_fn_in(x) for side, x in sides}
        if self.input_scale == 0:
            self._find_standardization(batch)
        else:
            self._recenter(batch, running_mean_weight(step_input.n_training_steps, self.cfg.prior_decay))

    def _find_standardization(self, batch: dict[str, Float[Tensor, "n _"]]) -> None:
        for side, x in batch.items():
            rows = gather_rows(x)
            if len(rows) < 2:
                return
            found = standardization_of(rows)
            setattr(self, f"{side}_mean", found.mean.to(self.input_mean))
            setattr(self, f"{side}_scale", torch.full_like(self.input_scale, found.scale))

    def _recenter(self, batch: dict[str, Float[Tensor, "n _"]], weight: float) -> None:
        """Moves the means towards the batch's, and the biases so that nothing that is encoded or decoded changes."""
        moved = {}
        for side, x in batch.items():
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            mean, scale = getattr(self, f"{side}_mean"), getattr(self, f"{side}_scale").to(x)
            deviation = (x - mean.to(x)) * scale
            ordinary = ~is_outlier(torch.linalg.vector_norm(deviation, dim=-1), x.shape[-1] ** 0.5)
            sums = torch.cat([(deviation * ordinary[:, None]).sum(0), ordinary.sum()[None]])
            total, n = gather_rows(sums[None]).sum(0).split([x.shape[-1], 1])
            new = (mean.to(x) + weight * total / n.clamp(min=1) / scale).to(mean)
            moved[side] = (new.to(x) - mean.to(x)) * scale
            setattr(self, f"{side}_mean", new)
        self.b_enc += moved["input"].to(self.b_enc) @ self.W_enc
        self.b_dec -= moved["output"].to(self.b_dec)

    def reconstruct(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Code, reconstruction and losses of a batch, without a trace in the running statistics.

        With several processes, code and losses are those of the whole batch.
        """
        sae_in, target = self.input_and_target(step_input.sae_in)
        feature_acts, hidden_pre = self.encode_with_hidden_pre(sae_in)
        sae_out = self.decode(feature_acts)
        scale = _known(self.output_scale).to(sae_out)
        error = gather_rows(self.mse_loss_fn(sae_out * scale, target * scale).sum(-1))
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
        price = tangent_entropy(rate, self.cfg.tangent_rate, self.cfg.entropy)
        losses = {"entropy_loss": self._entropy_coefficient(step_input, rate.detach()) * price}
        if self.cfg.covariance_coefficient > 0:
            drawing = torch.Generator().manual_seed(step_input.n_training_steps)
            times_signs = partial(all_reduce_sum, code_times_signs)
            penalty = covariance_penalty(feature_acts, self.cfg.covariance_sample, drawing, times_signs)
            losses["covariance_loss"] = step_input.coefficients["covariance"] * penalty
        return losses

    def _entropy_coefficient(self, step_input: TrainStepInput, rate: Float[Tensor, " d_sae"]) -> Float[Tensor, ""]:
        """The coefficient in force for a batch: 0 before `entropy_start_step`, then steered to the target."""
        started = step_input.n_training_steps >= self.cfg.entropy_start_step
        factor = controlled_coefficient(self.entropy_multiplier.to(rate), self._excess(rate))
        return factor * (step_input.coefficients["entropy"] * started)

    def _excess(self, rate: Float[Tensor, " d_sae"]) -> Float[Tensor, ""]:
        """Of the batch's rate over the target, relative; 0 without a target."""
        if self.cfg.target_bits is not None:
            return excess_bits(rate, self.prior.to(rate), self.cfg.target_bits)
        return rate.new_zeros(()) if self.cfg.target_l0 is None else excess_l0(rate, self.cfg.target_l0)

    def _update_statistics(self, rate: Float[Tensor, " d_sae"], n_training_steps: int) -> None:
        # Replaced, not changed in place: a compiled backward pass may still read the old value.
        if n_training_steps >= self.cfg.entropy_start_step:
            self.entropy_multiplier = updated_multiplier(
                self.entropy_multiplier, self._excess(rate).to(self.entropy_multiplier)
            )
        weight = running_mean_weight(n_training_steps, self.cfg.prior_decay)
        self.prior = self.prior.lerp(rate.to(self.prior.dtype), weight)

    def to_inference(self) -> BAE:
        """A `BAE` with a copy of the weights, as `save_inference_model` and `SAE.load_from_disk` would give it back."""
        bae = BAE.from_dict(self.cfg.get_inference_sae_cfg_dict())
        state_dict = dict(self.state_dict())
        self.process_state_dict_for_saving_inference(state_dict)
        bae.load_state_dict(state_dict)
        return bae

    @torch.no_grad()
    def fold_standardization(self) -> None:
        """Makes the weights those for activations as they are, in place; what comes out stays the same."""
        for name, weights in self._folded_weights().items():
            getattr(self, name).copy_(weights)
        for name, value in _statistics(self.W_enc, self.b_dec, scale=RAW).items():
            if name != "entropy_multiplier":
                setattr(self, name, value)

    def _folded_weights(self) -> dict[str, Tensor]:
        sides = (
            Standardization(mean, _known(scale).item())
            for mean, scale in ((self.input_mean, self.input_scale), (self.output_mean, self.output_scale))
        )
        return folded({name: getattr(self, name).data for name in FOLDED}, *sides)

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        self.fold_standardization()
        super().fold_activation_norm_scaling_factor(scaling_factor)

    @override
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        self.fold_standardization()
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict.update(self._folded_weights())
        for name in _statistics(self.W_enc, self.b_dec):
            del state_dict[name]

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        for name, value in _statistics(state_dict["W_enc"], state_dict["b_dec"], scale=RAW).items():
            state_dict.setdefault(name, value)

    @override
    def fold_W_dec_norm(self) -> None:
        refuse_fold_of_decoder_norm()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TrainingBAE":
        return apply_keeping_statistics(self, super()._apply, fn, recurse)


def _statistics(W_enc: Tensor, b_dec: Tensor, scale: float = 0.0) -> dict[str, Float[Tensor, "..."]]:
    """The buffers beside `prior`, before training."""
    one = torch.ones((), device=W_enc.device)
    return {
        "entropy_multiplier": one,
        "input_mean": torch.zeros(W_enc.shape[0], device=W_enc.device),
        "input_scale": one * scale,
        "output_mean": torch.zeros(b_dec.shape[0], device=W_enc.device),
        "output_scale": one * scale,
    }


def _known(scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return torch.where(scale > 0, scale, 1.0)


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
