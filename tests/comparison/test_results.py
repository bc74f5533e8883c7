import json
from dataclasses import asdict, replace

import pytest

from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.contexts import ContextSettings
from bae_lens.comparison.experiment import Experiment
from bae_lens.comparison.results import (
    AS_TRAINED,
    HELP_TABLE,
    OPTIMIZED,
    REFITTED,
    Comparison,
    Corpus,
    DictionaryResult,
    Run,
    Trial,
    codes_of,
    corpus_of,
    over_seeds,
    saebench_core,
)
from bae_lens.evaluation.features import FeatureDashboard, Neighbor, TokenInContext
from bae_lens.evaluation.metrics import CodeMetrics, DictionaryMetrics, OptimizedCode
from bae_lens.evaluation.model_loss import LanguageModelLoss
from bae_lens.functional.rate_distortion import RatePoint
from bae_lens.storage import Stage, validated
from bae_lens.training.recipe import TrainingSettings

CODE = CodeMetrics(100, 6.5, 5.25, 20.4, 16.4, 1, 2, 3, 4, [0.0, 1.0, 0.005, 0.05, 0.1, 0.11, 0.5, 0.02])
CURVE = [RatePoint(50.6, 0.742), RatePoint(60.0, 0.75)]
BETTER = OptimizedCode(replace(CODE, joint_bits=18.4, dead=0), 0.83, 29.2, [RatePoint(49.6, 0.82)])
METRICS = DictionaryMetrics(CODE, 0.751, 12.5, 0.9, 0.8, 30.2, CURVE, False, BETTER, replace(BETTER, value_bits=9.0))
LOSS = LanguageModelLoss(90, clean=2.0, with_sae=2.5, ablated=7.0, kl_with_sae=0.4, kl_ablated=4.0)
DASHBOARD = FeatureDashboard(3, 0.05, [TokenInContext("before", "token", "after", 1.5)], [Neighbor(5, 0.25)], ["yes"])


def run(seed: int, explained_variance: float) -> Run:
    curve: list[dict[str, int | float]] = [{"step": 0, "mse_loss": 2.5}]
    return Run(seed, 10.0 + seed, 1.25, curve, replace(METRICS, explained_variance=explained_variance), LOSS)


@pytest.fixture
def comparison() -> Comparison:
    corpus = Corpus(10, 100, 10, 2, 7.5, ["w1"])
    experiment = Experiment(
        "tiny", "words", "hook", contexts=ContextSettings(64), training=TrainingSettings(1000, 50), l0=8.0, seeds=(3, 4)
    )
    trials = [Trial({"lr": 0.1}, 0.5, 8.0, 40.0), Trial({"lr": 0.2}, 0.6, 9.0, 41.0)]
    return Comparison(
        experiment,
        corpus,
        replace(corpus, tokens=50),
        [Stage("train", 1.5, 0.5)],
        [RatePoint(10.0, 0.5)],
        [RatePoint(10.0, 0.6)],
        [RatePoint(9.0, 0.4)],
        [
            DictionaryResult("BAE", "bae", "h", "h", 8, trials, {"lr": 0.2}, [run(3, 0.7), run(4, 0.8)], [DASHBOARD]),
            DictionaryResult("TC", "transcoder", "h", "out", 8, [], {"lr": 0.1}, [run(3, 0.5), run(4, 0.5)], []),
        ],
    )


def test_comparison_survives_json(comparison, tmp_path):
    content = json.loads(comparison.save(tmp_path).read_text())
    assert Comparison.from_dict(content) == comparison
    assert content == comparison.to_dict()
    assert isinstance(Comparison.from_dict(content).experiment.seeds, tuple)
    for value in (METRICS, LOSS, DASHBOARD):
        assert validated(type(value), json.loads(json.dumps(asdict(value))), "it") == value


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda content: content.pop("pca"), "pca: Field required"),
        (lambda content: content.pop("sign_coding"), "sign_coding: Field required"),  # as in results before there was
        (
            lambda content: content["dictionaries"][0]["runs"][0]["metrics"].pop("optimized"),
            r"dictionaries\.0\.runs\.0\.metrics\.optimized: Field required",
        ),
        (lambda content: content["experiment"].update(seeds=[1, 1]), "experiment: .*seeds must be different"),
        (
            lambda content: content["dictionaries"][0]["runs"][1]["metrics"].pop("is_binary"),
            r"dictionaries\.0\.runs\.1",
        ),
        (lambda content: content["dictionaries"].append(None), r"dictionaries\.2"),
    ],
)
def test_what_is_no_result_is_refused_with_its_place(comparison, change, where):
    content = comparison.to_dict()
    change(content)
    with pytest.raises(ValueError, match=rf"this result is no Comparison of this version of bae_lens \({where}"):
        Comparison.from_dict(content)


