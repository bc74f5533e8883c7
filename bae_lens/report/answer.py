"""What a comparison says in one sentence: how much each dictionary explains, at how many bits."""

from statistics import mean

import numpy as np

from bae_lens.comparison.results import Comparison, DictionaryResult
from bae_lens.functional.rate_distortion import RatePoint
from bae_lens.report.series import by_hook


def answer(comparison: Comparison) -> str:
    """The dictionaries that write at the comparison's hook, from the fewest bits to the most, and PCA beside them.

    Values are rounded as coarsely as the table's value bits say; of several seeds it is the mean.
    """
    hook, dictionaries = next(iter(by_hook(comparison).items()))
    points = sorted(((_coded(dictionary), dictionary.name) for dictionary in dictionaries), key=lambda p: p[0].bits)
    (first, first_name), *others = points
    explains = f"{first_name} explains {first.explained_variance:.3f} of the variance"
    said = [f"{explains} with {first.bits:.0f} bits per {comparison.experiment.unit}"]
    said += [f"{name} {point.explained_variance:.3f} with {point.bits:.0f}" for point, name in others]
    pca = [_bits_for(point.explained_variance, comparison.pca) for point, _ in points]
    if hook != comparison.experiment.hook_name or None in pca:
        return f"{_listed(said)}."
    needed = _listed([f"{bits:.0f}" for bits in pca])
    order = ", in this order," if len(pca) > 1 else ""
    return f"{_listed(said)}; for as much, PCA needs {needed} bits{order} and no training."


def _coded(dictionary: DictionaryResult) -> RatePoint:
    points = [run.metrics.coded for run in dictionary.runs]
    return RatePoint(mean(point.bits for point in points), mean(point.explained_variance for point in points))


def _bits_for(explained_variance: float, curve: list[RatePoint]) -> float | None:
    """Where a curve reaches as much, between its points on straight lines; None beyond its ends."""
    ordered = sorted(curve, key=lambda point: point.explained_variance)
    reached = [point.explained_variance for point in ordered]
    if not ordered or not reached[0] <= explained_variance <= reached[-1]:
        return None
    return float(np.interp(explained_variance, reached, [point.bits for point in ordered]))


def _listed(parts: list[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
