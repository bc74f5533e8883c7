"""The Binary Autoencoder as a SAELens architecture (Eq. 1-2), for inference; `training_bae` trains it."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int, UInt8
from sae_lens import SAE, SAEConfig, StandardSAE, StandardSAEConfig
from torch import Tensor, nn
from typing_extensions import override

from bae_lens.functional.binarize import step
from bae_lens.functional.packing import pack_code
from bae_lens.functional.sparse_matmul import sparse_matmul
from bae_lens.functional.strength import FEATURES_PER_TOKEN, activation_strength, flip_polarity, strongest_features


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
        check_sizes(self)


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
        add_bias_and_prior(self, encoder_bias=0.0)

    @override
    def process_sae_in(self, sae_in: Float[Tensor, "*input"]) -> Float[Tensor, "*batch d_in"]:
        return process_sae_in(self, sae_in)

    @override
    def encode(self, x: Float[Tensor, "*input"]) -> Float[Tensor, "*batch d_sae"]:
        """The code, 0 or 1, of `x` (..., d_in), at hook_z (..., heads, d_head). Raises ValueError for other widths."""
        return self.hook_sae_acts_post(step(pre_activation(self, self.b_enc, x)))

    @torch.no_grad()
    def encode_packed(self, x: Float[Tensor, "batch d_in"], rows_at_once: int = 1024) -> UInt8[Tensor, "batch n_bytes"]:
        """The code of `x` as bits, `ceil(d_sae / 8)` bytes a row on the CPU (`unpack_code` gives the code back).

        No more than `rows_at_once` rows are a code of whole numbers at a time.
        """
        return torch.cat([pack_code(self.encode(rows)) for rows in x.split(rows_at_once)])

    @override
    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*output"]:
        return decode(self, feature_acts)

    def activation_strength(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Strength `log2 |h - prior|` of each bit, in bits, at most 0 (section 4.1).

        Raises ValueError while the prior is unknown.
        """
        self._check_prior()
        return activation_strength(feature_acts, self.prior)

    @torch.no_grad()
    def activated_features(self, x: Float[Tensor, "*input"], k: int = FEATURES_PER_TOKEN) -> Int[Tensor, "*batch k"]:
        """Each token's k most strongly activated features, strongest first (section 4.1).

        -1 where fewer than k bits differ from what the prior makes more likely.
        """
        return strongest_features(self.activation_strength(self.encode(x)), k)

    @torch.no_grad()
    def estimate_prior(self, activations: Iterable[Float[Tensor, "..."]]) -> Float[Tensor, " d_sae"]:
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

        Returns which features were flipped (1) or not (0). Raises ValueError while the prior is unknown.
        """
        self._check_prior()
        flip = (self.prior > 0.5).to(self.prior.dtype)
        flip_polarity(flip, self.W_enc.data, self.b_enc.data, self.W_dec.data, self.b_dec.data, self.prior)
        return flip

    def to_graded_sae(self) -> StandardSAE:
        """A ReLU SAE with the same weights: it fires where the BAE does and says how far above the threshold.

        For tools that need graded activations. It is for looking at features: it does not reconstruct.
        """
        fields = {name: value for name, value in self.cfg.to_dict().items() if name not in ("architecture", "metadata")}
        graded = StandardSAE(StandardSAEConfig(**fields, metadata=deepcopy(self.cfg.metadata)))
        graded.load_state_dict({name: value for name, value in self.state_dict().items() if name != "prior"})
        if not self.hook_z_reshaping_mode:
            graded.turn_off_forward_pass_hook_z_reshaping()
        return graded

    def _check_prior(self) -> None:
        if not self.prior.any():
            raise ValueError("the prior of this BAE is unknown (0); call estimate_prior with some activations first")

    @override
    def fold_W_dec_norm(self) -> None:
        refuse_fold_of_decoder_norm()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BAE":
        return apply_keeping_statistics(self, super()._apply, fn, recurse)


def check_sizes(cfg: SAEConfig) -> None:
    """Raises ValueError for a width below 1 and for a decoder bias that is subtracted from the input."""
    for name in ("d_in", "d_sae"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(cfg, name)}")
    if cfg.apply_b_dec_to_input:
        raise ValueError("apply_b_dec_to_input must be False for a BAE, whose encoder takes its input as it is")


def add_bias_and_prior(sae: SAE[Any], encoder_bias: float) -> None:
    """Gives an SAE under construction the parameter `b_enc` (d_sae,) and the buffer `prior` (d_sae,), unknown (0)."""
    sae.b_enc = nn.Parameter(torch.full((sae.cfg.d_sae,), encoder_bias, dtype=sae.dtype, device=sae.device))
    sae.register_buffer("prior", torch.zeros(sae.cfg.d_sae, device=sae.device))


def pre_activation(
    sae: SAE[Any], b_enc: Float[Tensor, " d_sae"], x: Float[Tensor, "*input"]
) -> Float[Tensor, "*batch d_sae"]:
    """`x @ W_enc + b_enc` of the normalized input (Eq. 2). Raises ValueError for another width."""
    width = x.shape[-1] * x.shape[-2] if sae.hook_z_reshaping_mode else x.shape[-1]
    if width != sae.cfg.d_in:
        raise ValueError(f"this BAE takes activations {sae.cfg.d_in} wide (d_in), got {width}; check the hook")
    return sae.hook_sae_acts_pre(sae.process_sae_in(x) @ sae.W_enc + b_enc)


def process_sae_in(sae: SAE[Any], sae_in: Float[Tensor, "*input"]) -> Float[Tensor, "*batch d_in"]:
    """What the encoder takes. (SAELens subtracts `0 * b_dec`, for whose gradient a whole matrix product is spent.)"""
    sae_in = sae.hook_sae_input(sae.reshape_fn_in(sae_in.to(sae.dtype)))
    return sae.run_time_activation_norm_fn_in(sae_in)


def decode(
    sae: SAE[Any], feature_acts: Float[Tensor, "*batch d_sae"], raw: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, "*output"]:
    """`feature_acts @ W_dec + b_dec` (Eq. 1), in the shape and scale of the SAE's input.

    `raw` undoes a standardization that the weights are for.
    """
    sae_out = sparse_matmul(feature_acts, sae.W_dec) + sae.b_dec
    sae_out = sae.hook_sae_recons(sae_out if raw is None else raw(sae_out))
    return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(sae_out), sae.d_head)


def refuse_fold_of_decoder_norm() -> None:
    """Raises NotImplementedError."""
    raise NotImplementedError("a binary code cannot absorb a scale: folding W_dec_norm would change the output")


def apply_keeping_statistics(sae: Any, apply: Callable[..., Any], fn: Callable[[Tensor], Tensor], recurse: bool) -> Any:
    """`nn.Module._apply` (which is behind `.to`), except that buffers stay in float32 when the weights change dtype.

    They are running statistics, whose small updates bfloat16 would lose.
    """
    statistics = {name: buffer for name, buffer in sae.named_buffers(recurse=False) if not buffer.is_meta}
    apply(fn, recurse)
    for name, buffer in statistics.items():
        setattr(sae, name, buffer.to(getattr(sae, name).device, torch.float32))
    return sae
