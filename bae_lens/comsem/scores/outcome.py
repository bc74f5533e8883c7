"""What asking for one score of one feature gave."""

from collections.abc import Iterable
from dataclasses import dataclass

from bae_lens.comsem.judges.judge import Verdict


@dataclass(frozen=True)
class Outcome:
    """A score, and what became of its questions."""

    value: float | None
    """None if it could not be measured."""
    unparsable: int = 0
    """Answers that could not be parsed."""
    failed: int = 0
    """Questions without an answer."""
    abstained: int = 0
    """Questions that the judge says it cannot judge."""
    interval: tuple[float, float] | None = None
    """95 % interval, where the score has one."""

    @classmethod
    def of_verdicts(cls, value: float | None, verdicts: Iterable[Verdict]) -> "Outcome":
        """With the verdicts of no use counted."""
        known = list(verdicts)
        return cls(
            value,
            unparsable=sum(verdict.yes is None and verdict.is_answer for verdict in known),
            failed=sum(verdict.failed for verdict in known),
            abstained=sum(verdict.abstained for verdict in known),
        )
