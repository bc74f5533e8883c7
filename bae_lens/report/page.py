"""A comparison as one HTML page that opens without a network."""

from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from bae_lens.comparison.comparing import L0_TOLERANCE, best_trial
from bae_lens.comparison.results import (
    AS_TRAINED,
    HELP_TABLE,
    OPTIMIZED,
    REFITTED,
    Comparison,
    DictionaryResult,
    codes_of,
    losses_of,
)
from bae_lens.comsem.table1 import HEADINGS
from bae_lens.functional.strength import INSTANCES_TO_COUNT
from bae_lens.report import series
from bae_lens.report.answer import answer
from bae_lens.report.card import without_folders
from bae_lens.report.comsem_figures import table1_shares
from bae_lens.report.explanations import EXPLANATIONS, in_units
from bae_lens.report.figures import draw
from bae_lens.report.html import embed, render
from bae_lens.report.series import Chart
from bae_lens.storage import write_text

REPORT_FILE = "report.html"
HELP_EXPLANATIONS = {
    AS_TRAINED: "What the encoder gives.",
    REFITTED: "The encoder's features, with the values that are best for the decoder.",
    OPTIMIZED: (
        "Features and values chosen for the decoder: of a binary code, bits flipped where it pays at the price of a "
        "bit; of real values, for each token the best of what the encoder gives, that with the best values, and as "
        "many features chosen one after the other."
    ),
    "explained variance": "With values rounded as coarsely as value bits count them.",
    "joint bits": (
        "Bits per token to say which features fire if each is coded given others, with all that it takes to read them, "
        "as a .bae file codes them."
    ),
    "bits": "Joint bits and value bits.",
}
"""What the rows and the columns of the table of codes mean."""


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Writes `report.html`, with its scripts inlined, and returns its path."""
    html = render(
        "report",
        comparison=comparison,
        model=without_folders(comparison.experiment.model or ""),
        unit=comparison.experiment.unit,
        dataset=without_folders(comparison.experiment.dataset),
        colors=series.colors(comparison),
        table=comparison.columns,
        explanations=_in_units(EXPLANATIONS, comparison),
        answer=answer(comparison),
        ce_error=_largest_error(comparison),
        answer_figure=embed(draw(series.quality_by_bits(comparison, next(iter(series.by_hook(comparison))))), "answer"),
        help_table=HELP_TABLE,
        help_explanations=_in_units(HELP_EXPLANATIONS, comparison),
        codes=[(dictionary.name, codes_of(dictionary)) for dictionary in comparison.dictionaries],
        quality_with_help=_panels(comparison, series.quality_with_help, "help")
        if comparison.experiment.every_help
        else {},
        quality_by_bits=_panels(comparison, series.quality_by_bits, "bits"),
        quality_by_l0=_panels(comparison, series.quality_by_l0, "l0"),
        firing_frequencies=embed(draw(series.firing_frequencies(comparison)), "rates"),
        loss_curves=embed(draw(series.training_curves(comparison, "mse_loss", "squared error (standardized)")), "loss"),
        l0_curves=embed(
            draw(series.training_curves(comparison, "l0", f"L0 (features per {comparison.experiment.unit})")),
            "l0-curves",
        ),
        tuned=[_tuning(dictionary, comparison.experiment.l0) for dictionary in comparison.dictionaries],
        l0_tolerance=L0_TOLERANCE,
        instances_to_count=INSTANCES_TO_COUNT,
        features=[
            {"name": dictionary.name, "features": [asdict(feature) for feature in dictionary.features]}
            for dictionary in comparison.dictionaries
        ],
        settings=_settings(comparison),
        pretrained={d.name: without_folders(d.pretrained) for d in comparison.dictionaries if d.pretrained is not None},
        table1_headings=HEADINGS,
        table1_figure=embed(table1_shares(comparison.comsem), "table1") if comparison.comsem else "",
        script=Markup((files("bae_lens.report") / "templates" / "report.js").read_text(encoding="utf-8")),
    )
    path = folder / REPORT_FILE
    write_text(path, html)
    return path


def _largest_error(comparison: Comparison) -> float | None:
    """Of CE recovered, among all runs; None where it is unknown for one."""
    errors = [loss.recovered_error for dictionary in comparison.dictionaries for loss in losses_of(dictionary)]
    known = [error for error in errors if error is not None]
    return max(known) if known and len(known) == len(errors) else None


def _in_units(texts: dict[str, str], comparison: Comparison) -> dict[str, str]:
    return {name: in_units(text, comparison.experiment.unit) for name, text in texts.items()}


def _panels(comparison: Comparison, chart: Callable[[Comparison, str], Chart], name: str) -> dict[str, Markup]:
    """A figure for each hook at which dictionaries write."""
    return {
        hook: embed(draw(chart(comparison, hook)), f"{name}-{index}")
        for index, hook in enumerate(series.by_hook(comparison))
    }


def _tuning(dictionary: DictionaryResult, l0: float | None) -> dict[str, Any]:
    """A dictionary's trials with what differs between them, and why one of them was chosen."""
    recipes = [trial.recipe for trial in dictionary.trials]
    varied = [key for key in dictionary.recipe if any(recipe[key] != recipes[0][key] for recipe in recipes)]
    chosen = best_trial(dictionary.trials, l0) if dictionary.trials else None
    tried = [
        {
            "setting": ", ".join(f"{key} {_plain(trial.recipe[key])}" for key in varied),
            "trial": trial,
            "why": _why(trial.informative_l0, l0) if index == chosen else "",
        }
        for index, trial in enumerate(dictionary.trials)
    ]
    return {"name": dictionary.name, "trials": tried}


def _why(informative_l0: float, l0: float | None) -> str:
    if l0 is None:
        return "largest explained variance"
    if abs(informative_l0 / l0 - 1) <= L0_TOLERANCE:
        return f"largest explained variance near L0 {l0:g}"
    return f"none came near L0 {l0:g}; the nearest"


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _settings(comparison: Comparison) -> dict[str, Any]:
    """What was asked for, and what every dictionary was trained with, without folders of this machine."""
    experiment = asdict(comparison.experiment)
    names = {key: without_folders(experiment[key] or "") for key in ("model", "dataset")}
    return {**experiment, **names, "dictionaries": {d.name: _recipe(d) for d in comparison.dictionaries}}


def _recipe(dictionary: DictionaryResult) -> dict[str, Any]:
    if dictionary.pretrained is None:
        return dictionary.recipe
    return {"pretrained": without_folders(dictionary.pretrained)}
