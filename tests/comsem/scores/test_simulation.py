import asyncio

import numpy as np
import pytest

from bae_lens.comsem.collect.instances import Excerpt, FeatureInstances
from bae_lens.comsem.judges.judge import Prediction
from bae_lens.comsem.scores.outcome import Outcome
from bae_lens.comsem.scores.simulation import correlation, simulation, simulation_score
from bae_lens.functional.strength import activation_strength


def test_correlation_by_hand():
    # Deviations (-2, 0, 2) and (-1, -1, 2): 6 / sqrt(8 * 6) = 0.8660
    assert correlation([1.0, 3.0, 5.0], [0.0, 0.0, 3.0]) == pytest.approx(0.8660254)
    assert correlation([1.0, 0.0], [0.0, 10.0]) == -1


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        ([5.0, 5.0, 5.0], [0.0, 1.0, 0.0], 0.0),  # says the same of every token
        ([0.0, 5.0, 1.0], [0.0, 0.0, 0.0], None),
        ([0.0, 5.0], [2.0, 2.0], None),
        ([], [], None),
        ([1.0], [1.0], None),
    ],
)
def test_correlation_of_constants(predicted, true, expected):
    assert correlation(predicted, true) == expected


def test_bits_and_their_strength_have_the_same_correlation():
    import torch

    generator = np.random.default_rng(0)
    predicted, bits = generator.random(50), generator.random(50) < 0.2
    strength = activation_strength(torch.tensor(bits).float()[:, None], torch.tensor([0.2]))[:, 0]
    of_bits = correlation(predicted.tolist(), bits.astype(float).tolist())
    assert correlation(predicted.tolist(), strength.tolist()) == pytest.approx(of_bits, abs=1e-6)


EXCERPTS = [Excerpt("a b", [(0, 1), (2, 3)], [0.0, 2.0]), Excerpt("c d", [(0, 1), (2, 3)], [0.0, 0.0])]


def test_tokens_of_all_excerpts_count_together_and_what_is_unknown_is_left_out():
    known = [Prediction([0.0, 10.0]), Prediction([0.0, 5.0])]
    assert simulation_score(known, EXCERPTS) == correlation([0.0, 10.0, 0.0, 5.0], [0.0, 2.0, 0.0, 0.0])
    assert simulation_score([known[0], Prediction(None)], EXCERPTS) == 1
    assert simulation_score([Prediction(None), known[1]], EXCERPTS) is None
    assert simulation_score([Prediction(None), Prediction(None)], EXCERPTS) is None


def test_what_became_of_the_questions_is_counted():
    class Judge:
        async def simulate(self, explanation, excerpts):
            assert (explanation, excerpts) == ("letters", [*EXCERPTS, *EXCERPTS])
            return [Prediction([0.0, 9.0]), Prediction(None), Prediction(None, True), Prediction(None, abstained=True)]

    instances = FeatureInstances(0, 0.1, 9, [], [], [], [*EXCERPTS, *EXCERPTS])
    outcome = asyncio.run(simulation(Judge(), "letters", instances, ""))
    assert outcome == Outcome(1.0, unparsable=1, failed=1, abstained=1)
    assert asyncio.run(simulation(Judge(), "letters", FeatureInstances(0, 0.1, 9, [], [], []), "")) == Outcome(None)
