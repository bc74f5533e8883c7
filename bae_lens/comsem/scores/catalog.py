"""The scores by name, in the order in which they are to be trusted."""

from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bae_lens.comsem.collect.instances import FeatureInstances
from bae_lens.comsem.judges.judge import IntruderFinder, Judge, Simulator
from bae_lens.comsem.scores.detection import detection
from bae_lens.comsem.scores.fuzzing import fuzzing
from bae_lens.comsem.scores.intruder import intruder
from bae_lens.comsem.scores.outcome import Outcome
from bae_lens.comsem.scores.simulation import simulation

ScoreName = Literal["detection", "intruder", "simulation", "fuzzing"]
Ask = Callable[[Any, str, FeatureInstances, str], Coroutine[Any, Any, Outcome]]


@dataclass(frozen=True)
class Score:
    """How one of the scores is asked for."""

    ask: Ask
    """Takes a judge, an explanation, instances, and a seed for the order of what is shown."""
    asks: type = Judge
    """What a judge must be able to do."""
    of_explanation: bool = True
    """Whether the explanation matters."""


SCORES: dict[ScoreName, Score] = {
    "detection": Score(detection),
    "intruder": Score(intruder, IntruderFinder, of_explanation=False),
    "simulation": Score(simulation, Simulator),
    "fuzzing": Score(fuzzing),
}


def check_scores(names: Iterable[str], judge: Judge) -> None:
    """Raises ValueError for a name that is none of a score, and for a score that the judge cannot be asked for."""
    for name in names:
        if name not in SCORES:
            raise ValueError(f"scores are {', '.join(get_args(ScoreName))}, got {name!r}")
        needed = SCORES[name].asks
        if not isinstance(judge, needed):
            raise ValueError(
                f"{judge.name} cannot be asked for {name} (it is no {needed.__name__}); leave that score out"
            )
