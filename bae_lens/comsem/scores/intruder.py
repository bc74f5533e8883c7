"""Intruder detection: do activating tokens look alike, whatever it is that they have in common?

"Evaluating SAE interpretability without generating explanations" (Paulo and Belrose, arXiv 2507.08473), where it agrees
with people.
"""

import random
from collections.abc import Sequence

from bae_lens.comsem.collect.instances import FeatureInstances, Instance
from bae_lens.comsem.judges.judge import Choice, IntruderFinder
from bae_lens.comsem.judges.measures import jeffreys_interval
from bae_lens.comsem.judges.together import together
from bae_lens.comsem.scores.outcome import Outcome

ALIKE = 4  # activating instances in a question
CHANCE = 1 / (ALIKE + 1)

Puzzle = tuple[list[Instance], int]
"""Instances in the order in which they are shown, and which of them does not activate the feature."""


async def intruder(judge: IntruderFinder, explanation: str, instances: FeatureInstances, seed: str) -> Outcome:  # noqa: ARG001
    """Share of the puzzles in which the judge finds the control; 1/5 is chance."""
    puzzles = intruder_puzzles(instances, seed)
    choices = await together([judge.find_intruder(shown) for shown, _ in puzzles])
    found, answered = count_found(choices, [number for _, number in puzzles])
    return Outcome(
        found / answered if answered else None,
        interval=jeffreys_interval(found, answered) if answered else None,
        unparsable=sum(choice.number is None and not choice.failed for choice in choices),
        failed=sum(choice.failed for choice in choices),
    )


def intruder_puzzles(instances: FeatureInstances, seed: str) -> list[Puzzle]:
    """One for each control, among four of the activating instances, in an order that `seed` decides.

    The instances that an explanation was made from take part too, since none is asked for. Without enough, none.
    """
    activating, rng = [*instances.explain, *instances.held_out], random.Random(seed)
    if len(activating) < ALIKE:
        return []
    puzzles = []
    for control in instances.controls:
        shown = rng.sample(activating, ALIKE)
        number = rng.randrange(ALIKE + 1)
        puzzles.append(([*shown[:number], control, *shown[number:]], number))
    return puzzles


def count_found(choices: Sequence[Choice], right: Sequence[int]) -> tuple[int, int]:
    """How many are right, and of how many answers, without those that could not be parsed."""
    answers = [
        choice.number == number for choice, number in zip(choices, right, strict=True) if choice.number is not None
    ]
    return sum(answers), len(answers)
