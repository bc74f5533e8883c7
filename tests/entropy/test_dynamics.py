import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bae_lens.activations.demo_model import load_demo_model
from bae_lens.activations.position_cache import PositionActivations, random_windows
from bae_lens.entropy import dynamics as dynamics_module
from bae_lens.entropy.dynamics import Cell, DynamicsSettings, EntropyDynamics, entropy_dynamics, held_out
from bae_lens.entropy.estimate import EntropyEstimate, estimate_entropy
from bae_lens.entropy.fit import FitSettings, fit_bae

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
SETTINGS = DynamicsSettings(d_sae=16, fit=FitSettings(steps=20, batch_size=16), entropy_coefficients=(0.1, 2.0))


@pytest.fixture
def run(tiny_model, tiny_tokenizer, tiny_dataset, tmp_path):
    def run(settings=SETTINGS, positions=(1, 4, 8)):
        windows = random_windows(tiny_tokenizer, tiny_dataset, 8, 60)
        return entropy_dynamics(tiny_model, windows, HOOKS, positions, settings, tmp_path)

    return run


def estimate(bits: float, share: float = 0.5) -> EntropyEstimate:
    return EntropyEstimate(bits, bits, (0.9 * bits, 1.2 * bits), bits / 4, 2, share, 10, 4, 4)


def result(curve: dict[int, list[tuple[float, float]]]) -> EntropyDynamics:
    cells = [
        Cell("hook", position, float(i), estimate(*point), 0.5)
        for position, points in curve.items()
        for i, point in enumerate(points)
    ]
    return EntropyDynamics("model", ["hook"], list(curve), 10, 5, 0, 0, [1] * len(curve), 4, cells)


def test_every_hook_position_and_price_is_measured(run):
    dynamics = run()
    assert len(dynamics.cells) == 2 * 3 * 2
    assert [cell.entropy_coefficient for cell in dynamics.at(HOOKS[1], 4)] == [0.1, 2.0]
    assert dynamics.n_documents == dynamics.n_windows / 3
    assert all(1 < n <= 60 for n in dynamics.distinct_tokens)
    assert EntropyDynamics.from_dict(json.loads(json.dumps({**dynamics.to_dict(), "saturations": []}))) == dynamics


