"""A language model on the shadow device, and what is done with it: caches, training, evaluation, steering, ComSem."""

import signal
import threading
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, HookedSAETransformer, StandardTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.evals import EvalConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from torch.testing import assert_close

from bae_lens import (
    BAE,
    BAEConfig,
    BinaryTranscoder,
    BinaryTranscoderConfig,
    Contender,
    CorpusSettings,
    DynamicsSettings,
    Experiment,
    FitSettings,
    Recipe,
    TrainingBAEConfig,
    TrainingSettings,
    TrainingTranscoderConfig,
    Vectors,
    compare,
    compare_vectors,
    edit,
    entropy_dynamics,
    evaluate_dictionary,
    feature_dashboards,
    logit_effects,
    random_windows,
    run_evals,
    train_dictionary,
)
from bae_lens.activations.cache_writer import cache_activations
from bae_lens.activations.contexts import ContextSettings
from bae_lens.activations.paired import PairedActivations
from bae_lens.activations.streaming import StreamedActivations
from bae_lens.comsem.collect.collector import collect
from bae_lens.comsem.collect.sampling import SamplingSettings
from bae_lens.evaluation.model_loss import LossMeter

HOOK, HOOK_IN, HOOK_OUT = "blocks.0.hook_resid_post", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
SETTINGS = TrainingSettings(training_tokens=640, batch_size=32)
SHAPE: dict[str, Any] = {"d_in": 16, "d_sae": 40}
RECIPES = {
    "bae": Recipe(TrainingBAEConfig(**SHAPE, target_l0=8.0, covariance_coefficient=1e-3), lr=4e-3),
    "topk": Recipe(TopKTrainingSAEConfig(**SHAPE, k=6), lr=4e-3),
    "standard": Recipe(StandardTrainingSAEConfig(**SHAPE, l1_coefficient=1.0), lr=4e-3),
    "transcoder": Recipe(TrainingTranscoderConfig(**SHAPE, d_out=16, l1_coefficient=0.1), lr=4e-3),
}


@pytest.fixture
def models(tiny_model, shadow):
    other = HookedSAETransformer(deepcopy(tiny_model.cfg), tiny_model.tokenizer)
    other.load_state_dict(tiny_model.state_dict())
    return {"cpu": tiny_model, shadow: other.to(shadow)}


@pytest.fixture
def cached(models, tiny_contexts, tmp_path):
    """On each device, the activations of the training and held-out tokens at all hooks."""
    return {
        device: {
            split: cache_activations(model, chosen, [HOOK, HOOK_IN, HOOK_OUT], tmp_path / device / split)
            for split, chosen in tiny_contexts.items()
        }
        for device, model in models.items()
    }


def drawn(kind: str, device: str) -> SAE[Any]:
    sae: SAE[Any]
    if kind == "transcoder":
        metadata = SAEMetadata(hook_name=HOOK_IN, hook_name_out=HOOK_OUT, context_size=16, prepend_bos=True)
        sae = BinaryTranscoder(BinaryTranscoderConfig(**SHAPE, d_out=16, metadata=metadata))
    else:
        metadata = SAEMetadata(hook_name=HOOK, context_size=16, prepend_bos=True)
        sae = BAE(BAEConfig(**SHAPE, metadata=metadata))
    generator = torch.Generator().manual_seed(2)
    for weights in sae.parameters():
        weights.data.normal_(generator=generator)
    sae.prior.fill_(0.1)
    sae.bit_price.fill_(0.5)
    return sae.to(device)


def test_the_pass_of_the_model_is_cached_from_it(cached, shadow):
    for split in ("train", "test"):
        for hook, expected in cached["cpu"][split].items():
            found = cached[shadow][split][hook]
            assert_close(torch.from_numpy(found.activations.copy()), torch.from_numpy(expected.activations.copy()))
            assert torch.equal(found.content, expected.content)


@pytest.mark.parametrize("paired", [False, True])
def test_batches_that_a_thread_has_ready_are_those_of_the_cpu(cached, shadow, paired):
    sides = cached["cpu"]["train"]
    states = PairedActivations(sides[HOOK_IN], sides[HOOK_OUT]) if paired else sides[HOOK]
    before = threading.active_count()
    there, here = states.shuffled(64, 1, 3, shadow), states.shuffled(64, 1, 3)
    for _ in range(20):
        batch = next(there)
        assert batch.device.type == shadow
        assert torch.equal(batch.cpu(), next(here))
    assert threading.active_count() == before + (2 if paired else 1)
    there.close()
    assert threading.active_count() == before


