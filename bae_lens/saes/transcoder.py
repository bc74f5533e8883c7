"""Transcoders beside SAELens' own: with a binary code, and with the k largest activations; for inference.

A transcoder reads the activations at one hook and writes those at another. `training_transcoder` trains them.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig, SkipTranscoder, SkipTranscoderConfig, Transcoder, TranscoderConfig
from torch import Tensor, nn
from typing_extensions import override

from bae_lens.saes.bae import BAE, BAEConfig
from bae_lens.saes.saelens_compat import TopK
from bae_lens.saes.skip import add_skip, skip_output

ARROW = "=>"  # "INPUT_HOOK=>OUTPUT_HOOK" names the activations at two hooks side by side


@no_type_check
@dataclass
class TopKTranscoderConfig(TranscoderConfig):
    """Config of a `TopKTranscoder` for inference."""

    apply_b_dec_to_input: bool = False
    """Must be False: the decoder bias belongs to the output."""
    k: int = 32
    """Features per token, at most; those whose pre-activation is not positive do not fire."""
    skip: bool = False
    """Whether it has a skip connection; see `skip`."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "topk_transcoder"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "TopKTranscoderConfig":
        return SAEConfig.from_dict.__func__(cls, config_dict)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "k": self.k, "skip": self.skip}


class TopKTranscoder(Transcoder):
    """SAELens' `Transcoder` with its k largest pre-activations, as far as they are positive, instead of all."""

    cfg: TopKTranscoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        add_skip(self)

    @override
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return super().forward(x) + skip_output(self, x)

    @override
    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return TopK(self.cfg.k)


@no_type_check
@dataclass
class BinaryTranscoderConfig(BAEConfig):
    """Config of a `BinaryTranscoder` for inference."""

    d_out: int = 768
    """Width of the activations at the output hook."""
    skip: bool = False
    """Whether it has a skip connection; see `skip`."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "binary_transcoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_flips(self.max_flips)


class BinaryTranscoder(BAE):
    """A `BAE` whose code is decoded to the activations at another hook: `W_dec` is (d_sae, d_out), `b_dec` (d_out,).

    Its code cannot be optimized, since what it is to reconstruct is not known when it encodes.
    """

    cfg: BinaryTranscoderConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def initialize_weights(self) -> None:
        add_transcoder_weights(self, decoder_init_norm=None)
        self.add_bias_and_prior()
        add_skip(self)

    @override
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.hook_sae_output(self.decode(self.encode(x)) + skip_output(self, x))

    @override
    def encode_optimized(
        self, x: Float[Tensor, "*input"], max_flips: int | None = None
    ) -> Float[Tensor, "*batch d_sae"]:
        raise NotImplementedError("the code of a transcoder cannot be optimized: its target is not known to encode")

    @override
    def to_graded_sae(self) -> Transcoder:
        """A ReLU transcoder with the same weights: it fires where this one does, with how far above the threshold.

        For tools that need graded activations. It is for looking at features: it does not reconstruct.
        """
        names = {field.name for field in fields(TranscoderConfig)} - {"metadata"}
        values = {name: getattr(self.cfg, name) for name in names}
        values["metadata"] = deepcopy(self.cfg.metadata)
        graded = (
            SkipTranscoder(SkipTranscoderConfig(**values)) if self.cfg.skip else Transcoder(TranscoderConfig(**values))
        )
        graded.load_state_dict(self.weights())
        return graded


def refuse_flips(max_flips: int) -> None:
    """Raises ValueError unless 0."""
    if max_flips != 0:
        raise ValueError(f"max_flips must be 0 for a transcoder, whose target is not known to encode, got {max_flips}")


def hooks_of(sae: SAE[Any]) -> tuple[str, str]:
    """The hooks that a dictionary reads from and writes to; they are the same unless it is a transcoder."""
    metadata = sae.cfg.metadata
    hook_name, _, hook_name_out = str(metadata.hook_name).partition(ARROW)
    return hook_name, hook_name_out or metadata.hook_name_out or hook_name


def output_width(cfg: SAEConfig) -> int:
    """Width of what a dictionary of this config writes: `d_out` of a transcoder, `d_in` of anything else."""
    return getattr(cfg, "d_out", cfg.d_in)


def add_transcoder_weights(sae: SAE[Any], decoder_init_norm: float | None) -> None:
    """Gives a transcoder under construction `W_enc` (d_in, d_sae), `W_dec` (d_sae, d_out) and `b_dec` (d_out,).

    The encoder's columns have norm 1, so that standardized inputs give pre-activations of variance 1; the decoder's
    rows have norm `decoder_init_norm`, None leaving them as drawn. Nothing ties the two, which face different spaces.
    """
    shapes = {"W_enc": (sae.cfg.d_in, sae.cfg.d_sae), "W_dec": (sae.cfg.d_sae, output_width(sae.cfg))}
    drawn = {name: torch.empty(shape, dtype=sae.dtype, device=sae.device) for name, shape in shapes.items()}
    for weights in drawn.values():
        nn.init.kaiming_uniform_(weights)
    sae.W_enc = nn.Parameter(drawn["W_enc"] / drawn["W_enc"].norm(dim=0))
    if decoder_init_norm is not None:
        drawn["W_dec"] *= decoder_init_norm / drawn["W_dec"].norm(dim=1, keepdim=True)
    sae.W_dec = nn.Parameter(drawn["W_dec"])
    sae.b_dec = nn.Parameter(torch.zeros(output_width(sae.cfg), dtype=sae.dtype, device=sae.device))


def transcoder_input(sae: SAE[Any], sae_in: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
    """What a transcoder encodes: its input as it is, because its decoder bias belongs to the output."""
    return sae.hook_sae_input(sae_in.to(sae.dtype))
