"""What other codes need: bits per vector against explained variance, as references for a binary autoencoder.

Bits alone say nothing: any code can be made shorter by reconstructing worse. Here are the curves that a code's point is
held against, the Gaussian bound, the classical code (PCA, then scalar quantization), the simplest (signs) and a binary
one whose features are drawn (random coding), and the bits of a family of codes at one explained variance, at which
different sets of vectors become comparable.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bae_lens.functional.losses import marginal_entropy
from bae_lens.functional.sparse_matmul import sparse_matmul

SWEPT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
ROWS_PER_PRODUCT = 8192  # of a float32 product that is then added in float64
COMPONENTS_AT_A_TIME = 32  # whose coefficients are held at once
SIGN_POINTS = 8  # of the curve of signs
RANDOM_L0 = (8, 16, 32, 64)  # features per vector, of the curve of random features
FEATURES_AT_A_TIME = 256  # of random features, whose pre-activations are held at once
RIDGE = 1e-3  # of the least squares that decode random features, in units of their mean variance
ROWS_FOR_CENTROIDS = 16_384  # training vectors from which the values of quantized coefficients are learned


class RatePoint(NamedTuple):
    """A code's cost and quality."""

    bits: float
    """Bits per vector."""
    explained_variance: float
    """1 minus mean squared error over variance; 1 is perfect, 0 is no better than the mean."""


