"""Which features of a binary code are worth their bits, found in closed form.

Gradients cannot answer this. A feature that fires half the time sits where the entropy has no slope, and of two that
say the same neither can go without the other taking over its part of the decoder. Given the code, though, the best
decoder is a least-squares problem, and so is the best decoder without a feature.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bae_lens.functional.losses import marginal_entropy

RIDGE = 1e-6  # added to the variances of the code, at most 1/4, so that features that say the same have an inverse
ROWS = 8192  # of a float32 product that is then added in float64; counts up to 2^24 stay exact


class Elimination(NamedTuple):
    """What is left of a code."""

    kept: Bool[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    """Least-squares decoder of the features kept; rows of the others are 0."""
    b_dec: Float[Tensor, " d_in"]


def eliminate(
    feature_acts: Float[Tensor, "n d_sae"], target: Float[Tensor, "n d_in"], entropy_coefficient: float
) -> Elimination:
    """Drops the features whose bits cost more than they explain, one by one, and refits the decoder of the rest.

    The loss `|target - reconstruction|^2 + entropy_coefficient * bits` (Eq. 3-5, summed over dimensions) falls by
    `entropy_coefficient * h(p_j) - |d_j|^2 / (C^-1)_jj` when feature j is dropped and the decoder fitted again, with C
    the covariance of the features left, d_j the row of their least-squares decoder and h the entropy of a bit. The
    feature with the largest fall goes first, until none would fall. Copies, negations and sums of other features go for
    their bits alone, constant features for nothing.

    Time is cubic and memory quadratic in the features that vary. Computed in float64, given in the dtype of `target`.
    Raises ValueError for fewer than 2 rows.
    """
    n = len(target)
    if n < 2:
        raise ValueError(f"elimination needs at least 2 rows, got {n}")
    rate, center = feature_acts.mean(0, dtype=torch.float64), target.mean(0, dtype=torch.float64)
    varies = ((rate > 0) & (rate < 1)).nonzero().flatten()
    code = feature_acts[:, varies]
    bits = marginal_entropy(rate[varies, None])
    second = _product(code, code) / n - torch.outer(rate[varies], rate[varies])
    second.diagonal().add_(RIDGE)
    cross = _product(code, target) / n - torch.outer(rate[varies], center)
    left = _worth_keeping(second, cross, entropy_coefficient * bits)
    rows = torch.linalg.solve(second[left][:, left], cross[left])
    kept = torch.zeros_like(rate, dtype=torch.bool)
    kept[varies[left]] = True
    W_dec = rows.new_zeros(len(rate), target.shape[1])
    W_dec[kept] = rows
    return Elimination(kept, W_dec.to(target.dtype), (center - rate @ W_dec).to(target.dtype))


def _worth_keeping(
    second: Float[Tensor, "k k"], cross: Float[Tensor, "k d_in"], cost: Float[Tensor, " k"]
) -> Bool[Tensor, " k"]:
    """Backward elimination; dropping a feature is a rank-one update of the inverse and of the decoder."""
    left = torch.ones_like(cost, dtype=torch.bool)
    inverse = torch.linalg.inv(second)
    decoder = inverse @ cross
    while left.any():
        fall = cost - decoder.square().sum(1) / inverse.diagonal()
        fall[~left] = -torch.inf
        worst = int(fall.argmax())
        if not fall[worst] > 0:
            break
        left[worst] = False
        column = inverse[:, worst] / inverse[worst, worst]
        decoder -= torch.outer(column, decoder[worst])
        inverse -= torch.outer(column, inverse[worst])
        inverse[worst, worst] = 1.0  # out of the way: its row and column are 0 now
    return left


def _product(a: Float[Tensor, "n k"], b: Float[Tensor, "n m"]) -> Float[Tensor, "k m"]:
    """`a^T b` in float64 from products of blocks of rows."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for rows_a, rows_b in zip(a.split(ROWS), b.split(ROWS), strict=True):
        total += (rows_a.to(rows_b.dtype).T @ rows_b).double()
    return total
