import pytest

from bae_lens.cli.progress import Progress, duration


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_list_of_stages_comes_first(capsys):
    Progress({"load": 10.0, "train": 50.0, "report": 30.0})
    assert lines(capsys) == ["3 stages, about 1 min 30 s on two idle cores:", "  load, train, report"]


def test_what_is_left_follows_the_pace_so_far(capsys):
    progress = Progress({"load": 10.0, "train": 50.0, "report": 30.0})
    progress.on_stage("load", None)
    progress.on_stage("load", 20.0)
    progress.on_stage("train", None)
    assert lines(capsys)[2:] == [
        "[1/3] load: 10 s, all that is left 1 min 30 s",
        "[1/3] load: done in 20 s",
        "[2/3] train: 1 min 40 s, all that is left 2 min 40 s",
    ]


def test_stages_that_an_earlier_run_has_done_are_not_waited_for(capsys):
    progress = Progress({"load": 10.0, "train": 50.0, "report": 30.0})
    progress.on_stage("report", None)
    assert lines(capsys)[-1] == "[3/3] report: 30 s, all that is left 30 s"


def test_rows_stand_under_one_heading(make_comparison, capsys):
    progress, comparison = Progress({"load": 1.0}), make_comparison()
    first, second = comparison.dictionaries[:2]
    for dictionary in (first, second):
        progress.on_measured(dictionary.name, dictionary.runs[0].metrics)
    heading, *rows = lines(capsys)[2:]
    assert heading.startswith("    dictionary")
    assert [row.split()[0] for row in rows] == [first.name.split()[0], second.name.split()[0]]
    assert len({len(line) for line in (heading, *rows)}) == 1
    assert f"{first.runs[0].metrics.explained_variance:.3f}" in rows[0]


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (125.0, "2 min 5 s")])
def test_durations(seconds, said):
    assert duration(seconds) == said
