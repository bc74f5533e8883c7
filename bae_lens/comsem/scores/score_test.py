"""Does a judge know answers that are known, in the questions of the scores that its self-test has none of?"""

import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from bae_lens.comsem.judges.judge import IntruderFinder, Simulator
from bae_lens.comsem.judges.measures import mean
from bae_lens.comsem.judges.self_test import ENOUGH
from bae_lens.comsem.judges.together import together
from bae_lens.comsem.scores.catalog import ScoreName
from bae_lens.comsem.scores.intruder import ALIKE, CHANCE, count_found
from bae_lens.comsem.scores.known_cases import ALIKE_CASES, SIMULATION_CASES
from bae_lens.comsem.scores.simulation import simulation_score

ORDER_SEED = 0


@dataclass(frozen=True)
class ScoreTest:
    """A judge's answers to the known cases of one score."""

    score: str
    value: float | None
    """The score, where 1 is right; None if there were no answers."""
    chance: float
    """What a judge without any idea gets."""
    n: int
    """Cases that were answered."""
    n_cases: int
    """Cases that were asked about."""

    @property
    def passed(self) -> bool:
        """Whether it is at least halfway from chance to 1, on nine tenths of the cases, as in the self-test."""
        knows = self.value is not None and self.value >= (1 + self.chance) / 2
        return knows and self.n >= ENOUGH * self.n_cases

    @property
    def summary(self) -> str:
        """One line."""
        value = "no answers" if self.value is None else f"{self.value:.2f}"
        return (
            f"test of {self.score}: {value} on {self.n} of {self.n_cases} cases with known answers, where chance is "
            f"{self.chance:g}: {'passed' if self.passed else 'failed'}"
        )


async def run_intruder_test(judge: IntruderFinder) -> ScoreTest:
    """On groups of tokens one of which does not belong."""
    rng, puzzles = random.Random(ORDER_SEED), []
    for alike, other in ALIKE_CASES:
        number = rng.randrange(ALIKE + 1)
        puzzles.append(([*alike[:number], other, *alike[number:]], number))
    choices = await together([judge.find_intruder(shown) for shown, _ in puzzles])
    found, answered = count_found(choices, [number for _, number in puzzles])
    return ScoreTest("intruder", found / answered if answered else None, CHANCE, answered, len(puzzles))


async def run_simulation_test(judge: Simulator) -> ScoreTest:
    """On sentences in which every token that an explanation fits is known; the mean over explanations."""
    predictions = await together([judge.simulate(explanation, list(texts)) for explanation, texts in SIMULATION_CASES])
    scores = [simulation_score(group, texts) for group, (_, texts) in zip(predictions, SIMULATION_CASES, strict=True)]
    n = sum(prediction.activations is not None for group in predictions for prediction in group)
    return ScoreTest("simulation", mean(scores), 0.0, n, sum(map(len, predictions)))


TESTS: dict[ScoreName, Callable[[Any], Coroutine[Any, Any, ScoreTest]]] = {
    "intruder": run_intruder_test,
    "simulation": run_simulation_test,
}
