import asyncio
from itertools import pairwise

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.judge import Verdict
from bae_lens.comsem.judges.mixed import ask_mixed

FITTING = [Instance(f"fits {number}", (0, 4), [(0, 4)]) for number in range(8)]
OTHERS = [Instance(f"does not {number}", (0, 4), [(0, 4)]) for number in range(6)]


class Judge:
    name = "recorder"
    needs_background = False

    def __init__(self):
        self.lists = []

    def prepare(self, background):
        raise NotImplementedError

    async def explain(self, examples, marked):
        raise NotImplementedError

    async def judge(self, explanation, instances, question):  # noqa: ARG002
        self.lists.append([instance.sentence for instance in instances])
        return [
            Verdict(instance.sentence.startswith("fits"), int(instance.sentence[-1]) / 10) for instance in instances
        ]

    async def close(self):
        raise NotImplementedError


def ask(judge, fitting, others, seed="0"):
    return asyncio.run(ask_mixed(judge, "x", fitting, others, "marked token", seed))


def test_both_kinds_are_mixed_in_one_list_and_verdicts_come_back_in_order():
    judge = Judge()
    fitting, others = ask(judge, FITTING, OTHERS)
    assert [(verdict.yes, verdict.probability) for verdict in fitting] == [(True, n / 10) for n in range(8)]
    assert [(verdict.yes, verdict.probability) for verdict in others] == [(False, n / 10) for n in range(6)]
    (shown,) = judge.lists
    kinds = [sentence.startswith("fits") for sentence in shown]
    assert sum(a != b for a, b in pairwise(kinds)) > 3
    assert sorted(shown) == sorted(instance.sentence for instance in [*FITTING, *OTHERS])


def test_seed_decides_the_order_and_repeats_it():
    judge = Judge()
    for seed in ("0", "0", "1"):
        ask(judge, FITTING, OTHERS, seed)
    first, again, other = judge.lists
    assert first == again != other


def test_nothing_is_asked_about_nothing():
    judge = Judge()
    assert ask(judge, [], []) == ([], [])
    assert judge.lists == []
