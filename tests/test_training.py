import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, HookedSAETransformer, TopKTrainingSAEConfig
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from bae_lens import BAE
from bae_lens.harvest import ContextSettings, HiddenStates, choose_contexts, harvest
from bae_lens.training import TrainingSettings, train_dictionary

SETTINGS = TrainingSettings(training_tokens=32 * 40, batch_size=32)
HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def states(
    tiny_model: HookedSAETransformer, tiny_tokenizer: PreTrainedTokenizerFast, tiny_dataset: Dataset, tmp_path: Path
) -> HiddenStates:
    settings = ContextSettings(context_size=16, harvest_tokens=600, held_out_tokens=15)
    return harvest(tiny_model, choose_contexts(tiny_tokenizer, tiny_dataset, settings)[0], HOOK, tmp_path / "states")


@pytest.fixture
def cfg(bae_config: Any) -> Any:
    return bae_config(target_l0=8.0, entropy_start_step=10)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "dictionaries" / "bae" / "sae_weights.safetensors")


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Runs `action` while the batch of that step is being fetched."""
    shuffled = HiddenStates.shuffled

    def interrupted(self, batch_size, seed, start_step=0):
        for index, batch in enumerate(shuffled(self, batch_size, seed, start_step), start_step):
            if index == step:
                action()
            yield batch

    monkeypatch.setattr(HiddenStates, "shuffled", interrupted)


def test_dictionary_learns_and_loads_as_any_sae_for_raw_hidden_states(states, cfg, tmp_path):
    metadata = {"hook_name": HOOK, "model_name": "tiny"}
    trained = train_dictionary("bae", cfg, states, SETTINGS, tmp_path, lr=4e-3, metadata=metadata)
    losses = [point["mse_loss"] for point in trained.curve]
    assert [point["step"] for point in trained.curve] == list(range(40))
    assert losses[-1] < 0.8 * losses[0]
    assert trained.seconds > 0
    sae = SAE.load_from_disk(tmp_path / "dictionaries" / "bae")
    assert isinstance(sae, BAE)
    assert sae.cfg.metadata.hook_name == HOOK
    x = states.rows(states.content)
    error = (sae(x) - x).square().sum() * states.standardisation.scale**2 / len(x)
    assert error.item() == pytest.approx(losses[-1], rel=0.2)


def test_same_seed_trains_the_same_dictionary_and_another_seed_another(states, cfg, tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_dictionary("bae", cfg, states, SETTINGS, tmp_path / folder, lr=1e-3, seed=seed)
    a, b, c = (weights(tmp_path / folder) for folder in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["W_enc"], c["W_enc"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(states, cfg, tmp_path, monkeypatch, number):
    whole = train_dictionary("bae", cfg, states, SETTINGS, tmp_path / "whole", lr=1e-3)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 23, lambda: os.kill(os.getpid(), number))
        with pytest.raises(KeyboardInterrupt):
            train_dictionary("bae", cfg, states, SETTINGS, tmp_path / "cut", lr=1e-3)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints" / "bae").iterdir()] == ["00000024"]
    resumed = train_dictionary("bae", cfg, states, SETTINGS, tmp_path / "cut", lr=1e-3)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed.curve == whole.curve
    assert not (tmp_path / "cut" / "checkpoints" / "bae").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_killed_training_goes_on_from_the_last_timed_checkpoint(states, cfg, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    whole = train_dictionary("bae", cfg, states, SETTINGS, tmp_path / "whole", lr=1e-3)
    monkeypatch.setattr("bae_lens.training.CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 15, kill)
        with pytest.raises(Killed):
            train_dictionary("bae", cfg, states, SETTINGS, tmp_path / "cut", lr=1e-3)
    (tmp_path / "cut" / "checkpoints" / "bae" / "00000016.partial").mkdir()
    steps = []
    interrupt_at(monkeypatch, 15, lambda: steps.append("resumed at 15"))
    assert train_dictionary("bae", cfg, states, SETTINGS, tmp_path / "cut", lr=1e-3).curve == whole.curve
    assert steps == ["resumed at 15"]


def test_finished_dictionary_is_not_trained_again(states, cfg, tmp_path, monkeypatch):
    first = train_dictionary("bae", cfg, states, SETTINGS, tmp_path, lr=1e-3)
    interrupt_at(monkeypatch, 0, lambda: pytest.fail("trained again"))
    assert train_dictionary("bae", cfg, states, SETTINGS, tmp_path, lr=1e-3).curve == first.curve


def test_corrupt_checkpoint_is_refused_with_the_remedy(states, cfg, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_dictionary("bae", cfg, states, SETTINGS, tmp_path, lr=1e-3)
    checkpoint = tmp_path / "checkpoints" / "bae" / "00000006"
    (checkpoint / "sae_weights.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"00000006 cannot be read .* remove it to start over"):
        train_dictionary("bae", cfg, states, SETTINGS, tmp_path, lr=1e-3)


def test_topk_revives_dead_features_within_a_short_run(states, tmp_path):
    cfg = TopKTrainingSAEConfig(d_in=16, d_sae=256, k=2)
    curve = train_dictionary("topk", cfg, states, SETTINGS, tmp_path, lr=1e-3).curve
    assert any(point["auxiliary_reconstruction_loss"] > 0 for point in curve)


def test_learning_rate_falls_to_zero_at_the_end(states, cfg, tmp_path, monkeypatch):
    from sae_lens.training.sae_trainer import SAETrainer

    step, rates = SAETrainer.step, []

    def recorded(self, batch):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", recorded)
    train_dictionary("bae", cfg, states, SETTINGS, tmp_path, lr=1e-3)
    assert rates[:32] == [1e-3] * 32
    assert rates[-1] == pytest.approx(1e-3 / 8)


def test_wrong_width_is_refused(states, bae_config, tmp_path):
    with pytest.raises(ValueError, match="bae has d_in 17, but the hidden states are 16 wide"):
        train_dictionary("bae", bae_config(d_in=17), states, SETTINGS, tmp_path, lr=1e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"training_tokens": 100}, r"training_tokens must be at least a batch \(512\), got 100"),
        ({"lr_decay": 1.0}, r"lr_decay must lie in \[0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**values)
