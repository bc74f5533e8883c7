import re
from dataclasses import replace
from statistics import stdev
from typing import Any

import pytest

from bae_lens import Experiment, HookComparisons, HookRow
from bae_lens.report.by_layer import layer_charts, write_layer_report
from bae_lens.storage import Stage

ROW = HookRow(
    comparison_hook="blocks.0.hook_resid_post",
    dictionary="BAE",
    architecture="bae",
    is_binary=True,
    hook_name="blocks.0.hook_resid_post",
    hook_name_out="blocks.0.hook_resid_post",
    d_sae=64,
    seed=0,
    training_seconds=1.0,
    explained_variance=0.9,
    ce_recovered=0.8,
    kl_recovered=0.7,
    l0=8.0,
    informative_l0=7.0,
    support_bits=50.0,
    joint_bits=40.0,
    value_bits=0.0,
    dead=3,
    always_on=0,
    dense=1,
    feature_activated=30,
)
TOPK = replace(ROW, dictionary="Top-k", architecture="topk", is_binary=False, value_bits=20.0)


def moved(row: HookRow, comparison: str, writes: str = "", **changes: Any) -> HookRow:
    return replace(row, comparison_hook=comparison, hook_name=comparison, hook_name_out=writes or comparison, **changes)


def result(*rows: HookRow) -> HookComparisons:
    seeds = tuple(dict.fromkeys(row.seed for row in rows))
    stages = [Stage("activations", 2.0, 1.0), Stage(rows[0].comparison_hook, 3.0, 1.0)]
    return HookComparisons(
        Experiment("/models/llama", "words", ROW.comparison_hook, seeds=seeds), 600, 300, 7, stages, [*rows]
    )


def points(found: HookComparisons, measure: str, place: str = "hook_resid_post") -> dict[str, list]:
    return {series.name: series.points for series in layer_charts(found)[measure][place].series}


def test_a_line_goes_through_the_layers_of_each_dictionary_in_their_order():
    deep = "blocks.12.hook_resid_post"
    found = result(moved(ROW, deep, explained_variance=0.5, dead=9), moved(TOPK, deep, value_bits=25.0), ROW, TOPK)
    assert points(found, "explained variance") == {"BAE": [(0.0, 0.9), (12.0, 0.5)], "Top-k": [(0.0, 0.9), (12.0, 0.9)]}
    assert points(found, "dead")["BAE"] == [(0.0, 3), (12.0, 9)]
    assert points(found, "value bits") == {"Top-k": [(0.0, 20.0), (12.0, 25.0)]}  # a binary code has no values
    chart = layer_charts(found)["dead"]["hook_resid_post"]
    assert [series.symbol for series in chart.series] == ["diamond", "circle"]
    assert (chart.x_ticks, chart.y_range) == ([0.0, 12.0], pytest.approx((-0.04 * 9.9, 9.9)))
    assert [series.intervals for series in chart.series] == [[], []]


def test_seeds_are_one_mark_with_their_spread():
    found = result(ROW, replace(ROW, seed=1, explained_variance=0.8), replace(ROW, seed=2, explained_variance=0.7))
    (series,) = layer_charts(found)["explained variance"]["hook_resid_post"].series
    spread = stdev([0.9, 0.8, 0.7])
    assert series.points == [(0.0, pytest.approx(0.8))]
    assert series.intervals == [pytest.approx((0.8 - spread, 0.8 + spread))]


def test_places_in_a_layer_have_charts_of_their_own_and_transcoders_are_where_they_write():
    mlp = "blocks.0.hook_mlp_out"
    found = result(
        ROW, moved(TOPK, ROW.comparison_hook, mlp, explained_variance=0.3), moved(ROW, mlp, ce_recovered=None)
    )
    charts = layer_charts(found)
    assert list(charts["explained variance"]) == ["hook_resid_post", "hook_mlp_out"]
    assert points(found, "explained variance", "hook_mlp_out") == {"Top-k": [(0.0, 0.3)], "BAE": [(0.0, 0.9)]}
    assert points(found, "CE recovered", "hook_mlp_out") == {
        "Top-k": [(0.0, 0.8)]
    }  # unknown where zeros change nothing
    assert list(charts["value bits"]) == ["hook_mlp_out"]
    assert "value bits" not in layer_charts(result(ROW))


def test_page_links_to_each_hooks_report_and_loads_nothing(tmp_path):
    name, deep = "<img src=x>", "blocks.1.hook_resid_post"
    found = result(ROW, replace(ROW, dictionary=name), moved(ROW, deep), moved(ROW, deep, dictionary=name))
    page = write_layer_report(found, tmp_path).read_text()
    body = page[page.index("<body>") :]
    links = re.findall(r'(?:href|src)="([^"#]+)"', body)
    assert links == [f"hooks/{hook}/report.html" for hook in (ROW.comparison_hook, deep)]
    assert "<img" not in body
    assert len(re.findall('id="figure-', body)) == 7  # every measure but value bits, of one place
    assert "0.900" in body
    assert "30 of 64" in body
    assert "/models" not in page
    assert "One seed" in body
    mlp = moved(ROW, deep, "blocks.1.hook_mlp_out")
    both = write_layer_report(result(ROW, replace(ROW, seed=1), mlp, replace(mlp, seed=1)), tmp_path).read_text()
    assert len(re.findall('id="figure-', both)) == 14
    assert "over 2 seeds" in both
