"""Fuzzing: are the highlighted tokens those on which the feature fires? (Paulo et al. 2024, arXiv 2410.13928)

Not to be relied on alone: a judge may tell tokens marked at random from others without any explanation.
"""

from bae_lens.comsem.collect.instances import FeatureInstances
from bae_lens.comsem.judges.judge import Judge
from bae_lens.comsem.judges.measures import balanced_accuracy
from bae_lens.comsem.judges.mixed import ask_mixed
from bae_lens.comsem.scores.outcome import Outcome


async def fuzzing(judge: Judge, explanation: str, instances: FeatureInstances, seed: str) -> Outcome:
    """Balanced accuracy at telling highlights of held-out instances from those of controls; 1/2 is chance."""
    if not instances.controls:
        return Outcome(None)
    held_out, controls = await ask_mixed(judge, explanation, instances.held_out, instances.controls, "highlights", seed)
    return Outcome.of_verdicts(balanced_accuracy(held_out, controls), [*held_out, *controls])
