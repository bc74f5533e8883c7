import json
import pkgutil
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from sae_lens import SAE, StandardTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch.testing import assert_close

from bae_lens import (
    BAE,
    Comparison,
    Contender,
    Experiment,
    Recipe,
    TrainingBAEConfig,
    TrainingSettings,
    TrainingTranscoderConfig,
    compare,
    compare_hooks,
)
from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.contexts import ContextSettings
from bae_lens.activations.streaming import KeepActivations
from bae_lens.comparison import comparing
from bae_lens.comparison.comparing import best_trial
from bae_lens.comparison.results import Trial
from bae_lens.evaluation.metrics import evaluate_dictionary
from bae_lens.evaluation.model_loss import LossMeter

HOOK, HOOK_IN, HOOK_OUT = "blocks.0.hook_resid_post", "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_post"
EXPERIMENT = Experiment(
    "tiny",
    "words",
    HOOK,
    contexts=ContextSettings(context_size=16, cached_tokens=600, held_out_tokens=300, tuning_tokens=150),
    training=TrainingSettings(training_tokens=320, batch_size=32),
    l0=8.0,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def bae(**overrides: Any) -> Recipe:
    return Recipe(TrainingBAEConfig(**{"d_in": 16, "d_sae": 64, "encoder_bias_init": -0.5, **overrides}), lr=4e-3)


def relu(l1_coefficient: float = 1.0) -> Recipe:
    return Recipe(StandardTrainingSAEConfig(d_in=16, d_sae=64, l1_coefficient=l1_coefficient), lr=1e-3)


def transcoder(l1_coefficient: float = 0.1, d_out: int = 32) -> Recipe:
    return Recipe(TrainingTranscoderConfig(d_in=16, d_sae=64, d_out=d_out, l1_coefficient=l1_coefficient), lr=1e-3)


def contenders() -> dict[str, Contender]:
    return {
        "BAE": Contender((bae(),)),
        "ReLU": Contender((relu(),)),
        "Transcoder": Contender((transcoder(),), HOOK_IN, HOOK_OUT),
    }


@pytest.fixture
def run(tiny_model: Any, tiny_dataset: Any, tmp_path: Path) -> Any:
    """Compares on the tiny model, in one and the same folder unless told another."""

    def run(
        made: dict[str, Contender] | None = None, experiment: Experiment = EXPERIMENT, folder: str = "run"
    ) -> Comparison:
        return compare(tiny_model, tiny_dataset, made or contenders(), experiment, tmp_path / folder)

    return run


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.Tensor]]:
    """The batches of every training step from now on, by architecture."""
    seen: dict[str, list[torch.Tensor]] = {}
    step = SAETrainer.step

    def recorded(self: Any, batch: torch.Tensor) -> Any:
        seen.setdefault(self.sae.cfg.architecture(), []).append(batch)
        return step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", recorded)
    return seen


def opened(folder: Path, split: str, *hooks: str) -> list[CachedActivations]:
    return [CachedActivations(folder / "activations" / split, hook) for hook in hooks]


def timeless(result: Comparison) -> Comparison:
    """Without times and memory, which no two runs share."""
    dictionaries = [
        replace(d, runs=[replace(one, training_seconds=0.0, memory_gib=0.0) for one in d.runs])
        for d in result.dictionaries
    ]
    return replace(result, stages=[], dictionaries=dictionaries)


def test_all_see_the_same_tokens_in_the_same_order(run, steps, tmp_path):
    result = run()
    assert {name: len(batches) for name, batches in steps.items()} == {"bae": 10, "standard": 10, "transcoder": 10}
    assert torch.equal(torch.cat(steps["bae"]), torch.cat(steps["standard"]))
    at_hook, source, target = (
        side.standardization(side.rows(side.content))
        for side in opened(tmp_path / "run", "train", HOOK, HOOK_IN, HOOK_OUT)
    )
    distance = torch.cdist(torch.cat(steps["bae"]), at_hook)
    assert distance.amin(1).max() < 1e-2
    tokens = distance.argmin(1)
    pairs = torch.cat(steps["transcoder"])
    assert_close(pairs[:, :16], source[tokens])
    assert_close(pairs[:, 16:], target[tokens])
    assert [d.name for d in result.dictionaries] == ["BAE", "ReLU", "Transcoder"]
    assert [d.architecture for d in result.dictionaries] == ["bae", "standard", "transcoder"]
    assert [(d.hook_name, d.hook_name_out) for d in result.dictionaries] == [
        (HOOK, HOOK),
        (HOOK, HOOK),
        (HOOK_IN, HOOK_OUT),
    ]


