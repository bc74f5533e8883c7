"""Real-valued codes chosen for the decoder: what an encoder, which decides each feature at once, leaves undone.

Given the decoder, the best code of a vector x with k features minimizes `|x - b_dec - a W_dec|^2` over their choice and
over their values `a >= 0`. The values of a given choice are a least-squares problem, solved exactly. The choice is
made greedily by gradient pursuit (Blumensath and Davies, 2008, doi:10.1109/TSP.2007.916124), which takes one product
with the decoder a feature and comes close to orthogonal matching pursuit.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from bae_lens.functional.optimized_code import argmax_of_rows, check_finite

PRODUCTS_AT_ONCE = 2**20  # of vectors with the decoder's rows, so that they stay in a core's cache
NUMBERS_AT_ONCE = 2**23  # of the decoder's rows that are gathered for vectors whose values are fitted together
RIDGE = 1e-10  # of a row's square, by which two rows that are the same still have one best pair of values
ROUNDING = 1e-10  # of a target's norm: values and slopes that are nearer to 0 have no sign
MOST_EXCHANGES = 200  # of features between those at 0 and the others; some five are enough


@torch.no_grad()
def fit_values(
    target: Float[Tensor, "batch d_out"], fires: Bool[Tensor, "batch d_sae"], W_dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "batch d_sae"]:
    """The values, at least 0, of the features that fire, with which the decoder comes nearest to `target`.

    `target` is what the decoder's rows are to add up to, `x - b_dec`. Computed in float64, in time of the cube of the
    largest number of features that fire. Raises ValueError for vectors that are not finite.
    """
    check_finite(target)
    counts = fires.sum(-1)
    unit, norms = _unit_rows(W_dec.double())
    code = torch.zeros(fires.shape, dtype=torch.float32, device=target.device)
    for rows in _blocks(counts, unit.shape[1]):
        size = int(counts[rows].max())
        features = fires[rows].byte().topk(size).indices if size else counts.new_zeros(len(rows), 0)
        chosen = fires[rows].gather(1, features)
        values = _least_squares(target[rows].double(), features, chosen, unit) / norms[features]
        code[rows] = code[rows].scatter_(1, features, values.float())
    return code


@torch.no_grad()
def pursue(
    target: Float[Tensor, "batch d_out"], n_features: Int[Tensor, " batch"], W_dec: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "batch d_sae"]:
    """A code of at most so many features a vector, chosen one after the other, with the best values, at least 0.

    Each step adds the feature whose row points most along what is left to explain, and moves all values along their
    gradient as far as lowers the error most. In the end `fit_values` finds the values of those chosen.
    Raises ValueError for vectors that are not finite, and for more features than there are.
    """
    check_finite(target)
    d_sae = len(W_dec)
    if not ((n_features >= 0) & (n_features <= d_sae)).all():
        raise ValueError(f"n_features must lie between 0 and d_sae = {d_sae}, got {n_features.tolist()}")
    unit, _ = _unit_rows(W_dec.float())
    chosen = torch.zeros(len(target), d_sae, dtype=torch.bool, device=target.device)
    order = n_features.argsort(descending=True)
    for rows in order.split(max(1, PRODUCTS_AT_ONCE // d_sae)):
        chosen[rows] = _chosen(target[rows].float(), n_features[rows], unit)
    return fit_values(target, chosen, W_dec)


def _chosen(
    target: Float[Tensor, "n d_out"], n_features: Int[Tensor, " n"], unit: Float[Tensor, "d_sae d_out"]
) -> Bool[Tensor, "n d_sae"]:
    """The features that gradient pursuit chooses, for vectors in order of falling `n_features`."""
    most = max(n_features.tolist(), default=0)
    features = torch.zeros(len(target), most, dtype=torch.int64, device=target.device)
    values = torch.zeros(len(target), most, device=target.device)
    residual, taken = target.clone(), torch.zeros(len(target), len(unit), device=target.device)
    for count in range(most):
        n = int((n_features > count).sum())  # those before it want more
        slope = residual[:n] @ unit.T
        features[:n, count] = argmax_of_rows(slope + taken[:n])
        own, old = features[:n, : count + 1], values[:n, : count + 1]
        taken[:n].scatter_(1, own[:, -1:], -torch.inf)
        gradient = slope.gather(1, own)
        gradient = torch.where((old > 0) | (gradient > 0), gradient, 0.0)
        direction = _sum_of_rows(own, gradient, unit)
        length = gradient.square().sum(-1) / direction.square().sum(-1).clamp(min=1e-30)
        values[:n, : count + 1] = (old + length[:, None] * gradient).relu()
        residual[:n] = target[:n] - _sum_of_rows(own, values[:n, : count + 1], unit)
    return taken < 0


def _least_squares(
    target: Float[Tensor, "n d_out"],
    features: Int[Tensor, "n k"],
    chosen: Bool[Tensor, "n k"],
    unit: Float[Tensor, "d_sae d_out"],
) -> Float[Tensor, "n k"]:
    """Non-negative least squares by block principal pivoting (Kim and Park, 2011, doi:10.1137/110821172).

    Of the features named, those not `chosen` stay 0. Features are exchanged between those at 0 and the others until the
    values of the others, which alone solve a linear system, are positive, and no feature at 0 would lower the error.
    All that have the wrong sign are exchanged at once, as long as there are fewer of them each time or all but three,
    then the last of them alone, which comes to an end.
    """
    k = features.shape[1]
    rows = unit[features]
    gram = rows @ rows.mT + RIDGE * torch.eye(k, dtype=unit.dtype, device=unit.device)
    product = (rows @ target[:, :, None]).squeeze(-1)
    least = ROUNDING * target.norm(dim=-1, keepdim=True)
    values, positive = torch.zeros_like(product), chosen.clone()
    fewest, patience = torch.full_like(features[:, :1], k + 1), torch.full_like(features[:, :1], 3)
    going_on = torch.arange(len(target), device=target.device)
    for _ in range(MOST_EXCHANGES if k else 0):
        own, inside = gram[going_on], positive[going_on].to(gram.dtype)
        system = own * inside[:, :, None] * inside[:, None, :] + torch.diag_embed(1 - inside)
        wanted = (product[going_on] * inside)[:, :, None]
        solved = torch.cholesky_solve(wanted, torch.linalg.cholesky(system))
        values[going_on] = solved.squeeze(-1)
        slope = (own @ solved).squeeze(-1) - product[going_on]
        signed = torch.where(positive[going_on], values[going_on], slope)
        wrong = chosen[going_on] & (signed < -least[going_on])
        count = wrong.sum(-1, keepdim=True)
        fewer = count < fewest[going_on]
        patience[going_on] = torch.where(fewer, 3, patience[going_on] - 1)
        fewest[going_on] = torch.minimum(fewest[going_on], count)
        last = wrong & (wrong.flip(1).cumsum(1).flip(1) == 1)
        positive[going_on] ^= torch.where(patience[going_on] >= 0, wrong, last)
        going_on = going_on[count.squeeze(-1) > 0]
        if len(going_on) == 0:
            break
    return values.clamp_(min=0)


def _blocks(counts: Int[Tensor, " batch"], d_out: int) -> list[Int[Tensor, " n"]]:
    """Vectors by their number of features, in parts that take about the same memory."""
    order, blocks = counts.argsort(), []
    while len(order):
        size = max(1, int(counts[order[-1]]))
        n = max(1, NUMBERS_AT_ONCE // (size * (size + d_out)))
        order, block = order[:-n], order[-n:]
        blocks.append(block)
    return blocks


def _sum_of_rows(
    features: Int[Tensor, "n k"], values: Float[Tensor, "n k"], unit: Float[Tensor, "d_sae d_out"]
) -> Float[Tensor, "n d_out"]:
    return embedding_bag(features, unit, mode="sum", per_sample_weights=values)


def _unit_rows(W_dec: Float[Tensor, "d_sae d_out"]) -> tuple[Float[Tensor, "d_sae d_out"], Float[Tensor, " d_sae"]]:
    """Rows of norm 1, those that are 0 as they are, and the norms."""
    norms = W_dec.norm(dim=-1)
    norms = torch.where(norms > 0, norms, 1.0)
    return W_dec / norms[:, None], norms
