"""What a GPU computes is what a CPU computes. Commands take a GPU where there is one, and so do their tests."""

from typing import Any

import pytest
import torch
from sae_lens import GatedTrainingSAEConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig

from bae_lens import covariance_penalty, estimate_entropy, fit_bae, random_directions
from bae_lens.evaluation.metrics import evaluate_dictionary
from bae_lens.training import trainer
from bae_lens.training.recipe import Recipe, TrainingSettings
from bae_lens.training.trainer import train_dictionary

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SETTINGS = TrainingSettings(training_tokens=32 * 40, batch_size=32)
SIZES: dict[str, Any] = {"d_in": 16, "d_sae": 64}


@pytest.mark.parametrize(("n", "d_sae", "rate"), [(4096, 5000, 0.02), (4096, 5000, 0.3), (5000, 300, 0.5)])
def test_covariance_of_a_code_in_bfloat16_is_that_in_float64(n, d_sae, rate):
    code = (torch.rand(n, d_sae, device="cuda") < rate).float().requires_grad_()
    penalty = covariance_penalty(code)
    (gradient,) = torch.autograd.grad(penalty, code)
    exact = code.detach().double()
    fired = exact.sum(0)
    signs = (n * (exact.T @ exact) - fired[:, None] * fired).sign().fill_diagonal_(0)
    centered = exact - exact.mean(0)
    expected = 2 / (n - 1) * (centered @ signs)
    torch.testing.assert_close(gradient.double(), expected - expected.mean(0), rtol=1e-4, atol=1e-5)
    assert penalty.item() == pytest.approx((centered.T @ centered / (n - 1) * signs).sum().item(), rel=1e-5)


@pytest.mark.parametrize("architecture", ["bae", "optimized", "standard", "topk", "gated"])
def test_dictionary_trained_on_a_gpu_explains_as_much_as_one_of_a_cpu(architecture, bae_config, states, tmp_path):
    configs = {
        "bae": lambda: bae_config(target_l0=8.0, entropy_start_step=10, covariance_coefficient=1e-3),
        "optimized": lambda: bae_config(target_l0=8.0, entropy_start_step=10, max_flips=8, optimized_start_step=20),
        "standard": lambda: StandardTrainingSAEConfig(**SIZES, l1_coefficient=0.1),
        "topk": lambda: TopKTrainingSAEConfig(**SIZES, k=8),
        "gated": lambda: GatedTrainingSAEConfig(**SIZES, l1_coefficient=0.1),
    }
    train, test = states
    recipe, x = Recipe(configs[architecture](), lr=4e-3), test.rows(test.content)
    found = {}
    for device in ("cpu", "cuda"):
        trained = train_dictionary("dictionary", recipe, train, SETTINGS, tmp_path / device, device=device)
        assert trained.sae.device.type == device
        found[device] = evaluate_dictionary(trained.sae, x)
    cpu, cuda = found["cpu"], found["cuda"]
    assert cuda.explained_variance == pytest.approx(cpu.explained_variance, abs=0.02)
    assert cuda.code.l0 == pytest.approx(cpu.code.l0, rel=0.1)
    assert cuda.optimized.explained_variance == pytest.approx(cpu.optimized.explained_variance, abs=0.02)


def test_interrupted_training_goes_on_and_ends_the_same(bae_config, states, tmp_path, monkeypatch):
    recipe = Recipe(bae_config(target_l0=8.0, entropy_start_step=10), lr=4e-3)
    whole = train_dictionary("bae", recipe, states[0], SETTINGS, tmp_path / "whole", device="cuda").sae
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    step = trainer._Run._step

    def stop_at_20(self, batch, tracked_run):
        if self.trainer.n_training_steps == 20:
            raise KeyboardInterrupt
        step(self, batch, tracked_run)

    monkeypatch.setattr(trainer._Run, "_step", stop_at_20)
    with pytest.raises(KeyboardInterrupt):
        train_dictionary("bae", recipe, states[0], SETTINGS, tmp_path / "parts", device="cuda")
    monkeypatch.setattr(trainer._Run, "_step", step)
    resumed = train_dictionary("bae", recipe, states[0], SETTINGS, tmp_path / "parts", device="cuda").sae
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)


def test_known_entropy_is_found_on_a_gpu():
    known = random_directions(8192, rank=8, d=32, generator=torch.Generator().manual_seed(0))
    vectors = known.vectors.cuda()
    bae = fit_bae(vectors[:6144], d_sae=64)
    assert bae.device.type == "cuda"
    estimate = estimate_entropy(bae, vectors[6144:])
    assert estimate.bits == pytest.approx(8.0, abs=0.05)
    assert estimate.explained_variance > 0.999
