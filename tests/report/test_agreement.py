from dataclasses import replace
from typing import Any

import pytest

from bae_lens.comsem.agreement import (
    Agreement,
    Change,
    ExplanationControl,
    ScoredRun,
    ScorePair,
    Stability,
)
from bae_lens.comsem.estimates import Estimate
from bae_lens.report.agreement import correlations, explanation_controls, write_agreement_report

HALF = Estimate(0.5, (0.25, 0.75), 12)
FEW = Estimate(0.5, None, 4)
UNKNOWN = Estimate(None, None, 0)


def traces(figure) -> Any:
    return figure.data


@pytest.fixture
def agreement():
    run = ScoredRun(
        name="<first>",
        model="m",
        judge="j",
        explainer="j",
        setting="robust",
        dataset="text",
        seed=0,
        passed=True,
        failed_tests=[],
        n_features={"A": 12},
        means={"A": {"detection": HALF, "score": FEW}, "random tokens": {"detection": UNKNOWN, "score": UNKNOWN}},
        pairs={"A": [ScorePair("detection", "score", HALF)]},
        controls=[ExplanationControl("score", HALF, FEW, FEW, HALF, FEW)],
    )
    change = Change("<first>", "second", ["seed"], 12, 3, 0, [Stability("detection", HALF, FEW)])
    return Agreement([run, replace(run, name="second", controls=[])], [change])


def test_page_says_what_is_known_and_what_is_not(agreement, tmp_path):
    html = write_agreement_report(agreement, tmp_path).read_text()
    assert "&lt;first&gt;" in html
    assert "<first>" not in html
    assert "0.50 (0.25 to 0.75)" in html
    assert "12 features were scored in both; 3 only in the first" in html
    assert "Not asked in this run" in html
    assert 'class="warning"' not in html
    assert 'src="http' not in html


def test_a_judge_that_failed_is_marked(agreement, tmp_path):
    failed = replace(agreement.runs[0], passed=False, failed_tests=["simulation", "intruder"])
    html = write_agreement_report(Agreement([failed], []), tmp_path).read_text()
    assert "the judge failed its self-test" in html
    assert "It failed the test of known cases of\n  simulation and intruder." in html
    assert "One run says nothing of this; name several." in html


def test_the_square_is_symmetric_and_its_diagonal_empty():
    pairs = [ScorePair("detection", "score", HALF), ScorePair("score", "fuzzing", UNKNOWN)]
    (square,) = traces(correlations(pairs))
    assert square.y == ("detection", "ComSem", "fuzzing")
    assert [list(row) for row in square.z] == [[None, 0.5, None], [0.5, None, None], [None, None, None]]
    assert square.text[0][1] == "0.50"


def test_bars_have_their_intervals(agreement):
    own, other, vague = traces(explanation_controls(agreement.runs[0]))
    assert (own.name, other.name, vague.name) == ("its own", "another's", "vague")
    assert (own.error_y.array, own.error_y.arrayminus) == ((0.25,), (0.25,))
    assert (other.error_y.array, other.error_y.arrayminus) == ((0.0,), (0.0,))
