"""The covariance penalty (Eq. 5) in memory linear in the number of features.

The penalty is the sum over pairs of features of |cov|. The covariance matrix is never held whole: it is made tile by
tile above the diagonal, and only the product of the code with its signs is kept. That product, centred, is the gradient
up to a factor, and, the penalty being homogeneous of degree two, its inner product with the code is the penalty itself.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

TILE = 1024  # features a side: smaller tiles waste the matmul, larger ones leave the cache


def covariance_penalty(feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
    """Sum over ordered pairs of distinct features of the absolute unbiased covariance over the batch (Eq. 5).

    Computed in at least float32. The signs of a binary code's covariances are exact up to 4096 rows: constant features
    contribute exactly nothing, and pairs of covariance 0 have no gradient.
    Raises ValueError for fewer than 2 rows, where no covariance exists.
    """
    n = feature_acts.shape[0]
    if n < 2:
        raise ValueError(f"covariance needs at least 2 rows, got {n}; use a larger batch")
    return cast(tuple[Tensor, Tensor], _AbsoluteCovariance.apply(feature_acts))[0]


class _AbsoluteCovariance(torch.autograd.Function):
    @staticmethod
    def forward(feature_acts: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(feature_acts.device.type, enabled=False):
            h = feature_acts.to(torch.promote_types(feature_acts.dtype, torch.float32))
            signed = _code_times_covariance_signs(h)
            signed = (signed - signed.mean(0)) / (h.shape[0] - 1)
            return (h * signed).sum(), 2 * signed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        gradient = output[1]
        ctx.mark_non_differentiable(gradient)
        ctx.save_for_backward(gradient)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        return (grad_outputs[0] * gradient).to(ctx.dtype)


def _code_times_covariance_signs(h: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
    """`h @ sign(cov(h))` with the diagonal left out; `n^2 cov = n h^T h - c c^T` for column sums c is whole."""
    n, count = h.shape[0], h.sum(0)
    product = torch.zeros_like(h)
    tiles = [slice(start, start + TILE) for start in range(0, h.shape[1], TILE)]
    for i, a in enumerate(tiles):
        for b in tiles[i:]:
            signs = (n * (h[:, a].T @ h[:, b]) - torch.outer(count[a], count[b])).sign_()
            if a == b:
                signs.fill_diagonal_(0)
            else:
                product[:, a] += h[:, b] @ signs.T
            product[:, b] += h[:, a] @ signs
    return product