def test_streamed_batches_are_those_of_the_cpu(models, cached, tiny_contexts, shadow, tmp_path):
    streams = [
        StreamedActivations(
            model, tiny_contexts["train"], cached[device]["train"][HOOK], tmp_path / "streamed" / device
        ).shuffled(64, 1, 3, device)
        for device, model in models.items()
    ]
    for _ in range(12):
        here, there = map(next, streams)
        assert there.device.type == shadow
        assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)


def test_what_a_thread_finds_damaged_is_raised_where_batches_are_taken(cached, shadow):
    states = cached["cpu"]["train"][HOOK]
    assert states.standardization.scale > 0
    states._unchecked[:] = True
    array = np.lib.format.open_memmap(states.folder / HOOK / "activations.npy", mode="r+")
    array[3] += 1
    batches = states.shuffled(64, 0, device=shadow)
    with pytest.raises(ValueError, match=r"1 contexts in .* are damaged"):
        next(batches)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_dictionary_is_trained_interrupted_resumed_and_saved(kind, cached, shadow, tmp_path, monkeypatch):
    trained = {}
    for device in ("cpu", shadow):
        sides = cached[device]["train"]
        states = PairedActivations(sides[HOOK_IN], sides[HOOK_OUT]) if kind == "transcoder" else sides[HOOK]
        if device == shadow:
            shuffled = type(states).shuffled

            def interrupted(self, *arguments, shuffled=shuffled, **options):
                for index, batch in enumerate(shuffled(self, *arguments, **options)):
                    if index == 9:
                        signal.raise_signal(signal.SIGINT)
                    yield batch

            with monkeypatch.context() as patch:
                patch.setattr(type(states), "shuffled", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    train_dictionary("d", RECIPES[kind], states, SETTINGS, tmp_path / "trained" / device, device=device)
        trained[device] = train_dictionary(
            "d", RECIPES[kind], states, SETTINGS, tmp_path / "trained" / device, device=device
        )
    for name, expected in trained["cpu"].sae.state_dict().items():
        found = trained[shadow].sae.state_dict()[name]
        assert found.device.type == shadow
        assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4, equal_nan=True)
    for found, expected in zip(trained[shadow].curve, trained["cpu"].curve, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["bae", "transcoder"])
def test_metrics_losses_dashboards_and_evals(kind, models, cached, tiny_dataset):
    found = {}
    for device, model in models.items():
        sae, test = drawn(kind, device), cached[device]["test"]
        sides = [test[HOOK_IN], test[HOOK_OUT]] if kind == "transcoder" else [test[HOOK]]
        metrics = evaluate_dictionary(sae, *(side.rows(side.content) for side in sides), optimize=kind == "bae")
        loss = LossMeter(model, test[HOOK], n_contexts=6)({"d": sae})["d"]
        shown = feature_dashboards(sae, sides[0], model, metrics.code.firing_rates, n_features=4)
        store = ActivationsStore.from_sae(model, sae, tiny_dataset, store_batch_size_prompts=4, total_tokens=1000)
        config = EvalConfig(
            batch_size_prompts=4,
            n_eval_reconstruction_batches=1,
            n_eval_sparsity_variance_batches=2,
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
        )
        evals, features = run_evals(sae, store, model, ActivationScaler(), config)
        found[device] = {
            "explained": metrics.explained_variance,
            "joint": metrics.code.joint_bits,
            "loss": [loss.clean, loss.with_sae, loss.ablated, loss.kl_with_sae],
            "shown": [(dashboard.feature, [example.token for example in dashboard.examples]) for dashboard in shown],
            "rates": features["firing_rate"],
            "evals": {name: group for name, group in evals.items() if name != "code"},
            "l0": evals["code"]["l0"],
        }
    cpu, there = found.values()
    assert there["shown"] == cpu["shown"]
    for name in ("explained", "joint", "loss", "rates", "l0"):
        assert there[name] == pytest.approx(cpu[name], rel=1e-4)
    for name, group in cpu["evals"].items():
        assert there["evals"][name] == pytest.approx(group, rel=1e-3, abs=1e-4, nan_ok=True)


