from collections.abc import Callable
from typing import Any

import pytest
import torch
import wandb
from sae_lens import SAE, LoggingConfig, Transcoder
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

from bae_lens import (
    BAE,
    TrainingBAEConfig,
    TrainingTranscoderConfig,
    TranscoderTrainingRunner,
    run_evals,
)
from bae_lens.saes.transcoder import hooks_of
from bae_lens.training import transcoder_runner

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = 64
HOOK = "blocks.0.hook_resid_post"
MLP = ("blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out")  # affine
DEEPER = ("blocks.0.hook_resid_pre", "blocks.1.mlp.hook_post")


@pytest.fixture
def runner(tiny_model: Any, tiny_dataset: Any) -> Callable[..., TranscoderTrainingRunner]:
    """Makes a runner of 20 steps on the tiny model: a BAE and a transcoder through the first MLP's last matrix."""

    def make(hooks: tuple[str, str] = MLP, d_in: int = 32, d_out: int = 16, **overrides: Any) -> Any:
        cfg = MultiSAETrainingRunnerConfig(
            **{
                "saes": {
                    "bae": TrainingBAEConfig(d_in=16, d_sae=64, encoder_bias_init=0.0),
                    "transcoder": TrainingTranscoderConfig(d_in=d_in, d_sae=80, d_out=d_out, l1_coefficient=0.001),
                },
                "hook_names": {"bae": HOOK, "transcoder": "=>".join(hooks)},
                "context_size": 16,
                "training_tokens": 20 * BATCH,
                "train_batch_size_tokens": BATCH,
                "store_batch_size_prompts": 8,
                "n_batches_in_buffer": 4,
                "n_batches_for_norm_estimate": 5,
                "lr": 1e-2,
                "lr_end": 1e-2,
                "model_from_pretrained_kwargs": {},
                "checkpoint_path": None,
                "output_path": None,
                "exclude_special_tokens": True,
                "n_eval_batches": 2,
                "eval_batch_size_prompts": 4,
                "logger": LoggingConfig(log_to_wandb=False),
                **overrides,
            }
        )
        return TranscoderTrainingRunner(cfg, override_model=tiny_model, override_dataset=tiny_dataset)

    return make


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.Tensor]]:
    """The batches of every training step from now on, by architecture."""
    seen: dict[str, list[torch.Tensor]] = {}
    step = SAETrainer.step

    def recorded(self: Any, batch: torch.Tensor) -> Any:
        seen.setdefault(self.sae.cfg.architecture(), []).append(batch.clone())
        return step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", recorded)
    return seen


def test_a_transcoder_and_a_bae_train_together_and_load(runner, tmp_path, tiny_model):
    saes = runner(training_tokens=120 * BATCH, lr=3e-2, lr_end=3e-2, output_path=str(tmp_path)).run()

    transcoder = SAE.load_from_disk(next(tmp_path.rglob("transcoder")))
    bae = SAE.load_from_disk(next(tmp_path.rglob("bae")))
    assert (type(transcoder), type(bae)) == (Transcoder, BAE)
    assert hooks_of(transcoder) == MLP
    assert hooks_of(bae) == (HOOK, HOOK)
    tokens = torch.randint(4, 64, (20, 16))
    _, cache = tiny_model.run_with_cache(tokens)
    x, y = (cache[hook].flatten(0, 1) for hook in MLP)
    torch.testing.assert_close(transcoder(x), saes["transcoder"](x))
    assert bae.encode(cache[HOOK]).equal(saes["bae"].encode(cache[HOOK]))
    torch.testing.assert_close(bae(cache[HOOK]), saes["bae"](cache[HOOK]))
    # The map is affine: with its rows aligned, it is learnt nearly exactly.
    assert 1 - (transcoder(x) - y).square().sum() / (y - y.mean(0)).square().sum() > 0.95
    plain = tiny_model(tokens)
    assert not torch.allclose(tiny_model.run_with_saes(tokens, saes=[transcoder]), plain)


def test_every_row_holds_both_hooks_of_one_token(runner, steps, tiny_model):
    runner().run()
    rows = torch.cat(steps["transcoder"])
    assert rows.shape == (20 * BATCH, 32 + 16)
    mlp = tiny_model.blocks[0].mlp
    torch.testing.assert_close(rows[:, 32:], rows[:, :32] @ mlp.W_out + mlp.b_out, rtol=1e-4, atol=1e-4)
    assert rows[:, 32:].std() > 0.01
    assert torch.cat(steps["bae"]).shape == (20 * BATCH, 16)


