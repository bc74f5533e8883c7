"""How information builds up in a language model: entropy of hidden states by layer and position (section 3.2)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.entropy import EntropyEstimate, estimate_entropy
from bae_lens.fit import FitSettings, fit_baes
from bae_lens.harvest import read_json, write_text
from bae_lens.position_states import Windows, collect
from bae_lens.rate_distortion import RatePoint, bits_at

BYTES_AT_A_TIME = 2**30  # of weights, gradients and the optimiser's two moments
HELD_OUT = 5  # one window in so many, from the end, is not trained on
RISEN = 0.95  # share of the rise at which a curve counts as saturated
REFITS = 200
# For few vectors in many dimensions, where features that look worth their bits may not be for others, and the exact
# decoder of a thousand vectors is not that of the next thousand (measured in benchmarks/README.md).
FEW_VECTORS = FitSettings(steps=256, batch_size=256, lr=3e-3, entropy_from=0.05, encoder_bias=-2.0, elimination=False)
LONGEST = 100  # scale of a saturating curve, in units of the last position: it looks like a line long before
SCALES = 300  # tried


@dataclass(frozen=True)
class DynamicsSettings:
    """How the BAEs of `entropy_dynamics` are trained."""

    d_sae: int
    """Features of each BAE."""
    entropy_coefficients: tuple[float, ...] = (1.0,)
    """Prices of a bit; several make a curve of bits against explained variance for every layer and position."""
    fit: FitSettings = FEW_VECTORS
    """Training; steps count for all BAEs alike."""
    seed: int = 0
    """Seed of the initial weights, the order of the vectors and the resampling."""


@dataclass(frozen=True)
class Cell:
    """One BAE of the grid."""

    hook_name: str
    position: int
    entropy_coefficient: float
    estimate: EntropyEstimate
    """Over the held-out windows."""
    train_explained_variance: float


@dataclass(frozen=True)
class Saturation:
    """`level - rise * exp(-(position - first) / scale)` fitted to one curve, with 95 % intervals."""

    hook_name: str
    level: float
    """Bits that the curve tends to."""
    level_interval: tuple[float, float]
    position: float
    """Where 95 % of the rise from the first position is done."""
    position_interval: tuple[float, float]
    """Its upper end is some 300 times the last position where the curve need not saturate at all."""
    reached: bool
    """Whether the positions looked at go as far as `position`."""


@dataclass(frozen=True)
class EntropyDynamics:
    """Entropies by hook, position and price of a bit."""

    model: str
    hook_names: list[str]
    positions: list[int]
    n_windows: int
    """Windows looked at, those held out among them."""
    massive: int
    """Windows left out because of a hidden state with over 10 times the median norm."""
    too_short: int
    """Documents dropped because they were shorter than a window."""
    distinct_tokens: list[int]
    """Different input tokens at each position. At the first one the entropy is at most log2 of it; the marginal bits of
    a code whose features repeat one another can be far more."""
    d_sae: int
    cells: list[Cell]

    def bits(self, hook_name: str, explained_variance: float | None = None) -> list[float | None]:
        """Corrected entropy by position, of the first price, or of all of them at one explained variance.

        None where the prices tried do not reach it.
        """
        return [self._bits(hook_name, position, explained_variance) for position in self.positions]

    def _bits(self, hook_name: str, position: int, explained_variance: float | None) -> float | None:
        estimates = [cell.estimate for cell in self.at(hook_name, position)]
        if explained_variance is None:
            return estimates[0].corrected_bits
        try:
            return bits_at([RatePoint(e.corrected_bits, e.explained_variance) for e in estimates], explained_variance)
        except ValueError:
            return None

    def at(self, hook_name: str, position: int) -> list[Cell]:
        """The cells of one hook and position, a price each."""
        return [cell for cell in self.cells if (cell.hook_name, cell.position) == (hook_name, position)]

    def saturations(self, explained_variance: float | None = None, seed: int = 0) -> list[Saturation]:
        """Of every hook whose curve has at least 4 positions and rises; see `fit_saturation`."""
        found = []
        for hook_name in self.hook_names:
            curve = zip(self.positions, self.bits(hook_name, explained_variance), strict=True)
            known = [(float(p), b, self._error(hook_name, p)) for p, b in curve if b is not None]
            positions, bits, errors = np.array(known).reshape(-1, 3).T
            saturation = fit_saturation(hook_name, positions, bits, errors, seed)
            found += [saturation] if saturation else []
        return found

    def _error(self, hook_name: str, position: int) -> float:
        low, high = self.at(hook_name, position)[0].estimate.interval
        return max((high - low) / 4, 1e-3)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EntropyDynamics":
        return cls(**{**values, "cells": [_cell(cell) for cell in values["cells"]]})


def entropy_dynamics(
    model: Any,
    windows: Windows,
    hook_names: Sequence[str],
    positions: Sequence[int],
    settings: DynamicsSettings,
    folder: Path,
) -> EntropyDynamics:
    """Trains a BAE for every hook, position and price on the windows' hidden states and measures its entropy.

    `windows` are `random_windows` of a text, or sequences of your own whose positions mean something, such as prompts
    in which a demonstration ends at each of `positions` (benchmarks/in_context.py). The last fifth of them is held out.

    One pass of the model collects everything in `folder`, where finished entropies are kept too: an interrupted run
    goes on. BAEs are trained together, as many as fit in a gibibyte.

    Raises ValueError as `collect` and `fit_baes` do, and if the folder holds entropies of other settings.
    """
    states = collect(model, windows, hook_names, positions, folder / "hidden_states")
    source = json.loads(json.dumps({**read_json(folder / "hidden_states" / "complete.json"), **asdict(settings)}))
    cells = _known_cells(folder, source)
    grid = list(product(range(len(states.hook_names)), range(len(positions)), settings.entropy_coefficients))
    d_in = states.states.shape[-1]
    at_a_time = max(1, BYTES_AT_A_TIME // (4 * 4 * 2 * d_in * settings.d_sae))
    with tqdm(total=len(grid), initial=len(cells), desc="entropies", unit="BAE") as progress:
        while len(cells) < len(grid):
            part = grid[len(cells) : len(cells) + at_a_time]
            vectors = states.vectors([(hook, position) for hook, position, _ in part])
            results = _measure(vectors, [price for *_, price in part], settings)
            for (hook, position, price), (estimate, train_share) in zip(part, results, strict=True):
                cells.append(Cell(states.hook_names[hook], states.positions[position], price, estimate, train_share))
            write_text(folder / "cells.json", json.dumps({"source": source, "cells": [asdict(c) for c in cells]}))
            progress.update(len(part))
    return EntropyDynamics(
        model=model.cfg.model_name,
        hook_names=states.hook_names,
        positions=states.positions,
        n_windows=len(states.kept),
        massive=len(windows.tokens) - len(states.kept),
        too_short=windows.too_short,
        distinct_tokens=[len(windows.tokens[:, windows.column(p)].unique()) for p in positions],
        d_sae=settings.d_sae,
        cells=cells,
    )


def fit_saturation(
    hook_name: str,
    positions: Float[np.ndarray, " n"],
    bits: Float[np.ndarray, " n"],
    errors: Float[np.ndarray, " n"],
    seed: int = 0,
) -> Saturation | None:
    """The saturating exponential through a curve; intervals by refitting it to the bits with their errors added anew.

    `errors` are standard errors of the bits. None for fewer than 4 positions or a curve that does not rise.
    """
    if len(positions) < 4:
        return None
    noise = np.random.default_rng(seed).standard_normal((REFITS, len(bits)))
    levels, scales, rises = _fit_curves(positions, np.vstack([bits, bits + errors * noise]), errors)
    if not rises[0]:
        return None
    # A refit that does not rise does not say where it saturates.
    saturated = positions.min() - np.log(1 - RISEN) * scales[rises]
    levels = levels[rises]
    low, high = np.quantile([levels, saturated], [0.025, 0.975], axis=1)
    return Saturation(
        hook_name=hook_name,
        level=float(levels[0]),
        level_interval=(float(min(low[0], levels[0])), float(max(high[0], levels[0]))),
        position=float(saturated[0]),
        position_interval=(float(min(low[1], saturated[0])), float(max(high[1], saturated[0]))),
        reached=bool(saturated[0] <= positions.max()),
    )


def _fit_curves(
    positions: Float[np.ndarray, " n"], curves: Float[np.ndarray, "curves n"], errors: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " curves"], Float[np.ndarray, " curves"], Bool[np.ndarray, " curves"]]:
    """Level and scale of each curve, and whether it rises. For a given scale the rest is a linear regression."""
    scales = np.geomspace(0.1, LONGEST * positions.max(), SCALES)
    decay = np.exp(-(positions - positions.min()) / scales[:, None])
    weight = errors**-2 / (errors**-2).sum()
    x, y = decay - decay @ weight[:, None], curves - curves @ weight[:, None]
    slope = (y * weight) @ x.T / (weight * x**2).sum(1)
    error = (weight * (y[:, None] - slope[..., None] * x) ** 2).sum(2)
    best = np.where(slope < 0, error, np.inf).argmin(1)
    at_best = slope[np.arange(len(curves)), best]
    return curves @ weight - at_best * (decay @ weight)[best], scales[best], at_best < 0


def _measure(
    vectors: Float[Tensor, "models n d_in"], prices: list[float], settings: DynamicsSettings
) -> list[tuple[EntropyEstimate, float]]:
    held_out = vectors.shape[1] // HELD_OUT
    train, test = vectors[:, :-held_out], vectors[:, -held_out:]
    baes = fit_baes(train, settings.d_sae, settings.seed, prices, settings.fit)
    return [
        (estimate_entropy(bae, x, settings.seed), estimate_entropy(bae, seen, settings.seed).explained_variance)
        for bae, x, seen in zip(baes, test, train, strict=True)
    ]


def _known_cells(folder: Path, source: dict[str, Any]) -> list[Cell]:
    path = folder / "cells.json"
    if not path.exists():
        return []
    earlier = read_json(path)
    if earlier["source"] != source:
        raise ValueError(f"{folder} holds entropies of other settings; choose another folder")
    return [_cell(cell) for cell in earlier["cells"]]


def _cell(values: dict[str, Any]) -> Cell:
    return Cell(**{**values, "estimate": EntropyEstimate.from_dict(values["estimate"])})
