import ctypes
import os
from pathlib import Path

import pytest
import torch

from bae_lens.entropy.estimate import estimate_entropy
from bae_lens.entropy.fit import FitSettings, fit_curves
from bae_lens.entropy.memory import CPU_BYTES, TrainingMemory, bytes_for_training

FIT = FitSettings(steps=4, batch_size=256, elimination=False)


@pytest.mark.parametrize("n_bytes", [10**7, 10**8, 10**9, 10**10])
def test_as_many_sets_as_fit(n_bytes):
    memory = TrainingMemory(10_000, 64, 256, 3, FIT)
    fit = memory.sets_at_a_time(n_bytes)
    assert memory.n_bytes(fit + 1) > n_bytes
    assert fit == 0 or memory.n_bytes(fit) <= n_bytes


def test_bytes_by_hand():
    two, three = (TrainingMemory(100_000, 8, 16, 5, FIT).n_bytes(n_sets) for n_sets in (2, 3))
    vectors = 2 * 4 * 100_000 * 8  # twice, in float32
    weights = 5 * 4 * (2 * 8 * 16 + 8 + 16)
    batch = 4 * 256 * (6 * 8 + 8 * 16)
    assert three - two == vectors + 5 * (weights + batch)


@pytest.mark.parametrize(("given", "usable"), [(None, 40), (100, 40), (60, 20), (30, -10)])
def test_a_gpu_trains_as_many_as_fit_beside_the_model(monkeypatch, given, usable):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40 * 10**9, 80 * 10**9))
    gpu_bytes = None if given is None else given * 10**9
    assert bytes_for_training(torch.device("cuda"), gpu_bytes) == int(0.9 * usable * 10**9)


def test_a_cpu_trains_few_at_a_time():
    assert bytes_for_training(torch.device("cpu")) == CPU_BYTES


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="cannot ask for the peak of memory")
@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "n_sets", "n_prices", "covariance"),
    [
        (60_000, 256, 128, 3, 1, 0.0),
        (60_000, 256, 128, 1, 2, 0.0),
        pytest.param(4096, 256, 2048, 2, 2, 0.1, marks=pytest.mark.slow),
    ],
)
def test_training_takes_no_more_than_said_and_not_much_less(n, d_in, d_sae, n_sets, n_prices, covariance):
    fit = FitSettings(steps=2, batch_size=256, elimination=False, covariance_coefficient=covariance)
    memory = TrainingMemory(n, d_in, d_sae, n_prices, fit)

    def train(rows: int) -> None:
        vectors = torch.randn(n_sets, rows, d_in)
        trained_on = vectors[:, torch.ones(rows, dtype=torch.bool)]
        for baes in fit_curves(trained_on, d_sae, 0, [0.1] * n_prices, fit):
            estimate_entropy(baes[0], trained_on[0])

    train(300)  # what libraries keep from the first call on
    ctypes.CDLL(None).malloc_trim(0)  # what other tests left would be taken again
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    train(n)
    taken = _memory("VmHWM") - before
    assert 0.4 * memory.n_bytes(n_sets) < taken <= memory.n_bytes(n_sets)


def _memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