def test_model_runs_once_over_every_context_however_many_dictionaries(run, tiny_model, monkeypatch):
    forward, calls = tiny_model.run_with_cache, []

    def counted(tokens: torch.Tensor, **kwargs: Any) -> Any:
        calls.extend(tuple(row) for row in tokens.tolist())
        return forward(tokens, **kwargs)

    monkeypatch.setattr(tiny_model, "run_with_cache", counted)
    run({"BAE": Contender((bae(),))}, folder="one")
    one = Counter(calls)
    calls.clear()
    run(folder="three")
    assert Counter(calls) == one
    assert {len(row): max(n for other, n in one.items() if len(other) == len(row)) for row in one} == {1: 1, 16: 1}


def test_what_is_reported_is_measured_on_the_test_documents(run, tiny_model, tmp_path):
    result = run()
    states = dict(
        zip((HOOK, HOOK_IN, HOOK_OUT), opened(tmp_path / "run", "test", HOOK, HOOK_IN, HOOK_OUT), strict=True)
    )
    saes = {d.name: SAE.load_from_disk(tmp_path / "run" / "dictionaries" / d.name) for d in result.dictionaries}
    losses = LossMeter(tiny_model, states[HOOK], n_contexts=32)(saes)
    for d in result.dictionaries:
        (one,) = d.runs
        sides = [states[hook] for hook in ((HOOK_IN, HOOK_OUT) if d.name == "Transcoder" else (HOOK,))]
        assert one.metrics == evaluate_dictionary(saes[d.name], *(side.rows(side.content) for side in sides))
        assert one.language_model == losses[d.name]
        assert 0 < len(d.features) <= 64
    assert result.test.tokens == result.dictionaries[0].runs[0].metrics.code.n_tokens == len(states[HOOK].content)
    assert len(result.pca) == len(result.gaussian_bound) > 3
    n_features = min(64, result.train.tokens // 8)
    assert len(result.random_coding) == sum(l0 <= n_features / 2 for l0 in (8, 16, 32, 64)) > 0
    loaded = saes["BAE"]
    assert isinstance(loaded, BAE)
    assert (loaded.cfg.metadata.model_name, loaded.cfg.metadata.dataset_path) == ("tiny", "words")
    tokens = states[HOOK].contexts.tokens[:1]
    _, cache = tiny_model.run_with_cache_with_saes(tokens, saes=[loaded])
    assert cache[f"{HOOK}.hook_sae_acts_post"].shape == (1, 16, 64)


def test_splits_share_no_document(run, tmp_path):
    run({"ReLU": Contender((relu(1.0), relu(2.0)))})
    train, tune, test = (
        set(opened(tmp_path / "run", split, HOOK)[0].contexts.document.tolist()) for split in ("train", "tune", "test")
    )
    assert not train & tune
    assert not train & test
    assert not tune & test


def test_each_seed_is_a_training_of_its_own(run, steps, tmp_path):
    result = run({"BAE": Contender((bae(),)), "ReLU": Contender((relu(),))}, replace(EXPERIMENT, seeds=(3, 4)))
    assert [[one.seed for one in d.runs] for d in result.dictionaries] == [[3, 4], [3, 4]]
    first, second = torch.cat(steps["bae"]).split(320)
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat(steps["bae"]), torch.cat(steps["standard"]))
    one, two = result.dictionaries[1].runs
    assert one.metrics.explained_variance != two.metrics.explained_variance
    assert "±" in result.table()
    assert (tmp_path / "run" / "seeds" / "4" / "dictionaries" / "ReLU").exists()
    alone = run({"ReLU": Contender((relu(),))}, replace(EXPERIMENT, seeds=(4,)), "alone")
    assert alone.dictionaries[0].runs[0].metrics == two.metrics


TRIALS = [Trial({}, 0.9, 20.0, 1.0), Trial({}, 0.7, 9.0, 1.0), Trial({}, 0.8, 6.5, 1.0), Trial({}, 0.85, 5.0, 1.0)]


