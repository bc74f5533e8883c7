"""What commands that train dictionaries share: models and texts by name, checked, then compared and reported."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bae_lens.activations.models import load_model
from bae_lens.activations.sources import load_text, located
from bae_lens.cli.device import check_device
from bae_lens.comparison.experiment import Contender, Experiment
from bae_lens.comparison.results import Comparison
from bae_lens.comparison.run import compare
from bae_lens.extras import COMMANDS, missing_packages
from bae_lens.storage import check_folder

REPORT_LIBRARIES = ("jinja2", "markupsafe", "matplotlib", "plotly")


def run_experiment(
    experiment: Experiment, contenders: Callable[[Any, str], Mapping[str, Contender]], folder: Path, device: str
) -> Comparison:
    """Loads what the experiment names, compares, and writes results and, if its libraries are there, a report.

    `contenders` makes the dictionaries for the loaded model and the hook. Raises ValueError, before anything
    is written, for sizes, devices, folders, texts, models and hooks that cannot be.
    """
    check_device(device)
    check_folder(folder)
    experiment = replace(experiment, model=located(experiment.model), dataset=located(experiment.dataset))
    start = time.monotonic()
    text = load_text(experiment.dataset, experiment.text_column, experiment.dataset_split)
    model = load_model(experiment.model, device, experiment.contexts.context_size)
    made = contenders(model, experiment.hook_name)
    loading = time.monotonic() - start
    comparison = compare(model, text, made, experiment, folder, device, loading)
    if not missing_packages(REPORT_LIBRARIES):
        from bae_lens.report.page import write_report
        from bae_lens.report.png import write_pictures

        write_pictures(comparison, folder)
        write_report(comparison, folder)
    return comparison


def summary(comparison: Comparison, folder: Path) -> str:
    """The table, and where the rest is."""
    if missing_packages(REPORT_LIBRARIES):
        command = COMMANDS[REPORT_LIBRARIES[0]]
        where = f"results and dictionaries are in {folder}; after {command} the same command adds a report"
    else:
        where = f"report, results and dictionaries are in {folder}"
    return f"{comparison.table()}\n\n{where}"
