import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bae_lens import dynamics as dynamics_module
from bae_lens.demo_model import load_demo_model
from bae_lens.dynamics import Cell, DynamicsSettings, EntropyDynamics, entropy_dynamics, fit_saturation
from bae_lens.entropy import EntropyEstimate, estimate_entropy
from bae_lens.fit import FitSettings, fit_bae
from bae_lens.position_states import PositionStates, random_windows

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
SETTINGS = DynamicsSettings(d_sae=16, fit=FitSettings(steps=20, batch_size=16), entropy_coefficients=(0.1, 2.0))


@pytest.fixture
def run(tiny_model, tiny_tokenizer, tiny_dataset, tmp_path):
    def run(settings=SETTINGS, positions=(1, 4, 8)):
        windows = random_windows(tiny_tokenizer, tiny_dataset, 8, 60)
        return entropy_dynamics(tiny_model, windows, HOOKS, positions, settings, tmp_path)

    return run


def estimate(bits: float, share: float = 0.5) -> EntropyEstimate:
    return EntropyEstimate(bits, bits, (bits - 1, bits + 1), 0.0, 2, share, 10, 4, 4)


def result(curve: dict[int, list[tuple[float, float]]]) -> EntropyDynamics:
    cells = [
        Cell("hook", position, float(i), estimate(*point), 0.5)
        for position, points in curve.items()
        for i, point in enumerate(points)
    ]
    return EntropyDynamics("model", ["hook"], list(curve), 10, 0, 0, [1] * len(curve), 4, cells)


def test_every_hook_position_and_price_is_measured(run):
    dynamics = run()
    assert len(dynamics.cells) == 2 * 3 * 2
    assert [cell.entropy_coefficient for cell in dynamics.at(HOOKS[1], 4)] == [0.1, 2.0]
    assert all(cell.estimate.n_vectors == dynamics.n_windows // 5 for cell in dynamics.cells)
    assert all(1 < n <= 60 for n in dynamics.distinct_tokens)
    assert EntropyDynamics.from_dict(json.loads(json.dumps(dynamics.to_dict()))) == dynamics


def test_batched_equals_looped(run, tmp_path):
    dynamics = run()
    states = PositionStates(tmp_path / "hidden_states")
    vectors = states.vectors([(1, 2)])[0]
    held_out = len(vectors) // 5
    bae = fit_bae(vectors[:-held_out], 16, 0, 2.0, SETTINGS.fit)
    alone = estimate_entropy(bae, vectors[-held_out:])
    cell = dynamics.at(HOOKS[1], 8)[1]
    assert cell.estimate.bits == pytest.approx(alone.bits, rel=1e-3)
    assert cell.estimate.explained_variance == pytest.approx(alone.explained_variance, abs=1e-3)


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
    with pytest.raises(ValueError, match="other settings"):
        run(replace(SETTINGS, d_sae=8))


def test_too_few_windows_are_refused(run):
    with pytest.raises(ValueError, match="at least a batch of 100 vectors"):
        run(replace(SETTINGS, fit=FitSettings(batch_size=100)))


def test_bits_at_one_explained_variance_are_none_out_of_reach():
    dynamics = result({1: [(10.0, 0.5), (20.0, 0.75)], 2: [(12.0, 0.7), (16.0, 0.8)]})
    assert dynamics.bits("hook") == [10.0, 12.0]
    assert dynamics.bits("hook", 0.75) == [20.0, pytest.approx(12 + 4 * np.log(0.3 / 0.25) / np.log(0.3 / 0.2))]
    assert dynamics.bits("hook", 0.6)[1] is None


def test_saturation_of_a_known_curve():
    positions = np.array([1.0, 2, 4, 8, 16, 32, 64, 128])
    bits = 100 - 60 * np.exp(-(positions - 1) / 10)
    found = fit_saturation("hook", positions, bits, np.full(8, 0.5))
    assert found is not None
    assert found.level == pytest.approx(100, abs=0.1)
    assert found.position == pytest.approx(1 + 10 * np.log(20), rel=0.03)
    assert found.reached
    assert found.level_interval[0] < 100 < found.level_interval[1] < 102
    assert found.position_interval[0] < found.position < found.position_interval[1]


def test_a_curve_that_goes_on_rising_has_not_saturated():
    positions = np.array([1.0, 2, 4, 8, 16])
    found = fit_saturation("hook", positions, 10 + positions, np.full(5, 0.1))
    assert found is not None
    assert not found.reached
    assert found.position_interval[1] > 100


def test_no_saturation_of_three_points_or_of_a_falling_curve():
    assert fit_saturation("hook", np.arange(1.0, 4), np.arange(3.0), np.ones(3)) is None
    assert fit_saturation("hook", np.arange(1.0, 6), -np.arange(5.0), np.ones(5)) is None
    assert result({1: [(1.0, 0.5)], 2: [(2.0, 0.5)]}).saturations() == []


def test_saturations_at_a_share_that_nothing_reaches():
    assert result({p: [(float(p), 0.5)] for p in (1, 2, 4, 8)}).saturations(0.9) == []


@pytest.mark.slow
def test_demonstrations_of_a_real_model(tmp_path):
    benchmark = Path(__file__).parent.parent / "benchmarks" / "in_context.py"
    demonstrations = runpy.run_path(str(benchmark))["demonstrations"]
    model = load_demo_model()
    windows, positions = demonstrations(model.tokenizer, n_prompts=160, n_demonstrations=4, seed=0)
    settings = DynamicsSettings(d_sae=64, fit=replace(dynamics_module.FEW_VECTORS, steps=64, batch_size=64))
    dynamics = entropy_dynamics(model, windows, ["blocks.5.hook_resid_post"], positions, settings, tmp_path)
    assert len(dynamics.cells) == 4
    assert all(torch.isfinite(torch.tensor(cell.estimate.bits)) for cell in dynamics.cells)