def test_steering(models, shadow):
    tokens = torch.randint(4, 64, (2, 10), generator=torch.Generator().manual_seed(0))
    results = []
    for device, model in models.items():
        own = []
        for kind in ("bae", "transcoder"):
            sae = drawn(kind, device)
            settings: tuple[dict[str, Any], ...] = ({}, {"positions": slice(2, -1)}, {"keep_error": False})
            for options in settings:
                with edit(model, sae, {3: 1, 5: "flip"}, **options):
                    own.append(model(tokens.to(device)))
        effects = logit_effects(model, drawn("bae", device), [1, 2], k=3)
        results.append((own, [[value for _, value in effect.up + effect.down] for effect in effects]))
    for expected, found in zip(*(own for own, _ in results), strict=True):
        assert found.device.type == shadow
        assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert results[1][1] == [pytest.approx(values, rel=1e-4) for values in results[0][1]]


def test_instances_for_comsem(models, tiny_dataset):
    corpus, sampling = CorpusSettings(tokens=600, context_size=16), SamplingSettings(max_features=5)
    found = [
        collect(model, {"bae": drawn("bae", device)}, tiny_dataset["text"], corpus, sampling)
        for device, model in models.items()
    ]
    assert found[1] == found[0]


@pytest.mark.slow
def test_a_comparison(models, tiny_dataset, tmp_path):
    experiment = Experiment(
        "tiny",
        "words",
        HOOK,
        contexts=ContextSettings(context_size=16, cached_tokens=600, held_out_tokens=300),
        training=SETTINGS,
    )
    contenders = {
        "BAE": Contender((RECIPES["bae"],)),
        "Top-k": Contender((RECIPES["topk"],)),
        "Transcoder": Contender((RECIPES["transcoder"],), HOOK_IN, HOOK_OUT),
    }
    results = [
        compare(model, tiny_dataset, contenders, experiment, tmp_path / device, device)
        for device, model in models.items()
    ]
    for expected, found in zip(*(result.dictionaries for result in results), strict=True):
        assert found.runs[0].metrics.explained_variance == pytest.approx(
            expected.runs[0].metrics.explained_variance, rel=1e-3
        )
        assert found.runs[0].language_model.with_sae == pytest.approx(
            expected.runs[0].language_model.with_sae, rel=1e-3
        )


def test_a_comparison_of_vectors(tmp_path, shadow):
    experiment = Experiment(
        None, "random", HOOK, contexts=ContextSettings(cached_tokens=600, held_out_tokens=90), training=SETTINGS
    )
    vectors, found = Vectors([torch.randn(900, 16)]), []
    for device in ("cpu", shadow):
        result = compare_vectors(vectors, {"BAE": Contender((RECIPES["bae"],))}, experiment, tmp_path / device, device)
        found.append(result.dictionaries[0])
    expected, there = ([(shown.feature, shown.examples[0].token) for shown in bae.features] for bae in found)
    assert there == expected
    assert found[1].runs[0].metrics.explained_variance == pytest.approx(
        found[0].runs[0].metrics.explained_variance, rel=1e-3
    )


def test_training_goes_on_from_a_saved_dictionary(cached, shadow, tmp_path):
    cfg, found = TrainingBAEConfig(**SHAPE), []
    for device in ("cpu", shadow):
        recipe = Recipe(cfg, 1e-3, drawn("bae", device))
        train = cached[device]["train"][HOOK]
        found.append(train_dictionary("bae", recipe, train, SETTINGS, tmp_path / device, device=device))
    assert found[1].sae.device.type == shadow
    assert_close(found[1].sae.W_dec.cpu(), found[0].sae.W_dec, rtol=1e-3, atol=1e-3)


def test_entropy_by_layer_and_position(models, tiny_dataset, tmp_path):
    settings = DynamicsSettings(d_sae=16, fit=FitSettings(steps=20, batch_size=16))
    found = []
    for device, model in models.items():
        windows = random_windows(model.tokenizer, tiny_dataset, 8, 60)
        dynamics = entropy_dynamics(model, windows, [HOOK], [1, 4], settings, tmp_path / device)
        found.append([cell.estimate.corrected_bits for cell in dynamics.cells])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
