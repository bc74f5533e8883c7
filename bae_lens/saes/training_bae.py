"""Training of the Binary Autoencoder inside SAELens (Eq. 3-6): the loss, its schedule, and the running statistics."""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from sae_lens import TrainingSAE
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from typing_extensions import override

from bae_lens.functional.binarize import step
from bae_lens.functional.losses import bit_price, marginal_entropy, reconstruction_error, tangent_entropy
from bae_lens.functional.optimized_code import firing_bits, optimize_code, useful_couplings
from bae_lens.functional.rate_control import controlled_coefficient, excess, updated_multiplier
from bae_lens.functional.strength import firing_rate, running_mean_weight
from bae_lens.saes.bae import BAE
from bae_lens.saes.binary_code import BinaryCode
from bae_lens.saes.finite_check import FiniteCheck
from bae_lens.saes.running_standardization import RunningStandardization, State, add_missing_state
from bae_lens.saes.saelens_compat import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from bae_lens.saes.sharing import SharedFeatures, SharedRows
from bae_lens.saes.standardization import PairStandardization, foldable_weights, folded, raw_price
from bae_lens.saes.training_config import TrainingBAEConfig


class Firing(NamedTuple):
    """How much the code of a batch fires, and what the training makes of it."""

    rate: Float[Tensor, " all_features"]
    """Firing rates of all features; differentiable with respect to those of this process."""
    excess: Float[Tensor, ""]
    """Of the rate over the target, relative, in [-1, 1]; 0 without a target."""
    entropy_coefficient: Float[Tensor, ""]
    """In force for this batch: 0 before `entropy_start_step`, then controlled by the excess."""


