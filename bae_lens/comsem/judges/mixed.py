"""Questions about two kinds of instances in one list, in which a place tells a judge nothing."""

import random

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.judge import Judge, Question, Verdict


async def ask_mixed(
    judge: Judge, explanation: str, fitting: list[Instance], others: list[Instance], question: Question, seed: str
) -> tuple[list[Verdict], list[Verdict]]:
    """Verdicts on `fitting` and on `others`, asked together in an order that `seed` decides.

    A judge that answers by position, or the same for all, is right about one kind as often as it is wrong about the
    other. Without any instances nothing is asked.
    """
    instances = [*fitting, *others]
    if not instances:
        return [], []
    order = random.Random(seed).sample(range(len(instances)), len(instances))
    answers = await judge.judge(explanation, [instances[number] for number in order], question)
    verdicts = [verdict for _, verdict in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]
    return verdicts[: len(fitting)], verdicts[len(fitting) :]
