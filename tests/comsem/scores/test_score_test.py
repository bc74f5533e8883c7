import asyncio
import random

import pytest

from bae_lens.comsem.judges.judge import Choice, Prediction
from bae_lens.comsem.scores.known_cases import ALIKE_CASES, SIMULATION_CASES, excerpt_from_marked
from bae_lens.comsem.scores.score_test import ScoreTest, run_intruder_test, run_simulation_test

RIGHT = {shown.marked for _, shown in ALIKE_CASES}


class Judge:
    def __init__(self, knows):
        self.knows, self.rng = knows, random.Random(7)

    async def find_intruder(self, instances):
        if not self.knows:
            return Choice(self.rng.randrange(5))
        return Choice(next(number for number, instance in enumerate(instances) if instance.marked in RIGHT))

    async def simulate(self, explanation, excerpts):  # noqa: ARG002
        if not self.knows:
            return [Prediction([self.rng.random() for _ in excerpt.tokens]) for excerpt in excerpts]
        return [Prediction([10 * activation for activation in excerpt.activations]) for excerpt in excerpts]


def test_who_knows_passes_and_who_guesses_fails():
    knows, guesses = Judge(True), Judge(False)
    assert asyncio.run(run_intruder_test(knows)) == ScoreTest("intruder", 1.0, 0.2, 20, 20)
    right = asyncio.run(run_simulation_test(knows))
    assert (right.value, right.n, right.passed) == (pytest.approx(1), 24, True)
    for run in (run_intruder_test, run_simulation_test):
        test = asyncio.run(run(guesses))
        assert test.value is not None
        assert test.value < 0.5
        assert not test.passed


def test_halfway_from_chance_passes():
    assert ScoreTest("intruder", 0.6, 0.2, 20, 20).passed
    assert not ScoreTest("intruder", 0.55, 0.2, 20, 20).passed
    assert ScoreTest("simulation", 0.5, 0.0, 24, 24).passed
    assert ScoreTest("intruder", 1.0, 0.2, 18, 20).passed
    assert not ScoreTest("intruder", 1.0, 0.2, 17, 20).passed
    assert not ScoreTest("simulation", None, 0.0, 0, 24).passed
    assert ScoreTest("intruder", None, 0.2, 0, 20).summary == (
        "test of intruder: no answers on 0 of 20 cases with known answers, where chance is 0.2: failed"
    )


def test_known_cases_are_told_apart_by_their_marks():
    assert len({marked for alike, other in ALIKE_CASES for marked in [other.marked, *(a.marked for a in alike)]}) == 100
    for _, excerpts in SIMULATION_CASES:
        for excerpt in excerpts:
            assert set(excerpt.activations) == {0.0, 1.0}
    assert excerpt_from_marked("<<Two>> words").token_texts == ["Two", "words"]
