"""What commands that train dictionaries share: models and texts by name, checked, then compared and reported."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from bae_lens.activations.contexts import CONTEXTS_FOLDER
from bae_lens.activations.device_map import first_device, read_device_map
from bae_lens.activations.models import load_model
from bae_lens.activations.precision import check_dtype
from bae_lens.activations.sources import load_text, located
from bae_lens.cli.device import check_device
from bae_lens.comparison.comparing import OnMeasured
from bae_lens.comparison.experiment import Contender, Experiment, check_run
from bae_lens.comparison.hook_results import HOOK_TABLE, HookComparisons
from bae_lens.comparison.hooks import HOOKS_FOLDER, check_in_layers, compare_hooks
from bae_lens.comparison.results import RESULT_FILE, TABLE, Comparison
from bae_lens.comparison.run import compare
from bae_lens.distributed.connection import is_main_process
from bae_lens.extras import COMMANDS, missing_packages
from bae_lens.report.card import write_cards
from bae_lens.storage import OnStage, check_folder, read_json, unwatched
from bae_lens.training.compiler import check_compiler
from bae_lens.training.tracking import UNTRACKED, Tracking

REPORT_LIBRARIES = ("jinja2", "markupsafe", "matplotlib", "plotly")
LOADING, REPORT = "load model and text", "report"
COLUMNS = ("dictionary", "explained variance", "CE recovered", "L0", "support bits", "value bits", "dead", "training")
HOOK_COLUMNS = ("hook", *COLUMNS[:-1])

HookNames = Annotated[tuple[str, ...] | str, tyro.conf.arg(metavar="HOOK [HOOK ...]")]


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
    loaded = _load(experiment, [experiment.hook_name], contenders, folder, device, model_device, device_map, on_stage)
    comparison = compare(
        loaded.model,
        loaded.text,
        loaded.contenders[experiment.hook_name],
        loaded.experiment,
        folder,
        device,
        loaded.seconds,
        on_stage,
        on_measured,
        share_steps=share_steps,
        shard_features=shard_features,
        tracking=tracking,
    )
    if is_main_process():
        write_results(comparison, folder, on_stage)
    return comparison


def summary_at_hooks(
    experiment: Experiment,
    hook_names: Sequence[str],
    contenders: Callable[[Any, str], Mapping[str, Contender]],
    folder: Path,
    device: str,
    model_device: str | None = None,
    device_map: str | None = None,
    *,
    share_steps: bool = False,
    shard_features: bool = False,
    tracking: Tracking = UNTRACKED,
) -> str:
    """As `run_experiment` at these hooks, whatever the experiment's own is, and returns the summary.

    A single hook has the folder to itself; of several each has one in it, see `compare_hooks`.
    """
    shared: dict[str, Any] = {"share_steps": share_steps, "shard_features": shard_features, "tracking": tracking}
    if len(hook_names) == 1:
        experiment = replace(experiment, hook_name=hook_names[0])
        placed = {"model_device": model_device, "device_map": device_map}
        return summary(run_experiment(experiment, contenders, folder, device, **placed, **shared), folder)
    check_in_layers(hook_names)
    check_run(folder, several_hooks=True)
    loaded = _load(experiment, hook_names, contenders, folder, device, model_device, device_map)
    result = compare_hooks(
        loaded.model,
        loaded.text,
        loaded.contenders,
        loaded.experiment,
        folder,
        device,
        loaded.seconds,
        **shared,
    )
    if is_main_process():
        for hook_name in result.hook_names:
            home = folder / HOOKS_FOLDER / hook_name
            write_results(Comparison.from_dict(read_json(home / RESULT_FILE)), home)
        if not missing_packages(REPORT_LIBRARIES):
            from bae_lens.report.by_layer import write_layer_report

            write_layer_report(result, folder)
    return hooks_summary(result, folder)


@dataclass(frozen=True)
class _Loaded:
    """What an experiment names."""

    experiment: Experiment
    """With the places of local files."""
    model: Any
    text: Any
    """None where it is not needed any more."""
    contenders: dict[str, Mapping[str, Contender]]
    """By hook."""
    seconds: float
    """That it took."""


def _load(
    experiment: Experiment,
    hook_names: Sequence[str],
    contenders: Callable[[Any, str], Mapping[str, Contender]],
    folder: Path,
    device: str,
    model_device: str | None,
    device_map: str | None,
    on_stage: OnStage = unwatched,
) -> _Loaded:
    spread = read_device_map(device_map)
    if spread is not None and model_device is not None:
        raise ValueError(
            f"a model runs on one device or by a device map, got both; leave out {model_device} or the map"
        )
    model_device = model_device or (device if spread is None else first_device(spread))
    check_place(experiment, folder, device)
    check_device(model_device)
    check_dtype(experiment.model_dtype, model_device)
    assert experiment.model is not None
    experiment = replace(experiment, model=located(experiment.model), dataset=located(experiment.dataset))
    on_stage(LOADING, None)
    start = time.monotonic()
    source = (experiment.dataset, experiment.text_column, experiment.dataset_split)
    text = None if (folder / CONTEXTS_FOLDER).exists() else load_text(*source)
    size = experiment.contexts.context_size
    model = load_model(str(experiment.model), model_device, size, experiment.model_dtype, spread)
    made = {hook_name: contenders(model, hook_name) for hook_name in hook_names}
    seconds = time.monotonic() - start
    on_stage(LOADING, seconds)
    return _Loaded(experiment, model, text, made, seconds)


def check_place(experiment: Experiment, folder: Path, device: str) -> None:
    """Raises ValueError for a device, or a folder, on which nothing can be trained as the experiment says."""
    check_device(device)
    if experiment.training.compile:
        check_compiler(device)
    check_folder(folder)


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
    elsewhere = [
        f"{dictionary.name} writes at {dictionary.hook_name_out}: what it explains and recovers is that of other "
        "activations.\n"
        for dictionary in comparison.dictionaries
        if dictionary.hook_name_out != comparison.experiment.hook_name
    ]
    split = "" if comparison.split is None else f"{comparison.split}\n"
    where = _where("results and dictionaries are", folder)
    return f"{terminal_table(comparison)}\n\n{split}{''.join(elsewhere)}{where}"


def hooks_summary(result: HookComparisons, folder: Path) -> str:
    """The same of several hooks."""
    rows = [[HOOK_TABLE[column](runs) for column in HOOK_COLUMNS] for runs in result.by_dictionary.values()]
    table = aligned([wrapped(column) for column in HOOK_COLUMNS], rows, n_left=2)
    each = f"each hook has results, dictionaries and a report of its own in {folder / HOOKS_FOLDER}"
    return f"{table}\n\n{each}\n{_where('results over layers are', folder)}"


def _where(what: str, folder: Path) -> str:
    if missing_packages(REPORT_LIBRARIES):
        command = COMMANDS[REPORT_LIBRARIES[0]]
        return f"{what} in {folder}; after {command} the same command adds a report"
    return f"{what} in {folder}; the report to open is {folder / 'report.html'}"


def terminal_table(comparison: Comparison) -> str:
    """The columns of the table that matter most, in at most 100 characters unless names are long."""
    columns = [column for column in COLUMNS if column in comparison.columns]
    rows = [[TABLE[column](dictionary) for column in columns] for dictionary in comparison.dictionaries]
    return aligned([wrapped(column) for column in columns], rows)


def wrapped(heading: str) -> tuple[str, str]:
    """A heading over two lines: its last word under the others."""
    above, _, below = heading.rpartition(" ")
    return above, below


def aligned(headings: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], n_left: int = 1) -> str:
    """Columns under headings of two lines: the first ones to the left, the others, of numbers, to the right."""
    lines = [*([heading[line] for heading in headings] for line in (0, 1)), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(2, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < n_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    )
