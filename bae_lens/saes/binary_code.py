"""What dictionaries with a binary code have in common, in inference and in training."""

from abc import ABC
from collections.abc import Callable
from typing import Any, ClassVar, TypeGuard, TypeVar

import torch
from jaxtyping import Float
from sae_lens import SAE, SAEConfig
from torch import Tensor, nn
from typing_extensions import override

from bae_lens.functional.sparse_matmul import sparse_matmul
from bae_lens.functional.strength import activation_strength
from bae_lens.saes.saelens_compat import HookPoint

Config = TypeVar("Config", bound=SAEConfig)


def is_binary(sae: SAE[Any]) -> TypeGuard["BinaryCode[Any]"]:
    """Whether a dictionary's features are bits; none of SAELens' own are."""
    return getattr(sae, "is_binary", False)


class StatisticsInFloat32(nn.Module):
    """A module whose buffers stay in float32 when its weights change dtype.

    They are running statistics, whose small updates bfloat16 would lose.
    """

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StatisticsInFloat32":
        statistics = {name: buffer for name, buffer in self.named_buffers(recurse=False) if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in statistics.items():
            setattr(self, name, buffer.to(getattr(self, name).device, torch.float32))
        return self


class BinaryCode(StatisticsInFloat32, SAE[Config], ABC):
    """A dictionary whose features are 0 or 1: `step(x @ W_enc + b_enc) @ W_dec + b_dec` (Eq. 1-2).

    Beside SAELens' hook points it has `hook_sae_acts_strength`: the activation strength `log2 |h - prior|` of each bit
    that `hook_sae_acts_post` gives (section 4.1), (..., d_sae) in bits, at most 0, NaN while the prior is unknown. It
    is computed where a hook or a cache asks for it, and is there to be read: what a hook returns changes nothing.
    """

    is_binary: ClassVar[bool] = True
    b_enc: nn.Parameter
    prior: Tensor
    """Firing rate of each feature, (d_sae,) in float32; 0 while unknown."""
    bit_price: Tensor
    """Squared error that a bit of the code is worth, of the activations that the weights are for; () in float32, NaN
    while unknown."""

    def __init__(self, cfg: Config, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.hook_sae_acts_strength = HookPoint()
        self.setup()

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.add_bias_and_prior()

    def add_bias_and_prior(self) -> None:
        """The parameter and the buffers that SAELens' weights lack."""
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))
        self.register_buffer("prior", torch.zeros(self.cfg.d_sae, device=self.device))
        self.register_buffer("bit_price", torch.full((), torch.nan, device=self.device))

    @override
    def process_sae_in(self, sae_in: Float[Tensor, "*input"]) -> Float[Tensor, "*batch d_in"]:
        """The normalized input. Raises ValueError for another width."""
        width = sae_in.shape[-1] * sae_in.shape[-2] if self.hook_z_reshaping_mode else sae_in.shape[-1]
        if width != self.cfg.d_in:
            raise ValueError(f"this BAE takes activations {self.cfg.d_in} wide (d_in), got {width}; check the hook")
        # SAELens subtracts `0 * b_dec`, for whose gradient a whole matrix product is spent.
        sae_in = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(sae_in)

    def pre_activation(self, sae_in: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """`x @ W_enc + b_enc` of what `process_sae_in` gives (Eq. 2)."""
        return self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)

    def hooked_code(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """What the hooks of `hook_sae_acts_post` make of a code; those of `hook_sae_acts_strength` see its strength."""
        feature_acts = self.hook_sae_acts_post(feature_acts)
        if self.hook_sae_acts_strength._forward_hooks:
            strength = activation_strength(feature_acts, self.prior)
            self.hook_sae_acts_strength(strength.where(self.prior.any(), torch.nan))
        return feature_acts

    @override
    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*output"]:
        """`feature_acts @ W_dec + b_dec` (Eq. 1), in the shape and scale of the input."""
        sae_out = self.hook_sae_recons(self.raw_output(self.sum_of_rows(feature_acts) + self.b_dec))
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out), self.d_head)

    def sum_of_rows(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Of the decoder, those of the features that fire."""
        return sparse_matmul(feature_acts, self.W_dec)

    def raw_output(self, sae_out: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_out"]:
        """What the weights make, without the standardization that they may be for; here there is none."""
        return sae_out

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.bit_price /= scaling_factor**2

    @override
    @torch.no_grad()
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """`bit_price` becomes unknown, unless the whitening scales all directions alike, and with them all errors."""
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        squared = unwhitening_matrix @ unwhitening_matrix.T
        scale = squared.diagonal().mean()
        identity = torch.eye(len(squared), dtype=squared.dtype, device=squared.device)
        alike = torch.allclose(squared / scale, identity)
        self.bit_price *= scale.to(self.bit_price) if alike else torch.nan

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict.setdefault("bit_price", torch.full((), torch.nan, device=state_dict["W_enc"].device))

    @override
    def fold_W_dec_norm(self) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError("a binary code cannot absorb a scale: folding W_dec_norm would change the output")
