import json
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from bae_lens import ComSem, ComSemReport
from bae_lens.comsem.collect.corpus import CorpusSettings
from bae_lens.comsem.firing_rates import frequency_bin
from bae_lens.comsem.judges.answer_cache import AnswerCache
from bae_lens.comsem.judges.client import ChatClient
from bae_lens.comsem.judges.judge import Verdict
from bae_lens.comsem.judges.language_model import LanguageModelJudge
from bae_lens.comsem.judges.spending import Budget
from bae_lens.comsem.scores.score_test import TESTS, ScoreTest

CORPUS = CorpusSettings(tokens=1200, context_size=16)


@pytest.fixture
def comsem(rule_judge):
    return lambda **options: ComSem(rule_judge, corpus=CORPUS, accept_failing_judge=True, **options)


@pytest.mark.parametrize("setting", ["paper", "robust"])
@pytest.mark.parametrize("kind", ["known_sae", "known_bae"])
def test_features_known_by_construction_are_ranked_right(request, comsem, word_model, word_texts, setting, kind):
    report = comsem(setting=setting).score(word_model, request.getfixturevalue(kind), word_texts)
    digits, the, end, nothing = report.dictionaries[0].features
    assert [feature.explanation for feature in (digits, the, end, nothing)] == ["digits", "the", "sentence end", "word"]
    assert [digits.score, the.score, end.score, nothing.score] == [1, 1, 1, 0]
    assert [digits.specificity, the.specificity] == [1, 1]
    assert nothing.balanced_accuracy == 0.5
    assert [digits.detection, digits.fuzzing, the.detection, the.fuzzing] == [1, 1, 1, 1]
    assert digits.auc == 1
    assert digits.interval == (pytest.approx(0.738, abs=1e-3), 1)
    scores = report.dictionaries[0]
    assert (scores.feature_activated, scores.above_zero, scores.perfect, scores.share_perfect) == (4, 3, 3, 0.75)
    assert {digits.shuffled, the.shuffled, end.shuffled} == {0}
    assert {feature.score for feature in report.random_features} <= {0.0}


def test_a_vague_description_scores_1_and_its_controls_give_it_away(
    comsem, rule_judge, word_model, known_sae, word_texts
):
    async def vague(*_, **__):
        return "a word"

    async def yes(_, instances, __):
        return [Verdict(True, 0.9)] * len(instances)

    rule_judge.explain, rule_judge.judge = vague, yes
    report = comsem().score(word_model, known_sae, word_texts)
    the = report.dictionaries[0].features[1]
    assert (the.score, the.specificity, the.balanced_accuracy, the.auc, the.shuffled) == (1, 0, 0.5, 0.5, 1)
    assert {feature.score for feature in report.random_features} == {1}
    assert not report.self_test.passed
    assert "the†" not in report.table()
    assert "| standard† |" in report.table()
    assert "failed its self-test" in report.table()


EVERY_SCORE = ("detection", "intruder", "simulation", "fuzzing")


def test_every_score_ranks_features_known_by_construction(comsem, word_model, known_bae, known_sae, word_texts):
    for sae in (known_sae, known_bae):
        report = comsem(scores=EVERY_SCORE).score(word_model, sae, word_texts)
        digits, the, _, nothing = report.dictionaries[0].features
        for measure in EVERY_SCORE:
            assert getattr(digits, measure) == getattr(the, measure) == pytest.approx(1)
        assert digits.intruder_interval == digits.interval
        assert (nothing.simulation, nothing.detection) == (0, 0.5)
        assert set(report.score_tests) == {"intruder", "simulation"}
        assert not report.score_tests["simulation"].passed, "the judge knows no words of the test"
        assert "test of simulation: 0.00 on 24 of 24 cases" in report.table()
        assert {feature.simulation for feature in report.random_features} == {0}


def test_a_judge_that_answers_nothing_of_a_score_s_test_is_refused(
    rule_judge, word_model, known_sae, word_texts, monkeypatch
):
    async def nothing(_judge):
        return ScoreTest("simulation", None, 0.0, 0, 24)

    monkeypatch.setitem(TESTS, "simulation", nothing)
    monkeypatch.setattr(ComSem, "_passed_test", lambda _: None)
    with pytest.raises(ValueError, match=r"rules answered none of the cases of simulation's test .*leave it out"):
        ComSem(rule_judge, corpus=CORPUS, scores=("simulation",)).score(word_model, known_sae, word_texts)


