"""Does a judge know answers that are known? Asked before anything else."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.judge import Judge, Question, Verdict
from bae_lens.comsem.judges.measures import share_of_no, share_of_yes
from bae_lens.comsem.judges.mixed import ask_mixed
from bae_lens.comsem.judges.self_test_cases import CASES, CaseGroup
from bae_lens.comsem.judges.together import together
from bae_lens.storage import validated

PASSED = 0.75  # balanced accuracy from which a judge's scores are not marked
NEAR_CHANCE = 0.6  # up to which a judge is refused
ENOUGH = 0.9  # share of the cases that must be answered for a verdict on the judge
ORDER_SEED = 0  # of the cases in one question; always the same, so that the answers are kept


@dataclass(frozen=True)
class KindOfCase:
    """A judge's answers to one kind of case, or to all; a case without an answer does not count."""

    n_positives: int
    """Answered cases in which yes is right."""
    n_negatives: int
    """Answered cases in which no is right."""
    accuracy_positives: float
    """Share of yes where yes is right."""
    accuracy_negatives: float
    """Share of no where no is right."""

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the two accuracies; 1/2 is chance."""
        return (self.accuracy_positives + self.accuracy_negatives) / 2


@dataclass(frozen=True)
class Calibration:
    """Logistic regression of the right answers on the log odds of the judge's yes-probability."""

    slope: float
    """By which the log odds are multiplied."""
    intercept: float
    """What is added to them, in nats."""

    def __call__(self, probability: float) -> float:
        return 1 / (1 + math.exp(-(self.slope * _log_odds(probability) + self.intercept)))


