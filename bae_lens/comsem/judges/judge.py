"""What a judge is asked, and what it answers."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from bae_lens.comsem.collect.instances import Excerpt, Instance

Question = Literal["token", "marked token", "passage", "highlights"]
"""What a judge is asked of an instance and an explanation: whether it explains

- the token in its sentence, asked one call each, the sentence unmarked (the paper's question);
- the token marked in its sentence;
- anything in the sentence ("detection" in EleutherAI's delphi);
- all of the tokens highlighted in the sentence ("fuzzing" there).
"""


@dataclass(frozen=True)
class Verdict:
    """A judge's answer about one instance."""

    yes: bool | None
    """None if the answer could not be parsed, if there was none, or if the judge abstains."""
    probability: float | None = None
    """Of yes against no, where the judge says."""
    failed: bool = False
    """There was no answer at all."""
    abstained: bool = False
    """The judge cannot judge this kind of explanation, and says so."""

    @property
    def is_answer(self) -> bool:
        """Whether it counts: there was an answer, and it was not an abstention."""
        return not (self.failed or self.abstained)


@dataclass(frozen=True)
class Prediction:
    """How strongly a feature would fire on each token of an excerpt, by its explanation."""

    activations: list[float] | None
    """From 0 to 10; None if the answer could not be parsed, if there was none, or if the judge abstains."""
    failed: bool = False
    """There was no answer at all."""
    abstained: bool = False
    """The judge cannot judge this kind of explanation, and says so."""


@dataclass(frozen=True)
class Choice:
    """Which of some instances has not what the others have in common."""

    number: int | None
    """From 0; None if the answer could not be parsed or if there was none."""
    failed: bool = False
    """There was no answer at all."""


@runtime_checkable
class Judge(Protocol):
    """Whoever puts into words what tokens have in common, and says whether the words fit others."""

    name: str
    needs_background: bool
    """Whether it judges by comparison with the corpus: then it is tested after instances have been collected."""

    def prepare(self, background: list[Instance]) -> None:
        """Shows the judge ordinary tokens of the corpus, once, before it is asked about the corpus."""
        ...

    async def explain(self, examples: list[Instance], marked: bool) -> str | None:
        """One phrase for what the tokens have in common; None if there was no answer, empty if it was of no use.

        `marked`: the tokens are shown marked in their sentences, otherwise beside them.
        """
        ...

    async def judge(self, explanation: str, instances: list[Instance], question: Question) -> list[Verdict]:
        """A verdict for each instance."""
        ...

    async def close(self) -> None:
        """Ends what the judge holds open; it may be asked again."""
        ...


@runtime_checkable
class Simulator(Protocol):
    """A judge that predicts activations; its `explain` and `judge` are as any judge's."""

    async def simulate(self, explanation: str, excerpts: list[Excerpt]) -> list[Prediction]:
        """A prediction for each excerpt, whose own activations it does not look at.

        Raises ValueError if the judge gives none of the probabilities that a prediction is made of.
        """
        ...


@runtime_checkable
class IntruderFinder(Protocol):
    """A judge that finds the odd one out; its `explain` and `judge` are as any judge's."""

    async def find_intruder(self, instances: list[Instance]) -> Choice:
        """Which of the marked tokens has not what all others have in common; nobody says what that is."""
        ...
