"""A ComSem report as one HTML page that opens without a network."""

from dataclasses import replace
from pathlib import Path

from markupsafe import Markup, escape

from bae_lens.comparison.results import RESULT_FILE, Comparison
from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.results import ComSemReport, FeatureScore
from bae_lens.comsem.table1 import HEADINGS, table1
from bae_lens.report import comsem_figures as plots_comsem
from bae_lens.report.html import embed, render
from bae_lens.report.page import write_report
from bae_lens.storage import read_json, write_json, write_text

COMSEM_FILE = "comsem.html"
FEATURES_SHOWN = 40  # per dictionary


def write_comsem_report(report: ComSemReport, folder: Path) -> Path:
    """Writes `comsem.html`, with its scripts inlined, and returns its path."""
    html = render(
        "report_comsem",
        report=report,
        rows=report.rows(),
        table1=table1(report),
        table1_headings=HEADINGS,
        table1_figure=embed(plots_comsem.table1_shares(table1(report)), "table1"),
        kinds=[*report.self_test.kinds.items(), ("all", report.self_test.overall)],
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


def join_comparison(report: ComSemReport, folder: Path) -> bool:
    """Adds Table 1 to the result and the report of the comparison in a folder, and says whether there is one."""
    path = folder / RESULT_FILE
    if not path.exists():
        return False
    comparison = replace(Comparison.from_dict(read_json(path)), comsem=table1(report))
    write_json(path, comparison)
    write_report(comparison, folder)
    return True


def worst_first(features: list[FeatureScore]) -> list[FeatureScore]:
    """The features with most verdicts that are wrong first, `FEATURES_SHOWN` at most."""
    return sorted(features, key=lambda feature: (-n_wrong(feature), feature.feature))[:FEATURES_SHOWN]


def n_wrong(feature: FeatureScore) -> int:
    """Answers about held-out tokens that are no yes, and about controls that are no no."""
    verdicts = [(judged.verdict, True) for judged in feature.held_out]
    verdicts += [(judged.verdict, False) for judged in feature.controls]
    return sum(verdict.is_answer and verdict.yes is not right for verdict, right in verdicts)


def marked(instance: Instance) -> Markup:
    """The sentence with the token marked."""
    start, end = instance.token
    before, token, after = instance.sentence[:start], instance.sentence[start:end], instance.sentence[end:]
    return Markup("{}<mark>{}</mark>{}").format(escape(before), escape(token), escape(after))