def test_scores_that_were_not_asked_for_have_no_column(comsem, word_model, known_sae, word_texts):
    headings = comsem(scores=("intruder",)).score(word_model, known_sae, word_texts).rows()[0]
    assert "intruder" in headings
    assert not {"detection", "simulation", "fuzzing"} & set(headings)


def test_explanations_that_are_not_right_get_their_share_of_every_score(comsem, word_model, known_sae, word_texts):
    asked = comsem(scores=EVERY_SCORE, explanation_controls=True).score(word_model, known_sae, word_texts)
    plain = comsem(scores=EVERY_SCORE).score(word_model, known_sae, word_texts)
    for feature, without in zip(asked.dictionaries[0].features, plain.dictionaries[0].features, strict=True):
        assert list(feature.with_vague) == ["score", "balanced_accuracy", "detection", "simulation", "fuzzing"]
        assert feature.with_vague == {
            "score": 0,
            "balanced_accuracy": 0.5,
            "detection": 0.5,
            "simulation": 0,
            "fuzzing": 0.5,
        }
        assert feature.with_other["score"] == feature.shuffled == without.shuffled
        assert list(without.with_other) == ["score", "balanced_accuracy"]
        assert without.with_vague == {}
        assert replace(feature, with_vague={}, with_other={}) == replace(without, with_other={})


def test_a_judge_without_log_probabilities_is_refused_before_anything_is_collected(chat_server, word_model, known_sae):
    judge = llm(chat_server)
    judge._logprobs = {}
    comsem = ComSem(judge, corpus=CORPUS, scores=("simulation",), accept_failing_judge=True)
    with pytest.raises(ValueError, match="simulation needs log-probabilities; use a server that gives them"):
        comsem.score(word_model, known_sae, [])


def test_the_estimate_counts_a_call_for_each_excerpt_and_puzzle(chat_server, word_model, known_sae, word_texts):
    known_sae.W_enc.data[:, 1:3] = 0.0
    comsem = ComSem(
        llm(chat_server),
        corpus=CORPUS,
        scores=("intruder", "simulation"),
        baseline_features=0,
        accept_failing_judge=True,
    )
    asked = comsem.estimate(word_model, known_sae, word_texts).asked
    assert asked == 20 + 20 + 24 + 2 * (2 + 16 + 8), "of three tests; and of each feature"


def test_controls_and_baselines_never_change_the_score(comsem, word_model, known_sae, word_texts):
    full = comsem().score(word_model, known_sae, word_texts)
    bare = comsem(controls=False, scores=(), baseline_features=0).score(word_model, known_sae, word_texts)
    assert [feature.score for feature in bare.dictionaries[0].features] == [
        feature.score for feature in full.dictionaries[0].features
    ]
    assert {feature.specificity for feature in bare.dictionaries[0].features} == {None}
    assert bare.random_features == []


def test_what_activates_a_feature_and_what_does_not_are_mixed_in_one_question(
    comsem, rule_judge, word_model, known_sae, word_texts
):
    lists = {"marked token": [], "passage": [], "highlights": []}
    judge = rule_judge.judge

    async def record(explanation, instances, question):
        show = "highlighted" if question == "highlights" else "marked"
        lists[question].append((explanation, [getattr(instance, show) for instance in instances]))
        return await judge(explanation, instances, question)

    rule_judge.judge = record
    report = comsem().score(word_model, known_sae, word_texts)
    for feature in report.dictionaries[0].features:
        held_out = [judged.instance.marked for judged in feature.held_out]
        controls = [judged.instance.marked for judged in feature.controls]
        for question in ("marked token", "passage"):
            questions = [
                (text, shown) for text, shown in lists[question] if sorted(shown) == sorted(held_out + controls)
            ]
            (shown,) = {tuple(shown) for _, shown in questions}
            kinds = [marked in held_out for marked in shown]
            assert sum(a != b for a, b in pairwise(kinds)) > 3
        texts = [text for text, shown in lists["marked token"] if sorted(shown) == sorted(held_out + controls)]
        assert len(set(texts)) == 2, "its own explanation and another's"
    highlights = [shown for _, shown in lists["highlights"]]
    assert highlights
    assert all(text.count("<<") > 1 for shown in highlights for text in shown), "one mark was asked about already"


