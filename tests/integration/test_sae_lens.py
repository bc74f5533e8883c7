import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import datasets
import jaxtyping
import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    GatedTrainingSAEConfig,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.config import SAETrainerConfig
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
    eval_sae_on_synthetic_data,
    train_toy_sae,
)
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

from bae_lens import BAE, BAEConfig, TrainingBAE, TrainingBAEConfig

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[..., TrainingBAEConfig]

BATCH = 64
FOLDED = ("none", "expected_average_only_in", "covariance_whitening")
AT_RUN_TIME = ("layer_norm", "constant_norm_rescale")
HOOK = "blocks.1.hook_resid_pre"


def batches(start: int = 0, n_causes: int = 6, dtype: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
    """An endless stream of activations with binary causes and an offset; the batch depends on its number only."""
    directions = torch.randn(n_causes, 16, generator=torch.Generator().manual_seed(0))
    for number in itertools.count(start):
        generator = torch.Generator().manual_seed(1 + number)
        causes = (torch.rand(BATCH, n_causes, generator=generator) < 0.25).float()
        noise = 0.1 * torch.randn(BATCH, 16, generator=generator)
        yield (causes @ directions + noise + 0.5).to(dtype)


def trainer(sae: TrainingBAE, steps: int, data: Iterator[torch.Tensor] | None = None, **overrides: Any) -> SAETrainer:
    cfg = SAETrainerConfig(
        **{
            "total_training_samples": steps * BATCH,
            "train_batch_size_samples": BATCH,
            "lr": 1e-2,
            "lr_end": 1e-2,
            "n_batches_for_norm_estimate": 10,
            **overrides,
        }
    )
    return SAETrainer(cfg, sae, data or batches())


def state(sae: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in sae.state_dict().items()}


def assert_identical(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def reconstruction_loss(sae: SAE[Any], x: torch.Tensor) -> float:
    with torch.no_grad():
        return (sae(x) - x).square().sum(-1).mean().item()


@pytest.fixture
def runner_config(bae_config: Make) -> Callable[..., LanguageModelSAERunnerConfig[TrainingBAEConfig]]:
    """Makes the config of a run of 30 steps on the tiny model."""

    def make(**overrides: Any) -> LanguageModelSAERunnerConfig[TrainingBAEConfig]:
        return LanguageModelSAERunnerConfig(
            **{
                "sae": bae_config(encoder_bias_init=0.0),
                "hook_name": HOOK,
                "is_dataset_tokenized": False,
                "context_size": 16,
                "training_tokens": 30 * BATCH,
                "train_batch_size_tokens": BATCH,
                "store_batch_size_prompts": 8,
                "n_batches_in_buffer": 4,
                "feature_sampling_window": 1000,
                "dead_feature_window": 500,
                "n_batches_for_norm_estimate": 5,
                "lr": 1e-2,
                "model_from_pretrained_kwargs": {},
                "checkpoint_path": None,
                "output_path": None,
                "logger": LoggingConfig(log_to_wandb=False),
                **overrides,
            }
        )

    return make


@pytest.fixture
def tiny_bae() -> BAE:
    """A BAE with a random code for `HOOK` of the tiny model."""
    metadata = SAEMetadata(hook_name=HOOK, context_size=16, prepend_bos=True, model_name="tiny")
    bae = BAE(BAEConfig(d_in=16, d_sae=64, metadata=metadata))
    bae.prior.uniform_()
    return bae


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(4, 64, (3, 12))


class TestTrainer:
    def test_fit_lowers_the_loss_to_the_noise(self, bae_config):
        sae = TrainingBAE(bae_config(entropy_coefficient=0.01))
        held_out = next(batches(10_000))
        before = reconstruction_loss(sae, held_out)

        trainer(sae, 200, lr=3e-2, lr_end=3e-2).fit()

        assert reconstruction_loss(sae, held_out) < 0.1 * before
        assert 0 < sae.cfg.metadata["l0"] < 64

    @pytest.mark.parametrize("target_l0", [None, 4.0])
    @pytest.mark.parametrize("saved_after", [5, 10, 15])
    def test_resuming_gives_the_same_bits_as_never_stopping(self, bae_config, tmp_path, target_l0, saved_after):
        cfg = {"entropy_start_step": 10, "target_l0": target_l0, "covariance_coefficient": 0.01}
        uninterrupted = TrainingBAE(bae_config(**cfg))
        initial = state(uninterrupted)
        trainer(uninterrupted, 20).fit()

        interrupted = TrainingBAE(bae_config(**cfg))
        interrupted.load_state_dict(initial)
        checkpoint = {"save_final_checkpoint": True, "checkpoint_path": str(tmp_path)}
        trainer(interrupted, saved_after, **checkpoint).fit()

        resumed = TrainingBAE(bae_config(**cfg))
        second = trainer(resumed, 20, batches(saved_after))
        second.load_trainer_state(tmp_path / f"final_{saved_after * BATCH}")
        resumed.load_weights_from_checkpoint(tmp_path / f"final_{saved_after * BATCH}")
        second.fit()

        assert second.n_training_steps == 20
        assert_identical(state(resumed), state(uninterrupted))
        assert (resumed.entropy_multiplier != 1) == (target_l0 is not None)

    def test_resuming_from_a_checkpoint_in_the_middle_gives_the_same_bits(self, bae_config, tmp_path):
        cfg = {"entropy_start_step": 10, "target_l0": 4.0}
        uninterrupted = TrainingBAE(bae_config(**cfg))
        trainer(uninterrupted, 20, n_checkpoints=1, checkpoint_path=str(tmp_path)).fit()
        (checkpoint,) = tmp_path.iterdir()
        done = int(checkpoint.name) // BATCH
        assert 0 < done < 20

        resumed = TrainingBAE(bae_config(**cfg))
        second = trainer(resumed, 20, batches(done))
        second.load_trainer_state(checkpoint)
        resumed.load_weights_from_checkpoint(checkpoint)
        assert second.n_training_steps == done - 1  # SAETrainer saves this before it counts the step it has made
        second.n_training_steps = done
        second.fit()

        assert_identical(state(resumed), state(uninterrupted))

    @pytest.mark.parametrize("target_l0", [3.0, pytest.param(6.0, marks=pytest.mark.slow)])
    def test_target_l0_is_met(self, bae_config, target_l0):
        sae = TrainingBAE(bae_config(target_l0=target_l0, encoder_bias_init=-2.0, tangent_rate=0.03))

        trainer(sae, 1000, batches(n_causes=24)).fit()

        held_out = itertools.islice(batches(10_000, n_causes=24), 10)
        l0 = torch.cat([sae.encode(batch) for batch in held_out]).sum(-1).mean()
        assert l0.item() == pytest.approx(target_l0, rel=0.1)

    def test_autocast_trains_like_float32(self, bae_config):
        cfg = bae_config(covariance_coefficient=0.01)
        plain, autocast = TrainingBAE(cfg), TrainingBAE(cfg)
        autocast.load_state_dict(state(plain))

        losses = [trainer(plain, 1).step(next(batches())), trainer(autocast, 1, autocast=True).step(next(batches()))]

        assert losses[1].losses["entropy_loss"].dtype == losses[1].losses["covariance_loss"].dtype == torch.float32
        torch.testing.assert_close(losses[1].loss, losses[0].loss, rtol=0.02, atol=0)
        trainer(autocast, 100, autocast=True).fit()
        assert reconstruction_loss(autocast, next(batches(10_000))) < losses[0].losses["mse_loss"] / 2

    def test_bfloat16_weights_train_and_keep_float32_statistics(self, bae_config):
        sae = TrainingBAE(bae_config(dtype="bfloat16", target_l0=4.0, tangent_rate=0.03, covariance_coefficient=0.01))
        held_out = next(batches(10_000)).bfloat16()
        before = reconstruction_loss(sae, held_out)

        trainer(sae, 100, batches(dtype=torch.bfloat16)).fit()

        assert {parameter.dtype for parameter in sae.parameters()} == {torch.bfloat16}
        assert {buffer.dtype for buffer in sae.buffers()} == {torch.float32}
        assert reconstruction_loss(sae, held_out) < before / 2

    def test_optimizer_knows_every_parameter_that_is_trained(self, bae_config):
        sae = TrainingBAE(bae_config())
        before = state(sae)

        trainer(sae, 1).fit()

        assert {name for name, value in sae.named_parameters() if not value.equal(before[name])} == {
            "W_enc",
            "b_enc",
            "W_dec",
            "b_dec",
        }

    @pytest.mark.parametrize("apply_encoder_bias", [True, False])
    @pytest.mark.parametrize("mode", [*FOLDED, *AT_RUN_TIME])
    def test_every_normalization_trains_and_folds(self, bae_config, mode, apply_encoder_bias):
        bias = {"apply_encoder_bias": apply_encoder_bias, "encoder_bias_init": 0.0}
        sae = TrainingBAE(bae_config(normalize_activations=mode, entropy_coefficient=0.01, **bias))
        held_out = next(batches(10_000))
        variance = held_out.var(0).sum().item()

        trainer(sae, 150, lr=3e-2, lr_end=3e-2).fit()

        assert sae.cfg.normalize_activations == (mode if mode in AT_RUN_TIME else "none")
        assert reconstruction_loss(sae, held_out) < 0.3 * variance


class TestFolding:
    @pytest.fixture
    def sae(self, bae_config: Make) -> TrainingBAE:
        sae = TrainingBAE(bae_config(dtype="float64", apply_encoder_bias=False, encoder_bias_init=0.0))
        sae.b_dec.data.normal_()
        return sae

    def test_scaling_factor_is_exact(self, sae):
        x, scale = torch.randn(100, 16, dtype=torch.float64), 0.37
        code, output = sae.encode(x * scale), sae(x * scale) / scale

        sae.fold_activation_norm_scaling_factor(scale)

        assert sae.encode(x).equal(code)
        torch.testing.assert_close(sae(x), output, rtol=0, atol=1e-12)

    def test_whitening_is_exact_even_without_encoder_bias(self, sae):
        x = torch.randn(100, 16, dtype=torch.float64) @ torch.randn(16, 16, dtype=torch.float64) + 3
        scaler = ActivationScaler()
        scaler.estimate_whitening(16, iter([x]), n_batches_for_norm_estimate=1)
        code, output = sae.encode(scaler.scale(x)), scaler.unscale(sae(scaler.scale(x)))

        assert scaler.whitening is not None
        sae.fold_activation_whitening(scaler.whitening.mean, scaler.whitening.matrix, scaler.whitening.inverse_matrix)

        assert sae.encode(x).equal(code)
        torch.testing.assert_close(sae(x), output, rtol=0, atol=1e-12)


class TestSaving:
    @pytest.fixture
    def sae(self, bae_config: Make) -> TrainingBAE:
        sae = TrainingBAE(bae_config(target_l0=4.0))
        trainer(sae, 20).fit()
        return sae

    def test_inference_save_and_load_gives_the_same_dictionary(self, sae, tmp_path):
        sae.save_inference_model(tmp_path)
        bae, x = SAE.load_from_disk(tmp_path), next(batches(1000))

        assert type(bae) is BAE
        assert bae.encode(x).equal(sae.encode(x))
        torch.testing.assert_close(bae(x), sae(x))
        assert bae.prior.equal(sae.prior)
        assert bae.prior.max() > 0

    def test_to_inference_is_what_saving_and_loading_gives(self, sae, tmp_path):
        sae.save_inference_model(tmp_path)
        loaded, bae = BAE.load_from_disk(tmp_path), sae.to_inference()

        assert bae.cfg == loaded.cfg
        assert_identical(state(bae), state(loaded))

    def test_to_inference_shares_no_memory(self, sae):
        bae, before = sae.to_inference(), state(sae)

        for tensor in (*bae.parameters(), *bae.buffers()):
            tensor.data.zero_()

        assert_identical(state(sae), before)

    def test_bfloat16_keeps_the_code_and_a_float32_prior(self, bae_config, tmp_path):
        sae = TrainingBAE(bae_config(dtype="bfloat16"))
        trainer(sae, 20, batches(dtype=torch.bfloat16)).fit()
        x = next(batches(1000, dtype=torch.bfloat16))

        sae.save_inference_model(tmp_path)
        loaded, bae = BAE.load_from_disk(tmp_path), sae.to_inference()

        for other in (loaded, bae):
            assert other.dtype == other.W_enc.dtype == torch.bfloat16
            assert other.prior.dtype == torch.float32
            assert other.encode(x).equal(sae.encode(x))
            torch.testing.assert_close(other.prior, sae.prior, rtol=2**-8, atol=0)

    def test_training_continues_from_an_inference_save(self, sae, tmp_path):
        sae.save_inference_model(tmp_path)

        loaded = TrainingBAE.load_from_disk(tmp_path)

        assert type(loaded) is TrainingBAE
        assert loaded.entropy_multiplier == 1
        assert loaded.entropy_multiplier.device.type == "cpu"
        assert loaded.encode(next(batches())).equal(sae.encode(next(batches())))
        trainer(loaded, 2).fit()

    def test_checkpoint_keeps_every_statistic(self, sae, tmp_path):
        sae.save_model(tmp_path)

        loaded = TrainingSAE.load_from_disk(tmp_path)

        assert type(loaded) is TrainingBAE
        assert loaded.cfg == sae.cfg
        assert loaded.entropy_multiplier != 1
        assert_identical(state(loaded), state(sae))

    def test_folding_decoder_norms_while_loading_is_refused(self, sae, tmp_path):
        sae.save_inference_model(tmp_path)

        with pytest.raises(NotImplementedError, match="a binary code cannot absorb a scale"):
            SAE.load_from_disk(tmp_path, fold_W_dec_norm=True)


class TestRunners:
    def test_language_model_runner(self, runner_config, tiny_model, tiny_dataset, tmp_path):
        cfg = runner_config(output_path=str(tmp_path), training_tokens=60 * BATCH)
        x = activations(tiny_model, tiny_dataset)
        runner = LanguageModelSAETrainingRunner(cfg, override_model=tiny_model, override_dataset=tiny_dataset)
        before = reconstruction_loss(runner.sae, x)

        sae = runner.run()

        bae = SAE.load_from_disk(tmp_path)
        assert type(bae) is BAE
        assert bae.cfg.metadata.hook_name == HOOK
        torch.testing.assert_close(bae(x), sae(x))
        assert reconstruction_loss(bae, x) < before / 2

    def test_language_model_runner_resumes(self, runner_config, tiny_model, tiny_dataset, tmp_path, monkeypatch):
        cfg = runner_config(n_checkpoints=1, checkpoint_path=str(tmp_path))
        LanguageModelSAETrainingRunner(cfg, override_model=tiny_model, override_dataset=tiny_dataset).run()
        (checkpoint,) = tmp_path.glob("*/*")
        done = int(checkpoint.name) // BATCH
        step, priors = SAETrainer.step, []

        def recorded(self, batch):
            priors.append(self.sae.prior)
            return step(self, batch)

        monkeypatch.setattr(SAETrainer, "step", recorded)
        cfg = runner_config(resume_from_checkpoint=str(checkpoint))
        LanguageModelSAETrainingRunner(cfg, override_model=tiny_model, override_dataset=tiny_dataset).run()

        assert len(priors) == 30 - done > 0
        assert priors[0].equal(load_file(checkpoint / "sae_weights.safetensors")["prior"])

    def test_runs_next_to_other_architectures(self, bae_config, tiny_model, tiny_dataset, tmp_path):
        cfg = MultiSAETrainingRunnerConfig(
            saes={
                "bae": bae_config(encoder_bias_init=0.0, normalize_activations="expected_average_only_in"),
                "standard": StandardTrainingSAEConfig(d_in=16, d_sae=64),
                "topk": TopKTrainingSAEConfig(d_in=16, d_sae=64, k=8),
                "gated": GatedTrainingSAEConfig(d_in=16, d_sae=64),
            },
            hook_names=HOOK,
            context_size=16,
            training_tokens=30 * BATCH,
            train_batch_size_tokens=BATCH,
            store_batch_size_prompts=8,
            n_batches_in_buffer=4,
            n_batches_for_norm_estimate=5,
            lr=1e-2,
            model_from_pretrained_kwargs={},
            checkpoint_path=None,
            output_path=str(tmp_path),
            logger=LoggingConfig(log_to_wandb=False),
        )

        saes = MultiSAETrainingRunner(cfg, override_model=tiny_model, override_dataset=tiny_dataset).run()

        assert set(saes) == {"bae", "standard", "topk", "gated"}
        x = activations(tiny_model, tiny_dataset)
        bae = SAE.load_from_disk(next(tmp_path.rglob("bae")))
        assert type(bae) is BAE
        assert bae.encode(x).equal(saes["bae"].encode(x))
        assert reconstruction_loss(bae, x) < x.var(0).sum()

    def test_trains_from_cached_activations(self, runner_config, tiny_model_folder, tiny_dataset, tmp_path):
        hook = "model.layers.0"
        cache = CacheActivationsRunnerConfig(
            dataset_path="",
            model_name=str(tiny_model_folder),
            model_class_name="AutoModelForCausalLM",
            model_batch_size=8,
            hook_name=hook,
            d_in=16,
            training_tokens=64 * BATCH,
            context_size=16,
            new_cached_activations_path=str(tmp_path / "cache"),
            device="cpu",
            buffer_size_gb=16 * BATCH * 16 * 4 / 1e9,
        )
        CacheActivationsRunner(cache, override_dataset=tiny_dataset).run()
        cfg = runner_config(
            model_name=str(tiny_model_folder),
            model_class_name="AutoModelForCausalLM",
            hook_name=hook,
            use_cached_activations=True,
            cached_activations_path=str(tmp_path / "cache"),
        )

        rows: Any = datasets.load_from_disk(str(tmp_path / "cache")).with_format("torch")[:8]
        x = rows[hook].flatten(0, 1)
        runner = LanguageModelSAETrainingRunner(cfg, override_dataset=tiny_dataset)
        before = reconstruction_loss(runner.sae, x)

        assert reconstruction_loss(runner.run(), x) < before / 2

    @pytest.mark.filterwarnings("ignore:::torch")  # the compiler warns of its own ways
    @pytest.mark.parametrize("target_l0", [None, 4.0])
    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compiled_step_equals_the_eager_one(self, bae_config, backend, target_l0, monkeypatch):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks cannot be compiled
        cfg = bae_config(covariance_coefficient=0.01, target_l0=target_l0, entropy_start_step=1)
        eager, compiled = TrainingBAE(cfg), TrainingBAE(cfg)
        compiled.load_state_dict(state(eager))
        compiled.training_forward_pass = torch.compile(compiled.training_forward_pass, backend=backend)

        for number, x in enumerate(itertools.islice(batches(), 3)):
            step_input = TrainStepInput(x, {"entropy": 0.3, "covariance": 0.01}, None, number, False)
            outputs = [sae.training_forward_pass(step_input) for sae in (eager, compiled)]
            torch.testing.assert_close(outputs[1].losses, outputs[0].losses)
            outputs[0].loss.backward()
            outputs[1].loss.backward()

        for name, parameter in eager.named_parameters():
            torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(state(compiled), state(eager))

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:::torch")
    def test_runner_compiles_the_sae(self, runner_config, tiny_model, tiny_dataset, monkeypatch):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        cfg = runner_config(compile_sae=True, training_tokens=10 * BATCH)
        x = activations(tiny_model, tiny_dataset)
        compiled = mock.Mock(side_effect=torch.compile)
        monkeypatch.setattr(torch, "compile", compiled)
        runner = LanguageModelSAETrainingRunner(cfg, override_model=tiny_model, override_dataset=tiny_dataset)
        before = reconstruction_loss(runner.sae, x)

        assert reconstruction_loss(runner.run(), x) < before
        compiled.assert_called_once()

    def test_synthetic_runner(self, bae_config):
        cfg = SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(num_features=12, hidden_dim=16),
            sae=bae_config(encoder_bias_init=0.0),
            training_samples=200 * BATCH,
            batch_size=BATCH,
            lr=1e-2,
            checkpoint_path=None,
            output_path=None,
            eval_samples=1000,
            logger=LoggingConfig(log_to_wandb=False),
        )

        result = SyntheticSAERunner(cfg).run()

        assert type(result.sae) is TrainingBAE
        assert result.final_eval is not None
        assert 0 < result.final_eval.sae_l0 < 64

    def test_toy_sae_finds_synthetic_features(self, bae_config):
        features = FeatureDictionary(num_features=6, hidden_dim=16)
        generator = ActivationGenerator(num_features=6, firing_probabilities=0.3)
        sae = TrainingBAE(bae_config(d_sae=32, entropy_coefficient=0.01, covariance_coefficient=0.001))

        train_toy_sae(sae, features, generator, training_samples=300 * BATCH, batch_size=BATCH, lr=3e-2)
        result = eval_sae_on_synthetic_data(sae, features, generator, num_samples=1000)

        assert result.explained_variance > 0.95
        assert result.mcc > 0.95


def activations(model: HookedSAETransformer, dataset: Dataset) -> torch.Tensor:
    """What the model holds at `HOOK` for 64 texts, without the special token at the start."""
    _, cache = model.run_with_cache(dataset["text"][-64:], names_filter=HOOK)
    return cache[HOOK][:, 1:16].reshape(-1, 16)


class TestModels:
    def test_added_sae_replaces_the_activation(self, tiny_model, tiny_bae, tokens):
        expected = tiny_model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda x, hook: tiny_bae(x))])  # noqa: ARG005
        plain = tiny_model(tokens)

        tiny_model.add_sae(tiny_bae)

        torch.testing.assert_close(tiny_model(tokens), expected)
        assert not torch.allclose(expected, plain)
        tiny_model.reset_saes()
        assert tiny_model(tokens).equal(plain)

    def test_run_with_saes_equals_adding_it(self, tiny_model, tiny_bae, tokens):
        logits = tiny_model.run_with_saes(tokens, saes=[tiny_bae])

        tiny_model.add_sae(tiny_bae)

        assert logits.equal(tiny_model(tokens))

    def test_cache_holds_the_code(self, tiny_model, tiny_bae, tokens):
        x = tiny_model.run_with_cache(tokens)[1][HOOK]

        _, cache = tiny_model.run_with_cache_with_saes(tokens, saes=[tiny_bae])

        code = cache[f"{HOOK}.hook_sae_acts_post"]
        assert code.unique().tolist() == [0, 1]
        assert code.equal(tiny_bae.encode(x))
        assert cache[f"{HOOK}.hook_sae_acts_strength"].equal(tiny_bae.activation_strength(code))
        torch.testing.assert_close(cache[f"{HOOK}.hook_sae_acts_pre"], x @ tiny_bae.W_enc + tiny_bae.b_enc)
        torch.testing.assert_close(cache[f"{HOOK}.hook_sae_recons"], tiny_bae(x))

    def test_error_term_restores_the_model(self, tiny_model, tiny_bae, tokens):
        plain = tiny_model(tokens)

        with_error, cache = tiny_model.run_with_cache_with_saes(tokens, saes=[tiny_bae], use_error_term=True)

        torch.testing.assert_close(with_error, plain)
        assert cache[f"{HOOK}.hook_sae_acts_strength"].shape == (3, 12, 64)

    def test_listening_to_the_strength_changes_nothing(self, tiny_model, tiny_bae, tokens):
        heard = []

        def listen(strength: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
            heard.append(strength)
            return torch.zeros_like(strength)

        logits = tiny_model.run_with_hooks_with_saes(
            tokens, saes=[tiny_bae], fwd_hooks=[(f"{HOOK}.hook_sae_acts_strength", listen)]
        )

        assert [strength.shape for strength in heard] == [(3, 12, 64)]
        assert logits.equal(tiny_model.run_with_saes(tokens, saes=[tiny_bae]))

    def test_code_can_be_intervened_on(self, tiny_model, tiny_bae, tokens):
        def clear(code: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
            return torch.zeros_like(code)

        tiny_bae.b_dec.data.normal_()
        without_code = tiny_model.run_with_hooks(
            tokens,
            fwd_hooks=[(HOOK, lambda x, hook: tiny_bae.b_dec.expand_as(x))],  # noqa: ARG005
        )

        logits = tiny_model.run_with_hooks_with_saes(
            tokens, saes=[tiny_bae], fwd_hooks=[(f"{HOOK}.hook_sae_acts_post", clear)]
        )

        torch.testing.assert_close(logits, without_code)

    def test_hook_z(self, tiny_model, tokens):
        hook = "blocks.0.attn.hook_z"
        cfg = BAEConfig(d_in=16, d_sae=64, reshape_activations="hook_z", metadata=SAEMetadata(hook_name=hook))
        bae = BAE(cfg)
        z = tiny_model.run_with_cache(tokens)[1][hook]

        _, cache = tiny_model.run_with_cache_with_saes(tokens, saes=[bae])

        assert z.shape == (3, 12, 2, 8)
        code = cache[f"{hook}.hook_sae_acts_post"]
        assert code.equal((z.flatten(-2) @ bae.W_enc + bae.b_enc >= 0).float())
        torch.testing.assert_close(cache[f"{hook}.hook_sae_output"], (code @ bae.W_dec).unflatten(-1, (2, 8)))

    def test_transformer_bridge(self, tiny_model_folder, tokens):
        hook = "blocks.1.hook_in"
        bae = BAE(BAEConfig(d_in=16, d_sae=64, metadata=SAEMetadata(hook_name=hook)))
        bae.prior.uniform_()
        model: Any = SAETransformerBridge.boot_transformers(str(tiny_model_folder), device="cpu")
        logits, plain = model.run_with_cache(tokens)

        with_sae = model.run_with_saes(tokens, saes=[bae])
        same, cache = model.run_with_cache_with_saes(tokens, saes=[bae])

        code = cache[f"{hook}.hook_sae_acts_post"]
        assert code.equal(bae.encode(plain[hook]))
        assert code.unique().tolist() == [0, 1]
        assert cache[model.get_sae_hook_name(bae, "hook_sae_acts_strength")].equal(bae.activation_strength(code))
        assert same.equal(with_sae)
        assert not torch.allclose(with_sae, logits)
        torch.testing.assert_close(model.run_with_saes(tokens, saes=[bae], use_error_term=True), logits)

    def test_evals_are_finite(self, tiny_model, tiny_bae, tiny_dataset):
        store = ActivationsStore.from_sae(
            tiny_model, tiny_bae, tiny_dataset, store_batch_size_prompts=4, total_tokens=1000
        )
        cfg = EvalConfig(
            n_eval_reconstruction_batches=2,
            n_eval_sparsity_variance_batches=2,
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
        )

        metrics, features = run_evals(tiny_bae, store, tiny_model, ActivationScaler(), cfg)

        values = torch.tensor(
            [value for group in metrics.values() if isinstance(group, dict) for value in group.values()]
        )
        assert len(values) >= 15
        assert values.isfinite().all()
        assert 0 < metrics["sparsity"]["l0"] < 64
        assert metrics["sparsity"]["l1"] == pytest.approx(metrics["sparsity"]["l0"])
        assert len(features["feature_density"]) == 64
