import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from bae_lens.comparison.comparing import best_trial
from bae_lens.comparison.results import (
    AS_TRAINED,
    HELP_TABLE,
    OPTIMIZED,
    REFITTED,
    TABLE,
    Comparison,
    codes_of,
)
from bae_lens.evaluation.features import TokenInContext
from bae_lens.report.page import EXPLANATIONS, HELP_EXPLANATIONS, write_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """What a page would load, its figures, its rows, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.figures: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.data = ""
        self._inside: dict[str, str | None] = {}
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = {"tag": tag, **dict(attrs)}
        self.loads += [
            str(value) for name, value in attrs if name in ("src", "href") and not str(value).startswith("#")
        ]
        if self._inside.get("class") == "plotly-graph-div":
            self.figures.append(str(self._inside["id"]))
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._inside.get("tag") == "script":
            self.data += data if self._inside.get("id") == "feature-data" else ""
            return
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data.strip()


@pytest.fixture
def page(tmp_path):
    def make(comparison: Comparison) -> Page:
        return Page(write_report(comparison, tmp_path).read_text())

    return make


def test_report_is_one_page_that_loads_nothing(comparison, page):
    shown = page(comparison)
    assert shown.loads == ["data:,"]
    assert "link" in shown.tags
    assert not {"iframe", "img", "object", "embed", "base"} & set(shown.tags)


def test_figures_have_one_panel_for_each_hook(comparison, page):
    names = ["answer", "bits-0", "bits-1", "help-0", "help-1", "l0-0", "l0-1", "rates", "loss", "l0-curves"]
    assert page(comparison).figures == [f"figure-{name}" for name in names]


def test_the_same_comparison_gives_the_same_page(comparison, tmp_path):
    first = write_report(comparison, tmp_path).read_bytes()
    assert write_report(comparison, tmp_path).read_bytes() == first


def test_table_shows_what_the_comparison_says(comparison, page):
    shown = page(comparison)
    expected = [[cell(dictionary) for cell in TABLE.values()] for dictionary in comparison.dictionaries]
    assert [row for row in shown.rows if len(row) == len(TABLE)] == expected


def test_a_comparison_without_help_has_no_section_for_it(comparison, tmp_path):
    without = replace(comparison, experiment=replace(comparison.experiment, every_help=False))
    page = write_report(without, tmp_path).read_text(encoding="utf-8")
    assert "With every help" not in page
    assert "figure-help" not in page


def test_codes_are_shown_as_trained_and_with_every_help(comparison, page):
    shown = page(comparison)
    rows = [row for row in shown.rows if len(row) == 2 + len(HELP_TABLE)]
    expected = [
        [dictionary.name if i == 0 else "", name, *(cell(codes) for cell in HELP_TABLE.values())]
        for dictionary in comparison.dictionaries
        for i, (name, codes) in enumerate(codes_of(dictionary).items())
    ]
    assert rows == expected
    assert [row[1] for row in rows[:5]] == [AS_TRAINED, REFITTED, OPTIMIZED, AS_TRAINED, OPTIMIZED]
    assert {*HELP_TABLE, AS_TRAINED, REFITTED, OPTIMIZED} <= {*HELP_EXPLANATIONS, *EXPLANATIONS}


def test_every_column_is_explained(comparison, page):
    assert list(EXPLANATIONS) == list(TABLE)
    text = page(comparison).text
    for heading, explanation in EXPLANATIONS.items():
        assert f"{heading}: {explanation}" in text


@pytest.mark.parametrize(
    ("seeds", "said", "not_said"),
    [((0,), "One seed: it says nothing", "standard deviation over"), ((0, 1, 2), "over 3 seeds", "One seed")],
)
def test_report_says_what_its_seeds_can_tell(make_comparison, page, seeds, said, not_said):
    text = page(make_comparison(seeds=seeds)).text
    assert said in text
    assert not_said not in text


def test_report_warns_of_different_hooks_when_there_are(make_comparison, page):
    assert "write at 2 different hooks" in page(make_comparison()).text
    assert "different hooks. Explained" not in page(make_comparison(("BAE", "Top-k"))).text


def test_trials_show_what_differed_and_why_one_was_chosen(comparison, page):
    rows = [row for row in page(comparison).rows if len(row) == 6 and row[1].startswith("lr")]
    assert [row[1] for row in rows[:3]] == ["lr 1", "lr 0.1", "lr 0.01"]  # not d_sae, which is the same for all
    assert [row[0] for row in rows] == ["Top-k", "", "", "BAE", "", "", "Transcoder", "", ""]
    assert best_trial(comparison.dictionaries[0].trials, 8.0) == 1
    assert [row[5] for row in rows[:3]] == ["", "largest explained variance near L0 8", ""]


@pytest.mark.parametrize(
    ("l0", "why", "rule"),
    [
        (100.0, ["", "", "none came near L0 100; the nearest"], "within 25 % of an informative L0 of 100"),
        (None, None, "Chosen is the trial of largest explained variance."),
    ],
)
def test_reason_is_the_one_that_decided(comparison, page, l0, why, rule):
    shown = page(replace(comparison, experiment=replace(comparison.experiment, l0=l0)))
    reasons = [row[5] for row in shown.rows if len(row) == 6 and row[1].startswith("lr")][:3]
    best = best_trial(comparison.dictionaries[0].trials, l0)
    assert reasons == (why or ["largest explained variance" if i == best else "" for i in range(3)])
    assert rule in " ".join(shown.text.split())


def test_nothing_is_said_about_trials_that_were_not(make_comparison, page):
    assert "What was tried" not in page(make_comparison(n_trials=0)).text


def test_features_are_data_in_the_page(comparison, page):
    data = json.loads(page(comparison).data)
    expected = comparison.to_dict()["dictionaries"]
    assert data == [{"name": d["name"], "features": d["features"]} for d in expected]


def hostile(comparison: Comparison) -> Comparison:
    """Markup wherever something that is not ours is shown."""
    first = comparison.dictionaries[0]
    example = TokenInContext(HOSTILE, HOSTILE, HOSTILE, 1.0)
    dashboard = replace(first.features[0], examples=[example], top_tokens=[HOSTILE])
    dictionary = replace(first, name=HOSTILE, hook_name_out=HOSTILE, features=[dashboard])
    binary = replace(comparison.dictionaries[1], hook_name_out=HOSTILE)
    return replace(
        comparison,
        experiment=replace(comparison.experiment, model=HOSTILE, dataset=HOSTILE, hook_name=HOSTILE),
        train=replace(comparison.train, outlier_examples=[HOSTILE]),
        dictionaries=[dictionary, binary, comparison.dictionaries[2]],
    )


def test_markup_in_names_and_tokens_is_text(comparison, tmp_path, page):
    html = write_report(hostile(comparison), tmp_path).read_text()
    assert "<script>alert" not in html
    assert "<img" not in re.sub(r"<script>/\*\*\n\* plotly.*?</script>", "", html, count=1, flags=re.DOTALL)
    assert Page(html).tags.count("script") == page(comparison).tags.count("script")
    assert json.loads(Page(html).data)[0]["features"][0]["examples"][0]["token"] == HOSTILE


def test_folders_of_this_machine_stay_here(comparison, tmp_path):
    experiment = replace(comparison.experiment, model="/models/somebody/llama", dataset="/data/secret/text.jsonl")
    html = write_report(replace(comparison, experiment=experiment), tmp_path).read_text()
    assert "somebody" not in html
    assert "/data/secret" not in html
    assert str(tmp_path) not in html
    assert "<b>llama</b>" in html
    assert "<b>text.jsonl</b>" in html


def test_settings_of_every_dictionary_are_there(comparison, page):
    text = page(comparison).text
    settings = json.loads(text[text.index('{\n  "') : text.rindex("}") + 1])
    assert settings["dictionaries"]["BAE"] == {"lr": 0.1, "d_sae": 64}
    assert settings["training"]["training_tokens"] == 640


def test_dictionary_without_features_has_an_empty_list(make_comparison, page):
    assert json.loads(page(make_comparison(n_features=0)).data)[1] == {"name": "BAE", "features": []}


def test_page_of_the_demos_size_is_small(make_comparison, tmp_path):
    comparison = make_comparison(("BAE", "ReLU", "Top-k", "Gated", "Transcoder"), n_features=100, d_sae=2304)
    assert 5e6 < write_report(comparison, tmp_path).stat().st_size < 7e6