def test_a_judge_that_compares_with_the_corpus_is_tested_as_it_judges(
    comsem, rule_judge, word_model, known_sae, word_texts
):
    prepared, asked = [], []
    judge = rule_judge.judge

    async def record(explanation, instances, question):
        asked.extend(instances)
        assert len(prepared) == 1, "the self-test comes after the preparation"
        return await judge(explanation, instances, question)

    rule_judge.needs_background, rule_judge.judge, rule_judge.prepare = True, record, prepared.append
    comsem().score(word_model, known_sae, word_texts)
    ((background),) = prepared
    assert background
    assert not {instance.sentence for instance in background} & {instance.sentence for instance in asked}


@pytest.mark.parametrize("fails", [False, True])
def test_dictionaries_stay_as_they_are(comsem, rule_judge, word_model, known_bae, word_texts, fails):
    async def fail(*_):
        raise OSError("no judge")

    known_bae.prior.fill_(0.3)
    before = deepcopy(known_bae.state_dict()), known_bae.cfg.to_dict(), known_bae.training
    if fails:
        rule_judge.needs_background, rule_judge.judge = True, fail  # after the collection
    with pytest.raises(OSError, match="no judge") if fails else nullcontext():
        comsem(max_features=1).score(word_model, known_bae, word_texts)
    state, *flags = before
    torch.testing.assert_close(dict(known_bae.state_dict()), state, rtol=0, atol=0, equal_nan=True)
    assert [known_bae.cfg.to_dict(), known_bae.training] == flags


def test_papers_setting_scores_all_features_and_the_robust_one_a_sample(rule_judge):
    limits = [
        ComSem(rule_judge, setting=setting, max_features=given)._max_features
        for setting in ("paper", "robust")
        for given in (None, 0, 7)
    ]
    assert limits == [None, None, 7, 256, None, 7]


def test_authors_setting_reads_sentence_by_sentence_and_leaves_nothing_out(comsem, word_model, known_sae, word_texts):
    report = comsem(setting="authors").score(word_model, known_sae, word_texts)
    assert report.settings["corpus"] == {
        "tokens": 1200, "context_size": 1024, "contexts_per_document": None, "sentences": 8192,
    }  # fmt: skip
    # All four features are among the ten strongest of every token, so that the first in the corpus stand for each.
    for feature in report.dictionaries[0].features:
        assert feature.n_instances == report.n_tokens
        assert [example.position for example in feature.examples] == [1, 2, 3, 4, 5]
        assert len({example.sentence for example in feature.examples}) == 1


def test_authors_questions_need_worked_examples(chat_server):
    with pytest.raises(ValueError, match="give LanguageModelJudge\\(worked_examples=True\\)"):
        ComSem(llm(chat_server), setting="authors")
    judge = LanguageModelJudge("m", ChatClient(chat_server.url), worked_examples=True)
    assert ComSem(judge, setting="authors")._question == "token"


def test_features_may_be_named(comsem, word_model, known_sae, word_texts):
    report = comsem(features=(2, 0), baseline_features=0).score(word_model, known_sae, word_texts)
    assert [feature.feature for feature in report.dictionaries[0].features] == [0, 2]
    with pytest.raises(ValueError, match="standard has features 0 to 3, got 4"):
        comsem(features=(0, 4)).score(word_model, known_sae, word_texts)


def test_features_that_never_fire_are_told(comsem, word_model, known_sae, word_texts):
    known_sae.W_enc.data[:, 1] = known_sae.W_enc.data[:, 2] = 0.0
    report = comsem(features=(1, 0), baseline_features=0).score(word_model, known_sae, word_texts)
    (scores,) = report.dictionaries
    assert (scores.left_out, scores.never_fire) == ([1], 2)
    assert "too few tokens activate features 1 of standard; they are not scored" in report.table()
    message = (
        r"no feature that was named has the 6 instances .* \(features that never fire: 2 of standard\); give more text"
    )
    with pytest.raises(ValueError, match=message):
        comsem(features=(1,)).score(word_model, known_sae, word_texts)


