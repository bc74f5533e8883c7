"""Training of transcoders inside SAELens, which has them for inference only: with L1, with top k, and binary.

A training batch holds the activations at both hooks side by side, (batch, d_in + d_out); see `paired`.
"""

from dataclasses import dataclass, replace
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from sae_lens import (
    SkipTranscoderConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from torch import Tensor, nn
from typing_extensions import override

from bae_lens.saes.saelens_compat import TrainStepInput, TrainStepOutput
from bae_lens.saes.skip import add_skip, skip_output
from bae_lens.saes.training_bae import TrainingBAE
from bae_lens.saes.training_config import TrainingBAEConfig
from bae_lens.saes.transcoder import ARROW, add_transcoder_weights, refuse_flips, transcoder_input


@no_type_check
@dataclass(kw_only=True)
class TrainingTranscoderConfig(StandardTrainingSAEConfig):
    """Config of a `TrainingTranscoder`: the fields of SAELens' ReLU SAE and `d_out`.

    Raises ValueError for a width below 1 and for options of SAEs that a transcoder does not have.
    """

    d_out: int
    """Width of the activations at the output hook."""
    skip: bool = False
    """Whether it has a skip connection; see `skip`."""
    apply_b_dec_to_input: bool = False
    """Must be False: the decoder bias belongs to the output."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "transcoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_transcoder(self)

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        config = _with_both_hooks(super().get_inference_sae_cfg_dict())
        return {**config, "architecture": SkipTranscoderConfig.architecture()} if self.skip else config


class TrainingTranscoder(StandardTrainingSAE):
    """A ReLU transcoder with an L1 penalty, trained on pairs; saved as SAELens' `Transcoder` or `SkipTranscoder`."""

    cfg: TrainingTranscoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def initialize_weights(self) -> None:
        _initialize_with_bias(self)

    @override
    def process_sae_in(self, sae_in: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return transcoder_input(self, sae_in)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        return _forward_pass_on_pairs(self, step_input)


@no_type_check
@dataclass(kw_only=True)
class TrainingTopKTranscoderConfig(TopKTrainingSAEConfig):
    """Config of a `TrainingTopKTranscoder`: the fields of SAELens' Top-k SAE and `d_out`.

    Raises ValueError for a width below 1 and for options of SAEs that a transcoder does not have.
    """

    d_out: int
    """Width of the activations at the output hook."""
    skip: bool = False
    """Whether it has a skip connection; see `skip`."""
    apply_b_dec_to_input: bool = False
    """Must be False: the decoder bias belongs to the output."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "topk_transcoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_transcoder(self)
        if not 1 <= self.k <= self.d_sae:
            raise ValueError(f"k must lie between 1 and d_sae = {self.d_sae}, got {self.k}")

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        return _with_both_hooks(super().get_inference_sae_cfg_dict())


class TrainingTopKTranscoder(TopKTrainingSAE):
    """A transcoder with the k largest activations of each token, trained on pairs; saved as a `TopKTranscoder`."""

    cfg: TrainingTopKTranscoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def initialize_weights(self) -> None:
        _initialize_with_bias(self)

    @override
    def process_sae_in(self, sae_in: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return transcoder_input(self, sae_in)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        return _forward_pass_on_pairs(self, step_input)


@no_type_check
@dataclass(kw_only=True)
class TrainingBinaryTranscoderConfig(TrainingBAEConfig):
    """Config of a `TrainingBinaryTranscoder`: the fields and presets of a BAE and `d_out`.

    Raises ValueError for a width below 1 and for options of SAEs that a transcoder does not have.
    """

    d_out: int
    """Width of the activations at the output hook."""
    skip: bool = False
    """Whether it has a skip connection; see `skip`."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "binary_transcoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_transcoder(self)
        refuse_flips(self.max_flips)

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        return _with_both_hooks(super().get_inference_sae_cfg_dict())


class TrainingBinaryTranscoder(TrainingBAE):
    """A BAE whose code is decoded to the activations at another hook, trained on pairs."""

    cfg: TrainingBinaryTranscoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    W_skip: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        add_transcoder_weights(self, self.cfg.decoder_init_norm)
        self.add_bias_and_prior()
        add_skip(self)

    @override
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.hook_sae_output(self.decode(self.encode(x)) + self.beside_code(x))

    @override
    def beside_code(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"] | float:
        if not self.cfg.skip:
            return 0.0
        skipped = self.standardization.source(x.to(self.dtype)) @ self.W_skip.T
        return skipped / self.standardization.target.scale.to(skipped)

    @override
    def follow_means(self, moved_in: Float[Tensor, " d_in"], moved_out: Float[Tensor, " d_out"]) -> None:
        super().follow_means(moved_in, moved_out)
        if self.cfg.skip:
            self.b_dec.add_(moved_in.to(self.b_dec) @ self.W_skip.T)

    @override
    def input_and_target(self, batch: Float[Tensor, "batch _"]) -> tuple[Tensor, Tensor]:
        return _split_pairs(self, batch)


def _check_transcoder(cfg: TrainingSAEConfig) -> None:
    for name in ("d_in", "d_sae", "d_out"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(cfg, name)}")
    for name, only in (
        ("apply_b_dec_to_input", False),
        ("normalize_activations", "none"),
        ("reshape_activations", "none"),
    ):
        if getattr(cfg, name) != only:
            raise ValueError(
                f"{name} must be {only!r} for a transcoder, whose input and output are different activations, "
                f"got {getattr(cfg, name)!r}; standardize both sides instead"
            )


def _with_both_hooks(config: dict[str, Any]) -> dict[str, Any]:
    """An inference config that names both hooks where training named them as one pair."""
    hook_name, arrow, hook_name_out = str(config["metadata"].get("hook_name")).partition(ARROW)
    if arrow:
        config["metadata"] |= {"hook_name": hook_name, "hook_name_out": hook_name_out}
    return config


def _initialize_with_bias(sae: TrainingTranscoder | TrainingTopKTranscoder) -> None:
    add_transcoder_weights(sae, sae.cfg.decoder_init_norm)
    sae.b_enc = nn.Parameter(torch.zeros(sae.cfg.d_sae, dtype=sae.dtype, device=sae.device))
    add_skip(sae)


def _forward_pass_on_pairs(sae: TrainingSAE[Any], step_input: TrainStepInput) -> TrainStepOutput:
    """Encodes the first d_in columns of the batch and compares the output with the other d_out.

    The output's `sae_in` is the target, so that the explained variance that SAELens logs is of the target.
    Raises ValueError for a batch of another width.
    """
    sae_in, target = _split_pairs(sae, step_input.sae_in)
    feature_acts, hidden_pre = sae.encode_with_hidden_pre(sae_in)
    sae_out = sae.decode(feature_acts) + skip_output(sae, sae_in)
    losses = {"mse_loss": sae.mse_loss_fn(sae_out, target).sum(dim=-1).mean()}
    auxiliary = sae.calculate_aux_loss(replace(step_input, sae_in=target), feature_acts, hidden_pre, sae_out)
    assert isinstance(auxiliary, dict)
    losses |= auxiliary
    return TrainStepOutput(target, sae_out, feature_acts, hidden_pre, torch.stack([*losses.values()]).sum(), losses)


def _split_pairs(
    sae: TrainingSAE[Any], batch: Float[Tensor, "batch _"]
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
    d_in, d_out, width = sae.cfg.d_in, sae.cfg.d_out, batch.shape[-1]
    if width != d_in + d_out:
        raise ValueError(
            f"a transcoder is trained on input and target side by side, {d_in} + {d_out} wide, got {width}; see paired"
        )
    sae_in, target = batch.split([d_in, d_out], dim=-1)
    return sae_in, target