@pytest.mark.parametrize(
    ("trials", "l0", "best"),
    [
        (TRIALS, 8.0, 2),  # of those within a quarter of 8, the largest explained variance
        (TRIALS, None, 0),
        (TRIALS, 20.0, 0),
        (TRIALS, 4.0, 3),  # exactly a quarter away is near
        (TRIALS[:2], 14.0, 0),  # none is near: 20 / 14 is less than 14 / 9, though 14 - 9 is less than 20 - 14
        (TRIALS, 13.0, 1),  # 13 / 9 is less than 20 / 13
        ([Trial({}, 0.0, 0.0, 0.0), Trial({}, 0.5, 900.0, 1.0)], 8.0, 1),
    ],
)
def test_best_trial_is_the_best_near_the_l0_asked_for_or_else_the_nearest(trials, l0, best):
    assert best_trial(trials, l0) == best


def test_codes_are_measured_with_every_help_if_that_is_asked_for(run):
    made = {"BAE": Contender((bae(),)), "ReLU": Contender((relu(),))}
    helped = run(made, replace(EXPERIMENT, l0=None), "helped").dictionaries
    without = run(made, replace(EXPERIMENT, l0=None, every_help=False), "without").dictionaries
    for with_help, alone in zip(helped, without, strict=True):
        measured = with_help.runs[0].metrics
        assert measured.optimized is not None
        assert alone.runs[0].metrics == replace(measured, optimized=None, refitted=None)


def test_tuning_chooses_on_the_tuning_documents(run, tmp_path, monkeypatch):
    """The measures of two trials are turned round on the tuning documents alone, and the choice turns with them."""
    made = {
        "ReLU": Contender((relu(0.01), relu(3.0))),
        "Transcoder": Contender((transcoder(), transcoder(2.0)), HOOK_IN, HOOK_OUT),
    }
    experiment = replace(EXPERIMENT, l0=None, seeds=(0, 1))
    honest = run(made, experiment, "honest")
    evaluate = comparing.Comparing._evaluate

    def turned(self: Any, name: str, sae: Any, split: str) -> Any:
        metrics = evaluate(self, name, sae, split)
        return replace(metrics, explained_variance=-metrics.explained_variance) if split == "tune" else metrics

    monkeypatch.setattr(comparing.Comparing, "_evaluate", turned)
    other = run(made, experiment, "turned")
    for one, two, name in zip(honest.dictionaries, other.dictionaries, made, strict=True):
        recipes = [recipe.to_dict() for recipe in made[name].trials]
        assert [trial.recipe for trial in one.trials] == [trial.recipe for trial in two.trials] == recipes
        best = max((0, 1), key=lambda i: one.trials[i].explained_variance)
        assert (one.recipe, two.recipe) == (recipes[best], recipes[1 - best])
        for folder, chosen in (("honest", one), ("turned", two)):
            for place in ("", "seeds/1"):
                path = tmp_path / folder / place / "dictionaries" / name / "training.json"
                assert json.loads(path.read_text())["source"]["recipe"] == chosen.recipe
        sides = opened(tmp_path / "honest", "tune", *made[name].hooks(experiment.hook_name))
        sae = SAE.load_from_disk(tmp_path / "honest" / "trials" / str(best) / "dictionaries" / name)
        tuned, trial = evaluate_dictionary(sae, *(side.rows(side.content) for side in sides)), one.trials[best]
        assert (trial.explained_variance, trial.informative_l0, trial.bits) == (
            tuned.explained_variance,
            tuned.code.informative_l0,
            tuned.bits,
        )
        assert 150 <= len(sides[0].content) < 150 + 15


def test_trial_that_is_chosen_is_not_trained_again(run, steps):
    run({"ReLU": Contender((relu(0.01), relu(3.0)))}, replace(EXPERIMENT, seeds=(5, 6)))
    assert len(steps["standard"]) == 3 * 10  # two trials, and the chosen one with the other seed


STAGES = [
    ("bae_lens.comparison.run.cache_activations", 1),
    ("bae_lens.comparison.comparing.train_dictionary", 5),
    ("bae_lens.comparison.comparing.evaluate_dictionary", 3),
    ("bae_lens.evaluation.model_loss.LossMeter._predictions", 4),
    ("bae_lens.comparison.baselines.pca_quantization", 0),
    ("bae_lens.comparison.origin.feature_dashboards", 1),
]


@pytest.fixture(scope="module")
def whole() -> dict[str, Comparison]:
    """What an uninterrupted comparison gives, made once."""
    return {}


