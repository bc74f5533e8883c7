from dataclasses import replace

import pytest

from bae_lens.comsem.judges.judge import Verdict
from bae_lens.comsem.judges.spending import Usage
from bae_lens.report import comsem_figures as plots_comsem
from bae_lens.report.comsem import n_wrong, worst_first, write_comsem_report


def test_page_is_one_file_with_the_table_and_wrong_verdicts_first(report, tmp_path):
    html = write_comsem_report(report, tmp_path).read_text()
    assert "known†" in html
    assert "failed its self-test" in html
    assert 'src="http' not in html
    assert html.index("3: word") < html.index("1: the")
    assert 'class="wrong"' in html


def test_failures_and_costs_are_told(report, tmp_path):
    lost = replace(report, failures={"cut off": 2}, usage=Usage(failed=2, cost=1.5))
    html = write_comsem_report(lost, tmp_path).read_text()
    assert "2 calls failed (cut off: 2); the same command asks them again" in html
    assert "cost\n  1.5000" in html
    assert "calls failed (" not in write_comsem_report(report, tmp_path).read_text()


def test_no_script_from_elsewhere_runs_in_the_page(report, tmp_path):
    html = write_comsem_report(report, tmp_path).read_text()
    assert html.index("Content-Security-Policy\" content=\"default-src 'none';") < html.index("<script")


def test_answers_that_could_not_be_parsed_are_told(report, tmp_path):
    html = write_comsem_report(replace(report, unparsable={"no verdicts": 3}), tmp_path).read_text()
    assert "3 answers could not be parsed (no verdicts: 3); the same command asks them again" in html


def test_text_of_the_corpus_is_escaped(report, tmp_path):
    dictionary = report.dictionaries[0]
    feature = dictionary.features[0]
    instance = replace(feature.examples[0], sentence="<script>1</script>", token=(8, 9), highlights=[(8, 9)])
    features = [replace(feature, explanation="<b>", examples=[instance])]
    changed = replace(report, dictionaries=[replace(dictionary, features=features)])
    html = write_comsem_report(changed, tmp_path).read_text()
    assert "&lt;script&gt;<mark>1</mark>&lt;/script&gt;" in html
    assert "&lt;b&gt;" in html


def test_features_with_most_wrong_verdicts_come_first(report):
    features = report.dictionaries[0].features
    assert [n_wrong(feature) for feature in features[:2]] == [0, 0]
    assert n_wrong(features[3]) == 8
    assert worst_first(features)[0] is features[3]


def test_an_abstention_is_counted_and_no_wrong_verdict(report, tmp_path):
    dictionary = report.dictionaries[0]
    wrong = dictionary.features[3]
    judged = replace(wrong.held_out[0], verdict=Verdict(None, abstained=True))
    feature = replace(wrong, held_out=[judged, *wrong.held_out[1:]], abstained=1)
    assert n_wrong(feature) == n_wrong(wrong) - 1
    changed = replace(report, dictionaries=[replace(dictionary, features=[feature])])
    headings, row, *_ = changed.rows()
    assert dict(zip(headings, row, strict=True))["abstained"] == "1"
    assert write_comsem_report(changed, tmp_path).read_text().count('data-verdict="\u2013"') == 1


def test_distribution_is_the_share_with_at_least_a_score(report):
    known, random_tokens = plots_comsem.score_distribution(report).to_dict()["data"]
    assert (known["x"], known["y"]) == ([0, 1], [1, 0.75])
    assert random_tokens["name"] == "random tokens†"


def test_scores_by_frequency_are_means_of_their_bins(report):
    (line,) = plots_comsem.score_by_frequency(report, "score", "score").to_dict()["data"]
    assert sum(int(text.split()[0]) for text in line["text"]) == 4
    assert all(0 < rate < 1 for rate in line["x"])


def test_weighted_scores_count_each_feature_as_often_as_it_fires(report):
    dictionary = report.dictionaries[0]
    one, other, unknown = (replace(feature, detection=None) for feature in dictionary.features[:3])
    features = [
        replace(one, firing_rate=0.3, detection=0.5),
        replace(other, firing_rate=0.1, detection=0.9),
        replace(unknown, firing_rate=0.9),
    ]
    changed = replace(dictionary, features=features)
    assert changed.weighted("detection") == pytest.approx((0.3 * 0.5 + 0.1 * 0.9) / 0.4)
    headings, row, *_ = replace(report, dictionaries=[changed]).rows()
    assert dict(zip(headings, row, strict=True))["weighted detection"] == "0.600"
    silent = replace(dictionary, features=[unknown])
    assert silent.weighted("detection") is None
    headings, *_ = replace(report, dictionaries=[silent], random_features=[]).rows()
    assert "weighted detection" not in headings
    assert "weighted score" in headings
