"""Statistics of verdicts."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from bae_lens.comsem.judges.judge import Verdict


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
