"""Scores in the shapes that other tools read: SAEBench's results and Neuronpedia's explanations."""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bae_lens.comsem.results import ComSemReport, DictionaryScores
from bae_lens.storage import write_text

RESULT_FILE = "comsem.json"
MEASURES = (
    "score",
    "specificity",
    "balanced_accuracy",
    "auc",
    "probability",
    "shuffled",
    "detection",
    "intruder",
    "simulation",
    "fuzzing",
)


def save(report: ComSemReport, folder: Path) -> None:
    """Writes `comsem.json` and, for each dictionary, `saebench/NAME.json` and `neuronpedia/NAME.jsonl`.

    Raises ValueError for a name that is none of a file, before anything is written.
    """
    for dictionary in report.dictionaries:
        if set(dictionary.name) & {"/", "\\", "\0"} or dictionary.name in ("", ".", ".."):
            raise ValueError(
                f"files are named after dictionaries, and {dictionary.name!r} is no name of one; rename it"
            )
    for shape in ("saebench", "neuronpedia"):
        (folder / shape).mkdir(parents=True, exist_ok=True)
    for dictionary in report.dictionaries:
        result = json.dumps(sae_bench_result(report, dictionary), indent=2)
        write_text(folder / "saebench" / f"{dictionary.name}.json", result)
        lines = [json.dumps(explanation) + "\n" for explanation in neuronpedia_explanations(report, dictionary)]
        write_text(folder / "neuronpedia" / f"{dictionary.name}.jsonl", "".join(lines))
    write_text(folder / RESULT_FILE, json.dumps(report.to_dict()))


def sae_bench_result(report: ComSemReport, dictionary: DictionaryScores) -> dict[str, Any]:
    """One dictionary's scores with the keys of an evaluation of SAEBench."""
    matched = {measure: report.matched(measure)[dictionary.name] for measure in ("score", "balanced_accuracy")}
    return {
        "eval_type_id": "comsem",
        "eval_config": {
            "setting": report.setting,
            "model_name": report.model,
            "judge": report.judge,
            "explainer": report.explainer,
            **report.settings,
        },
        "eval_id": f"comsem {report.model} {dictionary.hook_name} {dictionary.name} {report.judge}",
        "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": {
            "comsem": {
                "feature_activated": dictionary.feature_activated,
                "features_scored": len(dictionary.scores),
                "score_above_zero": dictionary.above_zero,
                "score_one": dictionary.perfect,
                "share_score_one": dictionary.share_perfect,
                **{measure: dictionary.mean(measure) for measure in MEASURES},
                **{f"frequency_matched_{measure}": value for measure, value in matched.items()},
                "judge_passed_self_test": report.self_test.passed,
            }
        },
        "eval_result_details": [
            {
                "feature": feature.feature,
                "firing_rate": feature.firing_rate,
                "explanation": feature.explanation,
                "interval": feature.interval,
                **{measure: getattr(feature, measure) for measure in MEASURES},
            }
            for feature in dictionary.features
        ],
        "sae_bench_commit_hash": "",
        "sae_lens_id": dictionary.name,
        "sae_lens_release_id": "",
        "sae_lens_version": version("sae-lens"),
        "sae_cfg_dict": {
            "architecture": dictionary.architecture,
            "hook_name": dictionary.hook_name,
            "d_sae": dictionary.d_sae,
            "model_name": report.model,
        },
        "eval_result_unstructured": {},
    }


def neuronpedia_explanations(report: ComSemReport, dictionary: DictionaryScores) -> list[dict[str, Any]]:
    """Explanations of the scored features in Neuronpedia's fields; the explainer bears the judge's mark."""
    return [
        {
            "modelId": report.model,
            "source": f"{dictionary.hook_name}-{dictionary.name}",
            "index": str(feature.feature),
            "explanation": feature.explanation,
            "typeName": f"comsem-{report.setting}",
            "explanationModelName": report.explainer + report.mark,
        }
        for feature in dictionary.features
        if feature.explanation is not None
    ]
