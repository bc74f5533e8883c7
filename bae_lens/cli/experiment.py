"""What commands that train dictionaries share: models and texts by name, checked, then compared and reported."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bae_lens.activations.models import load_model, resolve_hook
from bae_lens.activations.sources import load_text, located
from bae_lens.comparison.experiment import Contender, Experiment
from bae_lens.comparison.results import Comparison
from bae_lens.comparison.run import compare
from bae_lens.report.page import write_report
from bae_lens.report.png import write_pictures
from bae_lens.storage import check_folder

DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run_experiment(
    experiment: Experiment, contenders: Callable[[Any, str], Mapping[str, Contender]], folder: Path, device: str
) -> Comparison:
    """Loads what the experiment names, compares, and writes results and report into `folder`.

    `contenders` makes the dictionaries for the loaded model and the resolved hook. Raises ValueError, before anything
    is written, for sizes, devices, folders, texts, models and hooks that cannot be.
    """
    _check_device(device)
    check_folder(folder)
    experiment = replace(experiment, model=located(experiment.model), dataset=located(experiment.dataset))
    start = time.monotonic()
    text = load_text(experiment.dataset, experiment.text_column, experiment.dataset_split)
    model = load_model(experiment.model, device)
    made = contenders(model, resolve_hook(model, experiment.hook_name))
    loading = time.monotonic() - start
    comparison = compare(model, text, made, experiment, folder, device, loading)
    write_pictures(comparison, folder)
    write_report(comparison, folder)
    return comparison


def summary(comparison: Comparison, folder: Path) -> str:
    """The table, and where the rest is."""
    return f"{comparison.table()}\n\nreport, results and dictionaries are in {folder}"


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error
