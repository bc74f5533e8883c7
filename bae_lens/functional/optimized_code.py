"""Bits chosen for each vector: the code that is cheapest for its error, found by flips of single bits.

The encoder decides every bit alone, by a threshold. Given the decoder, the best code of a vector x minimizes

    |x - b_dec - h W_dec|^2 + price * bits(h),    bits(h) = sum_j h_j log2((1 - p_j) / p_j) + a constant.

Flipping bit j lowers this by `(1 - 2 h_j) y_j`, where the field

    y_j = 2 w_j.(x - b_dec) - |w_j|^2 - price * log2((1 - p_j) / p_j) - sum_{k != j} 2 w_j.w_k h_k

does not depend on bit j itself. So no single flip pays exactly if `h = step(y)`, a fixed point of Hopfield's network
(1982), and a flip of bit k changes the other fields by a row of the couplings `2 w_j.w_k`. Each flip made here is the
one that pays most. This is the rate-distortion optimized quantization of video coders (Sullivan and Wiegand 1998), in
the steps of matching pursuit (Mallat and Zhang 1993) with bits for coefficients.

All of it is in float32, whatever the dtype of code and weights.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bae_lens.functional.sparse_matmul import sparse_matmul

RAREST = 2.0**-16  # firing rates nearer to 0 or 1 count as this far from them
CACHED_FIELDS = 2**17  # fields that are flipped together on a CPU, so that they stay in a core's cache
LARGEST_COUPLINGS = 2**28  # numbers, a GiB, that are kept of a wide dictionary
FLIPS_EXPECTED = 8  # of a vector, when it is decided whether all couplings are worth computing
ROUNDING = 2.0**-17  # of the squares whose difference a field is: a flip that pays less may be a rounding error


def firing_bits(prior: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """Bits by which a code gets longer when a feature of this firing rate fires: `log2((1 - p) / p)`, in [-16, 16].

    Negative for a feature that fires more often than not. Rates within 2^-16 of 0 or 1 count as that far from them: a
    dead feature may fire where it is worth 16 bits, and one that always fired stay off.
    """
    p = prior.float().clamp(RAREST, 1 - RAREST)
    return ((1 - p) / p).log2()


def rate_distortion(
    target: Float[Tensor, "batch d_out"],
    feature_acts: Float[Tensor, "batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    firing_cost: Float[Tensor, " d_sae"],
) -> Float[Tensor, " batch"]:
    """Squared error of each vector plus the cost of the features that fire: what `optimize_code` lowers.

    `target` is what the decoder's rows are to add up to, `x - b_dec`; `firing_cost` the price of a bit, in squared
    error, times `firing_bits`.
    """
    code = feature_acts.float()
    return (target.float() - code @ W_dec.float()).square().sum(-1) + code @ firing_cost


def fields(
    target: Float[Tensor, "batch d_out"],
    feature_acts: Float[Tensor, "batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    firing_cost: Float[Tensor, " d_sae"],
) -> Float[Tensor, "batch d_sae"]:
    """By how much `rate_distortion` is lower if a feature fires than if it does not, all others as they are."""
    code, W = feature_acts.float(), W_dec.float()
    squares = W.square().sum(-1)
    residual = target.float() - sparse_matmul(code, W)
    return (residual @ W.T).mul_(2).sub_(squares + firing_cost).addcmul_(code, squares, value=2)


def couplings(W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "d_sae d_sae"]:
    """`2 w_j.w_k`, by what one feature's firing lowers the other's field; 0 of a feature with itself."""
    W = W_dec.float()
    return (W @ W.T).mul_(2).fill_diagonal_(0)


def useful_couplings(W_dec: Float[Tensor, "d_sae d_out"], n_vectors: int) -> Float[Tensor, "d_sae d_sae"] | None:
    """The couplings; None where `optimize_code` does better without: for few vectors, or if they are over a GiB."""
    d_sae = len(W_dec)
    if n_vectors * FLIPS_EXPECTED < d_sae or d_sae**2 > LARGEST_COUPLINGS:
        return None
    return couplings(W_dec)


class KeptCouplings:
    """The couplings of a decoder, kept until it changes: to compute them takes as long as to encode d_sae vectors."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, W_dec: Float[Tensor, "d_sae d_out"], n_vectors: int) -> Float[Tensor, "d_sae d_sae"] | None:
        """Those kept, or else `useful_couplings`."""
        if self._kept is not None and self._is_of(W_dec, self._kept[0]):
            return self._kept[1]
        coupling = useful_couplings(W_dec, n_vectors)
        if coupling is not None:
            self._kept = (W_dec.detach().clone(), coupling)
        return coupling

    @staticmethod
    def _is_of(W_dec: Tensor, kept: Tensor) -> bool:
        return W_dec.device == kept.device and W_dec.dtype == kept.dtype and torch.equal(W_dec, kept)


