import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jaxtyping
import pytest
import torch
from sae_lens import (
    SAE,
    MatchingPursuitTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    Transcoder,
)
from safetensors.torch import load_file

from bae_lens import (
    BAE,
    TrainingBinaryTranscoderConfig,
    TrainingTopKTranscoderConfig,
    TrainingTranscoderConfig,
)
from bae_lens.activations import batch_order, cache
from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.cache_writer import cache_activations
from bae_lens.functional.sparse_matmul import SparseProducts
from bae_lens.saes.running_standardization import RunningStandardization
from bae_lens.training import trainer
from bae_lens.training.recipe import Recipe, TrainingSettings
from bae_lens.training.trainer import train_dictionary

SETTINGS = TrainingSettings(training_tokens=32 * 40, batch_size=32)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def states(states: Any) -> CachedActivations:
    return states[0]


@pytest.fixture
def recipe(bae_config: Any) -> Recipe:
    return Recipe(bae_config(target_l0=8.0, entropy_start_step=10), lr=4e-3)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "dictionaries" / "bae" / "sae_weights.safetensors")


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Runs `action` while the batch of that step is being fetched."""
    shuffled = CachedActivations.shuffled

    def interrupted(self, batch_size, seed, start_step=0, device="cpu"):
        for index, batch in enumerate(shuffled(self, batch_size, seed, start_step, device), start_step):
            if index == step:
                action()
            yield batch

    monkeypatch.setattr(CachedActivations, "shuffled", interrupted)


def test_dictionary_learns_and_loads_as_any_sae_for_raw_hidden_states(states, recipe, tmp_path):
    metadata = {"model_name": "tiny"}
    trained = train_dictionary("bae", recipe, states, SETTINGS, tmp_path, metadata=metadata)
    losses = [point["mse_loss"] for point in trained.curve]
    assert [point["step"] for point in trained.curve] == list(range(40))
    assert trained.curve[0]["entropy_coefficient"] == 0
    assert trained.curve[-1]["entropy_coefficient"] > 0
    assert 0 < trained.curve[-1]["l0"] < 64
    assert losses[-1] < 0.8 * losses[0]
    assert trained.seconds > 0
    sae = SAE.load_from_disk(tmp_path / "dictionaries" / "bae")
    assert isinstance(sae, BAE)
    assert (sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name) == (states.hook_name, "tiny")
    x = states.rows(states.content)
    error = (sae(x) - x).square().sum() * states.standardization.scale**2 / len(x)
    assert error.item() == pytest.approx(losses[-1], rel=0.2)


def test_same_seed_trains_the_same_dictionary_and_another_seed_another(states, recipe, tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_dictionary("bae", recipe, states, SETTINGS, tmp_path / folder, seed=seed)
    a, b, c = (weights(tmp_path / folder) for folder in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["W_enc"], c["W_enc"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_ends_with_the_weights_of_a_whole_one(states, recipe, tmp_path, monkeypatch, number):
    handler = signal.getsignal(number)
    whole = train_dictionary("bae", recipe, states, SETTINGS, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 23, lambda: os.kill(os.getpid(), number))
        with pytest.raises(KeyboardInterrupt):
            train_dictionary("bae", recipe, states, SETTINGS, tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut" / "checkpoints" / "bae").iterdir()] == ["00000024"]
    resumed = train_dictionary("bae", recipe, states, SETTINGS, tmp_path / "cut")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed.curve == whole.curve
    assert not (tmp_path / "cut" / "checkpoints" / "bae").exists()
    assert signal.getsignal(number) is handler


def test_killed_training_goes_on_from_the_last_timed_checkpoint(states, recipe, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    whole = train_dictionary("bae", recipe, states, SETTINGS, tmp_path / "whole")
    monkeypatch.setattr("bae_lens.training.trainer.CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 15, kill)
        with pytest.raises(Killed):
            train_dictionary("bae", recipe, states, SETTINGS, tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "bae" / "00000016.partial").mkdir()
    steps = []
    interrupt_at(monkeypatch, 15, lambda: steps.append("resumed at 15"))
    assert train_dictionary("bae", recipe, states, SETTINGS, tmp_path / "cut").curve == whole.curve
    assert steps == ["resumed at 15"]


def test_finished_dictionary_is_not_trained_again(states, recipe, tmp_path, monkeypatch):
    first = train_dictionary("bae", recipe, states, SETTINGS, tmp_path)
    interrupt_at(monkeypatch, 0, lambda: pytest.fail("trained again"))
    assert train_dictionary("bae", recipe, states, SETTINGS, tmp_path).curve == first.curve


def test_finished_dictionary_of_another_recipe_is_not_taken_for_this_one(states, recipe, tmp_path):
    train_dictionary("bae", recipe, states, SETTINGS, tmp_path)
    for other, seed in (
        (Recipe(recipe.cfg, lr=1e-3), 0),
        (Recipe(replace(recipe.cfg, d_sae=32), recipe.lr), 0),
        (recipe, 1),
    ):
        with pytest.raises(ValueError, match=r"something else \((recipe.lr|recipe.d_sae|seed): .* there, .* now\)"):
            train_dictionary("bae", other, states, SETTINGS, tmp_path, seed=seed)


def test_finished_dictionary_of_other_activations_is_not_taken_for_one_of_these(states, recipe, tmp_path):
    train_dictionary("bae", recipe, states, SETTINGS, tmp_path)
    states.identity = {**states.identity, "model": "another"}
    with pytest.raises(ValueError, match=r"something else \(activations.model: '\w{16}' there, 'another' now\)"):
        train_dictionary("bae", recipe, states, SETTINGS, tmp_path)


def test_checkpoints_that_a_kill_left_beside_a_finished_dictionary_are_removed(states, recipe, tmp_path):
    train_dictionary("bae", recipe, states, SETTINGS, tmp_path)
    left = tmp_path / "checkpoints" / "bae" / "00000031"
    left.mkdir(parents=True)
    (left / "trainer_state.pt").write_bytes(b"much")
    train_dictionary("bae", recipe, states, SETTINGS, tmp_path)
    assert not (tmp_path / "checkpoints" / "bae").exists()


def test_dictionary_may_be_named_as_if_it_were_part_of_another(states, recipe, tmp_path):
    for name in ("X.partial", "X", "X.partial"):
        train_dictionary(name, recipe, states, SETTINGS, tmp_path)
    assert sorted(path.name for path in (tmp_path / "dictionaries").iterdir()) == ["X", "X.partial"]


def test_checkpoint_of_another_recipe_is_not_taken_for_this_one(states, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_dictionary("bae", recipe, states, SETTINGS, tmp_path)
    with pytest.raises(ValueError, match=r"holds something else \(recipe.d_sae: 64 there, 32 now\)"):
        train_dictionary("bae", Recipe(replace(recipe.cfg, d_sae=32), recipe.lr), states, SETTINGS, tmp_path)


@pytest.mark.parametrize("damaged", ["sae_weights.safetensors", "trainer_state.pt", "training.json"])
def test_corrupt_checkpoint_is_refused_with_the_remedy(states, recipe, tmp_path, monkeypatch, damaged):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_dictionary("bae", recipe, states, SETTINGS, tmp_path)
    checkpoint = tmp_path / "checkpoints" / "bae" / "00000006"
    (checkpoint / damaged).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"00000006.* cannot be read .* to start over"):
        train_dictionary("bae", recipe, states, SETTINGS, tmp_path)


def test_topk_revives_dead_features_within_a_short_run(states, tmp_path):
    recipe = Recipe(TopKTrainingSAEConfig(d_in=16, d_sae=256, k=2), lr=1e-3)
    curve = train_dictionary("topk", recipe, states, SETTINGS, tmp_path).curve
    assert any(point["auxiliary_reconstruction_loss"] > 0 for point in curve)


def test_learning_rate_falls_to_zero_at_the_end(states, recipe, tmp_path, monkeypatch):
    from sae_lens.training.sae_trainer import SAETrainer

    step, rates = SAETrainer.step, []

    def recorded(self, batch):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", recorded)
    train_dictionary("bae", recipe, states, SETTINGS, tmp_path)
    assert rates[:32] == [4e-3] * 32
    assert rates[-1] == pytest.approx(4e-3 / 8)


def test_wrong_width_is_refused(states, bae_config, tmp_path):
    with pytest.raises(ValueError, match=r"bae has d_in 17, but the activations at blocks.0.hook_resid_post are 16"):
        train_dictionary("bae", Recipe(bae_config(d_in=17), lr=1e-3), states, SETTINGS, tmp_path)


def test_transcoder_reads_one_hook_and_writes_another_with_raw_hidden_states(pairs, tmp_path):
    cfg = TrainingTranscoderConfig(d_in=16, d_sae=64, d_out=32, l1_coefficient=0.1)
    settings = TrainingSettings(training_tokens=32 * 200, batch_size=32)
    trained = train_dictionary("tc", Recipe(cfg, lr=1e-2), pairs, settings, tmp_path, metadata={"model_name": "tiny"})
    assert trained.curve[-1]["mse_loss"] < 0.3 * trained.curve[0]["mse_loss"]
    sae = SAE.load_from_disk(tmp_path / "dictionaries" / "tc")
    assert type(sae) is Transcoder
    metadata = sae.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out) == ("blocks.1.mlp.hook_in", "blocks.1.mlp.hook_post")
    x, y = (side.rows(side.content) for side in (pairs.source, pairs.target))
    error = (sae(x) - y).square().sum() * pairs.target.standardization.scale**2 / len(x)
    assert error.item() == pytest.approx(trained.curve[-1]["mse_loss"], rel=0.2)


@pytest.mark.parametrize(
    "config",
    [
        TrainingTopKTranscoderConfig(d_in=16, d_sae=64, d_out=32, k=4),
        TrainingBinaryTranscoderConfig(d_in=16, d_sae=64, d_out=32, target_l0=8.0, entropy_start_step=10),
    ],
    ids=["topk", "binary"],
)
def test_interrupted_transcoder_ends_with_the_weights_of_a_whole_one(pairs, tmp_path, monkeypatch, config):
    recipe = Recipe(config, lr=4e-3)
    whole = train_dictionary("bae", recipe, pairs, SETTINGS, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 23, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_dictionary("bae", recipe, pairs, SETTINGS, tmp_path / "cut")
    resumed = train_dictionary("bae", recipe, pairs, SETTINGS, tmp_path / "cut")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed.curve == whole.curve


def test_number_of_hooks_must_be_the_architectures(states, pairs, bae_config, tmp_path):
    transcoder = Recipe(TrainingTranscoderConfig(d_in=16, d_sae=64, d_out=32), lr=1e-3)
    with pytest.raises(ValueError, match=r"tc is a transcoder and is trained on two hooks, got blocks.0.hook_resid_p"):
        train_dictionary("tc", transcoder, states, SETTINGS, tmp_path)
    with pytest.raises(ValueError, match=r"bae is no transcoder .* on one hook, got blocks.1.mlp.hook_in, blocks.1.ml"):
        train_dictionary("bae", Recipe(bae_config(), lr=1e-3), pairs, SETTINGS, tmp_path)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"d_in": 17, "d_out": 32}, r"tc has d_in 17, but the activations at blocks.1.mlp.hook_in are 16 wide"),
        ({"d_in": 16, "d_out": 16}, r"tc has d_out 16, but the activations at blocks.1.mlp.hook_post are 32 wide"),
    ],
)
def test_wrong_width_of_a_transcoder_names_the_side(pairs, tmp_path, widths, message):
    recipe = Recipe(TrainingTranscoderConfig(d_sae=64, **widths), lr=1e-3)
    with pytest.raises(ValueError, match=message):
        train_dictionary("tc", recipe, pairs, SETTINGS, tmp_path)


def test_heads_are_trained_concatenated_and_saved_to_be_taken_apart(tiny_model, states, bae_config, tmp_path):
    hook = "blocks.0.attn.hook_z"
    z = cache_activations(tiny_model, states.contexts, [hook], tmp_path / "z")[hook]
    trained = train_dictionary("bae", Recipe(bae_config(), lr=4e-3), z, SETTINGS, tmp_path)
    sae = SAE.load_from_disk(tmp_path / "dictionaries" / "bae")
    tokens = states.contexts.tokens[:2].clamp(min=0)
    _, cache = tiny_model.run_with_cache_with_saes(tokens, saes=[sae])
    code = cache[f"{hook}.hook_sae_acts_post"]
    assert torch.equal(code.flatten(0, 1), trained.sae.encode(z.rows(torch.arange(32))))


def test_architecture_that_cannot_be_standardized_is_refused_before_training(states, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 0, lambda: pytest.fail("trained"))
    recipe = Recipe(MatchingPursuitTrainingSAEConfig(d_in=16, d_sae=64, decoder_init_norm=1.0), lr=1e-3)
    with pytest.raises(ValueError, match="a matching_pursuit dictionary cannot absorb the standardization"):
        train_dictionary("mp", recipe, states, SETTINGS, tmp_path)


def test_standardized_states_are_not_standardized_again(bae_config, states, tmp_path, monkeypatch):
    cfg = bae_config(target_l0=8.0)
    assert cfg.standardizes
    recipe, found = Recipe(cfg, lr=4e-3), []
    monkeypatch.setattr(RunningStandardization, "find", lambda _, *batch: found.append(batch))

    train_dictionary("bae", recipe, states, SETTINGS, tmp_path)

    assert not found
    assert recipe.to_dict()["standardize_activations"] is False
    assert cfg.standardizes  # as it was


def test_checkpoints_that_a_kill_left_after_the_end_are_removed(recipe, states, tmp_path):
    train_dictionary("bae", recipe, states, SETTINGS, tmp_path)
    left = tmp_path / "checkpoints" / "bae" / "00000030"
    left.mkdir(parents=True)
    train_dictionary("bae", recipe, states, SETTINGS, tmp_path)
    assert not left.parent.exists()


def test_report_of_another_version_is_refused(recipe, states, tmp_path):
    train_dictionary("bae", recipe, states, SETTINGS, tmp_path)
    path = tmp_path / "dictionaries" / "bae" / "training.json"
    path.write_text(path.read_text().replace('"memory_gib"', '"peak_memory"'))
    with pytest.raises(ValueError, match=r"training.json is no TrainingReport of this version .*memory_gib: Field req"):
        train_dictionary("bae", recipe, states, SETTINGS, tmp_path)


def test_sums_of_rows_train_to_the_weights_of_dense_products(states, tmp_path, monkeypatch):
    recipe = Recipe(TopKTrainingSAEConfig(d_in=16, d_sae=128, k=4), lr=1e-3)
    settings = TrainingSettings(training_tokens=32 * 8, batch_size=32)
    entered = []
    enter = SparseProducts.__enter__
    monkeypatch.setattr(SparseProducts, "__enter__", lambda self: entered.append(self) or enter(self))
    sums = train_dictionary("sums", recipe, states, settings, tmp_path).sae
    assert len(entered) == 8
    monkeypatch.setattr(trainer, "SparseProducts", nullcontext)
    dense = train_dictionary("dense", recipe, states, settings, tmp_path).sae
    for name, weight in dense.state_dict().items():
        torch.testing.assert_close(sums.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def test_a_run_in_another_order_of_the_batches_does_not_go_on(states, recipe, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 9, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train_dictionary("bae", recipe, states, SETTINGS, tmp_path)
    monkeypatch.setattr(cache, "BLOCK_ROWS", 16)
    monkeypatch.setattr(batch_order, "WINDOW_BLOCKS", 4)
    with pytest.raises(ValueError, match=r"order: nothing there, 'windows of .*' now.*choose another folder"):
        train_dictionary("bae", recipe, states, SETTINGS, tmp_path)


@pytest.mark.parametrize("kind", ["bae", "topk", "transcoder"])
def test_weights_below_float32_are_saved_where_they_absorb_standardization(kind, states, pairs, bae_config, tmp_path):
    on = pairs if kind == "transcoder" else states
    trained = {}
    for dtype in ("float32", "bfloat16"):
        cfg = {
            "bae": lambda dtype=dtype: bae_config(target_l0=8.0, dtype=dtype),
            "topk": lambda dtype=dtype: TopKTrainingSAEConfig(d_in=16, d_sae=64, k=8, dtype=dtype),
            "transcoder": lambda dtype=dtype: TrainingBinaryTranscoderConfig(d_in=16, d_sae=64, d_out=32, dtype=dtype),
        }[kind]()
        trained[dtype] = train_dictionary("d", Recipe(cfg, lr=4e-3), on, SETTINGS, tmp_path / dtype)
    sae = SAE.load_from_disk(tmp_path / "bfloat16" / "dictionaries" / "d")
    assert {weights.dtype for weights in sae.state_dict().values()} == {torch.float32}
    assert sae.cfg.dtype == "float32"
    losses = [trained[dtype].curve[-1]["mse_loss"] for dtype in trained]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    if kind != "transcoder":
        x = states.rows(states.content) + 0.0
        error = (trained["bfloat16"].sae(x) - x).square().sum() * states.standardization.scale**2 / len(x)
        assert error.item() == pytest.approx(losses[1], rel=0.25)


def test_autocast_multiplies_in_bfloat16_and_keeps_weights_in_float32(states, recipe, tmp_path):
    plain = train_dictionary("bae", recipe, states, SETTINGS, tmp_path / "plain")
    cast = train_dictionary("bae", recipe, states, replace(SETTINGS, autocast=True), tmp_path / "cast")
    assert weights(tmp_path / "cast")["W_enc"].dtype == torch.float32
    losses = [trained.curve[-1]["mse_loss"] for trained in (plain, cast)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    with pytest.raises(ValueError, match=r"training.autocast: True there, nothing now"):
        train_dictionary("bae", recipe, states, SETTINGS, tmp_path / "cast")


@pytest.mark.filterwarnings("ignore:::torch")  # the compiler warns of its own ways
@pytest.mark.parametrize(
    ("kind", "compiled"),
    [
        ("bae", lambda forward: partial(forward)),
        pytest.param("topk", partial(torch.compile, backend="eager"), marks=pytest.mark.slow),
        pytest.param("standard", torch.compile, marks=pytest.mark.slow),
        pytest.param("bae", torch.compile, marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_end_with_the_weights_of_others_also_when_resumed(
    kind, compiled, states, recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks cannot be compiled
    others = {
        "topk": TopKTrainingSAEConfig(d_in=16, d_sae=64, k=6),
        "standard": StandardTrainingSAEConfig(d_in=16, d_sae=64, l1_coefficient=1.0),
    }
    recipe = Recipe(others[kind], lr=4e-3) if kind in others else recipe
    settings = TrainingSettings(training_tokens=32 * 12, batch_size=32)
    compiling = mock.Mock(side_effect=compiled)
    monkeypatch.setattr(torch, "compile", compiling)
    train_dictionary("bae", recipe, states, settings, tmp_path / "eager")
    assert compiling.call_count == 0
    settings = replace(settings, compile=True)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train_dictionary("bae", recipe, states, settings, tmp_path / "compiled")
    train_dictionary("bae", recipe, states, settings, tmp_path / "compiled")
    assert compiling.call_count == 2
    expected = weights(tmp_path / "eager")
    for name, found in weights(tmp_path / "compiled").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)
