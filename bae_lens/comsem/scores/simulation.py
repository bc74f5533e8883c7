"""Numeric simulation: do activations follow from the explanation? (Bills et al. 2023)

"Language models can explain neurons in language models", https://openaipublic.blob.core.windows.net/neuron-explainer/paper/.
The score that the paper argues against (section 4.2).
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np

from bae_lens.comsem.collect.instances import Excerpt, FeatureInstances
from bae_lens.comsem.judges.judge import Prediction, Simulator
from bae_lens.comsem.scores.outcome import Outcome


async def simulation(judge: Simulator, explanation: str, instances: FeatureInstances, seed: str) -> Outcome:  # noqa: ARG001
    """Correlation of predicted and true activations over the tokens of all excerpts whose predictions are known."""
    if not instances.excerpts:
        return Outcome(None)
    predictions = await judge.simulate(explanation, instances.excerpts)
    return Outcome(
        simulation_score(predictions, instances.excerpts),
        unparsable=sum(p.activations is None and not (p.failed or p.abstained) for p in predictions),
        failed=sum(prediction.failed for prediction in predictions),
        abstained=sum(prediction.abstained for prediction in predictions),
    )


def simulation_score(predictions: Sequence[Prediction], excerpts: Sequence[Excerpt]) -> float | None:
    """Over all tokens together; excerpts without a prediction are left out."""
    known = [
        (prediction.activations, excerpt.activations)
        for prediction, excerpt in zip(predictions, excerpts, strict=True)
        if prediction.activations is not None
    ]
    predicted, true = (list(chain.from_iterable(values)) for values in zip(*known, strict=True)) if known else ([], [])
    return correlation(predicted, true)


def correlation(predicted: Sequence[float], true: Sequence[float]) -> float | None:
    """Pearson's coefficient, from -1 to 1 (Bills et al. 2023, "Scoring the explanation by comparing the simulated and
    actual neuron behavior").

    Of a binary feature it is the same for bits and for the paper's strength, which has one value for each bit. A
    constant prediction explains nothing and has 0. None where the true activations are constant or there are none.

    >>> round(correlation([0.0, 10.0, 5.0], [0.0, 1.0, 1.0]), 3)
    0.866
    """
    x, y = np.asarray(predicted, dtype=float), np.asarray(true, dtype=float)
    if len(y) == 0 or np.ptp(y) == 0:
        return None
    if np.ptp(x) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))
