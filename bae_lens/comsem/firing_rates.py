"""Scores depend on how often a feature fires, so dictionaries are compared at equal firing rates."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

BINS_PER_DECADE = 2


def frequency_bin(rate: float) -> int:
    """Number of the bin of a firing rate: half decades, -1 from 10^-0.5 up to 1, -2 below, and so on."""
    return min(-1, math.floor(BINS_PER_DECADE * math.log10(rate))) if rate > 0 else -99


def bin_edges(number: int) -> tuple[float, float]:
    """Firing rates that a bin lies between."""
    return 10 ** (number / BINS_PER_DECADE), 10 ** ((number + 1) / BINS_PER_DECADE)


def frequency_matched(values: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, float | None]:
    """Means of (firing rate, value) pairs by dictionary, as if all dictionaries fired equally often.

    Every dictionary's bin means are weighted alike: by the smallest share of features that any of them has in the bin.
    None for all if no bin is common to all.
    """
    binned = {
        name: {b: [value for rate, value in pairs if frequency_bin(rate) == b] for b in range(-99, 0)}
        for name, pairs in values.items()
    }
    weights = {
        b: min(len(by_bin[b]) / max(1, len(values[name])) for name, by_bin in binned.items()) for b in range(-99, 0)
    }
    total = sum(weights.values())
    if total == 0:
        return dict.fromkeys(values)
    return {
        name: sum(weight * float(np.mean(by_bin[b])) for b, weight in weights.items() if weight > 0) / total
        for name, by_bin in binned.items()
    }


def common_bins(rates: Mapping[str, Sequence[float]], n: int | None, seed: int) -> Counter[int]:
    """How many features each dictionary may give of each bin, so that all give as many: of what all have, n at most.

    `rates` are the firing rates of the features that may be chosen, by dictionary. Raises ValueError if no bin is
    common to all.
    """
    counts = [Counter(map(frequency_bin, of_one)) for of_one in rates.values()]
    common = counts[0]
    for other in counts[1:]:
        common &= other
    if not common:
        raise ValueError(
            f"{', '.join(rates)} have no firing rates in common to be matched at; leave match_firing_rates out"
        )
    if n is None or n >= common.total():
        return common
    return Counter(random.Random(seed).sample(sorted(common.elements()), n))
