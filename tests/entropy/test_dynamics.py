import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bae_lens.activations.demo_model import load_demo_model
from bae_lens.activations.position_cache import PositionActivations
from bae_lens.activations.prompts import Prompt, century_prompts, prompt_windows
from bae_lens.activations.windows import random_windows
from bae_lens.entropy import dynamics as dynamics_module
from bae_lens.entropy.dynamics import DynamicsSettings, entropy_dynamics, held_out, position_entropies
from bae_lens.entropy.estimate import estimate_entropy, fit_tree
from bae_lens.entropy.fit import FitSettings, fit_bae
from bae_lens.entropy.results import EntropyDynamics
from bae_lens.entropy.synthetic_model import bit_model

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
SETTINGS = DynamicsSettings(
    d_sae=16,
    fit=FitSettings(steps=20, batch_size=16),
    entropy_coefficients=(0.1, 2.0),
    dictionaries="per position",
)
SHARED = replace(SETTINGS, dictionaries="shared")


@pytest.fixture
def run(tiny_model, tiny_tokenizer, tiny_dataset, tmp_path):
    def run(settings=SETTINGS, positions=(1, 4, 8)):
        windows = random_windows(tiny_tokenizer, tiny_dataset, 8, 60)
        return entropy_dynamics(tiny_model, windows, HOOKS, positions, settings, tmp_path)

    return run


@pytest.mark.parametrize("settings", [SETTINGS, SHARED])
def test_every_hook_position_and_coefficient_is_measured(run, settings):
    dynamics = run(settings)
    assert len(dynamics.cells) == 2 * 3 * 2
    assert [cell.entropy_coefficient for cell in dynamics.at(HOOKS[1], 4)] == [0.1, 2.0]
    assert dynamics.n_documents == dynamics.n_windows / 3
    assert all(1 < n <= 60 for n in dynamics.distinct_tokens)
    assert EntropyDynamics.from_dict(json.loads(json.dumps({**dynamics.to_dict(), "views": []}))) == dynamics


