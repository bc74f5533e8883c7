import asyncio
import itertools
import json

import pytest

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.judge import Verdict
from bae_lens.comsem.judges.self_test import SelfTest, fit_logistic, run_self_test
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


@pytest.mark.parametrize(("abstains", "passed"), [(8, True), (9, False)])
def test_abstentions_are_told_and_with_more_than_a_tenth_no_judge_passes(abstains, passed):
    result = outcome(lambda truth, number: Verdict(None, abstained=True) if number < abstains else Verdict(truth))
    assert len(TRUTH) == 80
    assert (result.abstained, result.n_answered, result.unparsable) == (abstains, 80 - abstains, 0)
    assert (result.overall.accuracy_positives, result.overall.accuracy_negatives) == (1, 1)
    assert (result.enough, result.passed) == (True, passed)
    assert result.summary.endswith(f"it abstained from {abstains}")


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


def test_a_remainder_of_answers_passes_nobody():
    result = outcome(lambda truth, number: Verdict(truth) if number < 16 else Verdict(None, failed=True))
    assert (result.n_answered, result.failed, result.unparsable) == (16, len(TRUTH) - 16, 0)
    assert result.overall.balanced_accuracy == 1
    assert not result.enough
    assert not result.passed
    assert f"failed; {len(TRUTH) - 16} of {len(TRUTH)} cases were not answered" in result.summary
    nearly_all = outcome(lambda truth, number: Verdict(truth) if number > 7 else Verdict(None, failed=True))
    assert nearly_all.passed
    assert nearly_all.overall.n_positives + nearly_all.overall.n_negatives == len(TRUTH) - 8


def test_kinds_of_case_without_answers_are_left_out():
    answered = {kind for kind, _ in [(group.kind, group) for group in CASES[:2]]}
    known = {group.explanation for group in CASES if group.kind in answered}

    class Partly(Judge):
        async def judge(self, explanation, instances, question):
            verdicts = await super().judge(explanation, instances, question)
            return verdicts if explanation in known else [Verdict(None, failed=True)] * len(instances)

    result = asyncio.run(run_self_test(Partly(lambda truth, _: Verdict(truth)), "marked token"))
    assert set(result.kinds) == answered


def test_answers_that_cannot_be_parsed_are_told():
    result = outcome(lambda truth, number: Verdict(truth if number % 2 else None))
    assert f"; {len(TRUTH) // 2} answers could not be parsed" in result.summary


def test_logistic_regression_is_scikit_learns():
    """Recorded from LogisticRegression(tol=1e-10) of scikit-learn 1.9.1."""
    x = [0.883, -1.793, -2.359, 1.741, -3.033, 0.856, -0.642, -0.662, -3.618, 1.388, 0.986, -0.294, -1.667, 4.291,
         -2.118, -0.028, 3.808, -2.062, 0.593, -3.007, -2.194, 4.007, 1.443, -0.802, -1.907, 1.16, -3.516, 2.104, 3.455,
         -1.71, -4.963, 1.576, -1.238, 4.609, -1.321, 0.899, -1.382, -0.981, 0.346, -1.648]  # fmt: skip
    truth = [number % 2 == 1 for number in range(40)]
    assert fit_logistic(x, truth) == pytest.approx((0.28483659, 0.06966707), abs=1e-4)
    extreme = [-9.21, 9.21] * 20
    assert fit_logistic(extreme, truth) == pytest.approx((0.68282617, 0.0), abs=1e-4)