@dataclass(frozen=True)
class SelfTest:
    """A judge's answers to the built-in cases."""

    judge: str
    overall: KindOfCase
    """Over all cases."""
    kinds: dict[str, KindOfCase]
    """By kind of explanation."""
    unparsable: int
    """Answers that could not be parsed."""
    calibration: Calibration | None
    """None where the judge gives no probabilities or they go the wrong way."""
    failed: int = 0
    """Cases without an answer."""
    abstained: int = 0
    """Cases of which the judge says that it cannot judge them."""

    @property
    def n_answered(self) -> int:
        """Cases with an answer."""
        return self.overall.n_positives + self.overall.n_negatives

    @property
    def enough(self) -> bool:
        """Whether enough cases were answered to say anything about the judge."""
        return self.n_answered >= ENOUGH * (self.n_answered + self.failed)

    @property
    def passed(self) -> bool:
        """Whether the balanced accuracy over all cases, nearly all of them judged, is high enough to believe it."""
        judged = self.n_answered >= ENOUGH * (self.n_answered + self.failed + self.abstained)
        return judged and self.overall.balanced_accuracy >= PASSED

    @property
    def near_chance(self) -> bool:
        """Whether the balanced accuracy over all cases is about that of a coin."""
        return self.overall.balanced_accuracy <= NEAR_CHANCE

    @property
    def summary(self) -> str:
        """One line."""
        kinds = ", ".join(f"{kind} {result.balanced_accuracy:.2f}" for kind, result in self.kinds.items())
        lost = f"; {self.unparsable} answers could not be parsed" if self.unparsable else ""
        lost += f"; {self.failed} of {self.n_answered + self.failed} cases were not answered" if self.failed else ""
        lost += f"; it abstained from {self.abstained}" if self.abstained else ""
        return (
            f"self-test of {self.judge}: {self.overall.accuracy_positives:.2f} of {self.overall.n_positives} positives "
            f"and {self.overall.accuracy_negatives:.2f} of {self.overall.n_negatives} negatives right, balanced "
            f"accuracy {self.overall.balanced_accuracy:.2f} ({kinds}): {'passed' if self.passed else 'failed'}{lost}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "SelfTest":
        """Raises ValueError if it is none."""
        return validated(cls, content, "this self-test")


async def ask_cases(
    judge: Judge, question: Question, cases: Sequence[CaseGroup] = CASES
) -> list[tuple[list[Verdict], list[Verdict]]]:
    """A judge's verdicts on each group of cases: on those that the explanation fits, and on the others.

    They are asked as features are (`ask_mixed`).
    """

    async def ask(group: CaseGroup) -> tuple[list[Verdict], list[Verdict]]:
        fits, others = ([Instance.from_marked(text) for text in texts] for texts in (group.fits, group.does_not))
        return await ask_mixed(judge, group.explanation, fits, others, question, f"{ORDER_SEED} {group.explanation}")

    return await together([ask(group) for group in cases])


async def run_self_test(judge: Judge, question: Question, cases: Sequence[CaseGroup] = CASES) -> SelfTest:
    """Asks a judge, prepared as for scoring, about all cases, with the `question` that it will be asked.

    Raises OSError if it does not answer.
    """
    answers = await ask_cases(judge, question, cases)
    verdicts = [(group.kind, yes, no) for group, (yes, no) in zip(cases, answers, strict=True)]
    of_kind = {
        kind: _accuracy([(yes, no) for other, yes, no in verdicts if other == kind])
        for kind in dict.fromkeys(group.kind for group in cases)
    }
    everything = [(yes, no) for _, yes, no in verdicts]
    overall = _accuracy(everything)
    if overall is None:
        raise OSError("the judge did not answer the cases of its self-test; nothing was scored")
    single = [verdict for yes, no in everything for verdict in yes + no]
    return SelfTest(
        judge=judge.name,
        overall=overall,
        kinds={kind: accuracy for kind, accuracy in of_kind.items() if accuracy is not None},
        unparsable=sum(verdict.yes is None and verdict.is_answer for verdict in single),
        calibration=_calibrate(everything),
        failed=sum(verdict.failed for verdict in single),
        abstained=sum(verdict.abstained for verdict in single),
    )


def _accuracy(verdicts: list[tuple[list[Verdict], list[Verdict]]]) -> KindOfCase | None:
    """None if either side has no answers."""
    positives = [verdict for yes, _ in verdicts for verdict in yes if verdict.is_answer]
    negatives = [verdict for _, no in verdicts for verdict in no if verdict.is_answer]
    of_yes, of_no = share_of_yes(positives), share_of_no(negatives)
    return None if of_yes is None or of_no is None else KindOfCase(len(positives), len(negatives), of_yes, of_no)


def _calibrate(verdicts: list[tuple[list[Verdict], list[Verdict]]]) -> Calibration | None:
    known = [
        (verdict.probability, truth)
        for yes, no in verdicts
        for answers, truth in ((yes, True), (no, False))
        for verdict in answers
        if verdict.probability is not None
    ]
    if len({truth for _, truth in known}) < 2:
        return None
    slope, intercept = fit_logistic([_log_odds(probability) for probability, _ in known], [truth for _, truth in known])
    return Calibration(slope, intercept) if slope > 0 else None


def fit_logistic(x: list[float], truth: list[bool]) -> tuple[float, float]:
    """Slope and intercept of a logistic regression in one dimension, with half the slope's square as a penalty."""
    values, signs = np.array(x), np.where(truth, 1.0, -1.0)

    def loss(slope_and_intercept: np.ndarray) -> tuple[float, np.ndarray]:
        slope, intercept = slope_and_intercept
        margin = signs * (slope * values + intercept)
        pull = -signs * expit(-margin)
        gradient = np.array([slope + pull @ values, pull.sum()])
        return float(slope**2 / 2 + np.logaddexp(0, -margin).sum()), gradient

    slope, intercept = minimize(loss, np.zeros(2), jac=True, options={"gtol": 1e-8}).x
    return float(slope), float(intercept)


def _log_odds(probability: float) -> float:
    p = min(max(probability, 1e-4), 1 - 1e-4)
    return math.log(p / (1 - p))