def test_batched_equals_looped_and_no_document_is_on_both_sides(run, tmp_path):
    dynamics = run()
    states = PositionActivations(tmp_path / "activations")
    vectors = states.vectors([(1, 2)])[0]
    first = states.documents.unique()[-(len(vectors) // 5 // 3) - 1 :].min()  # three windows a document
    test = states.documents > first
    assert not set(states.documents[test].tolist()) & set(states.documents[~test].tolist())
    bae = fit_bae(vectors[~test], 16, 0, 2.0, SETTINGS.fit)
    alone = estimate_entropy(bae, vectors[test], clusters=states.documents[test])
    cell = dynamics.at(HOOKS[1], 8)[1]
    assert cell.estimate.n_vectors == test.sum()
    assert cell.estimate.bits == pytest.approx(alone.bits, rel=1e-3)
    assert cell.estimate.explained_variance == pytest.approx(alone.explained_variance, abs=1e-3)
    assert cell.estimate.interval == pytest.approx(alone.interval, rel=1e-3)


def test_last_documents_are_held_out_whole():
    documents = torch.tensor([7, 7, 7, 7, 9, 9, 9, 9, 12, 12])
    assert held_out(documents, 2).tolist() == [False] * 8 + [True] * 2
    assert held_out(torch.cat([documents, torch.tensor([12] * 2 + [13])]), 2).tolist() == [False] * 8 + [True] * 5
    assert held_out(torch.arange(60), 16).sum() == 12


@pytest.mark.parametrize("documents", [torch.zeros(60).long(), torch.arange(60) // 30, torch.arange(8)])
def test_too_few_windows_or_documents_are_refused(documents):
    with pytest.raises(ValueError, match=r"a batch of 40 windows, and 2 of other documents held out, but \d+ windows"):
        held_out(documents, 40)


def test_interrupted_run_goes_on_after_its_last_batch_of_baes(run, monkeypatch):
    monkeypatch.setattr(dynamics_module, "BYTES_AT_A_TIME", 4 * 4 * 2 * 16 * 16 * 4)
    original, calls = dynamics_module._measure, []

    def interrupted(*arguments):
        calls.append(len(arguments[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(dynamics_module, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    dynamics = run()
    assert calls == [4, 4, 4, 4]
    assert len(dynamics.cells) == 12
    assert run() == dynamics
    assert len(calls) == 4


def test_folder_of_other_settings_is_refused(run):
    run()
    with pytest.raises(ValueError, match=r"holds something else \(d_sae: .* there, 8 now\); choose another folder"):
        run(replace(SETTINGS, d_sae=8))


def test_too_few_windows_are_refused_before_the_model_runs(run, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamics_module, "collect", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="a batch of 100 windows"):
        run(replace(SETTINGS, fit=FitSettings(batch_size=100)))
    assert not list(tmp_path.iterdir())


def test_too_few_windows_are_refused_when_massive_ones_are_gone(run, monkeypatch):
    monkeypatch.setattr("bae_lens.functional.outliers.OUTLIER_NORM", 1.3)
    with pytest.raises(ValueError, match=r"but \d+ windows \(\d+ are left out for outliers\)"):
        run(replace(SETTINGS, fit=FitSettings(batch_size=45)))


def test_tokens_of_massive_windows_are_not_counted(run, monkeypatch):
    everything = run().distinct_tokens
    monkeypatch.setattr(PositionActivations, "kept", torch.arange(20))
    monkeypatch.setattr(dynamics_module, "_entropies", lambda *_: [])
    few = run()
    assert (few.outliers, few.n_windows) == (40, 20)
    assert all(n <= 20 < before for n, before in zip(few.distinct_tokens, everything, strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_sae": 0}, "d_sae must be at least 1"),
        ({"entropy_coefficients": ()}, "at least one entropy coefficient"),
        ({"entropy_coefficients": (1.0, float("nan"))}, "finite and at least 0"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **values)


def test_curve_at_one_explained_variance():
    dynamics = result({1: [(10.0, 0.5), (20.0, 0.75)], 2: [(12.0, 0.7), (16.0, 0.8)], 4: [(3.0, 0.8), (9.0, 0.9)]})
    first, second, third = dynamics.curve("hook")
    assert [first.bits, second.bits, third.bits] == [10.0, 12.0, 3.0]
    assert (first.interval, first.joint_bits_bound, first.explained_variance) == ((9.0, 12.0), 7.5, 0.5)
    first, second = dynamics.curve("hook", 0.75)
    assert first.bits == 20.0
    bits = 12 + 4 * np.log(0.3 / 0.25) / np.log(0.3 / 0.2)
    assert second.position == 2
    assert second.bits == pytest.approx(bits)
    assert second.interval == pytest.approx((0.9 * bits, 1.2 * bits))
    assert second.joint_bits_bound == pytest.approx(0.75 * bits)
    assert second.explained_variance == 0.75


def test_no_saturations_of_two_points():
    assert result({1: [(1.0, 0.5)], 2: [(2.0, 0.5)]}).saturations() == []


def test_saturations_at_a_share_that_nothing_reaches():
    assert result({p: [(float(p), 0.5)] for p in (1, 2, 4, 8)}).saturations(0.9) == []


@pytest.mark.slow
def test_demonstrations_of_a_real_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    benchmark = Path(__file__).parents[2] / "benchmarks" / "in_context.py"
    demonstrations = runpy.run_path(str(benchmark))["demonstrations"]
    model = load_demo_model()
    windows, positions = demonstrations(model.tokenizer, n_prompts=160, n_demonstrations=4, seed=0)
    settings = DynamicsSettings(d_sae=64, fit=replace(dynamics_module.FEW_VECTORS, steps=64, batch_size=64))
    dynamics = entropy_dynamics(model, windows, ["blocks.5.hook_resid_post"], positions, settings, tmp_path)
    assert len(dynamics.cells) == 4
    assert all(torch.isfinite(torch.tensor(cell.estimate.bits)) for cell in dynamics.cells)
