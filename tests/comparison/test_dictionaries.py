import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bae_lens.activations.cache_writer import cache_activations
from bae_lens.activations.forward import hook_widths
from bae_lens.activations.paired import PairedActivations
from bae_lens.comparison.dictionaries import BINARY, BINARY_TOPK, DictionarySpec, default_spec, read_specs
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


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a config file."""

    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


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


def test_file_is_read(write):
    path = write("""
hook_name: blocks.3.hook_resid_post
training: {batch_size: 64}
dictionaries:
  ours:
    architecture: bae
    config: {target_l0: 16.0}
    trials: [{lr: 0.001}, {lr: 0.002, entropy_coefficient: 0.1}]
  theirs: {architecture: transcoder, hook_name: a, hook_name_out: b, lr: 0.01}
""")
    content, dictionaries = read_specs(path)
    assert content == {"hook_name": "blocks.3.hook_resid_post", "training": {"batch_size": 64}}
    trials = ({"lr": 0.001}, {"lr": 0.002, "entropy_coefficient": 0.1})
    assert dictionaries == {
        "ours": DictionarySpec("bae", {"target_l0": 16.0}, trials=trials),
        "theirs": DictionarySpec("transcoder", lr=0.01, hook_name="a", hook_name_out="b"),
    }


def test_trials_override_the_config_and_the_learning_rate(tiny_model):
    spec = DictionarySpec("topk", {"k": 4}, lr=0.1, trials=({}, {"k": 8}, {"lr": 0.2}))
    contender = spec.contender(tiny_model, HOOK, 4, 100)
    assert [(recipe.to_dict()["k"], recipe.lr) for recipe in contender.trials] == [(4, 0.1), (8, 0.1), (4, 0.2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "dictionaries: {a: {architecture: bae}, a: {architecture: topk}}",
            "is not YAML that can be read: 'a' comes",
        ),
        ("seed: 1\nseed: 2", "'seed' comes twice"),
        ("- 1", "must hold a mapping of settings, got list"),
        ("", "must hold a mapping of settings, got NoneType"),
        ("a: [", "is not YAML that can be read"),
        ("dictionaries: {a: {lr: 3}}", "dictionary 'a' takes architecture, config, hook_name, .* got {'lr': 3}"),
        ("dictionaries: {a: {architecture: bae, rate: 3}}", "dictionary 'a' takes architecture, config"),
        ("dictionaries: {a: bae}", "dictionary 'a' takes architecture, config, .* got 'bae'"),
        ("dictionaries: {a: {architecture: bea}}", "architecture must be one of"),
        ("a: &a [1]\nb: *a", "aliases are not read; write the value out"),
        ("a: &a [*a]", "aliases are not read; write the value out"),
        ("seeds: &a [1, 2]\ndictionaries: {a: {architecture: bae, config: *a}}", "aliases are not read"),
        ("a: " + "[" * 2000 + "]" * 2000, "is not YAML that can be read: maximum recursion"),
        ("{[a, b]: 1}", "unhashable key"),
        ("when: 2001-99-99", "is not YAML that can be read: month"),
        ("# " + "x" * 2**18, "has more than 262144 bytes"),
        ("dictionaries: {1: {architecture: bae}}", "the name of a dictionary must be text, got 1; put it in quotes"),
        ("dictionaries: {no: {architecture: bae}}", "the name of a dictionary must be text, got False; put it in"),
        ("dictionaries: {a: {architecture: bae, config: {2001-01-01: 1}}}", "names must be text"),
    ],
)
def test_file_that_cannot_be_is_refused(write, text, message):
    with pytest.raises(ValueError, match=message):
        read_specs(write(text))


def test_what_is_shown_of_a_wrong_value_is_short(write):
    for text in (f"dictionaries: {{a: {{x: {list(range(9999))}}}}}", f"dictionaries: {list(range(9999))}"):
        with pytest.raises(ValueError, match=r"config\.yaml: dictionar") as refused:
            read_specs(write(text))
        assert len(str(refused.value)) < 400


def test_many_keys_are_read_in_time_that_grows_with_them(write):
    content, _ = read_specs(write("".join(f"a{i}: 1\n" for i in range(20_000))))
    assert len(content) == 20_000


WRONG_TYPES = {
    "dictionaries: [bae]": "a list instead of a mapping",
    "dictionaries: {a: {architecture: bae, trials: 3}}": "a number instead of a list",
    "dictionaries: {a: {architecture: bae, trials: [3]}}": "a trial that is no mapping",
    "dictionaries: {a: {architecture: bae, config: 3}}": "a config that is no mapping",
    "dictionaries: {a: {architecture: bae, preset: best}}": "a preset that is none",
}


@pytest.mark.parametrize("text", WRONG_TYPES, ids=[re.sub(" ", "_", reason) for reason in WRONG_TYPES.values()])
def test_wrong_types_in_a_description_are_refused(write, tiny_model, text):
    with pytest.raises(ValueError):  # noqa: PT011
        read_specs(write(text))[1]["a"].contender_by_width(partial(hook_widths, tiny_model), HOOK, 4, 100)
