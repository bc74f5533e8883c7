import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from sae_lens import StandardTrainingSAEConfig

from bae_lens import Contender, Experiment, Recipe, TrainingBAEConfig, TrainingSettings, compare
from bae_lens.activations.contexts import ContextSettings
from bae_lens.activations.model_shape import ModelShape
from bae_lens.comparison.plan import Timings, plan_comparison
from bae_lens.comparison.timing import DictionaryTiming, PassTiming
from bae_lens.planning import Resources

LLAMA = ModelShape(d_model=2048, n_layers=16, n_heads=32, d_mlp=8192, n_parameters=1_498_482_688)
EXPERIMENT = Experiment(
    "llama",
    "text",
    "blocks.11.hook_resid_post",
    contexts=ContextSettings(context_size=1024, cached_tokens=1_000_000),
    training=TrainingSettings(training_tokens=512_000),
)
AMPLE = Resources(10**12, 10**12, on_gpu=False)


def gpu(memory: float, disk: float = 500.0) -> Resources:
    return Resources(int(disk * 1e9), int(memory * 1e9), on_gpu=True)


def contenders(d_sae: int = 8192, trials: int = 1) -> dict[str, Contender]:
    recipes = tuple(Recipe(TrainingBAEConfig(d_in=2048, d_sae=d_sae), lr=1e-3 * (i + 1)) for i in range(trials))
    relu = Recipe(StandardTrainingSAEConfig(d_in=2048, d_sae=8), lr=1e-3)
    return {"BAE": Contender(recipes), "ReLU": Contender(trials * (relu,))}


def planned(plan_of: Experiment = EXPERIMENT, resources: Resources = AMPLE, **options):
    made = {plan_of.hook_name: options.pop("contenders", contenders())}
    return plan_comparison(LLAMA, plan_of, made, resources, **options)


def number_after(words: str, sentence: str) -> int:
    found = re.search(rf"{words} ([\d,]+)", sentence)
    assert found is not None
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_disk_and_tokens_are_those_of_a_run(tiny_model, tiny_dataset, tmp_path: Path, dtype):
    experiment = Experiment(
        "tiny",
        "words",
        "blocks.0.hook_resid_post",
        contexts=ContextSettings(context_size=16, cached_tokens=600, held_out_tokens=300, tuning_tokens=150),
        training=TrainingSettings(training_tokens=320, batch_size=32),
        every_help=False,
        cache_dtype=dtype,
    )
    relu = Recipe(StandardTrainingSAEConfig(d_in=16, d_sae=64), lr=1e-3)
    two = {"ReLU": Contender((relu, replace(relu, lr=2e-3)))}
    documents = [" ".join(text.split()[:15]) for text in tiny_dataset["text"][:800]]  # as long as a context
    compare(tiny_model, Dataset.from_dict({"text": documents}), two, experiment, tmp_path / "run")
    arrays = sum(np.load(path, mmap_mode="r").nbytes for path in tmp_path.rglob("*.npy"))
    weights = sum(path.stat().st_size for path in tmp_path.rglob("sae_weights.safetensors"))
    stages = plan_comparison(ModelShape(16, 2, 2, 32, 4096), experiment, {experiment.hook_name: two}, AMPLE).stages
    assert sum(stage.disk for stage in stages[:3]) == arrays
    # Files have headers; two checkpoints of three times the weights are there while one of the three is trained.
    assert sum(stage.disk for stage in stages[3:]) == pytest.approx(weights * (3 + 2 * 3) / 3, rel=0.1)


def test_by_hand():
    plan = planned(replace(EXPERIMENT, seeds=(0, 1), every_help=False))
    assert [stage.name for stage in plan.stages[2:5]] == ["activations", "train BAE", "measure BAE"]
    n_contexts = 978 + 17  # of 1023 tokens besides BOS, rounded up
    rows = 1024 * n_contexts
    assert plan.stages[2].work == f"{rows:,} tokens through 12 layers"
    assert plan.stages[2].disk == rows * (4 * 2048 + 4) + 8 * n_contexts + 8 * (rows + n_contexts)
    assert plan.stages[3].work == "2 x 1,000 steps of 512, 8,192 features"
    weights = 4 * (8192 * (2048 + 2048 + 2) + 2048)
    assert [stage.disk for stage in plan.stages[3:]] == [2 * weights + 2 * 3 * weights, 0, 2 * 4 * 34_832, 0, 0, 0]
    assert [stage.name for stage in plan.stages[-2:]] == ["language model's loss", "baselines"]
    on_gpu = planned(resources=gpu(80)).stages
    assert on_gpu[3].host == 8 * (rows + n_contexts) + 6 * 4 * 512 * (2048 + 2048) + 3 * weights
    random_features = 4096 * ((32_768 + 16_384) * (4 + 4) + 2 * 8 * 4096)  # bits at four L0s, numbers of one
    assert on_gpu[-1].host == 5 * 4 * 65_536 * 2048 + 4 * 16_384 * 2 * 2048 + random_features
    assert plan.misfits == []
    assert plan.seconds is None
    assert plan.device == 0


