"""Statistics of verdicts."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from bae_lens.comsem.judges.judge import Verdict

BINS_PER_DECADE = 2  # of the firing rate


def share_of_yes(verdicts: Sequence[Verdict]) -> float | None:
    """Yes among all answers; an answer that could not be parsed is not a yes, abstentions and no answer at all are left
    out.
    """
    answers = [verdict.yes is True for verdict in verdicts if verdict.is_answer]
    return sum(answers) / len(answers) if answers else None


def share_of_no(verdicts: Sequence[Verdict]) -> float | None:
    """No among all answers; as `share_of_yes`."""
    answers = [verdict.yes is False for verdict in verdicts if verdict.is_answer]
    return sum(answers) / len(answers) if answers else None


def balanced_accuracy(fitting: Sequence[Verdict], others: Sequence[Verdict]) -> float | None:
    """Mean of the share of yes where it is right and of no where that is right; 1/2 is chance."""
    sensitivity, specificity = share_of_yes(fitting), share_of_no(others)
    return None if sensitivity is None or specificity is None else (sensitivity + specificity) / 2


def jeffreys_interval(n_yes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Jeffreys' interval of a share of yes, n_yes out of n > 0.

    >>> [round(bound, 3) for bound in jeffreys_interval(8, 8)]
    [0.738, 1.0]
    """
    tail = (1 - confidence) / 2
    low, high = stats.beta.ppf([tail, 1 - tail], n_yes + 0.5, n - n_yes + 0.5)
    return (0.0 if n_yes == 0 else float(low), 1.0 if n_yes == n else float(high))


def auc(fitting: Sequence[Verdict], others: Sequence[Verdict]) -> float | None:
    """Probability that a fitting instance gets a higher yes-probability than another one, ties counting half.

    None where the judge gives no probabilities, or where either side is empty.
    """
    high = [verdict.probability for verdict in fitting if verdict.probability is not None]
    low = [verdict.probability for verdict in others if verdict.probability is not None]
    if not (high and low):
        return None
    statistic = stats.mannwhitneyu(high, low, method="asymptotic").statistic
    return float(statistic) / (len(high) * len(low))


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of at least two values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


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
