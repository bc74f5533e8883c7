"""The code that is chosen for the decoder, with every help: how good a dictionary is, apart from how it encodes.

An encoder decides every feature by itself, in one product. Given the decoder there are better codes, and dictionaries
differ in how much better, so that they are compared twice: as their encoders encode, and as well as can be encoded.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor

from bae_lens.functional.losses import marginal_entropy
from bae_lens.functional.nonnegative_code import fit_values, pursue
from bae_lens.functional.optimized_code import KeptCouplings, firing_bits, optimize_code
from bae_lens.functional.sparse_matmul import sparse_matmul
from bae_lens.saes.binary_code import is_binary

MOST_FEATURES = 256  # of a vector whose code is chosen anew, which takes time of their number
RUN_TIME_NORMS = ("layer_norm", "constant_norm_rescale")  # under which a code is for one vector's norm
ROWS_FOR_PRICE = 1024  # vectors on which an unknown price is found
PRICES_TRIED = 10


class BestCode:
    """Chooses codes for the decoder of a dictionary, starting from the encoder's own.

    Of a binary code, bits are flipped where it pays at the dictionary's `bit_price`, see `optimize_code`; where the
    price is unknown or 0, at the lowest price found at which the code takes no more marginal bits than the encoder's
    own. Of a real-valued code, the one nearest to its target is taken for each vector: the encoder's own; its features
    with the best values; or as many features, chosen one after the other, see `pursue`. Vectors with more than 256
    features keep the encoder's code. Values are at least 0, but for the encoder's own.
    """

    def __init__(self, sae: SAE[Any]) -> None:
        self.sae = sae
        self._couplings = KeptCouplings()
        nothing = torch.zeros(1, sae.cfg.d_sae, dtype=sae.dtype, device=sae.device)
        self.b_dec = sae.decode(nothing).flatten().float()
        self.W_dec = _rows(sae) - self.b_dec
        self._firing_cost: Tensor | None = None

    @staticmethod
    def exists(sae: SAE[Any]) -> bool:
        """Whether a dictionary's output is a sum of rows of its decoder, whatever the vector."""
        return sae.cfg.normalize_activations not in RUN_TIME_NORMS

    def __call__(
        self, feature_acts: Float[Tensor, "n d_sae"], target: Float[Tensor, "n d_out"]
    ) -> Float[Tensor, "n d_sae"]:
        """The code for `target`, which the encoder's `feature_acts` should reconstruct; their first rows fix the price.

        Raises ValueError for targets that are not finite.
        """
        target = target.to(self.W_dec) - self.b_dec
        chosen = self._bits(feature_acts, target) if is_binary(self.sae) else self._values(feature_acts, target)
        return chosen.to(feature_acts)

    def refit(
        self, feature_acts: Float[Tensor, "n d_sae"], target: Float[Tensor, "n d_out"]
    ) -> Float[Tensor, "n d_sae"]:
        """Real values of the features that fire, each vector's own or the best, whichever come nearer to `target`."""
        target = target.to(self.W_dec) - self.b_dec
        return self._nearer(feature_acts.float(), self._fitted(feature_acts, target), target).to(feature_acts)

    def _values(
        self, feature_acts: Float[Tensor, "n d_sae"], target: Float[Tensor, "n d_out"]
    ) -> Float[Tensor, "n d_sae"]:
        best = self._nearer(feature_acts.float(), self._fitted(feature_acts, target), target)
        few = _has_few(feature_acts)
        pursued = pursue(target, feature_acts.count_nonzero(-1) * few, self.W_dec)
        return torch.where(few[:, None], self._nearer(best, pursued, target), best)

    def _fitted(self, feature_acts: Tensor, target: Tensor) -> Float[Tensor, "n d_sae"]:
        few = _has_few(feature_acts)[:, None]
        return torch.where(few, fit_values(target, (feature_acts != 0) & few, self.W_dec), feature_acts.float())

    def _nearer(
        self, one: Float[Tensor, "n d_sae"], other: Float[Tensor, "n d_sae"], target: Float[Tensor, "n d_out"]
    ) -> Float[Tensor, "n d_sae"]:
        """Of each vector, the code that leaves the smaller error; the first if they are alike."""
        return torch.where((self._error(other, target) < self._error(one, target))[:, None], other, one)

    def _error(self, code: Float[Tensor, "n d_sae"], target: Float[Tensor, "n d_out"]) -> Float[Tensor, " n"]:
        return (target - sparse_matmul(code, self.W_dec)).square().sum(-1)

    def _bits(
        self, feature_acts: Float[Tensor, "n d_sae"], target: Float[Tensor, "n d_out"]
    ) -> Float[Tensor, "n d_sae"]:
        if self._firing_cost is None:
            self._firing_cost = self._find_firing_cost(feature_acts, target)
        return self._flipped(feature_acts, target, self._firing_cost)

    def _flipped(self, feature_acts: Tensor, target: Tensor, firing_cost: Tensor) -> Tensor:
        coupling = self._couplings(self.W_dec, len(target))
        return optimize_code(target, feature_acts, self.W_dec, firing_cost, coupling=coupling)

    def _find_firing_cost(
        self, feature_acts: Float[Tensor, "n d_sae"], target: Float[Tensor, "n d_out"]
    ) -> Float[Tensor, " d_sae"]:
        sae = self.sae
        assert is_binary(sae)
        rate = feature_acts.float().mean(0)
        bits = firing_bits(sae.prior if sae.prior.any() else rate)
        if sae.bit_price > 0:
            return sae.bit_price * bits
        feature_acts, target = feature_acts[:ROWS_FOR_PRICE], target[:ROWS_FOR_PRICE]
        own_bits = _marginal_bits(feature_acts)
        middle = self._error(feature_acts.float(), target).mean().item() / max(own_bits, 1.0)
        low, high = middle / 2**8, middle * 2**4
        for _ in range(PRICES_TRIED):
            price = (low * high) ** 0.5
            dear = _marginal_bits(self._flipped(feature_acts, target, price * bits)) > own_bits
            low, high = (price, high) if dear else (low, price)
        return high * bits


def _has_few(feature_acts: Float[Tensor, "n d_sae"]) -> Bool[Tensor, " n"]:
    return feature_acts.count_nonzero(-1) <= MOST_FEATURES


def _marginal_bits(feature_acts: Float[Tensor, "n d_sae"]) -> float:
    return marginal_entropy(feature_acts.double().mean(0)).item()


def _rows(sae: SAE[Any]) -> Float[Tensor, "d_sae d_out"]:
    """What each feature alone decodes to, with the bias."""
    parts = []
    for features in torch.arange(sae.cfg.d_sae, device=sae.device).split(1024):
        one_each = torch.zeros(len(features), sae.cfg.d_sae, dtype=sae.dtype, device=sae.device)
        parts.append(sae.decode(one_each.scatter_(1, features[:, None], 1)).float())
    return torch.cat(parts)
