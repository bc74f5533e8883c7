from dataclasses import replace

import pytest

from bae_lens.comsem.table1 import Table1Row, table1

ROW = Table1Row("bae", d_sae=400, feature_activated=300, scoreable=250, scored=50, above_zero=40, perfect=10)


def test_a_sample_speaks_for_all_features_that_could_be_scored():
    assert ROW.share_above_zero == 0.8
    assert ROW.above_zero_interval == pytest.approx((0.674, 0.892), abs=1e-3)
    assert ROW.cells(chosen=False) == [
        "bae",
        "300 of 400",
        "50 of 250",
        "about 200 (169 to 223)",
        "0.200 (0.108 to 0.326)",
    ]


def test_of_all_features_the_number_itself_is_told():
    assert replace(ROW, scoreable=50).cells(chosen=False)[3] == "40"


def test_chosen_features_speak_for_themselves(report):
    assert ROW.cells(chosen=True)[3] == "40"
    assert not table1(report).chosen
    for choice in ({"features": [1]}, {"match_firing_rates": True}):
        assert table1(replace(report, settings=report.settings | choice)).chosen


def test_of_what_was_not_scored_only_what_is_known_is_told():
    nothing = replace(ROW, scored=0, above_zero=0, perfect=0)
    assert nothing.cells(chosen=False) == [
        "bae",
        "300 of 400",
        "0 of 250",
        "",
        "",
    ]


def test_the_table_is_made_of_a_report(report):
    table = table1(report)
    assert [row.name for row in table.rows] == ["known", "random tokens"]
    known = table.rows[0]
    assert (known.feature_activated, known.scored, known.above_zero, known.perfect) == (4, 4, 3, 3)
    assert "| known\u2020 | 4 of 4 | 4 of 4 | 3 | 0.750 (" in table.table(), "the judge failed its test"