def test_output_may_be_deeper_than_every_other_hook(runner, steps, tiny_model):
    runner(DEEPER, d_in=16, d_out=32).run()
    x, y = torch.cat(steps["transcoder"]).split([16, 32], dim=-1)
    tokens = torch.randint(4, 64, (4, 16))
    _, cache = tiny_model.run_with_cache(tokens)
    assert y.std() == pytest.approx(cache[DEEPER[1]].std().item(), rel=0.2)
    assert x.std() == pytest.approx(cache[DEEPER[0]].std().item(), rel=0.2)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("hooks", [("blocks.0.mlp.hook_im", MLP[1]), (MLP[0], "blocks.9.hook_mlp_out")])
def test_hook_that_does_not_exist_is_refused_before_training(runner, steps, hooks):
    with pytest.raises(ValueError, match=r"the model has no hook 'blocks.*'; near ones: .*blocks"):
        runner(hooks)
    assert not steps


def test_runs_without_a_transcoder_and_with_prefetching(runner, steps):
    saes = {"bae": TrainingBAEConfig(d_in=16, d_sae=64)}
    runner(saes=saes, hook_names=HOOK, prefetch_llm_batches=True).run()
    assert len(steps["bae"]) == 20


def test_resumes_from_its_checkpoint(runner, steps, tmp_path, monkeypatch):
    runner(n_checkpoints=1, checkpoint_path=str(tmp_path)).run()
    checkpoint = next(path.parent for path in tmp_path.rglob("activations_store_state.safetensors"))
    done = int(checkpoint.name) // BATCH
    saved = load_file(next(path for path in checkpoint.rglob("sae_weights.safetensors") if "transcoder" in str(path)))
    steps.clear()
    step, first = SAETrainer.step, []

    def recorded(self: Any, batch: torch.Tensor) -> Any:
        if self.sae.cfg.architecture() == "transcoder":
            first.append(self.sae.W_dec.detach().clone())
        return step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", recorded)
    runner(resume_from_checkpoint=str(checkpoint)).run()

    assert 0 < done < 20
    assert len(steps["transcoder"]) == len(steps["bae"]) == 20 - done
    assert first[0].equal(saved["W_dec"])


def test_evaluator_measures_each_with_evals_that_are_right_for_it(runner, monkeypatch, tiny_model):
    def width(sae: Any, data: Any, scaler: ActivationScaler) -> dict[str, Any]:  # noqa: ARG001
        return {"width": next(iter(data)).shape[-1]}

    made = runner(evaluator=width)
    saes = made.run()
    monkeypatch.setattr(transcoder_runner, "run_evals", recorded := Recorded(run_evals))
    scalers = {name: ActivationScaler() for name in saes}
    provider = made.activations_store.get_multi_hook_data_loader()
    results = made.evaluator(saes, provider, scalers, made.cfg.hook_names_per_sae)

    assert (results["bae/width"], results["transcoder/width"]) == (16, 48)
    for name, sae in saes.items():
        arguments = recorded.calls[name == "transcoder"]
        assert arguments[0] is sae
        assert arguments[2] is tiny_model
        assert arguments[4].n_eval_sparsity_variance_batches == 2
        assert set(arguments[6]) == {0, 1, 2}
        assert {f"{name}/{group}" for group in recorded.results[name == "transcoder"][0]} <= results.keys()
    quality = results["transcoder/reconstruction_quality"]
    assert 0 < quality["explained_variance"] < 1
    assert "ce_loss_with_sae" in results["transcoder/model_performance_preservation"]
    assert results["bae/code"]["n_tokens"] > 0


class Recorded:
    """A function that remembers its arguments and results."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls: list[Any] = []
        self.results: list[Any] = []

    def __call__(self, *args: Any) -> Any:
        self.calls.append(args)
        self.results.append(self.function(*args))
        return self.results[-1]


@pytest.mark.parametrize("prefetch", [False, True])
def test_evals_are_logged_while_training(runner, monkeypatch, prefetch):
    logged: list[dict[str, Any]] = []
    for name in ("init", "finish"):
        monkeypatch.setattr(wandb, name, lambda *_, **__: None)
    monkeypatch.setattr(wandb, "log", lambda values, **_: logged.append(values))
    logger = LoggingConfig(
        log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=10, log_weights_to_wandb=False
    )
    runner(logger=logger, prefetch_llm_batches=prefetch).run()
    evals = [values for values in logged if any("reconstruction_quality" in str(key) for key in values)]
    assert len(evals) == 2
    assert any("transcoder" in str(key) for key in evals[0])