def test_a_text_too_short_for_any_feature_is_refused(comsem, word_model, known_sae):
    with pytest.raises(ValueError, match=r"no feature has the 6 instances that it takes in \d+ tokens"):
        comsem().score(word_model, known_sae, ["Word1 the 4 ship word word."])


def test_dictionaries_may_be_sampled_at_equal_firing_rates(comsem, word_model, make_sae, word_texts):
    one, other = make_sae(), make_sae()
    other.W_enc.data[:, 3] = other.W_enc.data[:, 0]  # three features are rare and one is not, where one has two of each
    report = comsem(match_firing_rates=True, baseline_features=0).score(
        word_model, {"one": one, "other": other}, word_texts
    )
    rates = [[frequency_bin(feature.firing_rate) for feature in scores.features] for scores in report.dictionaries]
    assert sorted(rates[0]) == sorted(rates[1]) == [-3, -3, -2]


def test_a_judge_near_chance_is_refused_before_anything_is_collected(rule_judge, word_model, known_sae):
    with pytest.raises(ValueError, match="which is near chance"):
        ComSem(rule_judge).score(word_model, known_sae, [])


def test_several_dictionaries_are_compared_in_one_report_that_comes_back_from_json(
    comsem, word_model, known_sae, known_bae, word_texts
):
    report = comsem().score(word_model, {"A": known_sae, "B": known_bae}, word_texts)
    assert [dictionary.name for dictionary in report.dictionaries] == ["A", "B"]
    a, b = report.dictionaries
    assert a.features == b.features
    assert report.matched("score") == {"A": a.mean("score"), "B": a.mean("score")}
    assert ComSemReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_score_works_inside_a_running_event_loop(comsem, word_model, known_sae, word_texts):
    import asyncio

    async def notebook():
        return comsem(max_features=1, scores=()).score(word_model, known_sae, word_texts)

    assert len(asyncio.run(notebook()).dictionaries[0].features) == 1


def test_settings_are_checked(rule_judge):
    with pytest.raises(ValueError, match="examples must be at least 1, got 0"):
        ComSem(rule_judge, examples=0)
    with pytest.raises(ValueError, match="costs nothing"):
        ComSem(rule_judge).estimate(None, {}, [])


def llm(chat_server, **options):
    """A model that says yes to everything, in both forms."""

    def answer(body):
        if "response_format" in body:
            schema = body["response_format"]["json_schema"]["schema"]
            return json.dumps(dict.fromkeys(schema["required"], "yes"))
        content = body["messages"][1]["content"]
        return f"words {zlib.crc32(content.encode())}" if "in common?" in content else "Yes"

    chat_server.answer = answer
    return LanguageModelJudge("m", ChatClient(chat_server.url, **options))


@pytest.mark.parametrize(("setting", "calls"), [("paper", 1 + 8 + 8 + 1 + 1), ("robust", 1 + 1 + 1)])
def test_calls_per_feature_and_the_estimate_of_them(
    capsys, chat_server, word_model, known_sae, word_texts, setting, calls
):
    known_sae.W_enc.data[:, 1:3] = 0.0  # two features are left, which share the instances 1 and 3
    judge = llm(chat_server)
    comsem = ComSem(judge, setting=setting, corpus=CORPUS, baseline_features=0, accept_failing_judge=True)
    estimate = comsem.estimate(word_model, known_sae, word_texts)
    assert chat_server.received == 0
    report = comsem.score(word_model, known_sae, word_texts)
    self_test = 80 if setting == "paper" else 20
    # Of one of the features a sentence has several highlights, which takes a question of its own.
    assert chat_server.received == report.usage.asked == estimate.asked == self_test + 2 * calls + 1
    assert "to ask about features" not in capsys.readouterr().err, "where nothing limits it, nobody has to know before"


def test_with_a_budget_what_it_takes_is_told_before(capsys, chat_server, word_model, known_sae, word_texts):
    known_sae.W_enc.data[:, 1:3] = 0.0
    judge = llm(chat_server, budget=Budget(tokens=10**6))
    ComSem(judge, corpus=CORPUS, baseline_features=0, accept_failing_judge=True).score(
        word_model, known_sae, word_texts
    )
    assert "to ask about features: 7 calls to be made and 20 cached" in capsys.readouterr().err