def test_codes_are_measured_alike_before_and_after_help(comparison):
    before, values, after = codes_of(comparison.dictionaries[0]).items()
    assert [name for name, _ in (before, values, after)] == [AS_TRAINED, REFITTED, OPTIMIZED]
    assert {heading: cell(after[1]) for heading, cell in HELP_TABLE.items()} == {
        "explained variance": "0.820 ± 0.000",
        "support bits": "20 ± 0",
        "joint bits": "18 ± 0",
        "value bits": "29 ± 0",
        "bits": "48 ± 0",  # 18.4 + 29.2
        "L0": "6.5 ± 0.0",
        "dead": "0 ± 0",
        "dense": "3 ± 0",
        "Feature Activated": "4 ± 0",
    }
    assert HELP_TABLE["bits"](before[1]) == "47 ± 0"  # 16.4 + 30.2
    assert HELP_TABLE["value bits"](values[1]) == "9 ± 0"


def test_codes_that_were_not_measured_are_left_out(comparison):
    binary = comparison.dictionaries[0]
    runs = [replace(run, metrics=replace(run.metrics, refitted=None, optimized=None)) for run in binary.runs]
    assert list(codes_of(replace(binary, runs=runs))) == [AS_TRAINED]


def test_table_has_a_row_a_dictionary_with_mean_and_standard_deviation(comparison):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in comparison.table().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert lines[1] == ["---", *["---:"] * (len(lines[0]) - 1)]
    assert [row["dictionary"] for row in rows] == ["BAE", "TC"]
    assert rows[0] == {
        "dictionary": "BAE",
        "writes": "h",
        "explained variance": "0.750 ± 0.071",  # of 0.7 and 0.8, with n - 1
        "CE recovered": "0.900 ± 0.000",
        "KL recovered": "0.900 ± 0.000",
        "L0": "6.5 ± 0.0",
        "informative L0": "5.2 ± 0.0",
        "support bits": "20 ± 0",
        "value bits": "30 ± 0",
        "dead": "1 ± 0",
        "always on": "2 ± 0",
        "dense": "3 ± 0",
        "Feature Activated": "4 ± 0 of 8",
        "training": "14 ± 1 s",
        "memory": "1.25 ± 0.00 GiB",
    }
    assert rows[1]["writes"] == "out"


def test_one_seed_has_no_spread():
    assert over_seeds([2.345], 2) == "2.35"
    assert over_seeds([1, 3], 1) == "2.0 ± 1.4"


def test_saebench_file_has_its_keys_and_our_values(comparison, tmp_path):
    comparison.save(tmp_path)
    names = {path.name for path in (tmp_path / "saebench").iterdir()}
    assert names == {"BAE_seed3.json", "BAE_seed4.json", "TC_seed3.json", "TC_seed4.json"}
    content = json.loads((tmp_path / "saebench" / "BAE_seed4.json").read_text())
    assert content == saebench_core(comparison, comparison.dictionaries[0], comparison.dictionaries[0].runs[1])
    assert content["eval_type_id"] == "core"
    assert content["sae_lens_id"] == "BAE_seed4"
    assert content["eval_config"] == {"model_name": "tiny", "dataset": "words", "context_size": 64}
    assert content["eval_result_metrics"] == {
        "model_behavior_preservation": {
            "kl_div_score": 0.9,
            "kl_div_with_ablation": 4.0,
            "kl_div_with_sae": 0.4,
        },
        "model_performance_preservation": {
            "ce_loss_score": 0.9,
            "ce_loss_with_ablation": 7.0,
            "ce_loss_with_sae": 2.5,
            "ce_loss_without_sae": 2.0,
        },
        "reconstruction_quality": {"explained_variance": 0.8, "mse": 12.5, "cossim": 0.9},
        "shrinkage": {"l2_ratio": 0.8},
        "sparsity": {"l0": 6.5},
        "token_stats": {"total_tokens_eval_reconstruction": 90, "total_tokens_eval_sparsity_variance": 100},
        "misc_metrics": {"freq_over_1_percent": 6 / 8, "freq_over_10_percent": 3 / 8},
    }
    assert content["eval_result_details"][2] == {"index": 2, "feature_density": 0.005}
    assert len(content["eval_result_details"]) == 8


@pytest.mark.parametrize("seeds", [(), (1, 1)])
def test_seeds_must_be_different(seeds):
    with pytest.raises(ValueError, match="seeds must be different, at least one, got"):
        Experiment("m", "t", "h", seeds=seeds)


def test_outlier_tokens_are_described(states, tiny_tokenizer):
    train: CachedActivations = states[0]
    norms, at = train.norms, 2 * 16 + 5
    norms[at] = 100 * norms[~train.special].median()
    corpus = corpus_of(train, lambda token: tiny_tokenizer.decode([token]))
    assert corpus.outlier_tokens == 1
    assert corpus.outlier_examples == [tiny_tokenizer.decode([train.contexts.tokens.flatten()[at]])]
    assert corpus.largest_norm == pytest.approx(100, rel=0.05)
    assert corpus.tokens == int((train.contexts.tokens >= 3).sum()) - 1
    assert corpus.special_tokens == corpus.contexts == 50  # one BOS each


def test_comparison_can_be_saved_into_a_new_folder(comparison, tmp_path):
    comparison.save(tmp_path / "new")
