"""What commands that train dictionaries share: models and texts by name, checked, then compared and reported."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bae_lens.activations.contexts import CONTEXTS_FOLDER
from bae_lens.activations.device_map import first_device, read_device_map
from bae_lens.activations.models import load_model
from bae_lens.activations.precision import check_dtype
from bae_lens.activations.sources import load_text, located
from bae_lens.cli.device import check_device
from bae_lens.comparison.experiment import Contender, Experiment
from bae_lens.comparison.results import TABLE, Comparison
from bae_lens.comparison.run import OnMeasured, compare
from bae_lens.distributed.connection import is_main_process
from bae_lens.extras import COMMANDS, missing_packages
from bae_lens.report.card import write_cards
from bae_lens.storage import OnStage, check_folder, unwatched
from bae_lens.training.compiler import check_compiler
from bae_lens.training.tracking import UNTRACKED, Tracking

REPORT_LIBRARIES = ("jinja2", "markupsafe", "matplotlib", "plotly")
LOADING, REPORT = "load model and text", "report"
COLUMNS = ("dictionary", "explained variance", "CE recovered", "L0", "support bits", "value bits", "dead", "training")


def run_experiment(
    experiment: Experiment,
    contenders: Callable[[Any, str], Mapping[str, Contender]],
    folder: Path,
    device: str,
    on_stage: OnStage = unwatched,
    on_measured: OnMeasured = unwatched,
    model_device: str | None = None,
    device_map: str | None = None,
    *,
    share_steps: bool = False,
    shard_features: bool = False,
    tracking: Tracking = UNTRACKED,
) -> Comparison:
    """Loads what the experiment names, compares, and writes results, cards and, if its libraries are there, a report.

    `contenders` makes the dictionaries for the loaded model and the hook. The text is read once: what a later start in
    `folder` needs of it is kept there. The model runs on `model_device`, if that is another one, or on several, as
    `read_device_map` reads their names. Raises ValueError, before anything is written, for sizes, devices, folders,
    texts, models and hooks that cannot be. `on_stage` and `on_measured` are told how it goes on; see `compare`. Of
    several processes the first writes what is not a result.
    """
    spread = read_device_map(device_map)
    if spread is not None and model_device is not None:
        raise ValueError(
            f"a model runs on one device or by a device map, got both; leave out {model_device} or the map"
        )
    model_device = model_device or (device if spread is None else first_device(spread))
    check_device(device)
    check_device(model_device)
    check_dtype(experiment.model_dtype, model_device)
    if experiment.training.compile:
        check_compiler(device)
    check_folder(folder)
    assert experiment.model is not None
    experiment = replace(experiment, model=located(experiment.model), dataset=located(experiment.dataset))
    on_stage(LOADING, None)
    start = time.monotonic()
    source = (experiment.dataset, experiment.text_column, experiment.dataset_split)
    text = None if (folder / CONTEXTS_FOLDER).exists() else load_text(*source)
    size = experiment.contexts.context_size
    model = load_model(str(experiment.model), model_device, size, experiment.model_dtype, spread)
    made = contenders(model, experiment.hook_name)
    loading = time.monotonic() - start
    on_stage(LOADING, loading)
    watched = (loading, on_stage, on_measured)
    comparison = compare(
        model,
        text,
        made,
        experiment,
        folder,
        device,
        *watched,
        share_steps=share_steps,
        shard_features=shard_features,
        tracking=tracking,
    )
    if is_main_process():
        write_results(comparison, folder, on_stage)
    return comparison


def write_results(comparison: Comparison, folder: Path, on_stage: OnStage = unwatched) -> None:
    """Writes cards and, if its libraries are there, pictures and report."""
    if not missing_packages(REPORT_LIBRARIES):
        from bae_lens.report.page import write_report
        from bae_lens.report.png import write_pictures

        on_stage(REPORT, None)
        start = time.monotonic()
        write_pictures(comparison, folder)
        write_report(comparison, folder)
        on_stage(REPORT, time.monotonic() - start)
    write_cards(comparison, folder)


def summary(comparison: Comparison, folder: Path) -> str:
    """The table for a terminal, and where the rest is; the report comes last."""
    if missing_packages(REPORT_LIBRARIES):
        command = COMMANDS[REPORT_LIBRARIES[0]]
        where = f"results and dictionaries are in {folder}; after {command} the same command adds a report"
    else:
        where = f"results and dictionaries are in {folder}; the report to open is {folder / 'report.html'}"
    elsewhere = [
        f"{dictionary.name} writes at {dictionary.hook_name_out}: what it explains and recovers is that of other "
        "activations.\n"
        for dictionary in comparison.dictionaries
        if dictionary.hook_name_out != comparison.experiment.hook_name
    ]
    split = "" if comparison.split is None else f"{comparison.split}\n"
    return f"{terminal_table(comparison)}\n\n{split}{''.join(elsewhere)}{where}"


def terminal_table(comparison: Comparison) -> str:
    """The columns of the table that matter most, in at most 100 characters unless names are long."""
    columns = [column for column in COLUMNS if column in comparison.columns]
    rows = [[TABLE[column](dictionary) for column in columns] for dictionary in comparison.dictionaries]
    return aligned([wrapped(column) for column in columns], rows)


def wrapped(heading: str) -> tuple[str, str]:
    """A heading over two lines: its last word under the others."""
    above, _, below = heading.rpartition(" ")
    return above, below


def aligned(headings: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """Columns under headings of two lines: the first to the left, the others, of numbers, to the right."""
    lines = [*([heading[line] for heading in headings] for line in (0, 1)), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(2, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()
        for cells in lines
    )