def test_a_refused_key_ends_everything_at_once(chat_server, word_model, known_sae, word_texts):
    chat_server.fault = lambda _: "401"
    with pytest.raises(ValueError, match="refused the key"):
        ComSem(llm(chat_server, concurrency=4)).score(word_model, known_sae, word_texts)
    assert chat_server.received <= 4


def test_explainer_and_judge_may_be_different_models(chat_server, word_model, known_sae, word_texts):
    judge = llm(chat_server)
    explainer = LanguageModelJudge("other", judge.client)
    ComSem(judge, explainer, corpus=CORPUS, max_features=1, accept_failing_judge=True).score(
        word_model, known_sae, word_texts
    )
    asked = Counter((body["model"], "in common?" in body["messages"][1]["content"]) for body in chat_server.bodies)
    assert set(asked) == {("other", True), ("m", False)}


def test_a_spent_budget_keeps_what_was_done_and_the_next_run_goes_on(chat_server, word_model, known_sae, word_texts):
    cache = AnswerCache()

    def run(budget):
        judge = llm(chat_server, cache=cache, concurrency=1, budget=budget)
        comsem = ComSem(judge, corpus=CORPUS, scores=(), baseline_features=0, accept_failing_judge=True)
        return comsem.score(word_model, known_sae, word_texts)

    # 20 questions of the self-test and 8 about features, at 12 tokens each, and the estimate of the one on its way
    first = run(Budget(tokens=900))
    assert first.stopped is not None
    assert "the budget of 900 tokens is spent" in first.table()
    assert len(first.dictionaries[0].features) < 4
    second = run(None)
    assert second.stopped is None
    assert len(second.dictionaries[0].features) == 4
    assert second.usage.cached > 20
    assert max(chat_server.answered.values()) == 1


def test_lost_calls_are_counted_and_left_out(chat_server, word_model, known_sae, word_texts):
    judge = llm(chat_server, max_retries=0, concurrency=1)
    comsem = ComSem(judge, corpus=CORPUS, scores=(), baseline_features=0, accept_failing_judge=True)
    chat_server.fault = lambda number: "503" if number in (20, 23) else None
    report = comsem.score(word_model, known_sae, word_texts)
    features = report.dictionaries[0].features
    assert report.usage.failed == sum(feature.failed > 0 for feature in features) == 2
    assert sum(feature.explanation is None for feature in features) == 2
    assert len(report.dictionaries[0].scores) == 2
    assert "2 calls failed (status 503: 2); the same command asks them again" in report.table()


def test_a_judge_of_which_nothing_can_be_read_is_told_from_a_bad_one(chat_server, word_model, known_sae):
    chat_server.answer = lambda _: "All of these cases fit."
    judge = LanguageModelJudge("m", ChatClient(chat_server.url))
    with pytest.raises(ValueError, match=r"most answers could not be parsed \(no verdicts: 20\), which says nothing"):
        ComSem(judge).score(word_model, known_sae, [])


def test_a_judge_that_left_most_cases_unanswered_is_not_believed(chat_server, word_model, known_sae):
    chat_server.fault = lambda number: None if number < 8 else "blank"
    judge = llm(chat_server, concurrency=1)
    with pytest.raises(OSError, match="48 of 80 cases were not answered: too few to tell; the same command asks"):
        ComSem(judge).score(word_model, known_sae, [])


def test_a_report_of_another_version_is_refused_with_a_sentence(report):
    content = json.loads(json.dumps(report.to_dict()))
    without = {name: value for name, value in content.items() if name != "unparsable"}
    assert ComSemReport.from_dict(without) == report, "of before that was counted"
    described = {**content, "describer": content["explainer"]}
    del described["explainer"]
    with pytest.raises(ValueError, match=r"this report is no ComSemReport of this version of bae_lens .*make it again"):
        ComSemReport.from_dict(described)


@pytest.mark.slow
def test_importing_comsem_imports_nothing_that_only_a_judge_needs():
    code = (
        "import sys; from bae_lens.comsem import *; assert LanguageModelJudge and OfflineJudge and ComSem;"
        "print([name for name in ('openai', 'sklearn.linear_model', 'sentence_transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