class TrainingBAE(BinaryCode[TrainingBAEConfig], TrainingSAE[TrainingBAEConfig]):
    """A `BAE` with its training loss (Eq. 5). Its statistics are buffers, and part of every checkpoint.

    The weights are for activations that `standardization` has centered and scaled; `to_inference`, saving for inference
    and `fold_standardization` make them weights for activations as they are.

    Of several processes, see `distributed`, each passes its own rows of a batch forward, and gets the code, the losses
    and the metrics of the whole batch, so that all keep the same statistics. With `SharedFeatures` as `sharing` each
    passes all rows, and has its own features' weights, code and firing rates.
    """

    entropy_multiplier: Tensor
    """What the target has made of the entropy coefficient so far, as a factor; () in float32."""
    standardization: RunningStandardization
    """Of what is encoded and of what is reconstructed."""

    def __init__(self, cfg: TrainingBAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.sharing: SharedRows | SharedFeatures = SharedRows()
        self.mse_loss_fn = partial(reconstruction_error, convention=cfg.reconstruction)
        self._check_finite = FiniteCheck()

    @override
    def add_bias_and_prior(self) -> None:
        super().add_bias_and_prior()
        self.b_enc.data.fill_(self.cfg.encoder_bias_init)
        self.b_enc.requires_grad_(self.cfg.apply_encoder_bias)
        self.register_buffer("entropy_multiplier", torch.ones((), device=self.device))
        self.standardization = RunningStandardization(self.cfg.d_in, len(self.b_dec), self.device)

    @override
    def process_sae_in(self, sae_in: Float[Tensor, "*input"]) -> Float[Tensor, "*batch d_in"]:
        return self.standardization.source(super().process_sae_in(sae_in))

    @override
    def sum_of_rows(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        return self.sharing.sum_over_features(super().sum_of_rows(feature_acts))

    @override
    def raw_output(self, sae_out: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_out"]:
        return self.standardization.target.raw(sae_out)

    @override
    def encode_with_hidden_pre(
        self, x: Float[Tensor, "*input"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"]]:
        hidden_pre = self.pre_activation(self.process_sae_in(x))
        return self.hooked_code(step(hidden_pre, self.cfg.surrogate)), hidden_pre

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"entropy": self.cfg.entropy_coefficient, "covariance": self.cfg.covariance_coefficient}

    def input_and_target(self, batch: Float[Tensor, "*batch"]) -> tuple[Tensor, Tensor]:
        """What is encoded and what is to be reconstructed, of a training batch: for an SAE the same."""
        return batch, batch

    def beside_code(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"] | float:  # noqa: ARG002
        """What is written beside what the code says, by a skip connection: nothing for an SAE."""
        return 0.0

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Code, reconstruction and losses of a batch; with several processes, code and losses of the whole batch.

        Raises ValueError for a batch of one row, which has no statistics, or with NaN or infinite activations.
        """
        self._prepare(step_input)
        sae_in, target = self.input_and_target(step_input.sae_in)
        feature_acts, hidden_pre = self.encode_with_hidden_pre(sae_in)
        start = self.cfg.optimized_start_step
        optimizes = start is not None and step_input.n_training_steps >= start
        if optimizes:
            feature_acts = self._optimized(feature_acts, target)
        sae_out = self.decode(feature_acts) + self.beside_code(sae_in)
        scale = self.standardization.target.scale.to(sae_out)
        error = self.sharing.whole_batch(self.mse_loss_fn(sae_out * scale, target * scale).sum(-1))
        code = self.sharing.whole_batch(feature_acts, sent_as=torch.uint8)
        if len(code) < 2:
            raise ValueError(f"a training batch needs at least 2 rows to have statistics, got {len(code)}")
        firing = self._firing(step_input, code)
        losses = {"mse_loss": error.mean(), **self._penalties(step_input, code, firing)}
        if optimizes:
            missed = binary_cross_entropy_with_logits(hidden_pre.float(), feature_acts.float(), reduction="none")
            losses["prediction_loss"] = self.sharing.whole_batch(missed.sum(-1)).mean()
        loss = torch.stack([*losses.values()]).sum()
        metrics = self._metrics(firing)
        self._update_statistics(firing, step_input, losses["mse_loss"])
        return TrainStepOutput(target, sae_out, code, hidden_pre, loss, losses, metrics)

    @torch.compiler.disable()
    @torch.no_grad()
    def _prepare(self, step_input: TrainStepInput) -> None:
        """Refuses activations that are not finite, finds the standardization on the first batch, and follows the mean.

        How exactly inputs are centered matters: what is left of the mean turns a push that all tokens share, which the
        bias should answer, into a push on every weight of the encoder. The biases move with the means, so that nothing
        that is encoded or decoded changes.
        """
        self._check_finite(step_input.sae_in, step_input.n_training_steps)
        if not self.cfg.standardizes:
            return
        sae_in, target = map(self.reshape_fn_in, self.input_and_target(step_input.sae_in))
        if self.standardization.state == State.UNKNOWN:
            self.standardization.find(sae_in, target)
        elif self.standardization.state == State.FOUND:
            weight = running_mean_weight(step_input.n_training_steps, self.cfg.prior_decay)
            moved_in = self.standardization.source.follow(sae_in, weight)
            moved_out = self.standardization.target.follow(target, weight)
            self.follow_means(moved_in, moved_out)

    def follow_means(self, moved_in: Float[Tensor, " d_in"], moved_out: Float[Tensor, " d_out"]) -> None:
        """Moves the biases with the means, given by how much these moved, in standardized units."""
        self.b_enc.add_(moved_in.to(self.b_enc) @ self.W_enc)
        self.b_dec.sub_(moved_out.to(self.b_dec))

    @torch.compiler.disable()
    @torch.no_grad()
    def _optimized(
        self, feature_acts: Float[Tensor, "batch d_sae"], target: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "batch d_sae"]:
        """The code with the bits flipped that pay, by the price and the firing rates so far."""
        target = self.run_time_activation_norm_fn_in(self.reshape_fn_in(target.to(self.dtype)))
        target = self.standardization.target(target) - self.b_dec
        firing_cost = self.bit_price * firing_bits(self.prior)
        coupling = useful_couplings(self.W_dec, len(target))
        return optimize_code(target, feature_acts, self.W_dec, firing_cost, self.cfg.max_flips, coupling)

    def _firing(self, step_input: TrainStepInput, code: Float[Tensor, "batch d_sae"]) -> Firing:
        rate = self.sharing.all_features(firing_rate(code))
        prior = self.sharing.all_features(self.prior.to(rate))
        over = excess(rate.detach(), prior, self.cfg.target_l0, self.cfg.target_bits)
        started = step_input.n_training_steps >= self.cfg.entropy_start_step
        factor = controlled_coefficient(self.entropy_multiplier.to(rate), over)
        return Firing(rate, over, factor * (step_input.coefficients["entropy"] * started))

    def _penalties(self, step_input: TrainStepInput, code: Tensor, firing: Firing) -> dict[str, Tensor]:
        entropy = tangent_entropy(firing.rate, self.cfg.tangent_rate, self.cfg.entropy)
        losses = {"entropy_loss": firing.entropy_coefficient * entropy}
        if self.cfg.covariance_coefficient > 0:
            drawing = torch.Generator().manual_seed(step_input.n_training_steps)
            penalty = self.sharing.covariance_penalty(code, self.cfg.covariance_sample, drawing)
            losses["covariance_loss"] = step_input.coefficients["covariance"] * penalty
        return losses

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        return self._penalties(step_input, feature_acts, self._firing(step_input, feature_acts))

    @torch.no_grad()
    def _metrics(self, firing: Firing) -> dict[str, Any]:
        return {
            "l0": firing.rate.sum(),
            "entropy_bits": marginal_entropy(firing.rate),
            "entropy_coefficient": firing.entropy_coefficient,
            "constant_features": ((firing.rate == 0) | (firing.rate == 1)).sum(),
        }

    @torch.no_grad()
    def _update_statistics(
        self, firing: Firing, step_input: TrainStepInput, reconstruction_loss: Float[Tensor, ""]
    ) -> None:
        # Replaced, not changed in place: a compiled backward pass may still read the old value.
        n_training_steps = step_input.n_training_steps
        if n_training_steps >= self.cfg.entropy_start_step:
            self.entropy_multiplier = updated_multiplier(
                self.entropy_multiplier, firing.excess.to(self.entropy_multiplier)
            )
            coefficient = self.entropy_multiplier * step_input.coefficients["entropy"]
            price = bit_price(coefficient, reconstruction_loss, len(self.b_dec), self.cfg.reconstruction)
            self.bit_price = price.to(self.bit_price)
        weight = running_mean_weight(n_training_steps, self.cfg.prior_decay)
        rate = self.sharing.own_features(firing.rate)
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
        for name, value in self._folded_with(self.standardization.fold()).items():
            getattr(self, name).copy_(value)

    def _folded_with(self, standardization: PairStandardization) -> dict[str, Tensor]:
        weights = foldable_weights(self)
        folded_weights = folded(weights, standardization.source, standardization.target)
        return {**folded_weights, "bit_price": raw_price(self.bit_price, standardization.target.scale)}

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        self.fold_standardization()
        super().fold_activation_norm_scaling_factor(scaling_factor)

    @override
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        self.fold_standardization()
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        self._check_finite.answer("before saving")
        super().process_state_dict_for_saving(state_dict)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict.update(self._folded_with(self.standardization.known()))
        for name in ["entropy_multiplier", *(name for name in state_dict if name.startswith("standardization."))]:
            del state_dict[name]

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict.setdefault("entropy_multiplier", torch.ones((), device=state_dict["W_enc"].device))
        add_missing_state(state_dict, "standardization")
