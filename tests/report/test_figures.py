from dataclasses import replace
from typing import Any

import pytest

from bae_lens.functional.rate_distortion import RatePoint
from bae_lens.report import series
from bae_lens.report.figures import draw

HOOK, MLP_OUT = "blocks.0.hook_resid_post", "blocks.0.hook_mlp_out"


def traces(figure: Any, name: str) -> list[Any]:
    return [trace for trace in figure.data if trace.name == name]


def titles(figure):
    return figure.layout.xaxis.title.text, figure.layout.yaxis.title.text


def test_panels_begin_with_the_hook_of_the_comparison(make_comparison):
    comparison = make_comparison(("Transcoder", "BAE", "Top-k"))
    panels = series.by_hook(comparison)
    assert list(panels) == [HOOK, MLP_OUT]
    assert [dictionary.name for dictionary in panels[HOOK]] == ["BAE", "Top-k"]


def test_real_values_are_a_curve_with_a_mark_where_the_table_counts_their_bits(comparison):
    figure: Any = draw(series.quality_by_bits(comparison, HOOK))
    curves, marks = traces(figure, "Top-k")
    (bits,) = traces(figure, "BAE")
    metrics = [[run.metrics for run in dictionary.runs] for dictionary in comparison.dictionaries[:2]]
    assert list(curves.x[:8]) == [point.bits for point in metrics[0][0].value_curve]
    assert curves.x[8] is None  # a gap between seeds
    assert marks.x == pytest.approx([m.code.support_bits + 120 for m in metrics[0]])
    assert list(marks.y) == [m.value_curve[3].explained_variance for m in metrics[0]]
    assert list(bits.x) == [m.code.support_bits for m in metrics[1]]
    assert list(bits.y) == [m.explained_variance for m in metrics[1]]
    assert (marks.marker.symbol, bits.marker.symbol) == ("circle", "diamond")
    assert titles(figure) == ("bits per token", "explained variance (1 is perfect)")


def test_help_has_a_curve_for_each_code_of_values_and_counts_joint_bits(comparison):
    figure: Any = draw(series.quality_with_help(comparison, HOOK))
    refitted, optimized, marks = traces(figure, "Top-k")
    (bits,) = traces(figure, "BAE")
    codes = [run.metrics.optimized for run in comparison.dictionaries[0].runs]
    assert (refitted.line.dash, optimized.line.dash) == ("dash", "solid")
    assert list(optimized.x[:8]) == [point.bits for point in codes[0].joint_value_curve]
    assert list(marks.x) == pytest.approx([0.8 * code.code.support_bits + 120 for code in codes])
    assert list(bits.y) == [run.metrics.optimized.explained_variance for run in comparison.dictionaries[1].runs]
    assert [trace.name for trace in figure.data[:3]] == ["PCA, quantized", "Gaussian bound", "signs"]
    assert max(*marks.x, *bits.x) < figure.layout.xaxis.range[1]


def test_one_entry_of_the_legend_hides_a_dictionary(comparison):
    for figure in (draw(series.quality_by_bits(comparison, HOOK)), draw(series.quality_by_l0(comparison, HOOK))):
        first, second = traces(figure, "Top-k")
        assert first.legendgroup == second.legendgroup == "Top-k"
        assert [first.showlegend, second.showlegend] == [False, True]


def test_references_are_at_the_hook_where_they_were_measured(comparison):
    here: Any
    elsewhere: Any
    here, elsewhere = (draw(series.quality_by_bits(comparison, hook)) for hook in (HOOK, MLP_OUT))
    assert [trace.name for trace in here.data[:3]] == ["PCA, quantized", "Gaussian bound", "signs"]
    assert list(here.data[0].y) == [point.explained_variance for point in comparison.pca]
    assert list(here.data[1].y) == [point.explained_variance for point in comparison.gaussian_bound]
    assert {trace.name for trace in elsewhere.data} == {"Transcoder"}
    assert "random features" not in [trace.name for trace in here.data]  # as in results of earlier versions
    with_random = replace(comparison, random_coding=[RatePoint(100.0, 0.5), RatePoint(200.0, 0.6)])
    here = draw(series.quality_by_bits(with_random, HOOK))
    assert (here.data[3].name, list(here.data[3].x)) == ("random features", [100.0, 200.0])


