"""The Binary Autoencoder as a SAELens architecture (Eq. 1-2), for inference; `training_bae` trains it."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import no_type_check

import torch
from jaxtyping import Float, Int, UInt8
from sae_lens import SAEConfig, StandardSAE, StandardSAEConfig
from torch import Tensor
from typing_extensions import override

from bae_lens.functional.binarize import step
from bae_lens.functional.optimized_code import KeptCouplings, firing_bits, optimize_code
from bae_lens.functional.packing import pack_code
from bae_lens.functional.strength import FEATURES_PER_TOKEN, activation_strength, flip_polarity, strongest_features
from bae_lens.saes.binary_code import BinaryCode


@no_type_check  # SAELens passes `metadata` as a plain dict when it loads a config, which a runtime type check refuses
@dataclass
class BAEConfig(SAEConfig):
    """Config of a `BAE` for inference. Raises ValueError for a width below 1 or `apply_b_dec_to_input=True`."""

    apply_b_dec_to_input: bool = False
    """Must be False: the BAE's encoder takes its input as it is (Eq. 1)."""
    max_flips: int = 0
    """Bits of each vector's code that `encode` may flip where it pays, see `BAE.encode_optimized`; 0 is the encoder's
    own code (Eq. 2)."""

    @classmethod
    @override
    def architecture(cls) -> str:
        return "bae"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self)
        check_max_flips(self.max_flips)


class BAE(BinaryCode[BAEConfig]):
    """Binary autoencoder: `feature_acts = step(x @ W_enc + b_enc)`, `sae_out = feature_acts @ W_dec + b_dec` (Eq. 1-2).

    `feature_acts` are 0 or 1 in the SAE's dtype. The buffer `prior` (d_sae,) is each feature's firing rate, the running
    mean over training or what `estimate_prior` measured, in float32 whatever the dtype of the weights.
    """

    def __init__(self, cfg: BAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self._couplings = KeptCouplings()

    @override
    def encode(self, x: Float[Tensor, "*input"]) -> Float[Tensor, "*batch d_sae"]:
        """The code, 0 or 1, of `x` (..., d_in), at hook_z (..., heads, d_head). Raises ValueError for other widths."""
        if self.cfg.max_flips > 0:
            return self.encode_optimized(x, self.cfg.max_flips)
        return self._encode_alone(x)

    def _encode_alone(self, x: Float[Tensor, "*input"]) -> Float[Tensor, "*batch d_sae"]:
        """The encoder's own code (Eq. 2), no bit of it flipped."""
        return self.hooked_code(self.code_of(self.pre_activation(self.process_sae_in(x))))

    def code_of(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """The encoder's own code, 0 or 1, from its pre-activations."""
        return step(hidden_pre)

    @torch.no_grad()
    def encode_optimized(
        self, x: Float[Tensor, "*input"], max_flips: int | None = None
    ) -> Float[Tensor, "*batch d_sae"]:
        """The code of `x` with the bits flipped that pay, at most `max_flips` a vector, or all that do with None.

        A flip pays if it lowers the squared error plus `bit_price` times the bits that the code takes by the firing
        rates in `prior`; see `optimize_code`. There is no gradient. Raises ValueError while the price or the prior is
        unknown, for vectors that are not finite, and for other widths.
        """
        self._check_prior()
        _check_bit_price(self.bit_price)
        sae_in = self.process_sae_in(x)
        feature_acts = self.code_of(self.pre_activation(sae_in))
        target = (sae_in - self.b_dec).reshape(-1, self.cfg.d_in)
        optimized = optimize_code(
            target,
            feature_acts.reshape(len(target), self.cfg.d_sae),
            self.W_dec,
            self.bit_price * firing_bits(self.prior),
            max_flips,
            self._couplings(self.W_dec, len(target)),
        )
        return self.hooked_code(optimized.view_as(feature_acts))

    @torch.no_grad()
    def encode_packed(self, x: Float[Tensor, "batch d_in"], rows_at_once: int = 1024) -> UInt8[Tensor, "batch n_bytes"]:
        """The code of `x` as bits, `ceil(d_sae / 8)` bytes a row on the CPU (`unpack_code` gives the code back).

        No more than `rows_at_once` rows are a code of whole numbers at a time.
        """
        return torch.cat([pack_code(self.encode(rows)) for rows in x.split(rows_at_once)])

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

        Counts are exact in float64 for any corpus. While the prior is unknown, the code is the encoder's own, without
        flips. Raises ValueError if there are no activations.
        """
        encode = self.encode if self.prior.any() else self._encode_alone
        fired = torch.zeros(self.cfg.d_sae, dtype=torch.float64)
        n = 0
        for batch in [activations] if isinstance(activations, Tensor) else activations:
            feature_acts = encode(batch.to(self.device)).reshape(-1, self.cfg.d_sae)
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
        """A ReLU SAE with the same weights: it fires where the encoder does, and says how far above its threshold.

        For tools that need graded activations. It is for looking at features: it does not reconstruct.
        """
        own = ("architecture", "metadata", "max_flips")
        fields = {name: value for name, value in self.cfg.to_dict().items() if name not in own}
        graded = StandardSAE(StandardSAEConfig(**fields, metadata=deepcopy(self.cfg.metadata)))
        graded.load_state_dict(self.weights())
        if not self.hook_z_reshaping_mode:
            graded.turn_off_forward_pass_hook_z_reshaping()
        return graded

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name: what a dictionary of SAELens has of them, without the statistics."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def _check_prior(self) -> None:
        if not self.prior.any():
            raise ValueError("the prior of this BAE is unknown (0); call estimate_prior with some activations first")


def _check_bit_price(bit_price: Float[Tensor, ""]) -> None:
    if not bit_price >= 0:
        raise ValueError(
            f"bit_price must be at least 0, got {bit_price.item()} (NaN is unknown, as in files of earlier versions); "
            "set it with sae.bit_price.fill_(...) to the squared error of an activation that one bit is worth, in "
            "training its entropy coefficient over the squared scale of the standardization"
        )


def check_sizes(cfg: SAEConfig) -> None:
    """Raises ValueError for a width below 1 and for a decoder bias that is subtracted from the input."""
    for name in ("d_in", "d_sae"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(cfg, name)}")
    if cfg.apply_b_dec_to_input:
        raise ValueError("apply_b_dec_to_input must be False for a BAE, whose encoder takes its input as it is")


def check_max_flips(max_flips: int) -> None:
    """Raises ValueError below 0."""
    if max_flips < 0:
        raise ValueError(f"max_flips must be at least 0, where 0 is the encoder's own code, got {max_flips}")
