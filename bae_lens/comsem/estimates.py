"""Statistics over features, each with a bootstrap interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

FEWEST = 10  # features for an interval
RESAMPLES = 2000
SEED = 0

Statistic = Callable[..., Any]


@dataclass(frozen=True)
class Estimate:
    """A statistic over features."""

    value: float | None
    """None where it is not defined."""
    interval: tuple[float, float] | None
    """95 % bootstrap interval over features; None where there are fewer than 10 of them."""
    n: int
    """Features."""

    def __str__(self) -> str:
        if self.value is None:
            return "\u2013"
        value, *bounds = (f"{round(number, 2) + 0.0:.2f}" for number in (self.value, *(self.interval or ())))
        return f"{value} ({' to '.join(bounds)})" if bounds else value


NOTHING = Estimate(None, None, 0)


def rank_correlation(x: Sequence[float | None], y: Sequence[float | None]) -> Estimate:
    """Spearman's coefficient where both are known. Not defined for fewer than three, or where either is constant.

    >>> str(rank_correlation([0.1, 0.2, 0.3, None], [0.5, 0.9, 0.7, 1.0]))
    '0.50'
    """
    a, b = _both_known(x, y)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Estimate(None, None, len(a))
    return Estimate(float(spearman(a, b)), _interval((a, b), spearman), len(a))


def spearman(x: Float[np.ndarray, "*batch n"], y: Float[np.ndarray, "*batch n"], axis: int = -1) -> Any:
    """Pearson's coefficient of the ranks, equal values at the mean of theirs; 0 where either is constant."""
    a, b = (stats.rankdata(values, axis=axis) for values in (x, y))
    a, b = (ranks - ranks.mean(axis=axis, keepdims=True) for ranks in (a, b))
    scale = np.sqrt((a**2).sum(axis=axis) * (b**2).sum(axis=axis))
    return np.divide((a * b).sum(axis=axis), scale, out=np.zeros_like(scale), where=scale > 0)


def difference(x: Sequence[float | None], y: Sequence[float | None]) -> Estimate:
    """Mean of y - x where both are known."""
    a, b = _both_known(x, y)
    return estimate(list(b - a), mean)


def preference(right: Sequence[float], other: Sequence[float]) -> Estimate:
    """Share of features to which the right explanation gives more, equals counting half; 1/2 is chance.

    >>> preference([0.9, 0.5, 0.2], [0.1, 0.5, 0.3]).value
    0.5
    """
    gain = np.asarray(right, dtype=float) - np.asarray(other, dtype=float)
    return estimate(list((np.sign(gain) + 1) / 2), mean)


def mean(values: Float[np.ndarray, "*batch n"], axis: int = -1) -> Any:
    """Along an axis, as a bootstrap asks for it."""
    return values.mean(axis=axis)


def estimate(values: Sequence[float | None], statistic: Statistic) -> Estimate:
    """A statistic of what is known."""
    known = np.array([value for value in values if value is not None], dtype=float)
    if len(known) == 0:
        return Estimate(None, None, 0)
    return Estimate(float(statistic(known)), _interval((known,), statistic), len(known))


def _interval(data: tuple[Float[np.ndarray, " n"], ...], statistic: Statistic) -> tuple[float, float] | None:
    """Percentiles of the statistic over features drawn again with replacement, those of a feature together."""
    if len(data[0]) < FEWEST:
        return None
    found = stats.bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        paired=len(data) > 1,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)


def _both_known(
    x: Sequence[float | None], y: Sequence[float | None]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    known = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    pairs = np.array(known, dtype=float).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]
