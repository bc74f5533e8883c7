"""What the values of a real-valued code cost: uniform quantization and the entropy of what comes out.

That a sparse code is to be judged by its description length is MDL-SAE's idea (Ayonrinde, Pearce and Sharkey, 2024,
arXiv 2410.11179), who add up the entropies of each feature's quantized activation, 0 among its levels. The count here
differs in three ways: which features fire is counted apart, so that a binary code is counted alike and a coder that
codes features jointly can be; the levels of all features share one step and one table, which no user has to send per
feature; and the step is the coarsest that costs little explained variance, where theirs is to cost little of the loss.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from bae_lens.functional.rate_distortion import RatePoint

QUANTIZATION_LOSS = 0.01  # of explained variance, that quantizing the values may cost
STEPS = tuple(2.0 ** (1 - half / 2) for half in range(10))  # in units of the root mean square of the values


@torch.no_grad()
def value_coding_curve(
    sae: SAE[Any],
    coded: Callable[[], Iterable[tuple[Float[Tensor, "_ d_sae"], Float[Tensor, "_ d_out"]]]],
    support_bits: float,
    variance: float,
) -> list[RatePoint]:
    """Explained variance against bits per token when the values of features that fire are quantized, coarse to fine.

    Values are measured by what they do to the output, activation times norm of the decoder row, and rounded to
    multiples of a step, one step for all features. Their cost is the empirical entropy of the rounded values, one code
    table shared by all features, so that it can be had by any entropy coder; saying which fire costs `support_bits`.
    `coded` gives batches of codes and of what `sae` should decode them to, and is asked twice; `variance` is the
    squared distance of all targets to their mean.
    """
    norms = sae.W_dec.norm(dim=-1).clamp(min=1e-12)
    root_mean_square = _root_mean_square((feature_acts for feature_acts, _ in coded()), norms)
    if root_mean_square == 0:
        return []
    errors = torch.zeros(len(STEPS), dtype=torch.float64)
    counts: list[dict[int, int]] = [{} for _ in STEPS]
    n = 0
    for feature_acts, y in coded():
        y, n = y.double(), n + len(y)
        for index, relative_step in enumerate(STEPS):
            step = relative_step * root_mean_square
            levels = (feature_acts * norms / step).round()
            errors[index] += (sae.decode(levels * step / norms).double().cpu() - y).square().sum()
            _add_counts(counts[index], levels[feature_acts != 0])
    return [
        RatePoint(support_bits + _entropy_times_total(count) / n, 1 - errors[index].item() / variance)
        for index, count in enumerate(counts)
    ]


def cheapest_values(curve: list[RatePoint], explained_variance: float) -> RatePoint:
    """The point of fewest bits that loses at most `QUANTIZATION_LOSS`; the finest one if every point loses more."""
    good = [point for point in curve if point.explained_variance >= explained_variance - QUANTIZATION_LOSS]
    return min(good, key=lambda point: point.bits) if good else curve[-1]


def _root_mean_square(codes: Iterable[Float[Tensor, "_ d_sae"]], norms: Float[Tensor, " d_sae"]) -> float:
    squares = fired = 0.0
    for feature_acts in codes:
        squares += (feature_acts * norms).double().square().sum().item()
        fired += (feature_acts != 0).sum().item()
    return (squares / fired) ** 0.5 if fired else 0.0


def _add_counts(counts: dict[int, int], levels: Float[Tensor, " fired"]) -> None:
    for level, count in zip(*(part.tolist() for part in levels.long().unique(return_counts=True)), strict=True):
        counts[level] = counts.get(level, 0) + count


def _entropy_times_total(counts: dict[int, int]) -> float:
    """Bits of an ideal code for all values together, whose table is their own distribution."""
    count = torch.tensor(list(counts.values()), dtype=torch.float64)
    return (count * (count.sum() / count).log2()).sum().item()
