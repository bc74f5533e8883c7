"""What entropy dynamics found, and the ways to look at it: curves by position at one explained variance or price."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from bae_lens.entropy.estimate import EntropyEstimate
from bae_lens.entropy.saturation import Saturation, fit_saturation
from bae_lens.functional.rate_distortion import RatePoint, weights_at
from bae_lens.storage import validated

STEP_OF_SHARES = 0.05  # explained variances at which curves are compared by default are multiples of it
NEAR_CAP = 0.8  # of the features: more bits than this many say how many features there are
OVERFITTED = 0.05  # explained variance of all windows over that of those held out

Dictionaries = Literal["shared", "per position"]
Mark = Literal["near cap", "few windows", "more bits than tokens"]


@dataclass(frozen=True)
class Cell:
    """A hook and position at one price of bits."""

    hook_name: str
    """Where the activations are from."""
    position: int
    """Which token of a window they belong to."""
    entropy_coefficient: float
    """Weight of the entropy in the loss, per bit."""
    estimate: EntropyEstimate
    """Over the held-out windows, with an interval by bootstrap over their documents; its tree of pairs is learnt from
    the windows trained on."""
    all_windows: EntropyEstimate
    """Over all windows, those trained on among them, as the paper has it."""


@dataclass(frozen=True)
class CurvePoint:
    """Entropy at one hook and position."""

    position: int
    """Which token of a window."""
    bits: float
    """Marginal or joint, as the curve says."""
    interval: tuple[float, float]
    """95 %; between two prices interpolated as the bits are, so without the error of the explained variances."""
    explained_variance: float
    """Of the activations that the bits were counted on."""
    marks: list[Mark]
    """Why the bits say more of the code than of the activations, if they do; see `marks_of`."""


@dataclass(frozen=True)
class View:
    """One way to look at the same cells: a curve by position for every hook."""

    name: str
    """In words, for a table or a legend."""
    explained_variance: float | None
    """At which all points are; None if they differ."""
    curves: dict[str, list[CurvePoint]]
    """By hook; without the positions that do not reach the explained variance."""
    saturations: list[Saturation]
    """Of the curves that have at least 4 positions and rise; see `fit_saturation`."""


@dataclass(frozen=True)
class EntropyDynamics:
    """Entropies by hook, position and entropy coefficient."""

    model: str
    """Name of the language model."""
    hook_names: list[str]
    """In the order asked for."""
    positions: list[int]
    """As asked for."""
    n_windows: int
    """Windows looked at, those held out among them."""
    n_documents: int
    """Documents that they are from."""
    outliers: int
    """Windows left out because one of their activations is an outlier; see `PositionActivations`."""
    too_short: int
    """Documents dropped because they were shorter than a window."""
    distinct_tokens: list[int]
    """Different input tokens at each position, in the windows looked at. At the first one the entropy of these windows
    is at most log2 of it; the marginal bits of a code whose features repeat one another can be far more."""
    d_sae: int
    """Features of each BAE."""
    dictionaries: Dictionaries
    """Whether positions of a hook share one."""
    cells: list[Cell]
    """One for each hook, position and entropy coefficient."""
    positions_count: Literal["tokens", "demonstrations"] = "tokens"
    """What positions are the numbers of: tokens of a window, or demonstrations in a prompt."""

    def at(self, hook_name: str, position: int) -> list[Cell]:
        """The cells of one hook and position, one for each coefficient: a curve of bits against explained variance."""
        return [cell for cell in self.cells if (cell.hook_name, cell.position) == (hook_name, position)]

    def common_explained_variance(self) -> float | None:
        """Where curves are compared by default: of the multiples of .05 that most cells' joint bits reach, the largest.

        None if no cell reaches any, as with a single price.
        """
        shares = [round(i * STEP_OF_SHARES, 2) for i in range(1, round(1 / STEP_OF_SHARES))]
        reach = [sum(len(self.curve(hook, share, joint=True)) for hook in self.hook_names) for share in shares]
        most = max(reach)
        return max(share for share, n in zip(shares, reach, strict=True) if n == most) if most else None

    def curve(self, hook_name: str, explained_variance: float, *, joint: bool = False) -> list[CurvePoint]:
        """Bits by position at one explained variance of held-out windows, interpolated between prices.

        Marginal bits corrected for the number of windows, or joint ones along a tree of pairs. Positions are left out
        where the prices do not reach the explained variance.
        """
        points = [self._at_share(hook_name, p, explained_variance, joint) for p in self.positions]
        return [point for point in points if point is not None]

    def curve_at_price(
        self, hook_name: str, entropy_coefficient: float | None = None, *, all_windows: bool = False
    ) -> list[CurvePoint]:
        """Bits by position at one price, by default the lowest: at explained variances that differ between points.

        Marginal bits of held-out windows, or of all, those trained on among them, as the paper counts them.
        """
        price = min(c.entropy_coefficient for c in self.cells) if entropy_coefficient is None else entropy_coefficient
        points = []
        for cell in self.cells:
            if (cell.hook_name, cell.entropy_coefficient) == (hook_name, price):
                e = cell.all_windows if all_windows else cell.estimate
                points.append(self._point(cell.position, _marginal(e), e.explained_variance, [cell]))
        return points

    def views(self, explained_variance: float | None = None) -> list[View]:
        """What there is to see: bits and joint bits at one explained variance, and at the lowest price bits of all
        windows, as in the paper, and of those held out.

        Without an explained variance it is `common_explained_variance`, or, if there is none, only the last two.
        """
        share = self.common_explained_variance() if explained_variance is None else explained_variance
        price = min(cell.entropy_coefficient for cell in self.cells)
        views = []
        if share is not None:
            for name, joint in ((f"joint bits at EV {share:g}", True), (f"bits at EV {share:g}", False)):
                curves = {hook: self.curve(hook, share, joint=joint) for hook in self.hook_names}
                views.append(_view(name, share, curves))
        for windows in ("all", "held-out"):
            curves = {h: self.curve_at_price(h, price, all_windows=windows == "all") for h in self.hook_names}
            views.append(_view(f"bits at price {price:g}, {windows} windows", None, curves))
        return views

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EntropyDynamics":
        """Whatever else stands beside the fields is passed over. Raises ValueError for what is none of this version."""
        return validated(cls, values, "this result")

    def _at_share(self, hook_name: str, position: int, share: float, joint: bool) -> CurvePoint | None:
        cells = self.at(hook_name, position)
        rows = [_joint(cell.estimate) if joint else _marginal(cell.estimate) for cell in cells]
        curve = [
            RatePoint(bits, cell.estimate.explained_variance) for (bits, *_), cell in zip(rows, cells, strict=True)
        ]
        try:
            weights = weights_at(curve, share)
        except ValueError:
            return None
        bits, low, high = map(float, weights @ np.array(rows))
        used = [cell for cell, weight in zip(cells, weights, strict=True) if weight > 0]
        return self._point(position, (bits, low, high), share, used)

    def _point(
        self, position: int, bits: tuple[float, float, float], explained_variance: float, cells: Sequence[Cell]
    ) -> CurvePoint:
        """`bits` and their interval, which come from these cells."""
        tokens = None
        if self.positions_count == "tokens" and position == 1:
            tokens = self.distinct_tokens[self.positions.index(position)]
        marks = marks_of(bits[0], [(cell.estimate, cell.all_windows) for cell in cells], tokens)
        return CurvePoint(position, bits[0], bits[1:], explained_variance, marks)


def _marginal(estimate: EntropyEstimate) -> tuple[float, float, float]:
    """Bits, and their interval."""
    return estimate.corrected_bits, *estimate.interval


def _joint(estimate: EntropyEstimate) -> tuple[float, float, float]:
    bits = estimate.joint_bits_bound
    return bits, *(estimate.joint_interval or (bits, bits))


def _view(name: str, explained_variance: float | None, curves: dict[str, list[CurvePoint]]) -> View:
    return View(name=name, explained_variance=explained_variance, curves=curves, saturations=saturations(curves))


def saturations(curves: dict[str, list[CurvePoint]]) -> list[Saturation]:
    """Of every curve that has at least 4 positions and rises; see `fit_saturation`."""
    found = []
    for hook_name, points in curves.items():
        rows = [(point.position, point.bits, *point.interval) for point in points]
        positions, bits, low, high = np.array(rows, dtype=float).reshape(-1, 4).T
        found.append(fit_saturation(hook_name, positions, bits, np.maximum((high - low) / 4, 1e-3)))
    return [saturation for saturation in found if saturation]


def marks_of(
    bits: float, measured: Sequence[tuple[EntropyEstimate, EntropyEstimate]], distinct_tokens: int | None = None
) -> list[Mark]:
    """What tells that bits are those of the code more than of the activations.

    `measured` are the estimates that the bits come from, each over held-out and over all windows.
    `near cap`: over .8 of a bit for each feature, so that more features would take more. `few windows`: the code
    explains .05 more of all windows than of those held out, so it has learnt the windows. `more bits than tokens`: at
    the first position, where a state follows from its token, more bits than the logarithm of the different tokens.
    """
    marks: list[Mark] = []
    if bits > NEAR_CAP * measured[0][0].d_sae:
        marks.append("near cap")
    if any(whole.explained_variance - held_out.explained_variance > OVERFITTED for held_out, whole in measured):
        marks.append("few windows")
    if distinct_tokens is not None and bits > np.log2(distinct_tokens):
        marks.append("more bits than tokens")
    return marks
