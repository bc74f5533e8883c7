import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sae_lens.training.sae_trainer import SAETrainer

from bae_lens import Recipe, TrainingBAEConfig, TrainingSettings
from bae_lens.training import trainer as trainer_module
from bae_lens.training.tracking import Tracking
from bae_lens.training.trainer import train_dictionary

RECIPE = Recipe(TrainingBAEConfig(d_in=16, d_sae=64, encoder_bias_init=-0.5), lr=4e-3)
SETTINGS = TrainingSettings(training_tokens=32 * 45, batch_size=32)

pytestmark = pytest.mark.usefixtures("one_thread")


class Histogram:
    """As wandb's and trackio's."""

    def __init__(self, values: Any = None, np_histogram: Any = None) -> None:
        self.histogram, self.bins = np_histogram or np.histogram(values)


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    """A tracker that keeps what it is told."""
    told: Any = SimpleNamespace(name=request.param, runs=[], logs=[], finished=0, __spec__=object())
    told.init = lambda **arguments: told.runs.append(arguments)
    told.log = lambda metrics, step: told.logs.append((step, metrics))
    told.finish = lambda: setattr(told, "finished", told.finished + 1)
    told.Histogram = Histogram
    monkeypatch.setitem(sys.modules, request.param, told)
    return told


def test_metrics_are_those_of_sae_lens_under_its_names(tracker, states, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "DEAD_WINDOW_SHARE", 1)
    expected, build = [], SAETrainer.build_train_step_log_dict

    def recorded(self: Any, *arguments: Any, **named: Any) -> Any:
        expected.append(build(self, *arguments, **named))
        return expected[-1]

    monkeypatch.setattr(SAETrainer, "build_train_step_log_dict", recorded)
    train_dictionary("BAE", RECIPE, states[0], SETTINGS, tmp_path, tracking=Tracking(tracker.name, "mine"))
    assert [step for step, _ in tracker.logs] == [9, 19, 29, 39]
    assert [metrics for _, metrics in tracker.logs] == expected
    first = tracker.logs[0][1]
    assert first["details/n_training_samples"] == 320
    assert {"losses/overall_loss", "losses/mse_loss", "metrics/explained_variance", "metrics/l0"} <= first.keys()
    assert {"metrics/entropy_bits", "sparsity/dead_features", "details/entropy_coefficient"} <= first.keys()
    (run,) = tracker.runs
    assert (run["project"], run["resume"], run["config"]["recipe"]["d_sae"]) == ("mine", "allow", 64)
    assert run["name"].startswith("BAE ")
    assert ("id" in run) == (tracker.name == "wandb")
    assert tracker.finished == 1


def test_an_interrupted_training_goes_on_with_its_run_and_a_finished_one_makes_none(
    tracker, states, tmp_path, monkeypatch
):
    tracking, step = Tracking(tracker.name), trainer_module.take_step

    def interrupted(trainer: Any, batch: Any) -> Any:
        if trainer.n_training_steps == 15:
            raise ValueError("enough")
        return step(trainer, batch)

    monkeypatch.setattr(trainer_module, "take_step", interrupted)
    with pytest.raises(ValueError, match="enough"):
        train_dictionary("BAE", RECIPE, states[0], SETTINGS, tmp_path, tracking=tracking)
    assert tracker.finished == 1
    monkeypatch.setattr(trainer_module, "take_step", step)
    for _ in range(2):
        train_dictionary("BAE", RECIPE, states[0], SETTINGS, tmp_path, tracking=tracking)
    first, second = tracker.runs
    assert first["name"] == second["name"]


def test_firing_rates_of_a_window_come_as_the_trackers_own_histogram(tracker, states, tmp_path, monkeypatch):
    original = trainer_module.trainer_of

    def with_short_windows(*arguments: Any) -> Any:
        trainer = original(*arguments)
        trainer.cfg.feature_sampling_window = 25
        return trainer

    monkeypatch.setattr(trainer_module, "trainer_of", with_short_windows)
    train_dictionary("BAE", RECIPE, states[0], SETTINGS, tmp_path, tracking=Tracking(tracker.name))
    (window,) = [metrics for step, metrics in tracker.logs if step == 25]
    assert isinstance(window["plots/feature_density_line_chart"], Histogram)
    assert sum(window["plots/feature_density_line_chart"].histogram) == 64


def test_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("bae_lens.training.tracking.find_spec", lambda _: None)
    with pytest.raises(ImportError, match="this needs trackio; pip install trackio brings it"):
        Tracking("trackio")
