"""Does a judge know answers that are known? Asked before anything else."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.judge import Judge, Question, Verdict
from bae_lens.comsem.judges.measures import balanced_accuracy, share_of_no, share_of_yes
from bae_lens.comsem.judges.mixed import ask_mixed
from bae_lens.comsem.judges.self_test_cases import CASES, CaseGroup
from bae_lens.comsem.judges.together import together

PASSED = 0.75  # balanced accuracy from which a judge's scores are not marked
NEAR_CHANCE = 0.6  # up to which a judge is refused
ORDER_SEED = 0  # of the cases in one question; always the same, so that the answers are kept


@dataclass(frozen=True)
class KindOfCase:
    """A judge's answers to one kind of case, or to all."""

    n_positives: int
    """Cases in which yes is right."""
    n_negatives: int
    """Cases in which no is right."""
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

    @property
    def passed(self) -> bool:
        """Whether the balanced accuracy over all cases is high enough to believe the judge."""
        return self.overall.balanced_accuracy >= PASSED

    @property
    def near_chance(self) -> bool:
        """Whether the balanced accuracy over all cases is about that of a coin."""
        return self.overall.balanced_accuracy <= NEAR_CHANCE

    @property
    def summary(self) -> str:
        """One line."""
        kinds = ", ".join(f"{kind} {result.balanced_accuracy:.2f}" for kind, result in self.kinds.items())
        return (
            f"self-test of {self.judge}: {self.overall.accuracy_positives:.2f} of {self.overall.n_positives} positives "
            f"and {self.overall.accuracy_negatives:.2f} of {self.overall.n_negatives} negatives right, balanced "
            f"accuracy {self.overall.balanced_accuracy:.2f} ({kinds}): {'passed' if self.passed else 'failed'}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "SelfTest":
        kinds = {kind: KindOfCase(**result) for kind, result in content["kinds"].items()}
        calibration = content["calibration"] and Calibration(**content["calibration"])
        overall = KindOfCase(**content["overall"])
        return cls(content["judge"], overall, kinds, content["unparsable"], calibration)


async def ask_cases(judge: Judge, question: Question) -> list[tuple[list[Verdict], list[Verdict]]]:
    """A judge's verdicts on each group of built-in cases: on those that the explanation fits, and on the others.

    They are asked as features are (`ask_mixed`).
    """

    async def ask(group: CaseGroup) -> tuple[list[Verdict], list[Verdict]]:
        fits, others = ([Instance.from_marked(text) for text in texts] for texts in (group.fits, group.does_not))
        return await ask_mixed(judge, group.explanation, fits, others, question, f"{ORDER_SEED} {group.explanation}")

    return await together([ask(group) for group in CASES])


async def run_self_test(judge: Judge, question: Question) -> SelfTest:
    """Asks a judge, prepared as for scoring, about all built-in cases, with the `question` that it will be asked.

    Raises OSError if it does not answer.
    """
    answers = await ask_cases(judge, question)
    verdicts = [(group.kind, yes, no) for group, (yes, no) in zip(CASES, answers, strict=True)]
    kinds = {
        kind: _accuracy([(yes, no) for other, yes, no in verdicts if other == kind])
        for kind in dict.fromkeys(group.kind for group in CASES)
    }
    everything = [(yes, no) for _, yes, no in verdicts]
    unparsable = sum(verdict.yes is None for yes, no in everything for verdict in yes + no)
    return SelfTest(judge.name, _accuracy(everything), kinds, unparsable, _calibrate(everything))


def _accuracy(verdicts: list[tuple[list[Verdict], list[Verdict]]]) -> KindOfCase:
    positives = [verdict for yes, _ in verdicts for verdict in yes]
    negatives = [verdict for _, no in verdicts for verdict in no]
    if balanced_accuracy(positives, negatives) is None:
        raise OSError("the judge did not answer the cases of its self-test; nothing was scored")
    return KindOfCase(len(positives), len(negatives), share_of_yes(positives) or 0.0, share_of_no(negatives) or 0.0)


def _calibrate(verdicts: list[tuple[list[Verdict], list[Verdict]]]) -> Calibration | None:
    from sklearn.linear_model import LogisticRegression

    known = [
        (verdict.probability, truth)
        for yes, no in verdicts
        for answers, truth in ((yes, 1), (no, 0))
        for verdict in answers
        if verdict.probability is not None
    ]
    if len({truth for _, truth in known}) < 2:
        return None
    odds = np.array([[_log_odds(probability)] for probability, _ in known])
    fitted = LogisticRegression().fit(odds, [truth for _, truth in known])
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    return Calibration(slope, intercept) if slope > 0 else None


def _log_odds(probability: float) -> float:
    p = min(max(probability, 1e-4), 1 - 1e-4)
    return math.log(p / (1 - p))
