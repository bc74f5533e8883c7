import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from sae_lens import HookedSAETransformer

from bae_lens import (
    Comparison,
    Contender,
    Experiment,
    HookComparisons,
    HookRow,
    Recipe,
    TrainingBAEConfig,
    TrainingSettings,
    TrainingTranscoderConfig,
    compare,
    compare_hooks,
)
from bae_lens.activations.contexts import ContextSettings
from bae_lens.comparison import comparing
from bae_lens.comparison import run as running
from bae_lens.comparison.dictionaries import DictionarySpec, PretrainedSpec
from bae_lens.comparison.hooks import check_specs
from bae_lens.training import trainer

HOOKS = ("blocks.1.hook_resid_post", "blocks.0.mlp.hook_post", "blocks.0.hook_resid_post")
WIDTHS = {"blocks.1.hook_resid_post": 16, "blocks.0.mlp.hook_post": 32, "blocks.0.hook_resid_post": 16}
EXPERIMENT = Experiment(
    "tiny",
    "words",
    "not looked at",
    contexts=ContextSettings(context_size=16, cached_tokens=300, held_out_tokens=150, loss_contexts=4),
    training=TrainingSettings(training_tokens=160, batch_size=32),
    seeds=(0, 1),
    every_help=False,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def at(hook: str, layer: int = 0) -> dict[str, Contender]:
    """A BAE of twice the hook's width, and a transcoder of an MLP."""
    width = WIDTHS[hook]
    bae = Recipe(TrainingBAEConfig(d_in=width, d_sae=2 * width, encoder_bias_init=-0.5), 4e-3)
    mlp = Recipe(TrainingTranscoderConfig(d_in=16, d_sae=32, d_out=16, l1_coefficient=0.1), 1e-3)
    sides = (f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out")
    return {"BAE": Contender((bae,)), "MLP": Contender((mlp,), *sides)}


CONTENDERS = {hook: at(hook, layer) for hook, layer in zip(HOOKS, (1, 0, 0), strict=True)}


@dataclass
class Ran:
    """A run at three hooks, and what it told of its progress."""

    folder: Path
    result: HookComparisons
    stages: list[str]
    measured: list[str]
    passes: int

    def comparison(self, hook: str) -> Comparison:
        return Comparison.from_dict(json.loads((self.folder / "hooks" / hook / "result.json").read_text()))


@pytest.fixture
def run(tiny_model: HookedSAETransformer, tiny_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    def run(folder: Path, made: Any = None) -> Ran:
        stages, measured, passes, cache = [], [], [], running.cache_activations
        with monkeypatch.context() as patch:
            patch.setattr(running, "cache_activations", lambda *a, **k: passes.append(a) or cache(*a, **k))
            result = compare_hooks(
                tiny_model,
                tiny_dataset,
                made or CONTENDERS,
                EXPERIMENT,
                folder,
                on_stage=lambda name, seconds: stages.append(name) if seconds is None else None,
                on_measured=lambda name, _: measured.append(name),
            )
        return Ran(folder, result, stages, measured, len(passes))

    return run


def without_times(content: Any) -> Any:
    times = {"seconds", "training_seconds", "memory_gib", "stages"}
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key not in times}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def test_each_hook_has_what_compare_gives_there_of_one_pass_for_all(run, tiny_model, tiny_dataset, tmp_path):
    ran = run(tmp_path / "run")
    assert ran.passes == 2  # over the training documents, and those for measuring
    assert not list((tmp_path / "run" / "hooks").rglob("activations*"))
    assert not ran.comparison(HOOKS[0]).train.outlier_tokens  # or else they would be left out at all hooks
    hook = HOOKS[1]
    alone = compare(tiny_model, tiny_dataset, at(hook), replace(EXPERIMENT, hook_name=hook), tmp_path / "alone")
    assert without_times(ran.comparison(hook).to_dict()) == without_times(alone.to_dict())

    assert ran.result.hook_names == list(HOOKS)
    assert HookComparisons.from_dict(json.loads((tmp_path / "run" / "result.json").read_text())) == ran.result
    assert [(row.comparison_hook, row.dictionary, row.seed) for row in ran.result.rows] == [
        (hook, name, seed) for hook in HOOKS for name in ("BAE", "MLP") for seed in (0, 1)
    ]
    assert ran.result.rows[4:8] == HookRow.all_of(ran.comparison(hook))
    row, found = ran.result.rows[5], ran.comparison(hook).dictionaries[0].runs[1]
    assert (row.d_sae, row.hook_name_out, row.is_binary) == (64, hook, True)
    assert (row.explained_variance, row.ce_recovered, row.kl_recovered, row.value_bits) == (
        found.metrics.explained_variance,
        found.language_model.recovered,
        found.language_model.kl_recovered,
        0.0,
    )
    code = found.metrics.code
    assert (row.support_bits, row.joint_bits, row.dead, row.dense) == (
        code.support_bits,
        code.joint_bits,
        code.dead,
        code.dense,
    )
    lines = ran.result.table().splitlines()
    assert len(lines) == 2 + 6
    assert lines[3].startswith("| blocks.1.hook_resid_post | MLP | ")

    assert [stage.name for stage in ran.result.stages] == [
        "load model and text",
        "choose contexts",
        "activations",
        *HOOKS,
    ]
    assert {f"train BAE at {hook}" for hook in HOOKS} <= set(ran.stages)
    assert Counter(ran.measured) == {f"{name} at {hook}": 2 for hook in HOOKS for name in ("BAE", "MLP")}


def test_a_run_that_was_stopped_goes_on_and_does_nothing_again(run, tmp_path, monkeypatch):
    two = {hook: {"BAE": CONTENDERS[hook]["BAE"]} for hook in HOOKS[:2]}
    whole = run(tmp_path / "whole", two)
    step, steps = trainer.take_step, []

    def cut(*args: Any) -> Any:
        steps.append(args)
        if len(steps) == 13:  # in the second hook's first training
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(trainer, "take_step", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", two)
    steps.clear()
    monkeypatch.setattr("bae_lens.activations.cache_writer._cache_missing", lambda *_: pytest.fail("cached again"))
    monkeypatch.setattr(trainer, "take_step", lambda *args: steps.append(args) or step(*args))
    resumed = run(tmp_path / "run", two)
    assert len(steps) == 2 * 5  # both seeds of the second hook, of which nothing was saved
    assert not {name for name in resumed.stages if name.endswith(HOOKS[0]) and name.startswith("measure")}
    assert without_times(resumed.result.to_dict()) == without_times(whole.result.to_dict())
    monkeypatch.setattr(comparing, "evaluate_dictionary", lambda *_, **__: pytest.fail("measured again"))
    steps.clear()
    run(tmp_path / "run", two)
    assert not steps


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, "compare_hooks needs at least one hook, got none"),
        (
            {HOOKS[0]: at(HOOKS[0]), "hook_embed": at(HOOKS[0])},
            "several hooks must each be in a layer, as blocks.0.hook_resid_pre is, got hook_embed; run it alone",
        ),
        (
            {HOOKS[0]: at(HOOKS[0]), "blocks.2.hook_resid_post": at(HOOKS[0])},
            r"no hook 'blocks.2.hook_resid_post'; near ones: .* \(its layers are 0 to 1\)",
        ),
        (
            {hook: at(HOOKS[0]) for hook in HOOKS},
            "BAE has d_in 16, but the activations at blocks.0.mlp.hook_post are 32 wide",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(run, tmp_path, made, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", made) if made else compare_hooks(None, None, {}, EXPERIMENT, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_aliases_of_one_hook_are_one_hook(tiny_model, tmp_path, monkeypatch):
    names = {"alias": HOOKS[0], HOOKS[0]: HOOKS[0]}
    monkeypatch.setattr(tiny_model, "_resolve_hook_name", names.__getitem__, raising=False)
    with pytest.raises(ValueError, match=f"hooks must be different, got {HOOKS[0]} twice; leave one out"):
        compare_hooks(tiny_model, None, dict.fromkeys(names, at(HOOKS[0])), EXPERIMENT, tmp_path)


def test_a_folder_is_for_one_hook_or_for_several(tiny_model, tiny_dataset, run, tmp_path):
    one, several = tmp_path / "one", tmp_path / "several"
    for folder, content in ((one, {"hook_name": HOOKS[0]}), (several, {"hook_names": HOOKS})):
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="one holds a run at one hook, but this is one at several; choose another f"):
        run(one)
    with pytest.raises(ValueError, match="several holds a run at several hooks, but this is one at one; choose anoth"):
        compare(tiny_model, tiny_dataset, at(HOOKS[0]), replace(EXPERIMENT, hook_name=HOOKS[0]), several)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            DictionarySpec("transcoder", hook_name="blocks.0.mlp.hook_in", hook_name_out="blocks.0.hook_mlp_out"),
            "takes the MLP in the layer of each, but it names blocks.0.mlp.hook_in and blocks.0.hook_mlp_out; leave",
        ),
        (
            PretrainedSpec("gemma/layer_1"),
            "at the one hook that it reads, but it would be at 3; leave it out",
        ),
        (
            DictionarySpec("transcoder", start_from="saved"),
            "at the one hook that it reads, but it starts from one at 3; leave start_from out",
        ),
        (
            DictionarySpec("topk", {"k": 4, "d_sae": 64}),
            "but it has it and widths are 16 at .*, 32 at .*; leave it",
        ),
        (DictionarySpec("topk", {"k": 4}, trials=({"d_sae": 9},)), "d_sae can be fixed for hooks of one width, but it"),
    ],
)
def test_a_dictionary_described_for_one_hook_is_refused_at_several(spec, message):
    with pytest.raises(ValueError, match=message):
        check_specs({"it": spec}, WIDTHS)
    check_specs({"it": spec}, {HOOKS[0]: 16})
    if isinstance(spec, DictionarySpec) and not spec.is_transcoder:
        check_specs({"it": spec}, {HOOKS[0]: 16, HOOKS[2]: 16})
