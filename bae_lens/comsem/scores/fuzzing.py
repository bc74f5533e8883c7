"""Fuzzing: are the highlighted tokens those on which the feature fires? (Paulo et al. 2024, arXiv 2410.13928)

Not to be relied on alone: a judge may tell tokens marked at random from others without any explanation.
"""

from itertools import chain

from bae_lens.comsem.collect.instances import FeatureInstances, Instance
from bae_lens.comsem.judges.judge import Judge, Verdict
from bae_lens.comsem.judges.measures import balanced_accuracy
from bae_lens.comsem.judges.mixed import ask_mixed
from bae_lens.comsem.scores.outcome import Outcome


async def fuzzing(judge: Judge, explanation: str, instances: FeatureInstances, seed: str) -> Outcome:
    """Balanced accuracy at telling highlights of held-out instances from those of controls; 1/2 is chance.

    Where the token alone is highlighted the question is the one about marked tokens, and is asked as such, so that a
    language model that was asked it before is not asked again; an answer of no use then counts here and there.
    """
    if not instances.controls:
        return Outcome(None)
    held_out, controls = instances.held_out, instances.controls
    marked: tuple[list[Verdict], list[Verdict]] = ([], [])
    if any(map(_alone, [*held_out, *controls])):
        marked = await ask_mixed(judge, explanation, held_out, controls, "marked token", seed)
    highlights = await ask_mixed(judge, explanation, _several(held_out), _several(controls), "highlights", seed)
    verdicts = [
        _merged(kind, of_marked, of_several)
        for kind, of_marked, of_several in zip((held_out, controls), marked, highlights, strict=True)
    ]
    return Outcome.of_verdicts(balanced_accuracy(*verdicts), chain.from_iterable(verdicts))


def _alone(instance: Instance) -> bool:
    return instance.highlights == [instance.token]


def _several(instances: list[Instance]) -> list[Instance]:
    return [instance for instance in instances if not _alone(instance)]


def _merged(instances: list[Instance], marked: list[Verdict], several: list[Verdict]) -> list[Verdict]:
    rest = iter(several)
    return [marked[number] if _alone(instance) else next(rest) for number, instance in enumerate(instances)]
