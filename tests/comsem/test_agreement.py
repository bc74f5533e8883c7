import json
from dataclasses import replace

import pytest

from bae_lens.comsem.agreement import Agreement, compare_scores


def changed(report, seed=1, features=slice(None), **fields):
    """As if it had been made otherwise: with other scores, and other features."""
    dictionary = report.dictionaries[0]
    kept = [replace(feature, **fields) for feature in dictionary.features[features]]
    return replace(
        report, settings={**report.settings, "seed": seed}, dictionaries=[replace(dictionary, features=kept)]
    )


def test_what_overlaps_is_compared_and_what_does_not_is_counted(report):
    other = changed(report, features=slice(1, None), detection=None)
    other.dictionaries[0].features.append(replace(other.dictionaries[0].features[0], feature=17))
    (change,) = compare_scores({"a": report, "b": other}).changes
    assert (change.first, change.second, change.differ) == ("a", "b", ["seed"])
    assert (change.n_both, change.n_only_first, change.n_only_second) == (3, 1, 1)
    measures = {stability.measure: stability for stability in change.measures}
    assert set(measures) == {"score", "balanced_accuracy", "fuzzing"}, "detection is known of one of them only"
    assert (measures["score"].correlation.value, measures["score"].difference.value) == (pytest.approx(1), 0)


def test_features_of_other_models_and_dictionaries_are_others(report):
    for unlike in (
        replace(report, model="another"),
        replace(report, dictionaries=[replace(report.dictionaries[0], weights="others")]),
    ):
        (change,) = compare_scores({"a": report, "b": unlike}).changes
        assert (change.n_both, change.n_only_first, change.n_only_second, change.measures) == (0, 4, 4, [])


def test_what_differs_between_runs_is_named(report):
    other = replace(report, judge="other", explainer="other", setting="paper", dataset="elsewhere")
    (change,) = compare_scores({"a": report, "b": other}).changes
    assert change.differ == ["judge", "explainer", "setting", "text"]
    taught = replace(report, settings={**report.settings, "worked_examples": True})
    assert compare_scores({"a": report, "b": taught}).changes[0].differ == ["worked examples"]
    assert compare_scores({"a": report, "b": report}).changes[0].differ == []


def test_controls_are_over_the_features_of_which_all_are_known(report):
    dictionary = report.dictionaries[0]
    asked = [
        replace(dictionary.features[0], detection=0.9, with_other={"detection": 0.5}, with_vague={"detection": 0.9}),
        replace(dictionary.features[1], detection=0.7, with_other={"detection": 0.8}, with_vague={"detection": 0.5}),
        replace(dictionary.features[2], detection=0.1, with_other={"detection": None}, with_vague={"detection": 0.5}),
        dictionary.features[3],
    ]
    (run,) = compare_scores({"a": replace(report, dictionaries=[replace(dictionary, features=asked)])}).runs
    (control,) = run.controls
    assert control.measure == "detection"
    assert [control.right.value, control.other.value, control.vague.value] == pytest.approx([0.8, 0.65, 0.7])
    assert (control.over_other.value, control.over_vague.value, control.right.n) == (0.5, 0.75, 2)


def test_pairs_are_by_dictionary_and_of_all_and_only_of_what_was_measured(report):
    two = replace(report, dictionaries=[*report.dictionaries, replace(report.dictionaries[0], name="twin")])
    (run,) = compare_scores({"a": two}).runs
    assert list(run.pairs) == ["all dictionaries", "known", "twin"]
    assert [(pair.first, pair.second) for pair in run.pairs["twin"]] == [
        ("detection", "score"),
        ("detection", "balanced_accuracy"),
        ("detection", "fuzzing"),
        ("score", "balanced_accuracy"),
        ("score", "fuzzing"),
        ("balanced_accuracy", "fuzzing"),
    ]
    assert run.pairs["all dictionaries"][0].correlation.n == 8
    assert list(run.means) == ["known", "twin", "random tokens"]
    assert run.means["known"]["score"].value == 0.75


def test_tables_and_numbers_come_back_from_json(report):
    found = compare_scores({"a": report, "b": changed(report)})
    assert Agreement.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert "| detection and score | 1.00 | 1.00 |" in found.table()
    assert "| differ in | seed |" in found.table()
    assert "| features in both | 4 |" in found.table()
    with pytest.raises(ValueError, match="this agreement is no Agreement of this version"):
        Agreement.from_dict({"runs": 1})
    with pytest.raises(ValueError, match="there are no ComSem reports"):
        compare_scores({})
