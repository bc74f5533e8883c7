"""A mean in a table, with what it differs from another's."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap


def mean_and_difference(values: Sequence[float], other: Sequence[float]) -> str:
    """The mean and, unless all are the same, the 95 % interval of the mean difference to the others, in pairs."""
    difference = np.array(values) - np.array(other)
    if not difference.any():
        return f"{np.mean(values):.3f}"
    low, high = bootstrap((difference,), np.mean, rng=np.random.default_rng(0)).confidence_interval
    return f"{np.mean(values):.3f} ({low:+.3f} to {high:+.3f})"
