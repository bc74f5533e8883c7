"""A ComSem report as one HTML page that opens without a network."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.results import ComSemReport, FeatureScore
from bae_lens.report import comsem_figures as plots_comsem
from bae_lens.report.page import embed
from bae_lens.storage import write_text

COMSEM_FILE = "comsem.html"
FEATURES_SHOWN = 40  # per dictionary


def write_comsem_report(report: ComSemReport, folder: Path) -> Path:
    """Writes `comsem.html`, with its scripts inlined, and returns its path."""
    templates = Environment(loader=PackageLoader("bae_lens.report"), autoescape=True, undefined=StrictUndefined)
    html = templates.get_template("report_comsem.html.jinja").render(
        report=report,
        rows=report.rows(),
        kinds=[*report.self_test.kinds.items(), ("all", report.self_test.overall)],
        plotly=Markup(get_plotlyjs()),
        distribution=embed(plots_comsem.score_distribution(report), "scores"),
        by_frequency=embed(plots_comsem.score_by_frequency(report, "score", "mean score"), "frequency"),
        accuracy_by_frequency=embed(
            plots_comsem.score_by_frequency(report, "balanced_accuracy", "mean balanced accuracy"), "accuracy"
        ),
        worst_first=worst_first,
        marked=marked,
        features_shown=FEATURES_SHOWN,
    )
    path = folder / COMSEM_FILE
    write_text(path, html)
    return path


def worst_first(features: list[FeatureScore]) -> list[FeatureScore]:
    """The features with most verdicts that are wrong first, `FEATURES_SHOWN` at most."""
    return sorted(features, key=lambda feature: (-n_wrong(feature), feature.feature))[:FEATURES_SHOWN]


def n_wrong(feature: FeatureScore) -> int:
    """Held-out tokens without a yes, and controls without a no."""
    return sum(judged.verdict.yes is not True for judged in feature.held_out) + sum(
        judged.verdict.yes is not False for judged in feature.controls
    )


def marked(instance: Instance) -> Markup:
    """The sentence with the token marked."""
    start, end = instance.token
    before, token, after = instance.sentence[:start], instance.sentence[start:end], instance.sentence[end:]
    return Markup("{}<mark>{}</mark>{}").format(escape(before), escape(token), escape(after))