def gaussian_bound(eigenvalues: Float[Tensor, " d"], bits: Float[Tensor, "*points"]) -> Float[Tensor, "*points"]:
    """Largest explained variance that a code of so many bits can reach for Gaussian vectors, by reverse water-filling.

    With water level t, components of variance `l` cost `1/2 log2(l / t)` bits if `l > t`, and leave an error of
    `min(l, t)`. Vectors that are not Gaussian can be cheaper, never dearer: of all sets with this covariance, Gaussian
    ones need the most bits.

    `eigenvalues` are those of the covariance, in any order; bits are at least 0. Computed in float64 on the CPU.
    Raises ValueError for a covariance without variance, negative eigenvalues or negative bits.
    """
    variance = _descending(eigenvalues)
    budget = bits.double().cpu()
    if not (budget >= 0).all():
        raise ValueError(f"bits must be at least 0, got {budget.min().item()}")
    variance = variance[variance > 0]
    log = variance.log2()
    count = torch.arange(1, len(log) + 1, dtype=torch.float64)
    bits_before_joining = (log.cumsum(0) - count * log) / 2  # what the larger ones cost when the k-th comes under water
    active = torch.searchsorted(bits_before_joining, budget.flatten(), right=True).clamp(min=1)
    level = ((log.cumsum(0)[active - 1] - 2 * budget.flatten()) / active).exp2()
    kept = torch.cat([variance.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    error = active * level + kept[active]
    return (1 - error / variance.sum()).view_as(budget)


def gaussian_bits(
    eigenvalues: Float[Tensor, " d"], explained_variance: Float[Tensor, "*points"]
) -> Float[Tensor, "*points"]:
    """Fewest bits per vector for an explained variance if the vectors were Gaussian: the inverse of `gaussian_bound`.

    Raises ValueError as it does, and for an explained variance outside [0, 1).
    """
    level = water_level(eigenvalues, explained_variance)
    variance = _descending(eigenvalues)
    return (variance / level[..., None]).clamp(min=1).log2().sum(-1) / 2


def water_level(
    eigenvalues: Float[Tensor, " d"], explained_variance: Float[Tensor, "*points"]
) -> Float[Tensor, "*points"]:
    """The level t at which `sum min(eigenvalue, t)` is the share of the variance left unexplained."""
    variance = _descending(eigenvalues)
    if not ((explained_variance >= 0) & (explained_variance < 1)).all():
        raise ValueError("explained_variance must lie in [0, 1)")
    knots = torch.cat([torch.zeros(1, dtype=torch.float64), variance.flip(0)])
    larger = torch.arange(len(variance), -1, -1, dtype=torch.float64)
    error = knots.cumsum(0) + larger * knots
    wanted = (1 - explained_variance.double().cpu()) * variance.sum()
    return torch.from_numpy(np.asarray(np.interp(wanted.numpy(), error.numpy(), knots.numpy())))


def pca_quantization(
    train: Float[Tensor, "n d"],
    test: Float[Tensor, "m d_test"],
    explained_variances: Sequence[float] = SWEPT,
) -> list[RatePoint]:
    """The curve of PCA with scalar quantization: fitted on `train`, measured on `test`, in order of rising bits.

    Coefficients are rounded to a multiple of one step common to all components, which at high rate is what reverse
    water-filling asks for: components smaller than the step cost nothing by themselves. Every component's symbols
    count with their empirical entropy over `test` (as a binary autoencoder's bits do, each component by itself), and
    are decoded as the mean of the training coefficients that share the symbol. One point for each of
    `explained_variances`, whose step is what Gaussian vectors would need to reach it at high rate; what is reached
    is more where steps are coarse.

    Raises ValueError for fewer than two vectors, different widths, values that are not finite, or constant vectors.
    """
    _check(train, test)
    mean = train.mean(0, dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eigh(covariance(train))
    vectors = vectors.to(train.device)
    steps = (12 * water_level(eigenvalues.clamp(min=0), torch.tensor(explained_variances, dtype=torch.float64))).sqrt()
    order = torch.arange(train.shape[1] - 1, -1, -1)
    train = train[:: -(-len(train) // ROWS_FOR_CENTROIDS)]
    bits, error = torch.zeros(2, len(steps), dtype=torch.float64)
    for part in order.split(COMPONENTS_AT_A_TIME):
        basis = vectors[:, part].float()
        known, new = ((x.float() - mean.float()) @ basis for x in (train, test))
        for i, step in enumerate(steps.tolist()):
            part_bits, part_error = _quantize(known, new, step)
            bits[i] += part_bits
            error[i] += part_error
    total = (test.double() - test.double().mean(0)).square().sum().item()
    return sorted(RatePoint(b, e) for b, e in zip(bits.tolist(), (1 - error / total).tolist(), strict=True))


def sign_coding(
    train: Float[Tensor, "n d"], test: Float[Tensor, "m d_test"], points: int = SIGN_POINTS
) -> list[RatePoint]:
    """The curve of signs alone: learned on `train`, measured on `test`, in order of rising bits.

    Dimensions of a hidden state as so many binary registers, no direction learned: "Bag of Dims" (Nalagatla, 2026,
    arXiv 2606.12629) as a code. Each dimension that is coded takes a bit, on which side of its training mean it is, and
    is decoded as the mean of the training values on that side; the others are their mean. `points` codes, of which each
    has as many dimensions more, those first whose sign explains most in training. Bits count with their entropy over
    `test`. At its end an isotropic Gaussian takes a bit a dimension, which explains 2 / pi.

    Raises ValueError as `pca_quantization` does.
    """
    _check(train, test)
    mean = train.mean(0, dtype=torch.float64)
    known, new = (x - mean.to(x) for x in (train, test))
    above, above_new = known >= 0, new >= 0
    fired = above.sum(0)
    total, upper = known.sum(0, dtype=torch.float64), (known * above).sum(0, dtype=torch.float64)
    high, low = upper / fired.clamp(min=1), (total - upper) / (len(train) - fired).clamp(min=1)
    explained = fired * high.square() + (len(train) - fired) * low.square()
    alone = new.square().sum(0, dtype=torch.float64)
    coded = (new - torch.where(above_new, high, low).to(new)).square().sum(0, dtype=torch.float64)
    share = above_new.double().mean(0)
    bits = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / np.log(2)
    order = explained.argsort(descending=True)
    at = torch.linspace(0, len(order), points + 1).round().long()[1:].clamp(min=1) - 1
    error = alone.sum() + (coded - alone)[order].cumsum(0)[at]
    variance = (test.double() - test.double().mean(0)).square().sum()
    return [
        RatePoint(*point)
        for point in zip(bits[order].cumsum(0)[at].tolist(), (1 - error / variance).tolist(), strict=True)
    ]


def random_coding(
    train: Float[Tensor, "n d"], test: Float[Tensor, "m d_test"], n_features: int, l0s: Sequence[int] = RANDOM_L0
) -> list[RatePoint]:
    """The curve of random features of equal rates: decoder and thresholds from `train`, measured on `test`.

    What the encoder of a binary dictionary must beat: of each of `n_features` bits the direction is drawn, isotropic,
    the same one every time; the bit is 1 for the same share of `train` as every other, those that lie furthest in this
    direction; the decoder is that of least squares, with a little ridge. One code for each of `l0s`, which is how many
    bits of a vector are 1 in the mean, in order of rising bits. Bits count with their entropy over `test`.

    Raises ValueError as `pca_quantization` does, and for an l0 that is not between 0 and `n_features`.
    """
    _check(train, test)
    for l0 in l0s:
        if not 0 < l0 < n_features:
            raise ValueError(f"l0 must lie between 0 and n_features = {n_features}, got {l0}")
    counts = [min(max(round(l0 / n_features * len(train)), 1), len(train)) for l0 in sorted(l0s)]
    directions = torch.randn(train.shape[1], n_features, generator=torch.Generator().manual_seed(0)).to(train)
    mean = train.mean(0, dtype=torch.float64).to(train)
    known, new = train - mean, test - mean
    codes: list[list[tuple[Tensor, Tensor]]] = [[] for _ in counts]
    for part in directions.split(FEATURES_AT_A_TIME, dim=1):
        pre, pre_new = known @ part, new @ part
        largest = pre.topk(max(counts, default=0), dim=0).values
        for code, count in zip(codes, counts, strict=True):
            code.append((pre >= largest[count - 1], pre_new >= largest[count - 1]))
    variance = (test.double() - test.double().mean(0)).square().sum()
    points = []
    for parts in codes:
        code, code_new = (torch.cat(side, 1).to(train) for side in zip(*parts, strict=True))
        rate = code.mean(0)
        decoder = _least_squares(code, rate, known)
        error = (new - sparse_matmul(code_new, decoder) + rate @ decoder).double().square().sum()
        points.append(RatePoint(marginal_entropy(code_new.mean(0).double()).item(), (1 - error / variance).item()))
    return points


def _least_squares(
    code: Float[Tensor, "n k"], rate: Float[Tensor, " k"], target: Float[Tensor, "n d"]
) -> Float[Tensor, "k d"]:
    """The weights by which the code less its rate gives a centered target, with a ridge of `RIDGE`."""
    gram = sparse_matmul(code.T, code).double() - len(code) * rate.double().outer(rate.double())
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, sparse_matmul(code.T, target).double()).to(target)


def covariance(vectors: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Unbiased covariance in float64, from float32 products of centered vectors, which vectors of any scale may be."""
    mean = vectors.mean(0, dtype=torch.float64).to(vectors)
    unit = 2.0 ** vectors.abs().max().double().clamp(min=1e-300).log2().floor().item()  # takes no digit from a product
    total = torch.zeros(vectors.shape[1], vectors.shape[1], dtype=torch.float64)
    for batch in vectors.split(ROWS_PER_PRODUCT):
        centered = (batch - mean) / unit
        centered = centered.float() if batch.dtype != torch.float64 else centered
        total += (centered.T @ centered).double().cpu()
    return total * unit**2 / (len(vectors) - 1)


def bits_at(curve: Sequence[RatePoint], explained_variance: float) -> float:
    """Bits that a family of codes needs for an explained variance, between its members.

    Members that cost more than another without explaining more are left out. In between, bits are linear in
    `log(1 - explained_variance)`, as they are at high rate. Raises ValueError outside what the family reaches.
    """
    return float(weights_at(curve, explained_variance) @ [point.bits for point in curve])


def weights_at(curve: Sequence[RatePoint], explained_variance: float) -> Float[np.ndarray, " members"]:
    """How much each member of a family counts in `bits_at`: 0 but for the two neighbors, whose weights add up to 1."""
    best: list[int] = []
    for i in sorted(range(len(curve)), key=lambda i: (curve[i].bits, -curve[i].explained_variance)):
        if not best or curve[i].explained_variance > curve[best[-1]].explained_variance:
            best.append(i)
    reached = [curve[i].explained_variance for i in best]
    if not best or not reached[0] <= explained_variance <= reached[-1]:
        span = f"between {reached[0]:.4g} and {reached[-1]:.4g}" if best else "nothing"
        raise ValueError(f"the codes explain {span} of the variance, got {explained_variance}; add codes beyond that")
    unexplained = [-np.log(max(1 - share, 1e-12)) for share in [explained_variance, *reached]]
    weights = np.zeros(len(curve))
    weights[best] = [np.interp(unexplained[0], unexplained[1:], only) for only in np.eye(len(best))]
    return weights


def _quantize(train: Float[Tensor, "n k"], test: Float[Tensor, "m k"], step: float) -> tuple[float, float]:
    """Bits per vector and summed squared error of `test` when the coefficients of k components are rounded."""
    reach = torch.stack([train.abs().max(), test.abs().max()]).max().div(step).round().item()
    if reach == 0:
        return 0.0, (test - train.mean(0)).double().square().sum().item()
    levels = int(2 * reach + 1)
    symbols, known = (_symbols(x, step, int(reach)) for x in (test, train))
    size = levels * train.shape[1]
    count = torch.bincount(known, minlength=size)
    middle = torch.arange(-int(reach), int(reach) + 1, device=train.device).mul(step).repeat(train.shape[1]).double()
    sums = torch.bincount(known, weights=train.flatten().double(), minlength=size)
    values = torch.where(count > 0, sums / count.clamp(min=1), middle)
    share = torch.bincount(symbols, minlength=size).double() / len(test)
    bits = -torch.xlogy(share, share).sum() / np.log(2)
    return bits.item(), (test.flatten() - values[symbols]).square().sum().item()


def _symbols(coefficients: Float[Tensor, "n k"], step: float, reach: int) -> Int[Tensor, " nk"]:
    """Whole numbers from 0, different for different components."""
    own = (coefficients / step).round().long() + reach
    return (own + torch.arange(coefficients.shape[1], device=own.device) * (2 * reach + 1)).flatten()


def _descending(eigenvalues: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """In float64, from the largest; rounding errors below 0 count as 0."""
    variance = eigenvalues.double().cpu().sort(descending=True).values
    if not (torch.isfinite(variance).all() and variance.numel() and variance[0] > 0):
        raise ValueError("a rate needs vectors with some finite variance; these have none")
    if variance[-1] < -1e-6 * variance[0]:
        raise ValueError(f"eigenvalues of a covariance are at least 0, got {variance[-1].item()}")
    return variance.clamp(min=0)


def _check(train: Float[Tensor, "n d"], test: Float[Tensor, "m d_test"]) -> None:
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train and test must have the same width, got {train.shape[1]} and {test.shape[1]}")
    for name, vectors in (("train", train), ("test", test)):
        if len(vectors) < 2:
            raise ValueError(f"{name} needs at least 2 vectors, got {len(vectors)}")
        if not torch.isfinite(vectors).all():
            raise ValueError(f"{name} must be finite, but holds NaN or infinity")