def test_batched_equals_looped_and_no_document_is_on_both_sides(run, tmp_path):
    dynamics = run()
    states = PositionActivations(tmp_path / "activations")
    vectors = states.vectors([(1, 2)])[0]
    first = states.documents.unique()[-(len(vectors) // 5 // 3) - 1 :].min()  # three windows a document
    test = states.documents > first
    assert not set(states.documents[test].tolist()) & set(states.documents[~test].tolist())
    bae = fit_bae(vectors[~test], 16, 0, 2.0, SETTINGS.fit)
    tree = fit_tree(bae, vectors[~test])
    alone = estimate_entropy(bae, vectors[test], clusters=states.documents[test], tree=tree)
    cell = dynamics.at(HOOKS[1], 8)[1]
    assert cell.estimate.n_vectors == test.sum()
    assert cell.estimate.bits == pytest.approx(alone.bits, rel=1e-3)
    assert cell.estimate.explained_variance == pytest.approx(alone.explained_variance, abs=1e-3)
    assert cell.estimate.interval == pytest.approx(alone.interval, rel=1e-3)
    assert cell.estimate.joint_bits_bound == pytest.approx(alone.joint_bits_bound, rel=1e-3)
    assert cell.estimate.joint_interval is not None
    everything = estimate_entropy(bae, vectors, clusters=states.documents)
    assert cell.all_windows.bits == pytest.approx(everything.bits, rel=1e-3)
    assert cell.all_windows.n_vectors == len(vectors)


def test_a_shared_dictionary_is_trained_on_all_positions_and_measured_at_each(run, tmp_path):
    dynamics = run(SHARED)
    states = PositionActivations(tmp_path / "activations")
    vectors = states.vectors([(1, position) for position in range(3)])
    test = held_out(states.documents, 16)
    bae = fit_bae(vectors[:, ~test].flatten(0, 1), 16, 0, 0.1, SHARED.fit)
    for position, x in zip((1, 4, 8), vectors, strict=True):
        tree = fit_tree(bae, x[~test])
        alone = estimate_entropy(bae, x[test], clusters=states.documents[test], tree=tree)
        found = dynamics.at(HOOKS[1], position)[0].estimate
        assert found.bits == pytest.approx(alone.bits, rel=1e-3)
        assert found.joint_bits_bound == pytest.approx(alone.joint_bits_bound, rel=1e-3)


def test_known_entropies_are_recovered_at_every_position_by_a_shared_dictionary():
    generator = torch.Generator().manual_seed(0)
    model = bit_model(3, 24, (2, 3), generator)
    tokens = model.tokens(2000, 4, generator)
    states = torch.stack([torch.stack([model.states(tokens, layer, p) for p in (1, 2, 4)]) for layer in (0, 1)])
    fit = replace(dynamics_module.SHARED, steps=600)
    measured = position_entropies(states, torch.arange(2000), DynamicsSettings(32, (0.3,), fit=fit))
    places = [(layer, position) for layer in (0, 1) for position in (1, 2, 4)]
    for (layer, position), (estimate, whole) in zip(places, measured, strict=True):
        assert estimate.explained_variance > 0.98
        assert estimate.joint_bits_bound == pytest.approx(model.joint_bits(layer, position), rel=0.1)
        assert whole.n_vectors == 2000


def test_bits_that_pay_are_flipped_if_asked():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 200, 12, generator=generator)
    fit = FitSettings(steps=60, batch_size=64, elimination=False)
    plain, flipped = (
        position_entropies(x, torch.arange(200), DynamicsSettings(16, (0.1,), fit=fit, max_flips=flips))[0][1]
        for flips in (0, 8)
    )
    assert flipped.explained_variance > plain.explained_variance + 0.05


def test_more_bits_than_tokens_are_marked_at_the_first_position_only(run):
    dynamics = run(SHARED)
    points = [point for view in dynamics.views() for points in view.curves.values() for point in points]
    of_tokens = [point for point in points if "more bits than tokens" in point.marks]
    assert {point.position for point in of_tokens} == {1}
    bits = [point.bits for point in points if point.position == 1]
    assert len(of_tokens) == sum(b > np.log2(dynamics.distinct_tokens[0]) for b in bits)


def test_last_documents_are_held_out_whole():
    documents = torch.tensor([7, 7, 7, 7, 9, 9, 9, 9, 12, 12])
    assert held_out(documents, 2).tolist() == [False] * 8 + [True] * 2
    assert held_out(torch.cat([documents, torch.tensor([12] * 2 + [13])]), 2).tolist() == [False] * 8 + [True] * 5
    assert held_out(torch.arange(60), 16).sum() == 12


@pytest.mark.parametrize("documents", [torch.zeros(60).long(), torch.arange(60) // 30, torch.arange(8)])
def test_too_few_windows_or_documents_are_refused(documents):
    with pytest.raises(ValueError, match=r"a batch of 40 windows, and 2 of other documents held out, but \d+ windows"):
        held_out(documents, 40)


@pytest.mark.parametrize(("settings", "expected"), [(SETTINGS, [2, 2, 2, 2]), (SHARED, [1, 1, 1])])
def test_interrupted_run_goes_on_after_its_last_batch_of_baes(run, monkeypatch, settings, expected):
    sets = expected[0]
    monkeypatch.setattr("bae_lens.entropy.memory.TrainingMemory.sets_at_a_time", lambda *_: sets)
    original, calls = dynamics_module.position_entropies, []

    def interrupted(vectors, *arguments):
        calls.append(len(vectors))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(vectors, *arguments)

    monkeypatch.setattr(dynamics_module, "position_entropies", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    dynamics = run(settings)
    assert calls == expected
    assert len(dynamics.cells) == 12
    assert run(settings) == dynamics
    assert len(calls) == len(expected)


def test_work_is_cut_as_the_process_with_least_memory_can_take_it(run, monkeypatch):
    shared: list[list[list[int]]] = []
    monkeypatch.setattr(dynamics_module, "gather", lambda value: [value, min(value, 2)] if value == 6 else [value])
    monkeypatch.setattr(dynamics_module.TrainingMemory, "sets_at_a_time", lambda *_: 6)
    share = dynamics_module.share

    def noted(items, work):
        shared.append(items)
        share(items, work)

    monkeypatch.setattr(dynamics_module, "share", noted)
    run()
    assert shared == [[[0, 1], [2, 3], [4, 5]]]


def test_folder_of_other_settings_is_refused(run):
    run()
    with pytest.raises(ValueError, match=r"holds something else \(settings.d_sae: .* there, 8 now\)"):
        run(replace(SETTINGS, d_sae=8))
    with pytest.raises(ValueError, match=r"holds something else \(positions.2: 8 there, 6 now\)"):
        run(positions=(1, 4, 6))


def test_too_few_windows_are_refused_before_the_model_runs(run, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamics_module, "collect", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="a batch of 100 windows"):
        run(replace(SETTINGS, fit=FitSettings(batch_size=100)))
    assert not list(tmp_path.iterdir())


def test_too_few_windows_are_refused_when_those_of_outliers_are_gone(run, monkeypatch):
    monkeypatch.setattr("bae_lens.activations.position_cache.SINK_NORM", 1.3)
    with pytest.raises(ValueError, match=r"but \d+ windows \(\d+ are left out for outliers\)"):
        run(replace(SETTINGS, fit=FitSettings(batch_size=45)))


def test_tokens_of_outlier_windows_are_not_counted(run, monkeypatch):
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
        ({"max_flips": -1}, "max_flips must be at least 0, .*got -1"),
        ({"entropy_coefficients": (1.0, float("nan"))}, "finite and at least 0"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **values)


@pytest.mark.slow
def test_demonstrations_of_a_real_model(tmp_path):
    model = load_demo_model()
    prompts = [Prompt(row["text"], tuple(row["ends"]), group=row["group"]) for row in century_prompts(100, 2)]
    windows = prompt_windows(model.tokenizer, prompts)["correct"]
    settings = DynamicsSettings(d_sae=64, fit=replace(dynamics_module.FEW_VECTORS, steps=64, batch_size=64))
    dynamics = entropy_dynamics(model, windows, ["blocks.2.hook_resid_post"], [1, 2], settings, tmp_path)
    assert len(dynamics.cells) == 2 * len(settings.entropy_coefficients)
    assert all(0 < cell.estimate.bits < 64 for cell in dynamics.cells)
