import re
from dataclasses import replace

import numpy as np
import pytest

from bae_lens.activations import position_cache
from bae_lens.activations.model_shape import ModelShape
from bae_lens.activations.windows import kept_windows, random_windows
from bae_lens.entropy import dynamics as dynamics_module
from bae_lens.entropy import memory as memory_module
from bae_lens.entropy.dynamics import DynamicsSettings, entropy_dynamics, training_memory
from bae_lens.entropy.fit import FitSettings
from bae_lens.entropy.plan import plan_dynamics
from bae_lens.entropy.presets import paper_settings
from bae_lens.planning import Resources

LLAMA = ModelShape(d_model=2048, n_layers=16, n_heads=32, d_mlp=8192, n_parameters=1_498_482_688)
PAPER = (LLAMA, range(16), 11, 1024)
SETTINGS = DynamicsSettings(16, (0.1, 2.0), fit=FitSettings(steps=20, batch_size=16), dictionaries="per position")
AMPLE = Resources(10**12, 10**12, on_gpu=False)


def gpu(disk: float, memory: float) -> Resources:
    return Resources(int(disk * 1e9), int(memory * 1e9), on_gpu=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_disk_and_tokens_are_those_of_a_run(tiny_model, tiny_tokenizer, tiny_dataset, tmp_path, monkeypatch, dtype):
    n_tokens, original = [], position_cache.run_at_hooks

    def counted(model, tokens, *arguments, **named):
        n_tokens.append(tokens.numel())
        return original(model, tokens, *arguments, **named)

    monkeypatch.setattr(position_cache, "run_at_hooks", counted)
    windows = kept_windows(tmp_path / "windows", {}, lambda: random_windows(tiny_tokenizer, tiny_dataset, 8, 60))
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (0, 1)]
    found = entropy_dynamics(tiny_model, windows, hooks, [1, 2, 4, 8], SETTINGS, tmp_path / "run", states_dtype=dtype)
    plan = plan_dynamics(ModelShape(16, 2, 2, 32, 4096), [0, 1], 4, 8, 60, SETTINGS, dtype, AMPLE)
    assert plan.disk == sum(np.load(path, mmap_mode="r").nbytes for path in tmp_path.rglob("*.npy"))
    assert plan.n_tokens == sum(n_tokens) == 60 * 9
    assert plan.n_baes == len(found.cells) == 16
    assert plan.misfits == []


def test_shared_dictionaries_are_fewer():
    shared = replace(SETTINGS, dictionaries="shared")
    plans = [plan_dynamics(LLAMA, [3, 5], 4, 8, 60, s, "float32", AMPLE) for s in (SETTINGS, shared)]
    assert [plan.n_baes for plan in plans] == [16, 4]
    assert [training_memory(60, 4, 8, s).n_vectors for s in (SETTINGS, shared)] == [60, 240]


def test_paper_fits_one_gpu_of_80_gb_and_500_gb_of_disk():
    plan = plan_dynamics(*PAPER, 262_144, paper_settings(2048), "float32", gpu(500, 80))
    assert plan.misfits == []
    assert plan.n_tokens == 262_144 * 1025
    assert (plan.n_baes, plan.steps) == (176, 102_400)
    assert plan.stages[2].disk == 262_144 * (176 * (4 * 2048 + 4 + 8) + 8)
    memory = training_memory(262_144, 11, 2048, paper_settings(2048))
    another = memory.n_bytes(plan.sets_at_a_time + 1) - memory.n_bytes(plan.sets_at_a_time)
    assert plan.device <= 0.9 * 80e9 < plan.device + another


def test_disk_that_is_too_small_says_how_many_windows_fit():
    (misfit,) = plan_dynamics(*PAPER, 262_144, paper_settings(2048), "float32", gpu(100, 80)).misfits
    assert misfit.startswith("380 GB of disk are needed and 100 GB are free; ask for at most ")
    fewer = number_after("at most", misfit)
    for n_windows, fits in ((fewer, True), (fewer + 1, False)):
        plan = plan_dynamics(*PAPER, n_windows, paper_settings(2048, n_windows), "float32", gpu(100, 80))
        assert (plan.misfits == []) == fits
    assert plan_dynamics(*PAPER, 262_144, paper_settings(2048), "float16", gpu(200, 80)).misfits == []


def test_gpu_that_is_too_small_says_how_many_windows_fit():
    (misfit,) = plan_dynamics(*PAPER, 262_144, paper_settings(2048), "float32", gpu(500, 16)).misfits
    assert "beside the model; ask for at most" in misfit
    assert misfit.endswith("or for fewer features or prices, or smaller batches")
    fewer = number_after("at most", misfit)
    for n_windows, fits in ((fewer, True), (int(1.01 * fewer), False)):
        settings = paper_settings(2048)
        assert (plan_dynamics(*PAPER, n_windows, settings, "float32", gpu(500, 16)).misfits == []) == fits


def test_features_that_fit_with_no_windows_are_to_be_fewer():
    settings = replace(paper_settings(2048), d_sae=10**6)
    (misfit,) = plan_dynamics(*PAPER, 262_144, settings, "float32", gpu(500, 80)).misfits
    assert re.search("beside the model; ask for fewer features or prices", misfit)


def test_model_that_is_too_large_says_so():
    (misfit,) = plan_dynamics(*PAPER, 262_144, paper_settings(2048), "float32", gpu(500, 8)).misfits
    assert re.fullmatch(
        r"running the model takes [\d.]+ GB of memory and the GPU has 7.2 GB for it; "
        "choose a smaller model, or a lower position",
        misfit,
    )


def test_host_has_it_all_without_a_gpu():
    on_gpu, on_cpu = (
        plan_dynamics(*PAPER, 1000, SETTINGS, "float32", Resources(10**12, 10**12, on_gpu=on)) for on in (True, False)
    )
    assert on_cpu.device == 0 < on_gpu.device
    assert on_cpu.host > on_gpu.host


def test_run_trains_on_as_many_sets_as_planned(tiny_model, tiny_tokenizer, tiny_dataset, tmp_path, monkeypatch):
    n_bytes = training_memory(60, 4, 16, SETTINGS).n_bytes(3)
    monkeypatch.setattr(memory_module, "CPU_BYTES", n_bytes)
    sets, original = [], dynamics_module.position_entropies
    monkeypatch.setattr(
        dynamics_module,
        "position_entropies",
        lambda vectors, *given: (sets.append(len(vectors)), original(vectors, *given))[1],
    )
    windows = random_windows(tiny_tokenizer, tiny_dataset, 8, 60)
    entropy_dynamics(tiny_model, windows, ["blocks.0.hook_resid_post"], [1, 2, 4, 8], SETTINGS, tmp_path)
    assert sets == [3, 1]


def number_after(words: str, sentence: str) -> int:
    match = re.search(rf"{words} ([\d,]+)", sentence)
    assert match
    return int(match[1].replace(",", ""))
