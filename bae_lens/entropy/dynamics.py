"""How information builds up in a language model: entropy of activations by layer and position (section 3.2)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.activations.fingerprint import model_fingerprint, tensor_fingerprint
from bae_lens.activations.models import resolve_hook
from bae_lens.activations.position_cache import PositionActivations, collect
from bae_lens.activations.precision import Dtype
from bae_lens.activations.windows import Windows
from bae_lens.distributed.connection import is_main_process, n_processes
from bae_lens.distributed.exchange import gather
from bae_lens.distributed.work import share
from bae_lens.entropy.estimate import EntropyEstimate, estimate_entropy, fit_tree
from bae_lens.entropy.fit import FitSettings, check_entropy_coefficients, fit_curves
from bae_lens.entropy.memory import TrainingMemory, bytes_for_training
from bae_lens.entropy.results import Cell, Dictionaries, EntropyDynamics
from bae_lens.file_exchange import bring_together
from bae_lens.saes.bae import check_max_flips
from bae_lens.storage import ACTIVATIONS_FOLDER, Stopwatch, claimed, read_json, validated, write_json

HELD_OUT = 5  # one window in so many at least is not trained on
PRICES = (0.01, 0.1, 0.7, 4.0, 16.0)  # from nearly lossless codes to coarse ones
# For few vectors in many dimensions, where features that look worth their bits may not be for others, and the exact
# decoder of a thousand vectors is not that of the next thousand (measured in benchmarks/README.md).
FEW_VECTORS = FitSettings(steps=256, batch_size=256, lr=1e-2, entropy_from=0.05, encoder_bias=-2.0, elimination=False)
# A BAE that positions share has many times the vectors, and can learn for longer.
SHARED = replace(FEW_VECTORS, steps=1024)


@dataclass(frozen=True)
class DynamicsSettings:
    """How the BAEs of `entropy_dynamics` are trained."""

    d_sae: int
    """Features of each BAE."""
    entropy_coefficients: tuple[float, ...] = PRICES
    """Weights of the entropy in the loss, per bit: a curve of bits against explained variance for every hook and
    position."""
    dictionaries: Dictionaries = "shared"
    """Whether one BAE is trained on the windows' activations at all positions of a hook, or one for each position.
    Bits are counted for each position, from its own firing rates, either way."""
    fit: FitSettings = SHARED
    """Training; steps count for all BAEs alike."""
    max_flips: int = 0
    """Bits of each vector's code that may be flipped where it pays, see `BAE.encode_optimized`; 0 for the encoder's."""
    seed: int = 0
    """Seed of the initial weights, the order of the vectors and the resampling."""

    def __post_init__(self) -> None:
        """Raises ValueError for a width below 1, no such dictionaries, and for no coefficients or such as cannot be."""
        if self.d_sae < 1:
            raise ValueError(f"d_sae must be at least 1, got {self.d_sae}")
        if self.dictionaries not in get_args(Dictionaries):
            raise ValueError(f"dictionaries must be one of {get_args(Dictionaries)}, got {self.dictionaries!r}")
        if not self.entropy_coefficients:
            raise ValueError("give at least one entropy coefficient, got none")
        check_entropy_coefficients(self.entropy_coefficients)
        check_max_flips(self.max_flips)


def entropy_dynamics(
    model: Any,
    windows: Windows,
    hook_names: Sequence[str],
    positions: Sequence[int],
    settings: DynamicsSettings,
    folder: Path,
    loading_seconds: float = 0.0,
    device: str | torch.device | None = None,
    states_dtype: Dtype = "float32",
    gpu_bytes: int | None = None,
) -> EntropyDynamics:
    """Trains BAEs on the windows' activations and measures their entropy at every hook, position and coefficient.

    `windows` are `random_windows` of a text, or sequences of your own whose positions mean something, such as prompts
    in which a demonstration ends at each of `positions` (benchmarks/in_context.py). The windows of the last documents,
    at least a fifth of all, are held out; as windows of a document are alike, intervals come from a bootstrap over
    documents.

    One pass of the model collects everything in `folder`, where finished entropies are kept too: an interrupted run
    goes on. BAEs are trained on `device`, by default the model's, together, as many as fit: on a CPU in two gibibytes,
    on a GPU beside the model in `gpu_bytes`, or all that there is. `states_dtype` is what activations are kept in.
    `stages.json` says how long it took, with the `loading_seconds` of model and windows. Several processes share the
    pass, and each trains the BAEs of hooks, or of positions, of its own; all return the same.

    Raises ValueError as `collect`, `fit_baes` and `claimed` do, and, before the model runs, for windows of a single
    document or fewer than a batch to train on.
    """
    held_out(windows.document, settings.fit.batch_size)
    purpose = {
        "model": model.cfg.model_name,
        "model_weights": model_fingerprint(model),
        "hook_names": [resolve_hook(model, hook_name) for hook_name in hook_names],
        "positions": list(positions),
        "windows": tensor_fingerprint(windows.tokens),
        "settings": asdict(settings),
    }
    with claimed(folder, purpose):
        bring_together(folder)
        stopwatch = Stopwatch(folder)
        stopwatch.add("model and windows", loading_seconds)
        with stopwatch.stage("activations"):
            states = collect(model, windows, hook_names, positions, folder / ACTIVATIONS_FOLDER, dtype=states_dtype)
        distinct = [len(windows.tokens_at(p)[states.kept].unique()) for p in positions]
        with stopwatch.stage("entropies"):
            at = torch.device(model.cfg.device if device is None else device)
            cells = _entropies(states, settings, folder, at, gpu_bytes)
    return EntropyDynamics(
        model=model.cfg.model_name,
        hook_names=states.hook_names,
        positions=states.positions,
        n_windows=len(states.kept),
        n_documents=len(states.documents.unique()),
        outliers=len(windows.tokens) - len(states.kept),
        too_short=windows.too_short,
        distinct_tokens=distinct,
        d_sae=settings.d_sae,
        dictionaries=settings.dictionaries,
        cells=cells,
        positions_count="tokens" if windows.ends is None else "demonstrations",
    )


def held_out(documents: Int[Tensor, " n"], batch_size: int, outliers: int = 0) -> Bool[Tensor, " n"]:
    """Which windows are held out: those of the last documents, as few as make a fifth of the windows.

    Raises ValueError if that leaves fewer than 2, or fewer than a batch to train on; `outliers` windows were left out.
    """
    _, document, count = documents.unique(return_inverse=True, return_counts=True)
    later = count.flip(0).cumsum(0).flip(0) - count
    chosen = (later < len(documents) // HELD_OUT)[document]
    train, test = int((~chosen).sum()), int(chosen.sum())
    if test < 2 or train < batch_size:
        without = f" ({outliers} are left out for outliers)" if outliers else ""
        raise ValueError(
            f"training needs at least a batch of {batch_size} windows, and 2 of other documents held out, but "
            f"{len(documents)} windows{without} of {len(count)} documents give {train} and {test}; use more windows or "
            "documents, or a smaller batch"
        )
    return chosen


def position_entropies(
    vectors: Float[Tensor, "hooks positions n d_in"], documents: Int[Tensor, " n"], settings: DynamicsSettings
) -> list[tuple[EntropyEstimate, EntropyEstimate]]:
    """Over the held-out and over all vectors, for every hook, position and coefficient, the last varying fastest.

    `documents` says which of the vectors belong together. Everything is done where the vectors are. Raises ValueError
    as `held_out` and `fit_baes` do.
    """
    test = held_out(documents, settings.fit.batch_size)
    if settings.dictionaries == "per position":
        vectors = vectors.flatten(0, 1)[:, None]
    train, seed = vectors[:, :, ~test].flatten(1, 2), settings.seed
    curves = fit_curves(train, settings.d_sae, seed, settings.entropy_coefficients, settings.fit)
    for bae in chain.from_iterable(curves):
        bae.cfg.max_flips = settings.max_flips
    return [
        (
            estimate_entropy(bae, x[test], seed, documents[test], fit_tree(bae, x[~test])),
            estimate_entropy(bae, x, seed, documents),
        )
        for baes, at_positions in zip(curves, vectors, strict=True)
        for x in at_positions
        for bae in baes
    ]


def _entropies(
    states: PositionActivations,
    settings: DynamicsSettings,
    folder: Path,
    device: torch.device,
    gpu_bytes: int | None,
) -> list[Cell]:
    """Of hooks, or, with a BAE for each position, of positions of hooks: as many at a time as fit and fall to each
    process. Those of each are kept in a file.
    """
    held_out(states.documents, settings.fit.batch_size, len(states.all_documents) - len(states.documents))
    hooks, positions = range(len(states.hook_names)), range(len(states.positions))
    groups = [[(hook, p) for p in positions] for hook in hooks]
    if settings.dictionaries == "per position":
        groups = [[pair] for group in groups for pair in group]
    paths = [folder / "cells" / f"{index:05}.json" for index in range(len(groups))]
    missing: list[int] = gather([index for index, path in enumerate(paths) if not path.exists()])[0]
    memory = training_memory(len(states.documents), len(positions), states.d_in, settings)
    fitting = min(gather(max(1, memory.sets_at_a_time(bytes_for_training(device, gpu_bytes)))))
    together = max(1, min(fitting, -(-len(missing) // n_processes())))
    (folder / "cells").mkdir(exist_ok=True)
    initial = len(paths) - len(missing)
    with tqdm(
        total=len(paths), initial=initial, desc="entropies", unit="dictionary", disable=not is_main_process()
    ) as progress:

        def measure(indices: list[int]) -> None:
            part = [groups[index] for index in indices]
            vectors = states.vectors([pair for group in part for pair in group], device).unflatten(0, (len(part), -1))
            measured = iter(position_entropies(vectors, states.documents, settings))
            for index, group in zip(indices, part, strict=True):
                cells = [
                    Cell(states.hook_names[hook], states.positions[position], price, *next(measured))
                    for (hook, position), price in product(group, settings.entropy_coefficients)
                ]
                write_json(paths[index], [asdict(cell) for cell in cells])
            progress.update(len(indices))

        share([missing[start : start + together] for start in range(0, len(missing), together)], measure)
    bring_together(folder)
    return [validated(Cell, cell, str(path)) for path in paths for cell in read_json(path)]


def training_memory(n_windows: int, n_positions: int, d_in: int, settings: DynamicsSettings) -> TrainingMemory:
    """Of the sets of activations that BAEs are trained on: those of a hook, or of each of its positions."""
    n_vectors = n_windows * (n_positions if settings.dictionaries == "shared" else 1)
    return TrainingMemory(n_vectors, d_in, settings.d_sae, len(settings.entropy_coefficients), settings.fit)
