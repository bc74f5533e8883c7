"""The flags of vectors that come without a language model, for the commands that take either."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from bae_lens.activations.contexts import ContextSettings
from bae_lens.activations.vectors import VECTORS_HOOK, VectorFiles
from bae_lens.cli.experiment import check_place, write_results
from bae_lens.comparison.experiment import Contender, Experiment
from bae_lens.comparison.results import Comparison
from bae_lens.comparison.vectors import compare_vectors
from bae_lens.distributed.connection import is_main_process

OF_VECTORS = ("array", "documents", "labels")
OF_MODELS = (
    "hook_name", "hook_name_out", "model", "dataset", "text_column", "dataset_split", "model_dtype", "model_device",
    "device_map", "keep_activations", "sample_tokens",
)  # fmt: skip
OF_TEXTS = ("context_size", "loss_contexts", "contexts_per_document")


def vector_files(flags: Any) -> VectorFiles | None:
    """What the flags say of files of vectors; None if they name none.

    Raises ValueError for flags that say how vectors are read where there are none, and for those of models and texts
    where there are.
    """
    if not flags.vectors:
        if said := [f"--{name}" for name in OF_VECTORS if getattr(flags, name) is not None]:
            raise ValueError(
                f"of files of vectors, but without --vectors: {', '.join(said)}; name the files with --vectors"
            )
        return None
    defaults = {field.name: field.default for field in fields(flags)}
    said = [name for name in OF_MODELS if name in defaults and getattr(flags, name) != defaults[name]]
    said += [name for name in OF_TEXTS if getattr(flags.contexts, name) != getattr(ContextSettings(), name)]
    if said:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in said)
        raise ValueError(
            f"--vectors come without a language model and its text, got {listed} too; leave out what is of these"
        )
    return VectorFiles(flags.vectors, flags.array, flags.documents, flags.labels)


def run_on_vectors(
    files: VectorFiles, experiment: Experiment, contenders: Any, folder: Path, device: str, **options: Any
) -> Comparison:
    """Compares dictionaries of the vectors, and writes results, cards and, if its libraries are there, a report.

    `contenders(widths_at, hook_name)` makes the dictionaries. `options` are those of `compare_vectors`. Raises
    ValueError, before anything is written, for devices, folders and files that cannot be.
    """
    check_place(experiment, folder, device)
    vectors = files.open()
    made: Mapping[str, Contender] = contenders(lambda _: {VECTORS_HOOK: vectors.d}, VECTORS_HOOK)
    experiment = replace(experiment, model=None, dataset=vectors.name, hook_name=VECTORS_HOOK)
    comparison = compare_vectors(vectors, made, experiment, folder, device, **options)
    if is_main_process():
        write_results(comparison, folder)
    return comparison
