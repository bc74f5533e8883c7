"""Binary Sparse Coding (Quirke, Shabalin and Belrose, 2025, arXiv 2509.25596): the k largest pre-activations as bits.

After the code of its first authors (EleutherAI/sparsify, activation `topk_binary` of the branch `binary`): the features
that fire are the k of largest pre-activation, as far as they are over a threshold that each feature learns, and the
gradient of a bit among these k is the sigmoid's derivative, that of the others 0. A threshold is a bias with another
sign, so that here the encoder's bias is all there is. What else differs is what a `BAE` has of its own: activations are
standardized, the rows of the decoder have any norm, where theirs have norm 1, and the sigmoid has a temperature of 1,
where their default is 2. Their SAE subtracts the decoder's bias from its input, which the encoder's bias does as well;
their transcoder does not.
"""

from copy import deepcopy
from dataclasses import dataclass, fields
from typing import no_type_check

import torch
from jaxtyping import Float
from sae_lens import TopKSAE, TopKSAEConfig
from torch import Tensor
from typing_extensions import override

from bae_lens.functional.binarize import step_of_largest
from bae_lens.saes.bae import BAE, BAEConfig
from bae_lens.saes.saelens_compat import TrainStepInput
from bae_lens.saes.training_bae import Firing, TrainingBAE
from bae_lens.saes.training_config import TrainingBAEConfig
from bae_lens.saes.training_transcoder import TrainingBinaryTranscoder, TrainingBinaryTranscoderConfig
from bae_lens.saes.transcoder import (
    BinaryTranscoder,
    BinaryTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
)


@no_type_check
@dataclass
class BinaryTopKConfig(BAEConfig):
    """Config of a `BinaryTopK` for inference. Raises ValueError for a k below 1 or above d_sae, and for flips."""

    k: int = 32
    """Features per token, at most; those whose pre-activation is negative do not fire."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "binary_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bits(self)


class BinaryTopK(BAE):
    """A `BAE` of whose features only the k with the largest pre-activations fire."""

    cfg: BinaryTopKConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def code_of(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return step_of_largest(hidden_pre, self.cfg.k)

    @override
    def fold_polarity(self) -> Float[Tensor, " d_sae"]:
        raise NotImplementedError(
            "of a Top-k code no feature can exchange 0 and 1: it would not be among the k largest"
        )

    @override
    def to_graded_sae(self) -> TopKSAE:
        """A Top-k SAE with the same weights: it fires where this one does, with how far above the threshold.

        For tools that need graded activations. It is for looking at features: it does not reconstruct.
        """
        own = ("architecture", "metadata", "max_flips")
        fields = {name: value for name, value in self.cfg.to_dict().items() if name not in own}
        graded = TopKSAE(TopKSAEConfig(**fields, metadata=deepcopy(self.cfg.metadata)))
        graded.load_state_dict(self.weights())
        if not self.hook_z_reshaping_mode:
            graded.turn_off_forward_pass_hook_z_reshaping()
        return graded


@no_type_check
@dataclass
class TrainingBinaryTopKConfig(TrainingBAEConfig):
    """Config of a `TrainingBinaryTopK`: the fields of a BAE, by default without entropy and bias, and k.

    Raises ValueError as `TrainingBAEConfig` does, for a k below 1 or above d_sae, and for flips.
    """

    k: int = 32
    """Features per token, at most."""
    entropy_coefficient: float = 0.0
    """Weight of the marginal entropy; the rate is fixed by k."""
    encoder_bias_init: float = 0.0
    """Encoder bias at the start."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "binary_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bits(self)


class TrainingBinaryTopK(TrainingBAE):
    """A `BinaryTopK` in training; what a bit is worth stays unknown, since k decides how many there are."""

    cfg: TrainingBinaryTopKConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def encode_with_hidden_pre(
        self, x: Float[Tensor, "*input"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"]]:
        hidden_pre = self.pre_activation(self.process_sae_in(x))
        return self.hooked_code(step_of_largest(hidden_pre, self.cfg.k, self.cfg.surrogate)), hidden_pre

    @override
    def _update_statistics(
        self, firing: Firing, step_input: TrainStepInput, reconstruction_loss: Float[Tensor, ""]
    ) -> None:
        super()._update_statistics(firing, step_input, reconstruction_loss)
        self.bit_price = torch.full_like(self.bit_price, torch.nan)


@no_type_check
@dataclass
class BinaryTopKTranscoderConfig(BinaryTopKConfig, BinaryTranscoderConfig):
    """Config of a `BinaryTopKTranscoder` for inference: the fields of a `BinaryTranscoder`, and k."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "binary_topk_transcoder"


class BinaryTopKTranscoder(BinaryTopK, BinaryTranscoder):
    """A `BinaryTranscoder` of whose features only the k with the largest pre-activations fire."""

    cfg: BinaryTopKTranscoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def to_graded_sae(self) -> TopKTranscoder:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A Top-k transcoder with the same weights: it fires where this one does, with how far above the threshold.

        For tools that need graded activations. It is for looking at features: it does not reconstruct.
        """
        names = {field.name for field in fields(TopKTranscoderConfig)} - {"metadata"}
        values = {name: getattr(self.cfg, name) for name in names}
        graded = TopKTranscoder(TopKTranscoderConfig(**values, metadata=deepcopy(self.cfg.metadata)))
        graded.load_state_dict(self.weights())
        return graded


@no_type_check
@dataclass(kw_only=True)
class TrainingBinaryTopKTranscoderConfig(TrainingBinaryTopKConfig, TrainingBinaryTranscoderConfig):
    """Config of a `TrainingBinaryTopKTranscoder`: the fields of a binary transcoder, defaults of a binary Top-k, and k.

    Raises ValueError as both do.
    """

    @classmethod
    @override
    def architecture(cls) -> str:
        return "binary_topk_transcoder"


class TrainingBinaryTopKTranscoder(TrainingBinaryTopK, TrainingBinaryTranscoder):
    """A `BinaryTopKTranscoder` in training, on pairs."""

    cfg: TrainingBinaryTopKTranscoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]


def _check_bits(cfg: BinaryTopKConfig | TrainingBinaryTopKConfig) -> None:
    if not 1 <= cfg.k <= cfg.d_sae:
        raise ValueError(f"k must lie between 1 and d_sae = {cfg.d_sae}, got {cfg.k}")
    if cfg.max_flips != 0:
        raise ValueError(f"max_flips must be 0 for a binary_topk, whose bits have no price, got {cfg.max_flips}")