def test_seconds_are_those_of_the_steps():
    of_dictionaries = {name: DictionaryTiming(step=0.5, measured_token=0.01) for name in ("BAE", "ReLU")}
    timings = Timings(PassTiming(layer=1e-6, prediction=1e-5), {EXPERIMENT.hook_name: of_dictionaries})
    plan = planned(replace(EXPERIMENT, seeds=(0, 1), every_help=False), timings=timings)
    seconds = {stage.name: stage.seconds for stage in plan.stages}
    assert seconds["train BAE"] == 2 * 1000 * 0.5
    assert seconds["measure BAE"] == pytest.approx(2 * 16_384 * 0.01)
    assert seconds["activations"] == pytest.approx(1e-6 * 1_018_880 * 12)
    assert seconds["choose contexts"] is None
    # 16 layers as the model is; behind layer 11, 5 with zeros and 5 for each of 2 seeds of 2 dictionaries
    assert seconds["language model's loss"] == pytest.approx(32 * 1024 * (1e-6 * (16 + 5 * 5) + 1e-5 * 6))
    assert plan.seconds == pytest.approx(sum(filter(None, seconds.values())))
    assert planned(timings=timings).stages[4].seconds is None  # every help is not timed
    assert planned(contenders=contenders(trials=3), timings=timings).stages[3].seconds == 3 * 1000 * 0.5


def test_hooks_add_up_in_disk_and_time_and_take_the_most_of_memory():
    other, dictionaries = "blocks.3.hook_resid_post", contenders()
    of_one = {name: DictionaryTiming(step=0.5, measured_token=0.01) for name in dictionaries}
    hooks = [EXPERIMENT.hook_name, other]
    timings = Timings(PassTiming(layer=1e-6, prediction=1e-5), dict.fromkeys(hooks, of_one))
    one, two = (
        plan_comparison(LLAMA, EXPERIMENT, dict.fromkeys(at, dictionaries), AMPLE, timings=timings)
        for at in (hooks[:1], hooks)
    )
    assert [stage.name for stage in two.stages] == [stage.name for stage in one.stages]
    by_name = [{stage.name: stage for stage in plan.stages} for plan in (one, two)]
    train, train_both = (stages["train BAE"] for stages in by_name)
    weights = 4 * (8192 * (2048 + 2048 + 2) + 2048)
    assert train_both.disk == train.disk + weights  # checkpoints are there of one dictionary at a time
    assert train_both.seconds == 2 * 1000 * 0.5
    assert (train_both.host, train_both.work) == (train.host, f"{train.work} at 2 of 2 hooks")
    assert two.stages[2].disk - one.stages[2].disk == 995 * (1024 * 4 * (2048 + 1) + 8)  # contexts
    loss, loss_of_both = (stages["language model's loss"].seconds for stages in by_name)
    # Behind layer 3, 13 layers with zeros and with each dictionary, where behind layer 11 there are 5.
    assert loss is not None
    assert loss_of_both == pytest.approx(2 * loss + 32 * 1024 * 1e-6 * 8 * 3)


def test_half_of_a_gpu_that_is_missing_says_by_what_to_shrink():
    half = planned().host / 1e9 / 2
    for misfit in planned(resources=gpu(half)).misfits:
        assert re.search(r"takes .* GB of memory.* and the GPU has .*; (choose|ask for)", misfit)


def test_features_that_fit_a_gpu_do_and_no_more():
    wide = contenders(d_sae=200_000)
    (misfit,) = planned(resources=gpu(20), contenders=wide, model_beside=False).misfits
    assert misfit.startswith("training BAE takes")
    assert misfit.endswith("or train it with train --shard-features in several processes")
    fewer = number_after("ask for at most", misfit)
    for d_sae, n_misfits in ((fewer, 0), (fewer + 1, 1)):
        alone = {"BAE": contenders(d_sae)["BAE"]}
        assert len(planned(resources=gpu(20), contenders=alone, model_beside=False).misfits) == n_misfits


def test_disk_that_is_too_small_says_how_many_tokens_fit():
    (misfit,) = planned(resources=gpu(80, disk=4)).misfits
    assert misfit.endswith("or keep them in bfloat16, or choose another disk")
    fewer = number_after("cache at most", misfit)
    contexts = replace(EXPERIMENT.contexts, cached_tokens=fewer)
    assert planned(replace(EXPERIMENT, contexts=contexts), gpu(80, disk=4)).misfits == []
    contexts = replace(EXPERIMENT.contexts, cached_tokens=round(1.02 * fewer))
    assert planned(replace(EXPERIMENT, contexts=contexts), gpu(80, disk=4)).misfits != []


def test_model_that_does_not_fit_can_be_narrower_or_elsewhere():
    (misfit,) = planned(resources=gpu(12)).misfits[:1]
    assert misfit.startswith("running the model takes")
    assert "choose --model-dtype bfloat16, shorter contexts, or another --model-device" in misfit
    narrow = replace(EXPERIMENT, model_dtype="bfloat16")
    assert "bfloat16" not in planned(narrow, gpu(4)).misfits[0]
    assert planned(resources=gpu(12), model_beside=False).misfits == []
