from typing import Any

import pytest
import torch

from bae_lens.activations.cache_writer import cache_activations
from bae_lens.activations.paired import PairedActivations
from bae_lens.comparison.dictionaries import BINARY, BINARY_TOPK, DictionarySpec, default_spec
from bae_lens.training.recipe import TrainingSettings
from bae_lens.training.trainer import train_dictionary

pytestmark = pytest.mark.usefixtures("one_thread")

HOOK = "blocks.0.hook_resid_post"
NAMES = {
    "bae": "BAE",
    "standard": "ReLU",
    "topk": "Top-k",
    "binary_topk": "Binary Top-k",
    "gated": "Gated",
    "jumprelu": "JumpReLU",
    "batchtopk": "BatchTopK",
    "matryoshka_batchtopk": "Matryoshka",
    "transcoder": "Transcoder",
    "topk_transcoder": "Top-k transcoder",
    "binary_transcoder": "Binary transcoder",
    "binary_topk_transcoder": "Binary Top-k transcoder",
}


@pytest.mark.parametrize("architecture", NAMES)
def test_default_of_every_architecture_trains(architecture, tiny_model, tiny_contexts, tmp_path):
    name, spec = default_spec(architecture, l0=8, d_sae=64, trials=3)
    assert name == NAMES[architecture]
    contender = spec.contender(tiny_model, HOOK, expansion=4, training_steps=16)
    assert len(contender.trials) == 3
    middle = contender.trials[1]
    assert (middle.cfg.architecture(), middle.cfg.d_in, middle.cfg.d_sae) == (architecture, 16, 64)
    asked = middle.cfg.to_dict()
    if "l1_coefficient" in asked:
        penalties = [recipe.cfg.to_dict()["l1_coefficient"] for recipe in contender.trials]
        assert penalties[1] == pytest.approx({"standard": 2.8, "gated": 4.4, "transcoder": 8.3}[architecture])
        assert [p / penalties[1] for p in penalties] == pytest.approx([1 / 1.6, 1, 1.6])
        assert {recipe.lr for recipe in contender.trials} == {1e-3}
        assert asked["l1_warm_up_steps"] == 2
    else:
        assert 8 in (asked.get("k"), asked.get("target_l0"))
        lr = 6e-3 if architecture in BINARY else 4e-3 if architecture in BINARY_TOPK else 1e-3
        assert [recipe.lr for recipe in contender.trials] == pytest.approx([lr / 1.6, lr, lr * 1.6])
    hooks = (contender.hook_name, str(contender.hook_name_out)) if contender.hook_name else (HOOK,)
    if "transcoder" in architecture:
        assert hooks == ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out")
    states = cache_activations(tiny_model, tiny_contexts["test"], list(hooks), tmp_path / "states")
    source: Any = PairedActivations(*states.values()) if len(hooks) == 2 else states[HOOK]
    settings = TrainingSettings(training_tokens=64, batch_size=32)
    trained = train_dictionary(name, middle, source, settings, tmp_path)
    assert torch.isfinite(trained.sae(next(iter(states.values())).rows(torch.arange(4)))).all()


def test_single_trial_is_the_middle_of_the_grid():
    assert default_spec("gated", 32, 2304)[1].trials == ({"l1_coefficient": 4.4},)
    assert default_spec("bae", 32, 2304)[1].trials == ({"lr": 6e-3},)


def test_architecture_without_default_is_refused():
    with pytest.raises(ValueError, match="'matching_pursuit' has no default settings; it must be one of bae, standard"):
        default_spec("matching_pursuit", 32, 2304)


def test_a_transcoder_takes_its_hooks_and_reads_what_it_is_wide(tiny_model):
    spec = DictionarySpec("transcoder", hook_name="blocks.0.mlp.hook_post", hook_name_out=HOOK)
    contender = spec.contender(tiny_model, HOOK, 4, 100)
    assert (contender.hook_name, contender.hook_name_out) == ("blocks.0.mlp.hook_post", HOOK)
    (recipe,) = contender.trials
    assert {"d_in": 32, "d_sae": 128, "d_out": 16}.items() <= recipe.to_dict().items()


def test_presets_have_their_learning_rate(tiny_model):
    presets: Any = (("default", 6e-3), ("optimized", 6e-3), ("paper", 5e-4), ("authors", 5e-4))
    for preset, lr in presets:
        (recipe,) = DictionarySpec("bae", preset=preset).contender(tiny_model, HOOK, 4, 100).trials
        assert recipe.lr == lr
    (recipe,) = DictionarySpec("bae", lr=0.1, preset="paper").contender(tiny_model, HOOK, 4, 100).trials
    assert (recipe.lr, recipe.to_dict()["reconstruction"]) == (0.1, "l2_norm")


@pytest.mark.parametrize(
    ("spec", "hook", "message"),
    [
        (
            {"architecture": "bae", "hook_name": HOOK},
            HOOK,
            "only transcoders take hook_name and hook_name_out, and bae is none",
        ),
        ({"architecture": "transcoder"}, "hook_embed", "hook_embed is in no layer; name hook_name and hook_name_out"),
        ({"architecture": "transcoder", "hook_name_out": "nowhere"}, HOOK, "the model has no hook 'nowhere'"),
        ({"architecture": "bae", "config": {"k": 3}}, HOOK, "TrainingBAEConfig takes .*, but no 'k'"),
        ({"architecture": "transcoder", "config": {"d_out": 3}}, HOOK, "but no 'd_out'"),
        ({"architecture": "topk", "trials": ({"k": 65},)}, HOOK, "topk cannot be made with {'k': 65}"),
        ({"architecture": "standard", "lr": 0.0}, HOOK, "lr must be positive and finite, got 0.0"),
    ],
)
def test_description_that_cannot_be_is_refused(tiny_model, spec, hook, message):
    with pytest.raises(ValueError, match=message):
        DictionarySpec(**spec).contender(tiny_model, hook, 4, 100)


def test_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match=r"architecture must be one of .*bae.*, got 'bea'"):
        DictionarySpec("bea")


def test_trials_override_the_config_and_the_learning_rate(tiny_model):
    spec = DictionarySpec("topk", {"k": 4}, lr=0.1, trials=({}, {"k": 8}, {"lr": 0.2}))
    contender = spec.contender(tiny_model, HOOK, 4, 100)
    assert [(recipe.to_dict()["k"], recipe.lr) for recipe in contender.trials] == [(4, 0.1), (8, 0.1), (4, 0.2)]
