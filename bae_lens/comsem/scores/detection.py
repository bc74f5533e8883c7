"""Detection: is a passage one that activates the feature? (Paulo et al. 2024, arXiv 2410.13928)"""

from bae_lens.comsem.collect.instances import FeatureInstances
from bae_lens.comsem.judges.judge import Judge
from bae_lens.comsem.judges.measures import balanced_accuracy
from bae_lens.comsem.judges.mixed import ask_mixed
from bae_lens.comsem.scores.outcome import Outcome


async def detection(judge: Judge, explanation: str, instances: FeatureInstances, seed: str) -> Outcome:
    """Balanced accuracy at telling the sentences of held-out instances from those of controls; 1/2 is chance."""
    if not instances.controls:
        return Outcome(None)
    held_out, controls = await ask_mixed(judge, explanation, instances.held_out, instances.controls, "passage", seed)
    return Outcome.of_verdicts(balanced_accuracy(held_out, controls), [*held_out, *controls])