@torch.no_grad()
def optimize_code(
    target: Float[Tensor, "batch d_out"],
    feature_acts: Float[Tensor, "batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    firing_cost: Float[Tensor, " d_sae"],
    max_flips: int | None = None,
    coupling: Float[Tensor, "d_sae d_sae"] | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """A code after up to `max_flips` flips a vector, each the one that lowers `rate_distortion` most.

    With None it goes on until no flip pays, and at most d_sae times. No vector's code depends on the others.
    `coupling` is `couplings(W_dec)`: without it, its rows are computed for each flip, which takes as long as encoding
    once more, and is less only for few vectors or where the matrix would be too large.
    Raises ValueError for vectors or costs that are not finite, and for a negative number of flips.
    """
    if max_flips is not None and max_flips < 0:
        raise ValueError(f"max_flips must be at least 0, or None for as many as pay, got {max_flips}")
    if not torch.isfinite(firing_cost).all():
        raise ValueError("every feature's firing_cost must be finite, got NaN or infinity; check the price of a bit")
    check_finite(target)
    d_sae = feature_acts.shape[-1]
    with torch.autocast(target.device.type, enabled=False):
        W, target, sign = W_dec.float(), target.float(), 1 - 2 * feature_acts.float()
        field = fields(target, feature_acts, W, firing_cost)
        squares = target.square().sum(-1, keepdim=True) + W.square().sum(-1).max()
        rows = max(1, CACHED_FIELDS // d_sae if target.device.type == "cpu" else len(target))
        blocks = zip(sign.split(rows), field.split(rows), (ROUNDING * squares).split(rows), strict=True)
        for signs, own_fields, least in blocks:
            _flip(signs, own_fields, least, W, coupling, d_sae if max_flips is None else max_flips)
    return ((1 - sign) / 2).to(feature_acts.dtype)


def check_finite(target: Float[Tensor, "batch d_out"]) -> None:
    """Raises ValueError, saying how many, for vectors that hold NaN or infinity: no code is best for them."""
    bad = int((~torch.isfinite(target)).any(-1).sum())
    if bad:
        raise ValueError(f"vectors must be finite, but {bad} of {len(target)} hold NaN or infinity; leave them out")


def _flip(
    sign: Float[Tensor, "n d_sae"],
    field: Float[Tensor, "n d_sae"],
    least: Float[Tensor, "n 1"],
    W_dec: Float[Tensor, "d_sae d_out"],
    coupling: Float[Tensor, "d_sae d_sae"] | None,
    max_flips: int,
) -> None:
    """In place, where `sign` is 1 of a bit that is off and -1 of one that is on, and a flip must gain over `least`."""
    for flips in range(1, max_flips + 1):
        gain = sign * field
        best = argmax_of_rows(gain)
        index = best[:, None]
        turned = sign.gather(1, index) * (gain.gather(1, index) > least)
        going_on = turned.nonzero()[:, 0]
        if len(going_on) == 0:
            return
        if coupling is None:
            lowered = (W_dec[best] @ W_dec.T).mul_(2).scatter_(1, index, 0.0)
        else:
            lowered = coupling.index_select(0, best)
        field.addcmul_(lowered, turned, value=-1)
        sign.scatter_add_(1, index, -2 * turned)
        if len(going_on) < len(sign) / 2:  # vectors of which no flip pays are done, and not carried along
            rest = sign[going_on]
            _flip(rest, field[going_on], least[going_on], W_dec, coupling, max_flips - flips)
            sign[going_on] = rest
            return


def argmax_of_rows(x: Float[Tensor, "n k"]) -> Int[Tensor, " n"]:
    """Of each row; on a CPU by numpy, which takes a tenth of torch's time."""
    return torch.from_numpy(x.numpy().argmax(-1)) if x.device.type == "cpu" else x.argmax(-1)
