from dataclasses import replace
from typing import Any

import pytest

from bae_lens.functional.rate_distortion import RatePoint
from bae_lens.report.answer import answer


def with_points(comparison: Any, points: dict[str, tuple[float, float]]) -> Any:
    """The comparison with dictionaries whose code takes so many bits and explains so much; none has values."""
    dictionaries = []
    for dictionary in comparison.dictionaries:
        bits, explained_variance = points.get(dictionary.name, (1.0, 0.0))
        runs = [
            replace(
                run,
                metrics=replace(
                    run.metrics,
                    code=replace(run.metrics.code, support_bits=bits),
                    explained_variance=explained_variance,
                    value_bits=0.0,
                    value_curve=[],
                ),
            )
            for run in dictionary.runs
        ]
        dictionaries.append(replace(dictionary, runs=runs))
    return replace(comparison, dictionaries=dictionaries, pca=[RatePoint(100.0, 0.5), RatePoint(300.0, 0.9)])


def test_dictionaries_stand_by_their_bits_and_pca_beside_them(comparison):
    made = with_points(comparison, {"Top-k": (280.0, 0.8), "BAE": (200.0, 0.7), "Transcoder": (10.0, 0.1)})
    assert answer(made) == (
        "BAE explains 0.700 of the variance with 200 bits per token and Top-k 0.800 with 280; for as much, PCA needs "
        "200 and 250 bits, in this order, and no training."
    )


@pytest.mark.parametrize("explained_variance", [0.3, 0.95])
def test_nothing_is_said_of_pca_beyond_what_was_measured(comparison, explained_variance):
    made = with_points(comparison, {"Top-k": (280.0, explained_variance), "BAE": (200.0, 0.7)})
    assert "PCA" not in answer(made)


def test_transcoders_alone_are_not_held_against_pca_at_another_hook(make_comparison):
    said = answer(with_points(make_comparison(names=("Transcoder",)), {"Transcoder": (80.0, 0.7)}))
    assert said == "Transcoder explains 0.700 of the variance with 80 bits per token."
