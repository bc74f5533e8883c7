"""The covariance penalty (Eq. 5) in memory linear in the number of features.

The penalty is the sum over pairs of features of |cov|. The covariance matrix is never held whole: it is made in parts,
and only the product of the code with its signs is kept. That product, centered, is the gradient up to a factor, and,
the penalty being homogeneous of degree two, its inner product with the code is the penalty itself.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bae_lens.functional.sparse_matmul import NonzeroEntries, sums_rows

TILE = 1024  # features a side of a dense tile: smaller ones waste the matmul, larger ones leave the cache
GPU_TILE = 4096  # there each kernel has to be launched, and nothing stays in a cache
BLOCK = 128  # columns of signs at a time for a sparse code, so that they stay in the cache
EXACT_ROWS = 4096  # n^2 is counted exactly in float32 up to here


def code_times_signs(h: Float[Tensor, "batch d_sae"], part: int = 0, n_parts: int = 1) -> Float[Tensor, "batch d_sae"]:
    """`h @ sign(cov(h))` with the diagonal left out, or one of several equal parts of the work, whose sum that is."""
    return _by_gathering(h, part, n_parts) if sums_rows(h) else _by_tiles(h, part, n_parts)


def covariance_penalty(
    feature_acts: Float[Tensor, "batch d_sae"],
    sample: int | None = None,
    generator: torch.Generator | None = None,
    times_signs: Callable[[Tensor], Tensor] = code_times_signs,
) -> Float[Tensor, ""]:
    """Sum over ordered pairs of distinct features of the absolute unbiased covariance over the batch (Eq. 5).

    Computed in at least float32. The signs of a binary code's covariances are exact whole-number arithmetic: constant
    features contribute exactly nothing, and pairs of covariance 0 have no gradient. On a CPU a sparse code takes time
    in proportion to the number of features that fire, times d_sae.

    With `sample`, the sum is over the pairs among so many features, drawn with `generator`, scaled to be an unbiased
    estimate of the whole, as is its gradient. Its standard error, relative to the whole, is about `2 cv / sqrt(sample)`
    for a coefficient of variation cv among the features' shares of the whole, as long as `sample` is well below d_sae.

    `times_signs` is where the time goes: `code_times_signs` or, for several processes, the sum of its parts.

    Raises ValueError for fewer than 2 rows, where no covariance exists, and for a sample of fewer than 2 features or
    more than there are.
    """
    n, d_sae = feature_acts.shape
    if n < 2:
        raise ValueError(f"covariance needs at least 2 rows, got {n}; use a larger batch")
    if sample is None:
        return absolute_covariance(feature_acts, times_signs)
    drawn, factor = drawn_features(d_sae, sample, generator)
    return absolute_covariance(feature_acts[:, drawn.to(feature_acts.device)], times_signs) * factor


def drawn_features(
    d_sae: int, sample: int, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, " sample"], float]:
    """A sample of the features, and what the sum over its pairs is to be multiplied with to estimate that over all.

    Raises ValueError for a sample of fewer than 2 features or more than there are.
    """
    if not 2 <= sample <= d_sae:
        raise ValueError(f"the sample must lie between 2 features and d_sae = {d_sae}, got {sample}")
    drawn = torch.randperm(d_sae, generator=generator)[:sample]
    return drawn, d_sae * (d_sae - 1) / (sample * (sample - 1))


def absolute_covariance(
    feature_acts: Float[Tensor, "batch d_sae"], times_signs: Callable[[Tensor], Tensor]
) -> Float[Tensor, ""]:
    """Sum of the absolute covariances of each of these features with all those that `times_signs` multiplies with."""
    return cast(tuple[Tensor, Tensor], _AbsoluteCovariance.apply(feature_acts, times_signs))[0]


def others_times_signs(
    others: Float[Tensor, "batch others"], own: Float[Tensor, "batch own"]
) -> Float[Tensor, "batch own"]:
    """`others @ sign(cov(others, own))`: what other features add to `code_times_signs` of some, tile by tile."""
    count, own_count, product = others.sum(0), own.sum(0), torch.zeros_like(own)
    others, own = _narrowed(others), _narrowed(own)
    for a in _tiles(others):
        for b in _tiles(own):
            signs = _signs(_matmul(others[:, a].T, own[:, b]), count[a], own_count[b], len(own))
            product[:, b] += _matmul(others[:, a], signs)
    return product


class _AbsoluteCovariance(torch.autograd.Function):
    @staticmethod
    def forward(feature_acts: Tensor, times_signs: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast(feature_acts.device.type, enabled=False):
            h = feature_acts.to(torch.promote_types(feature_acts.dtype, torch.float32))
            gradient = times_signs(h)
            gradient = gradient.sub_(gradient.mean(0)).mul_(2 / (h.shape[0] - 1))
            return (h * gradient).sum() / 2, gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: tuple[Tensor, Tensor]) -> None:
        gradient = output[1]
        ctx.mark_non_differentiable(gradient)
        ctx.save_for_backward(gradient)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (grad_outputs[0] * gradient).to(ctx.dtype), None


def _by_gathering(h: Float[Tensor, "batch d_sae"], part: int, n_parts: int) -> Float[Tensor, "batch d_sae"]:
    """Among the features that fire, column block by column block, each with two sums of rows."""
    entries = NonzeroEntries.of(h)
    fires = torch.bincount(entries.column, minlength=h.shape[1]) > 0
    number, kept = fires.cumsum(0) - 1, fires.nonzero().flatten()
    by_row = replace(entries, column=number[entries.column], shape=(len(h), len(kept)))
    by_feature = by_row.transposed()
    h = h.index_select(1, kept)
    count = h.sum(0)
    product = torch.zeros_like(h)
    for start in range(part * BLOCK, len(kept), n_parts * BLOCK):
        block = slice(start, start + BLOCK)
        signs = _signs(by_feature @ h[:, block], count, count[block], len(h))
        signs[block].fill_diagonal_(0)
        product[:, block] = by_row @ signs
    return h.new_zeros(len(h), len(fires)).index_copy_(1, kept, product)


def _by_tiles(h: Float[Tensor, "batch d_sae"], part: int, n_parts: int) -> Float[Tensor, "batch d_sae"]:
    """Tile by tile on and above the diagonal, each with two or three dense products."""
    count, product = h.sum(0), torch.zeros_like(h)
    h = _narrowed(h)
    tiles = _tiles(h)
    pairs = [(a, b) for i, a in enumerate(tiles) for b in tiles[i:]]
    for a, b in pairs[part::n_parts]:
        signs = _signs(_matmul(h[:, a].T, h[:, b]), count[a], count[b], len(h))
        if a == b:
            signs.fill_diagonal_(0)
        else:
            product[:, a] += _matmul(h[:, b], signs.T)
        product[:, b] += _matmul(h[:, a], signs)
    return product


def _tiles(h: Float[Tensor, "batch d_sae"]) -> list[slice]:
    side = GPU_TILE if h.is_cuda else TILE
    return [slice(start, start + side) for start in range(0, h.shape[1], side)]


def _narrowed(h: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
    """On a GPU `h` in bfloat16 if that changes nothing, as for a code; elsewhere as it is."""
    if h.device.type != "cuda" or h.dtype != torch.float32 or not (h == h.bfloat16()).all():
        return h
    return h.bfloat16()


def _matmul(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """The product, for a narrowed `a` of whole numbers exact in float32, which adds it up."""
    return torch.mm(a, b.bfloat16(), out_dtype=torch.float32) if a.dtype == torch.bfloat16 else a @ b


def _signs(
    products: Float[Tensor, "a b"], count_a: Float[Tensor, " a"], count_b: Float[Tensor, " b"], n: int
) -> Float[Tensor, "a b"]:
    """Signs of `n^2 cov = n h^T h - c c^T`, whole numbers for a binary code, given `h^T h` (overwritten) and `c`."""
    if n <= EXACT_ROWS:
        return products.mul_(n).addr_(count_a, count_b, alpha=-1).sign_()
    return products.double().mul_(n).addr_(count_a.double(), count_b.double(), alpha=-1).sign_().to(products.dtype)
