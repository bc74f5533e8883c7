import json
import sys

import pytest

from bae_lens.cli import main as cli
from bae_lens.comsem.agreement import Agreement
from bae_lens.comsem.judges.self_test import KindOfCase, SelfTest
from bae_lens.comsem.judges.spending import Usage
from bae_lens.comsem.results import ComSemReport, DictionaryScores, FeatureScore


def feature(number):
    scores = dict.fromkeys(("score", "specificity", "balanced_accuracy", "auc", "probability"), number / 12)
    asked = {"examples": [], "held_out": [], "controls": [], "interval": None, "unparsable": 0, "failed": 0}
    return FeatureScore(number, 0.1, 9, "words", **asked, **scores, detection=number / 12, fuzzing=None)


REPORT = ComSemReport(
    setting="robust",
    model="tiny",
    judge="judge",
    explainer="judge",
    base_url=None,
    settings={"seed": 0, "corpus": {}},
    self_test=SelfTest("judge", KindOfCase(40, 40, 1.0, 1.0), {}, 0, None),
    n_tokens=100,
    n_sentences=10,
    dictionaries=[DictionaryScores("A", "bae", "hook", 16, 12, 12, [feature(number) for number in range(12)])],
    random_features=[],
    usage=Usage(),
    failures={},
    stopped=None,
)


@pytest.fixture
def scored(tmp_path):
    """Two folders that hold a report, one directly and one as a run does."""
    for folder in (tmp_path / "a", tmp_path / "b" / "comsem"):
        folder.mkdir(parents=True)
        (folder / "comsem.json").write_text(json.dumps(REPORT.to_dict()))
    return tmp_path


@pytest.fixture
def agreement(monkeypatch, tmp_path):
    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["bae-lens", "agreement", *arguments])
        cli.main()

    return run


def test_runs_are_compared_and_written(agreement, scored, capsys):
    agreement("a", "b", "--output", "out")
    out = capsys.readouterr().out
    assert "| rank correlation | a | b |" in out
    assert "| detection and score | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) |" in out
    assert "| differ in | nothing |" in out
    written = Agreement.from_dict(json.loads((scored / "out" / "agreement.json").read_text()))
    assert [run.name for run in written.runs] == ["a", "b"]
    assert (scored / "out" / "agreement.html").exists()


def test_one_run_has_pairs_of_scores_and_no_changes(agreement, scored, capsys):
    agreement("a")
    assert "of each score with itself" not in capsys.readouterr().out
    assert (scored / "agreement" / "agreement.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the folders that bae-lens comsem has written"),
        (["nowhere"], "nowhere holds no comsem.json; choose what bae-lens comsem wrote"),
        (["a", "a"], "a folder is named twice among a, a"),
    ],
)
def test_users_error_ends_with_one_line(agreement, scored, capsys, arguments, message):  # noqa: ARG001
    with pytest.raises(SystemExit) as stop:
        agreement(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
