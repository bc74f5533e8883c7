"""What the values of a real-valued code cost: uniform quantization and the entropy of what comes out.

That a sparse code is to be judged by its description length is the idea of MDL-SAE (Ayonrinde, Pearce and Sharkey,
2024, arXiv 2410.11179), who round all features' activations to one precision and take the entropy of each feature's
histogram. Here which features fire is counted apart, so that a binary code is counted alike, and features can be coded
jointly; and one table of levels serves all features, so that no table has to be sent for each.
"""

from collections import Counter
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
    `coded` gives batches of codes and of what `sae` should decode them to. It is asked for each step anew, so that one
    that encodes does so right before each batch is decoded, as dictionaries that normalize each vector want it.
    `variance` is the squared distance of all targets to their mean.
    """
    norms = sae.W_dec.norm(dim=-1).clamp(min=1e-12)
    root_mean_square = _root_mean_square((feature_acts for feature_acts, _ in coded()), norms)
    if root_mean_square == 0:
        return []
    curve = []
    for step in (relative_step * root_mean_square for relative_step in STEPS):
        error, counts, n = 0.0, Counter[int](), 0
        for feature_acts, y in coded():
            levels = (feature_acts * norms / step).round()
            error += (sae.decode(levels * step / norms).double().to(y.device) - y.double()).square().sum().item()
            counts.update(_counts(levels[feature_acts != 0]))
            n += len(y)
        curve.append(RatePoint(support_bits + _entropy_times_total(counts) / n, 1 - error / variance))
    return curve


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


def _counts(levels: Float[Tensor, " fired"]) -> dict[int, int]:
    values, counts = levels.long().unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _entropy_times_total(counts: Counter[int]) -> float:
    """Bits of an ideal code for all values together, whose table is their own distribution."""
    count = torch.tensor(list(counts.values()), dtype=torch.float64)
    return (count * (count.sum() / count).log2()).sum().item()
