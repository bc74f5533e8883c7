"""Where a curve that rises to a level has got there: a saturating exponential, with intervals (section 3.2)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

RISEN = 0.95  # share of the rise at which a curve counts as saturated
REFITS = 200
SURELY = 0.975  # share of refits that must rise
LONGEST = 100  # scale of a saturating curve, in units of the last position: it looks like a line long before
SCALES = 300  # tried


@dataclass(frozen=True)
class Saturation:
    """`level - rise * exp(-(position - first) / scale)` fitted to one curve, with 95 % intervals."""

    hook_name: str
    """Whose curve it is."""
    level: float
    """Bits that the curve tends to."""
    level_interval: tuple[float, float]
    """In bits."""
    position: float
    """Where 95 % of the rise from the first position is done."""
    position_interval: tuple[float, float]
    """Its upper end is some 300 times the last position where the curve need not saturate at all."""
    reached: bool
    """Whether the positions looked at go as far as `position`."""


def fit_saturation(
    hook_name: str,
    positions: Float[np.ndarray, " n"],
    bits: Float[np.ndarray, " n"],
    errors: Float[np.ndarray, " n"],
    seed: int = 0,
) -> Saturation | None:
    """The saturating exponential through a curve; intervals by refitting it to the bits with their errors added anew.

    `errors` are standard errors of the bits, taken to be larger where the curve misses the bits by more than they say.
    None for fewer than 4 positions, and for a curve that does not rise beyond its errors: in 97.5 % of the refits.
    """
    if len(positions) < 4:
        return None
    noise = np.random.default_rng(seed).standard_normal((REFITS, len(bits)))
    misfit = _fit_curves(positions, bits[None], errors)[3].item() / max(1, len(bits) - 3)
    errors = errors * max(1.0, misfit**0.5)
    levels, scales, rises, _ = _fit_curves(positions, np.vstack([bits, bits + errors * noise]), errors)
    if not rises[0] or rises.mean() < SURELY:
        return None
    saturated = positions.min() - np.log(1 - RISEN) * scales[rises]
    levels = levels[rises]
    low, high = np.quantile([levels, saturated], [0.025, 0.975], axis=1)
    return Saturation(
        hook_name=hook_name,
        level=float(levels[0]),
        level_interval=(float(min(low[0], levels[0])), float(max(high[0], levels[0]))),
        position=float(saturated[0]),
        position_interval=(float(min(low[1], saturated[0])), float(max(high[1], saturated[0]))),
        reached=bool(saturated[0] <= positions.max()),
    )


def _fit_curves(
    positions: Float[np.ndarray, " n"], curves: Float[np.ndarray, "curves n"], errors: Float[np.ndarray, " n"]
) -> tuple[
    Float[np.ndarray, " curves"],
    Float[np.ndarray, " curves"],
    Bool[np.ndarray, " curves"],
    Float[np.ndarray, " curves"],
]:
    """Level and scale of each curve, whether it rises, and its squared misses in units of the errors.

    For a given scale the rest is a linear regression.
    """
    scales = np.geomspace(0.1, LONGEST * positions.max(), SCALES)
    decay = np.exp(-(positions - positions.min()) / scales[:, None])
    weight = errors**-2 / (errors**-2).sum()
    x, y = decay - decay @ weight[:, None], curves - curves @ weight[:, None]
    slope = (y * weight) @ x.T / (weight * x**2).sum(1)
    error = ((y[:, None] - slope[..., None] * x) ** 2 / errors**2).sum(2)
    best = np.where(slope < 0, error, np.inf).argmin(1)
    curve = np.arange(len(curves))
    at_best = slope[curve, best]
    return curves @ weight - at_best * (decay @ weight)[best], scales[best], at_best < 0, error[curve, best]