@pytest.mark.parametrize(("stage", "call"), STAGES)
def test_interrupted_comparison_goes_on_and_ends_the_same(run, whole, monkeypatch, steps, stage, call):
    made = {
        "BAE": Contender((bae(), bae(entropy_coefficient=0.1))),
        "Transcoder": Contender((transcoder(0.1), transcoder(2.0)), HOOK_IN, HOOK_OUT),
    }
    experiment = replace(EXPERIMENT, seeds=(0, 1))
    if not whole:
        whole["result"] = run(made, experiment, "whole")
        steps.clear()
    function, calls = pkgutil.resolve_name(stage), []

    def cut(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stage, cut)
        with pytest.raises(KeyboardInterrupt):
            run(made, experiment)
    resumed = run(made, experiment)
    # two trials and another seed of each, nothing twice
    assert {name: len(batches) for name, batches in steps.items()} == {"bae": 30, "transcoder": 30}
    assert timeless(resumed) == timeless(whole["result"])


def test_finished_comparison_does_nothing_again(run, monkeypatch):
    made = {"ReLU": Contender((relu(0.01), relu(3.0)))}
    first = run(made)
    for name in ("comparing.evaluate_dictionary", "origin.feature_dashboards", "baselines.pca_quantization"):
        monkeypatch.setattr(f"bae_lens.comparison.{name}", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr("bae_lens.training.trainer._Run", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr("bae_lens.activations.cache_writer._cache_missing", lambda *_: pytest.fail("cached again"))
    monkeypatch.setattr(LossMeter, "__call__", lambda *_: pytest.fail("spliced again"))
    again = run(made)
    assert again.dictionaries == first.dictionaries
    assert (again.pca, again.gaussian_bound) == (first.pca, first.gaussian_bound)


def test_other_configuration_in_the_folder_is_refused_with_the_difference(run, tmp_path):
    run()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.json")}
    with pytest.raises(ValueError, match=r"holds something else \(training.batch_size: 32 there, 16 now\)"):
        run(experiment=replace(EXPERIMENT, training=TrainingSettings(training_tokens=320, batch_size=16)))
    with pytest.raises(ValueError, match=r"recipes.BAE.0.target_l0: None there, 4.0 now"):
        run({**contenders(), "BAE": Contender((bae(target_l0=4.0),))})
    with pytest.raises(ValueError, match=r"recipes.Transcoder.* there, nothing now"):
        run({name: contender for name, contender in contenders().items() if name != "Transcoder"})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.json")} == before


@pytest.mark.parametrize(
    ("name", "contender", "message"),
    [
        ("B", Contender((bae(d_in=20),)), r"B has d_in 20, but the activations at blocks.0.hook_resid_post are 16"),
        (
            "T",
            Contender((transcoder(d_out=16),), HOOK_IN, HOOK_OUT),
            r"T has d_out 16, but the activations at blocks.1.mlp.hook_post are 32 wide",
        ),
        ("T", Contender((transcoder(),)), r"T is a transcoder and is trained on two hooks, got blocks.0.hook_resid_po"),
        ("B", Contender((bae(),), HOOK_IN, HOOK_OUT), "B is no transcoder and is trained on one hook, got"),
        ("T", Contender((transcoder(),), HOOK_IN, "blocks.7.hook_out"), r"the model has no hook 'blocks.7.hook_out'"),
        ("", Contender((bae(),)), "a dictionary's name must be made of letters, digits, spaces and _.+-, got ''"),
        ("a/b", Contender((bae(),)), "a dictionary's name must be made of letters, digits, spaces and _.+-, got 'a/b'"),
        ("BAE", Contender(()), "the same number of trials, at least one, got BAE: 0"),
    ],
)
def test_contender_that_cannot_be_is_refused_before_anything_is_written(run, tmp_path, name, contender, message):
    with pytest.raises(ValueError, match=message):
        run({name: contender})
    assert not (tmp_path / "run").exists()


def test_hooks_of_a_transcoder_go_together():
    with pytest.raises(ValueError, match=r"hook_name and hook_name_out go together, got blocks.1.mlp.hook_in and None"):
        Contender((transcoder(),), HOOK_IN)


def test_everybody_gets_the_same_number_of_trials(run, tmp_path):
    message = "every dictionary must have the same number of trials, at least one, got BAE: 1, ReLU: 2"
    with pytest.raises(ValueError, match=message):
        run({"BAE": Contender((bae(),)), "ReLU": Contender((relu(1.0), relu(2.0)))})
    assert not (tmp_path / "run").exists()


def test_comparison_of_nothing_is_refused(tiny_model, tiny_dataset, tmp_path):
    with pytest.raises(ValueError, match="a comparison needs at least one dictionary, got none"):
        compare(tiny_model, tiny_dataset, {}, EXPERIMENT, tmp_path)


@pytest.mark.filterwarnings("ignore:the text gave")
def test_text_without_documents_for_tuning_is_refused(tiny_model, tiny_dataset, tmp_path):
    few = tiny_dataset.select(range(5))
    with pytest.raises(ValueError, match="no tune document among 5"):
        compare(tiny_model, few, {"R": Contender((relu(1.0), relu(2.0)))}, EXPERIMENT, tmp_path)


@pytest.mark.filterwarnings("ignore:the text gave")
@pytest.mark.parametrize("at_hooks", [False, True])
def test_text_with_fewer_tokens_than_a_batch_is_refused_before_the_pass(
    tiny_model, tiny_dataset, tmp_path, monkeypatch, at_hooks
):
    monkeypatch.setattr("bae_lens.comparison.run.cache_activations", lambda *_, **__: pytest.fail("the model ran"))
    few = tiny_dataset.select(range(2))  # one to train on, of 24 tokens
    made = {"BAE": Contender((bae(),))}
    run: Any = compare_hooks if at_hooks else compare
    given = {HOOK: made, "blocks.1.hook_resid_post": made} if at_hooks else made
    with pytest.raises(ValueError, match="24 tokens were chosen for training, and a batch takes 32; add text"):
        run(tiny_model, few, given, EXPERIMENT, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_topk_with_its_rescaling_is_compared_as_it_was_trained(run):
    result = run({"Top-k": Contender((Recipe(TopKTrainingSAEConfig(d_in=16, d_sae=64, k=4), lr=1e-3),))})
    (one,) = result.dictionaries[0].runs
    assert 0 < one.metrics.code.l0 <= 4
    assert one.metrics.value_bits > 0


def test_result_is_kept_in_the_folder(run, tmp_path):
    run({"ReLU": Contender((relu(),))})
    assert (tmp_path / "run" / "result.json").exists()


def test_finished_trial_is_not_measured_again(run, monkeypatch):
    made = {"ReLU": Contender((relu(0.01), relu(3.0)))}
    evaluate, saes = comparing.evaluate_dictionary, []

    def cut_at_second(sae: Any, *args: Any, **options: Any) -> Any:
        saes.append(sae)
        if len(saes) == 2:
            raise KeyboardInterrupt
        return evaluate(sae, *args, **options)

    monkeypatch.setattr(comparing, "evaluate_dictionary", cut_at_second)
    with pytest.raises(KeyboardInterrupt):
        run(made)
    run(made)
    assert len(saes) == 2 + 1 + 1  # the first trial, the second twice, and the chosen one on the test documents


def test_name_of_the_folder_above_is_refused(run):
    with pytest.raises(ValueError, match="a dictionary's name must be made of letters"):
        run({"..": Contender((relu(),))})


def test_transcoder_that_reads_after_it_writes_is_refused(run):
    with pytest.raises(ValueError, match="reads after"):
        run({"T": Contender((transcoder(),), "blocks.1.hook_resid_post", "blocks.0.mlp.hook_post")})


def test_progress_is_told_and_each_dictionary_is_measured_as_soon_as_it_is_trained(tiny_model, tiny_dataset, tmp_path):
    told: list[str] = []

    def on_stage(name: str, seconds: float | None) -> None:
        told.append(name if seconds is None else f"{name} done")

    def on_measured(name: str, metrics: Any) -> None:
        assert 0 < metrics.code.l0 < 64
        told.append(f"row of {name}")

    made = {name: contender for name, contender in contenders().items() if name != "Transcoder"}
    compare(
        tiny_model,
        tiny_dataset,
        made,
        EXPERIMENT,
        tmp_path / "run",
        on_stage=on_stage,
        on_measured=on_measured,
    )
    assert [line for line in told if not line.endswith(" done")] == [
        "choose contexts",
        "activations",
        *("train BAE", "measure BAE", "row of BAE"),
        *("train ReLU", "measure ReLU", "row of ReLU"),
        "language model's loss",
        "baselines",
        *("dashboards of BAE", "dashboards of ReLU"),
    ]
    assert told.index("train BAE done") < told.index("measure BAE")


def streaming(keep: KeepActivations, **settings: Any) -> Experiment:
    return replace(EXPERIMENT, keep_activations=keep, every_help=False, **settings)


@pytest.mark.parametrize(
    "made",
    [
        {"BAE": Contender((bae(),))},
        pytest.param({"T": Contender((transcoder(),), HOOK_IN, HOOK_OUT)}, marks=pytest.mark.slow),
    ],
)
def test_streamed_activations_train_what_cached_ones_do_where_the_sample_is_all(run, steps, tmp_path, made):
    cached = run(made, replace(EXPERIMENT, every_help=False), folder="cached")
    streamed = run(made, streaming("none"), folder="streamed")
    (batches,) = steps.values()
    assert_close(torch.cat(batches[10:]), torch.cat(batches[:10]), rtol=1e-4, atol=1e-4)
    explained = [each.dictionaries[0].runs[0].metrics.explained_variance for each in (cached, streamed)]
    assert explained[0] == pytest.approx(explained[1], abs=1e-2)
    assert streamed.train == replace(cached.train, sample_tokens=cached.train.tokens)
    assert (streamed.experiment.keep_activations, streamed.pca) == ("none", cached.pca)
    sae = SAE.load_from_disk(tmp_path / "streamed" / "dictionaries" / streamed.dictionaries[0].name)
    hooks = (HOOK, None) if "BAE" in made else (HOOK_IN, HOOK_OUT)
    assert (sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out) == hooks
    assert not (tmp_path / "streamed" / "activations" / "streamed" / "activations.npy").exists()


def test_what_was_streamed_and_of_what_its_mean_is_are_in_the_result_whatever_is_removed(
    run, steps, tmp_path, monkeypatch
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    made = {"BAE": Contender((bae(),))}
    with monkeypatch.context() as patch:
        patch.setattr("bae_lens.comparison.comparing.evaluate_dictionary", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(made, streaming("own", sample_tokens=100))
    shutil.rmtree(tmp_path / "run" / "activations" / "streamed")
    first = run(made, streaming("own", sample_tokens=100))
    assert (first.train.contexts, first.train.sample_tokens) == (50, 111)
    assert first.train.tokens + first.train.outlier_tokens == 600
    shutil.rmtree(tmp_path / "run" / "activations")
    assert run(made, streaming("none", sample_tokens=100)).train == first.train  # and another way of keeping them
    assert len(steps["bae"]) == 10
    with pytest.raises(ValueError, match=r"holds something else \(sample_tokens: 100 there, 90 now\)"):
        run(made, streaming("none", sample_tokens=90))
    with pytest.raises(ValueError, match=r"holds something else \(sample_tokens: 100 there, nothing now\)"):
        run(made, streaming("all"))


def test_what_cannot_be_streamed_is_refused(run, tiny_model, tiny_dataset, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="to one dictionary, of one recipe and one seed, got 3 with 3 recipes and 1 se"
    ):
        run(experiment=streaming("none"))
    one = {"R": Contender((relu(),))}
    with pytest.raises(ValueError, match="of one recipe and one seed, got 1 with 1 recipes and 2 seeds; train each by"):
        run(one, streaming("own", seeds=(0, 1)))
    with pytest.raises(
        ValueError, match="compare_hooks caches all activations, got keep_activations='own'; stream with compare"
    ):
        compare_hooks(
            tiny_model, tiny_dataset, {HOOK: one, "blocks.1.hook_resid_post": one}, streaming("own"), tmp_path / "run"
        )
    with monkeypatch.context() as patch:
        patch.setattr("bae_lens.comparison.experiment.n_processes", lambda: 2)
        with pytest.raises(ValueError, match="2 processes that stream activations share every step, got share_steps=F"):
            run({"BAE": Contender((bae(),))}, streaming("own"))
        with pytest.raises(
            ValueError, match=r"2 processes stream activations to a bae or .*, got a standard; train it in"
        ):
            compare(tiny_model, tiny_dataset, one, streaming("own"), tmp_path / "run", share_steps=True)
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(ValueError, match="sample_tokens must be at least 1, got 0"):
        streaming("none", sample_tokens=0)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which would refuse it first
    with pytest.raises(ValueError, match="keep_activations must be one of all, own, none, got 'nothing'"):
        streaming("nothing")  # pyright: ignore[reportArgumentType]
