import asyncio

import pytest

from bae_lens.comsem.collect.instances import FeatureInstances, Instance
from bae_lens.comsem.judges.judge import Verdict
from bae_lens.comsem.scores.catalog import SCORES, check_scores
from bae_lens.comsem.scores.detection import detection
from bae_lens.comsem.scores.fuzzing import fuzzing
from bae_lens.comsem.scores.outcome import Outcome


class Bare:
    """A judge as a user may write it, that explains and judges, and nothing else."""

    name, needs_background = "bare", False

    def __init__(self):
        self.asked = []

    def prepare(self, background): ...

    async def explain(self, examples, marked): ...

    async def judge(self, explanation, instances, question):  # noqa: ARG002
        self.asked.append(question)
        return [Verdict(None if "?" in i.text else i.text == "yes") for i in instances]

    async def close(self): ...


def instances(held_out, controls):
    def twice(text):
        return Instance(f"{text} {text}", (0, len(text)), [(0, len(text)), (len(text) + 1, 2 * len(text) + 1)])

    return FeatureInstances(0, 0.1, 9, [], [*map(twice, held_out)], [*map(twice, controls)])


def test_a_score_that_a_judge_cannot_be_asked_for_is_refused():
    check_scores(("detection", "fuzzing"), Bare())
    with pytest.raises(ValueError, match=r"bare cannot be asked for simulation \(it is no Simulator\); leave"):
        check_scores(("detection", "simulation"), Bare())
    with pytest.raises(ValueError, match="bare cannot be asked for intruder"):
        check_scores(("intruder",), Bare())
    with pytest.raises(ValueError, match="scores are detection, intruder, simulation, fuzzing, got 'f1'"):
        check_scores(("f1",), Bare())


def test_the_score_to_lead_with_comes_first_and_the_unreliable_one_last():
    assert list(SCORES) == ["detection", "intruder", "simulation", "fuzzing"]


@pytest.mark.parametrize(("score", "question"), [(detection, "passage"), (fuzzing, "highlights")])
def test_detection_and_fuzzing_are_balanced_accuracies(score, question):
    judge = Bare()
    asked = instances(["yes", "yes", "yes", "no"], ["no", "yes?"])
    # Three of four are found, and one of two controls: (3/4 + 1/2) / 2; what cannot be parsed is no "no"
    assert asyncio.run(score(judge, "x", asked, "")) == Outcome(0.625, unparsable=1)
    assert judge.asked == [question]
    assert asyncio.run(score(judge, "x", instances(["yes"], []), "")) == Outcome(None)
    assert judge.asked == [question]
