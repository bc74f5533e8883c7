"""The report in a real browser; skipped where there is no Chromium, which pip does not install."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bae_lens.comparison.results import Comparison
from bae_lens.evaluation.features import TokenInContext
from bae_lens.report.page import write_report

sync_api = pytest.importorskip("playwright.sync_api")
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
HOSTILE = "</script><img src=x onerror='window.hacked = true'>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"needs a browser: one of {', '.join(BROWSERS)} on the PATH"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_report(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the report of a comparison without a network; at the end nothing may have gone wrong in the page."""
    contexts, troubles = [], []

    def open_page(comparison: Comparison, width: int = 1280, scheme: str = "light") -> Any:
        path = write_report(comparison, tmp_path)
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or troubles.append(request.url))
        page.on("console", lambda message: message.type in ("error", "warning") and troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def column(page: Any, number: int) -> list[str]:
    return page.locator(".results").first.locator(f"tbody td:nth-child({number})").all_inner_texts()


def shown_feature(page: Any) -> str:
    return page.locator("#feature-dashboard h3").inner_text().split(",")[0]


def test_figures_are_drawn(comparison, open_report):
    page = open_report(comparison)
    assert page.locator(".plotly-graph-div .main-svg .scatterlayer").count() == 10
    assert page.locator("#figure-bits-0 .legend .traces").count() == 5  # two dictionaries and three references


def test_page_and_figures_are_light_on_dark_where_that_is_preferred(comparison, open_report):
    page = open_report(comparison, scheme="dark")

    def color(selector: str, quality: str) -> list[int]:
        value = page.locator(selector).first.evaluate(f"element => getComputedStyle(element)['{quality}']")
        return [int(part) for part in value.strip("rgba()").split(",")[:3]]

    assert max(color("body", "background-color")) < 64
    for selector, quality in (
        ("body", "color"),
        (".answer", "color"),
        (".xtick text", "fill"),
        (".legendtext", "fill"),
    ):
        assert min(color(selector, quality)) > 150


def test_headings_sort_the_table(comparison, open_report):
    page = open_report(comparison)
    assert column(page, 1) == ["Top-k", "BAE", "Transcoder"]
    heading = page.get_by_role("columnheader", name="explained variance").first
    button = heading.get_by_role("button")
    button.click()
    values = [float(value.split()[0]) for value in column(page, 3)]
    assert values == sorted(values, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"
    button.press("Enter")
    assert [float(value.split()[0]) for value in column(page, 3)] == values[::-1]
    assert heading.get_attribute("aria-sort") == "ascending"
    page.locator(".results").first.get_by_role("button", name="dictionary").click()
    assert column(page, 1) == ["BAE", "Top-k", "Transcoder"]
    assert page.locator(".results").first.locator("th[aria-sort]").count() == 1


def test_a_value_that_is_no_number_comes_last(comparison, open_report):
    run = comparison.dictionaries[0].runs[0]
    broken = replace(run, metrics=replace(run.metrics, explained_variance=float("nan")))
    dictionaries = [replace(comparison.dictionaries[0], runs=[broken]), *comparison.dictionaries[1:]]
    page = open_report(replace(comparison, dictionaries=dictionaries))
    page.locator(".results").first.get_by_role("button", name="explained variance").click()
    assert column(page, 1)[-1] == "Top-k"


def test_features_can_be_browsed(comparison, open_report):
    page = open_report(comparison)
    page.get_by_label("dictionary").select_option(label="BAE")
    page.get_by_label("order").select_option(label="by number")
    assert shown_feature(page) == "Feature 0"
    assert page.locator("#feature-position").inner_text() == "1 of 4"
    assert page.get_by_role("button", name="previous").is_disabled()
    page.get_by_role("button", name="next").click()
    assert shown_feature(page) == "Feature 3"
    page.locator("#feature-feature").select_option(index=3)
    assert shown_feature(page) == "Feature 9"
    assert page.get_by_role("button", name="next").is_disabled()
    page.get_by_role("button", name="0 (cosine 0.75)").click()
    assert shown_feature(page) == "Feature 0"
    assert page.get_by_role("button", name="1 (cosine 0.25)").count() == 0  # not in the sample
    marked = page.locator("#feature-dashboard .examples mark").all_inner_texts()
    assert marked == ["token0"] * 8
    assert page.locator("#feature-dashboard .facts").inner_text().startswith("raises the logits of")
    assert "↵" in page.locator("#feature-dashboard .facts").inner_text()  # a line end can be seen


def test_features_are_ordered_by_firing_rate(comparison, open_report):
    page = open_report(comparison)
    rates = {f"Feature {f.feature}": f.firing_rate for f in comparison.dictionaries[0].features}
    most, least = max(rates, key=lambda name: rates[name]), min(rates, key=lambda name: rates[name])
    assert shown_feature(page) == most
    page.get_by_label("order").select_option(label="rarest first")
    assert shown_feature(page) == least
    page.locator("#feature-feature").select_option(index=3)
    assert shown_feature(page) == most


def test_features_are_found_by_their_tokens(comparison, open_report):
    page = open_report(comparison)
    search = page.get_by_label("token contains")
    search.fill(" TOKEN2")
    assert shown_feature(page) == "Feature 6"
    assert page.locator("#feature-position").inner_text() == "1 of 1"
    page.get_by_role("button", name="9 (cosine 0.75)").click()  # leaves the search
    assert (shown_feature(page), search.input_value()) == ("Feature 9", "")
    search.fill("nowhere")
    assert page.locator("#feature-dashboard").inner_text() == "No feature of the sample has such a token."
    assert page.locator("#feature-feature").is_disabled()


def test_what_there_is_not_is_not_shown(make_comparison, open_report):
    page = open_report(make_comparison(n_features=0, n_trials=0, seeds=(0,)))
    assert page.locator("#feature-dashboard").inner_text() == "No feature of it fires often enough."
    page = open_report(make_comparison())
    page.get_by_label("dictionary").select_option(label="Transcoder")
    assert "raises the logits" not in page.locator("#feature-dashboard").inner_text()


def test_markup_in_tokens_and_names_does_nothing(comparison, open_report):
    first = comparison.dictionaries[0]
    example = TokenInContext(HOSTILE, f" {HOSTILE}", HOSTILE, 1.0)
    dashboard = replace(first.features[0], examples=[example], top_tokens=[HOSTILE])
    dictionary = replace(first, name=HOSTILE, features=[dashboard])
    page = open_report(replace(comparison, dictionaries=[dictionary, *comparison.dictionaries[1:]]))
    assert page.locator("#feature-dashboard mark").inner_text() == HOSTILE
    assert HOSTILE in page.locator("#figure-bits-0 .legend").text_content()
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("width", [500, 1280])
def test_nothing_is_wider_than_the_window(make_comparison, open_report, width):
    long_name = "A transcoder with a name that somebody thought would never be read on a telephone"
    page = open_report(make_comparison(("BAE", "ReLU", "Top-k", "Gated", "Transcoder", long_name)), width)
    page.get_by_text("Show", exact=True).click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for figure in page.locator(".plotly-graph-div").all():
        assert figure.locator(".main-svg").first.bounding_box()["width"] <= width
