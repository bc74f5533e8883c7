"""How information builds up in a language model: entropy of activations by layer and position (section 3.2)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.activations.fingerprint import model_fingerprint, tensor_fingerprint
from bae_lens.activations.models import resolve_hook
from bae_lens.activations.position_cache import PositionActivations, Windows, collect
from bae_lens.entropy.estimate import EntropyEstimate, estimate_entropy
from bae_lens.entropy.fit import FitSettings, check_entropy_coefficients, fit_baes
from bae_lens.entropy.saturation import Saturation, fit_saturation
from bae_lens.functional.rate_distortion import RatePoint, weights_at
from bae_lens.storage import Stopwatch, claimed, read_json, validated, write_json

BYTES_AT_A_TIME = 2**30  # of weights, gradients and the optimizer's two moments
HELD_OUT = 5  # one window in so many at least is not trained on
# For few vectors in many dimensions, where features that look worth their bits may not be for others, and the exact
# decoder of a thousand vectors is not that of the next thousand (measured in benchmarks/README.md).
FEW_VECTORS = FitSettings(steps=256, batch_size=256, lr=1e-2, entropy_from=0.05, encoder_bias=-2.0, elimination=False)


@dataclass(frozen=True)
class DynamicsSettings:
    """How the BAEs of `entropy_dynamics` are trained."""

    d_sae: int
    """Features of each BAE."""
    entropy_coefficients: tuple[float, ...] = (1.0,)
    """Weights of the entropy in the loss, per bit; several make a curve of bits against explained variance for every
    layer and position."""
    fit: FitSettings = FEW_VECTORS
    """Training; steps count for all BAEs alike."""
    seed: int = 0
    """Seed of the initial weights, the order of the vectors and the resampling."""

    def __post_init__(self) -> None:
        """Raises ValueError for a width below 1, and for no coefficients or such as cannot be."""
        if self.d_sae < 1:
            raise ValueError(f"d_sae must be at least 1, got {self.d_sae}")
        if not self.entropy_coefficients:
            raise ValueError("give at least one entropy coefficient, got none")
        check_entropy_coefficients(self.entropy_coefficients)


@dataclass(frozen=True)
class Cell:
    """One BAE of the grid."""

    hook_name: str
    """Where the activations are from."""
    position: int
    """Which token of a window they belong to."""
    entropy_coefficient: float
    """Weight of the entropy in the loss, per bit."""
    estimate: EntropyEstimate
    """Over the held-out windows, with an interval by bootstrap over their documents."""
    train_explained_variance: float
    """Of the windows that the BAE was trained on."""


@dataclass(frozen=True)
class CurvePoint:
    """Entropy at one hook and position, of the first coefficient or interpolated to an explained variance."""

    position: int
    bits: float
    """Corrected for the number of vectors."""
    interval: tuple[float, float]
    """Interpolated as the bits are, so without the error of the explained variances."""
    joint_bits_bound: float
    """What the dependence of pairs leaves of the bits; see `EntropyEstimate`."""
    explained_variance: float
    """Of the held-out activations."""


@dataclass(frozen=True)
class EntropyDynamics:
    """Entropies by hook, position and entropy coefficient."""

    model: str
    """Name of the language model."""
    hook_names: list[str]
    """In the order asked for."""
    positions: list[int]
    """As asked for."""
    n_windows: int
    """Windows looked at, those held out among them."""
    n_documents: int
    """Documents that they are from."""
    outliers: int
    """Windows left out because one of their activations is an outlier, by `is_outlier`."""
    too_short: int
    """Documents dropped because they were shorter than a window."""
    distinct_tokens: list[int]
    """Different input tokens at each position, in the windows looked at. At the first one the entropy of these windows
    is at most log2 of it; the marginal bits of a code whose features repeat one another can be far more."""
    d_sae: int
    """Features of each BAE."""
    cells: list[Cell]
    """One for each hook, position and entropy coefficient."""

    def curve(self, hook_name: str, explained_variance: float | None = None) -> list[CurvePoint]:
        """Entropy by position, of the first coefficient, or between coefficients at one explained variance.

        Positions are left out where the coefficients tried do not reach it.
        """
        points = [self._point(hook_name, position, explained_variance) for position in self.positions]
        return [point for point in points if point is not None]

    def _point(self, hook_name: str, position: int, explained_variance: float | None) -> CurvePoint | None:
        estimates = [cell.estimate for cell in self.at(hook_name, position)]
        if explained_variance is None:
            e = estimates[0]
            return CurvePoint(position, e.corrected_bits, e.interval, e.joint_bits_bound, e.explained_variance)
        try:
            family = [RatePoint(e.corrected_bits, e.explained_variance) for e in estimates]
            weights = weights_at(family, explained_variance)
        except ValueError:
            return None
        values = np.array([(e.corrected_bits, *e.interval, e.joint_bits_bound) for e in estimates])
        bits, low, high, joint = map(float, weights @ values)
        return CurvePoint(position, bits, (low, high), joint, explained_variance)

    def at(self, hook_name: str, position: int) -> list[Cell]:
        """The cells of one hook and position, one for each coefficient."""
        return [cell for cell in self.cells if (cell.hook_name, cell.position) == (hook_name, position)]

    def saturations(self, explained_variance: float | None = None, seed: int = 0) -> list[Saturation]:
        """Of every hook whose curve has at least 4 positions and rises; see `fit_saturation`."""
        found = []
        for hook_name in self.hook_names:
            points = self.curve(hook_name, explained_variance)
            rows = [(point.position, point.bits, *point.interval) for point in points]
            positions, bits, low, high = np.array(rows, dtype=float).reshape(-1, 4).T
            saturation = fit_saturation(hook_name, positions, bits, np.maximum((high - low) / 4, 1e-3), seed)
            found += [saturation] if saturation else []
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EntropyDynamics":
        """Whatever else stands beside the fields is passed over. Raises ValueError for what is none of this version."""
        return validated(cls, values, "this result")


def entropy_dynamics(
    model: Any,
    windows: Windows,
    hook_names: Sequence[str],
    positions: Sequence[int],
    settings: DynamicsSettings,
    folder: Path,
    loading_seconds: float = 0.0,
) -> EntropyDynamics:
    """Trains a BAE for every hook, position and coefficient on the windows' activations and measures its entropy.

    `windows` are `random_windows` of a text, or sequences of your own whose positions mean something, such as prompts
    in which a demonstration ends at each of `positions` (benchmarks/in_context.py). The windows of the last documents,
    at least a fifth of all, are held out; as windows of a document are alike, intervals come from a bootstrap over
    documents.

    One pass of the model collects everything in `folder`, where finished entropies are kept too: an interrupted run
    goes on. BAEs are trained together, as many as fit in a gibibyte. `stages.json` says how long it took, with the
    `loading_seconds` of model and windows.

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
        stopwatch = Stopwatch(folder)
        stopwatch.add("model and windows", loading_seconds)
        with stopwatch.stage("activations"):
            states = collect(model, windows, hook_names, positions, folder / "activations")
        with stopwatch.stage("entropies"):
            cells = _entropies(states, settings, folder / "cells.json")
    return EntropyDynamics(
        model=model.cfg.model_name,
        hook_names=states.hook_names,
        positions=states.positions,
        n_windows=len(states.kept),
        n_documents=len(states.documents.unique()),
        outliers=len(windows.tokens) - len(states.kept),
        too_short=windows.too_short,
        distinct_tokens=[len(windows.tokens_at(p)[states.kept].unique()) for p in positions],
        d_sae=settings.d_sae,
        cells=cells,
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


def _entropies(states: PositionActivations, settings: DynamicsSettings, path: Path) -> list[Cell]:
    test = held_out(states.documents, settings.fit.batch_size, len(states.all_documents) - len(states.documents))
    cells = [validated(Cell, cell, str(path)) for cell in read_json(path)] if path.exists() else []
    grid = list(product(range(len(states.hook_names)), range(len(states.positions)), settings.entropy_coefficients))
    d_in = states.d_in
    at_a_time = max(1, BYTES_AT_A_TIME // (4 * 4 * 2 * d_in * settings.d_sae))
    with tqdm(total=len(grid), initial=len(cells), desc="entropies", unit="BAE") as progress:
        while len(cells) < len(grid):
            part = grid[len(cells) : len(cells) + at_a_time]
            vectors = states.vectors([(hook, position) for hook, position, _ in part])
            results = _measure(vectors, test, states.documents, [coefficient for *_, coefficient in part], settings)
            for (hook, position, coefficient), measured in zip(part, results, strict=True):
                cells.append(Cell(states.hook_names[hook], states.positions[position], coefficient, *measured))
            write_json(path, [asdict(cell) for cell in cells])
            progress.update(len(part))
    return cells


def _measure(
    vectors: Float[Tensor, "models n d_in"],
    test: Bool[Tensor, " n"],
    documents: Int[Tensor, " n"],
    coefficients: list[float],
    settings: DynamicsSettings,
) -> list[tuple[EntropyEstimate, float]]:
    train, unseen = vectors[:, ~test], vectors[:, test]
    baes = fit_baes(train, settings.d_sae, settings.seed, coefficients, settings.fit)
    return [
        (
            estimate_entropy(bae, x, settings.seed, documents[test]),
            estimate_entropy(bae, seen, settings.seed).explained_variance,
        )
        for bae, x, seen in zip(baes, unseen, train, strict=True)
    ]
