import asyncio
import itertools
import json

import pytest

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.judge import Verdict
from bae_lens.comsem.judges.self_test import SelfTest, run_self_test
from bae_lens.comsem.judges.self_test_cases import CASES

TRUTH = {
    (group.explanation, Instance.from_marked(text).marked): fits
    for group in CASES
    for fits, texts in ((True, group.fits), (False, group.does_not))
    for text in texts
}


class Judge:
    """Answers as `answer` says, given the truth and a running number."""

    name = "made up"
    needs_background = False

    def __init__(self, answer):
        self.answer = answer
        self.number = -1

    def prepare(self, background):
        raise AssertionError(background)

    async def explain(self, *_, **__):
        raise AssertionError

    async def judge(self, explanation, instances, question):
        assert question == "marked token"
        return [self.verdict(TRUTH[explanation, instance.marked]) for instance in instances]

    def verdict(self, truth):
        self.number += 1
        return self.answer(truth, self.number)

    async def close(self):
        pass


def outcome(answer) -> SelfTest:
    return asyncio.run(run_self_test(Judge(answer), "marked token"))


def test_there_are_enough_cases_of_every_kind_and_both_answers():
    assert len(TRUTH) >= 60
    assert sum(TRUTH.values()) == len(TRUTH) / 2
    kinds = {group.kind for group in CASES}
    assert kinds == {"semantic", "syntactic", "positional", "vague"}
    assert all(sum(group.kind == kind for group in CASES) >= 3 for kind in kinds)


def test_a_judge_that_knows_passes():
    result = outcome(lambda truth, _: Verdict(truth, 0.9 if truth else 0.2))
    assert result.passed
    assert not result.near_chance
    assert (result.overall.accuracy_positives, result.overall.accuracy_negatives) == (1, 1)
    assert result.calibration is not None
    assert result.calibration(0.9) > 0.5 > result.calibration(0.2)
    assert "passed" in result.summary


@pytest.mark.parametrize("answer", [True, False, None])
def test_a_judge_that_always_says_the_same_is_near_chance(answer):
    result = outcome(lambda *_: Verdict(answer))
    assert result.near_chance
    assert not result.passed
    assert result.calibration is None
    assert result.unparsable == (len(TRUTH) if answer is None else 0)


def test_a_judge_that_answers_by_position_is_near_chance():
    class ByPosition(Judge):
        async def judge(self, explanation, instances, question):  # noqa: ARG002
            return [Verdict(yes) for yes in self.answer[: len(instances)]]

    for answers in itertools.product([True, False], repeat=4):
        assert asyncio.run(run_self_test(ByPosition(answers), "marked token")).near_chance


def test_a_weak_judge_fails_without_being_near_chance():
    result = outcome(lambda truth, number: Verdict(truth if number % 3 else not truth))
    assert not result.passed
    assert not result.near_chance


def test_probabilities_that_go_the_wrong_way_calibrate_nothing():
    assert outcome(lambda truth, _: Verdict(truth, 0.2 if truth else 0.9)).calibration is None


def test_no_answers_are_an_error():
    with pytest.raises(OSError, match="did not answer"):
        outcome(lambda *_: Verdict(None, failed=True))


def test_result_comes_back_from_json():
    result = outcome(lambda truth, _: Verdict(truth, 0.9 if truth else 0.2))
    assert SelfTest.from_dict(json.loads(json.dumps(result.to_dict()))) == result