def test_window_shows_every_mark(comparison):
    most_bits, least = series.window(comparison.dictionaries)
    points = [run.metrics.coded for dictionary in comparison.dictionaries for run in dictionary.runs]
    assert all(point.bits < most_bits and point.explained_variance > least for point in points)
    dead = replace(comparison.dictionaries[1].runs[0].metrics, explained_variance=-3.0)
    dead = replace(dead, code=replace(dead.code, support_bits=0.0))
    assert dead.coded == RatePoint(0.0, -3.0)
    ruined = replace(comparison.dictionaries[1], runs=[replace(comparison.dictionaries[1].runs[0], metrics=dead)])
    assert series.window([ruined]) == pytest.approx((1.02, -3.1))


def test_trials_are_small_and_open(comparison):
    figure: Any = draw(series.quality_by_l0(comparison, HOOK))
    tried, chosen = traces(figure, "BAE")
    assert tried.marker.symbol == "diamond-open"
    assert list(tried.x) == [4.0, 8.0, 12.0]
    assert tried.marker.size < chosen.marker.size
    runs = comparison.dictionaries[1].runs
    assert list(chosen.x) == [run.metrics.code.informative_l0 for run in runs]
    assert list(chosen.y) == [run.metrics.explained_variance for run in runs]
    assert figure.layout.shapes[0].x0 == 8  # asked for


def test_nothing_asked_and_nothing_tried(make_comparison):
    comparison = make_comparison(n_trials=0)
    comparison = replace(comparison, experiment=replace(comparison.experiment, l0=None))
    figure: Any = draw(series.quality_by_l0(comparison, HOOK))
    assert len(figure.data) == 2
    assert not figure.layout.shapes


def test_firing_rates_are_counted_once_in_bins_of_a_quarter_of_a_power_of_ten(comparison):
    bae = comparison.dictionaries[1]
    rates = [0.0, 0.0, 1e-7, 0.0011, 0.0012, 1.0]  # none, none, below the first bin, two together, the last bin
    code = replace(bae.runs[0].metrics.code, firing_rates=rates, dead=2)
    run = replace(bae.runs[0], metrics=replace(bae.runs[0].metrics, code=code))
    histogram = series.histogram_of_rates(replace(bae, runs=[run]))
    assert {middle: count for middle, count in histogram if count} == {-4.875: 1, -2.875: 2, -0.125: 1}
    figure: Any = draw(series.firing_frequencies(replace(comparison, dictionaries=[replace(bae, runs=[run])])))
    assert figure.data[0].name == "BAE (2 never fire)"
    assert titles(figure) == ("log10 of the firing rate (share of tokens)", "features")


def test_training_curves_show_who_has_the_quantity(comparison):
    bae = comparison.dictionaries[1]
    other = replace(bae, name="other", runs=[replace(bae.runs[0], curve=[{"step": 0, "l0": 3.0}])])
    figure: Any = draw(
        series.training_curves(replace(comparison, dictionaries=[bae, other]), "mse_loss", "squared error")
    )
    assert list(figure.data[0].y[:2]) == [100, 50]
    assert len(figure.data[1].y) == 0
    assert titles(figure) == ("training step", "squared error")
    assert figure.layout.yaxis.type == "log"


def test_a_dictionary_has_one_color_everywhere(make_comparison):
    comparison = make_comparison(tuple(f"Top-k {i}" for i in range(12)))
    chosen = series.colors(comparison)
    assert len({chosen[f"Top-k {i}"] for i in range(10)}) == 10
    assert chosen["Top-k 10"] == chosen["Top-k 0"]
    for figure in (
        draw(series.quality_by_bits(comparison, HOOK)),
        draw(series.quality_by_l0(comparison, HOOK)),
        draw(series.training_curves(comparison, "l0", "")),
    ):
        for name, color in chosen.items():
            for trace in traces(figure, name):
                assert color in (trace.line.color, trace.marker.color)
    figure: Any = draw(series.firing_frequencies(comparison))
    assert [trace.line.color for trace in figure.data] == list(chosen.values())


def test_names_are_no_markup(make_comparison):
    figure: Any = draw(series.quality_by_bits(make_comparison(("<b>Top-k</b>",)), HOOK))
    assert figure.data[-1].name == "&lt;b&gt;Top-k&lt;/b&gt;"
