"""`bae-lens entropy`."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from bae_lens.bae import BAE
from bae_lens.entropy import EntropyEstimate, estimate_entropy
from bae_lens.fit import FitSettings, fit_bae
from bae_lens.harvest import write_text
from bae_lens.plots_entropy import recovered_entropy
from bae_lens.recovery import WIDTHS, recover

HELD_OUT = 5  # one vector in so many, from the end, is not trained on
SMALL_RANKS, SMALL_WIDTHS, SMALL_VECTORS = (2, 8, 32), WIDTHS[:2], 20_000


@dataclass(frozen=True)
class Entropy:
    """Estimate the entropy of vectors in a file, or, with --benchmark, of vectors whose entropy is known.

    With a dictionary the vectors are encoded by it. Without one a BAE is trained on four fifths of them, and measured
    on the last fifth.
    """

    vectors: Path | None = None
    """A .npy, .pt or .safetensors file that holds one array (n, d)."""
    dictionary: Path | None = None
    """Folder of a saved BAE."""
    d_sae: int | None = None
    """Features of the BAE that is trained; by default four a dimension."""
    entropy_coefficient: float = 0.3
    """Price of a bit in the BAE that is trained: the squared error it must save, of vectors with mean square d."""
    steps: int = FitSettings.steps
    """Training steps."""
    batch_size: int = FitSettings.batch_size
    """Vectors per step."""
    benchmark: bool = False
    """Recover known entropies instead, with the penalties on and off: a small version of
    benchmarks/entropy_recovery.py, a few minutes."""
    output: Path | None = None
    """A .json file for the result; a figure of --benchmark goes into an .html file beside it."""
    seed: int = 0
    """Seed of the initial weights, the order of the vectors and the resampling."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the BAE runs."""

    def run(self) -> str:
        if self.benchmark:
            return self._recovery()
        if self.vectors is None:
            raise ValueError("give a file of --vectors, or --benchmark")
        x = read_vectors(self.vectors).to(self.device)
        if self.dictionary is not None:
            sae = SAE.load_from_disk(self.dictionary, self.device)
            if not isinstance(sae, BAE):
                raise ValueError(f"{self.dictionary} holds a {sae.cfg.architecture()}, and an entropy needs a bae")
            return self._report(estimate_entropy(sae, x, self.seed))
        train = x[: len(x) - len(x) // HELD_OUT]
        settings = FitSettings(steps=self.steps, batch_size=self.batch_size)
        bae = fit_bae(
            train, 4 * x.shape[1] if self.d_sae is None else self.d_sae, self.seed, self.entropy_coefficient, settings
        )
        return self._report(estimate_entropy(bae, x[len(train) :], self.seed))

    def _report(self, estimate: EntropyEstimate) -> str:
        self._write(estimate.to_dict())
        low, high = estimate.interval
        return (
            f"{estimate.bits:.2f} bits per vector over {estimate.n_vectors} vectors "
            f"({estimate.varying_features} of {estimate.d_sae} features vary)\n"
            f"{estimate.corrected_bits:.2f} bits corrected for their number, 95 % interval {low:.2f} to {high:.2f}\n"
            f"at most {estimate.joint_bits_bound:.2f} bits jointly: pairs among {estimate.sampled_features} features "
            f"share {estimate.shared_bits:.2f}\n"
            f"explained variance {estimate.explained_variance:.4f}"
        )

    def _recovery(self) -> str:
        recipes = {
            "on": (self.entropy_coefficient, FitSettings(steps=1024)),
            "off": (0.0, FitSettings(steps=1024, elimination=False)),
        }
        found = {
            penalties: [
                row
                for d_sae in SMALL_WIDTHS
                for row in recover(SMALL_RANKS, d_sae, self.seed, price, settings, SMALL_VECTORS)
            ]
            for penalties, (price, settings) in recipes.items()
        }
        self._write({penalties: [row.to_dict() for row in rows] for penalties, rows in found.items()})
        if self.output is not None:
            figure = recovered_entropy({f"penalties {penalties}": rows for penalties, rows in found.items()})
            figure.write_html(self.output.with_suffix(".html"), config={"displayModeBar": False})
        lines = [
            "| penalties | true bits | features | bits | features that vary | FVU |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for penalties, rows in found.items():
            for row in rows:
                numbers = f"{row.rank} | {row.d_sae} | {row.bits:.2f} | {row.varying_features} | {row.fvu:.1e}"
                lines.append(f"| {penalties} | {numbers} |")
        return "\n".join(lines)

    def _write(self, result: object) -> None:
        if self.output is not None:
            write_text(self.output, json.dumps(result, indent=1))


def read_vectors(path: Path) -> Float[Tensor, "n d"]:
    """The one array of a file in float32; nothing in the file is executed.

    Raises ValueError for other kinds of file, damaged ones, and for anything but one matrix of numbers.
    """
    readers = {".npy": _read_npy, ".pt": _read_pt, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise ValueError(f"vectors must be in a file that ends in {', '.join(readers)}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        found = readers[path.suffix](path)
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0] or "it is empty or breaks off"
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if not isinstance(found, Tensor) or found.ndim != 2 or found.is_complex():
        shape = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(f"{path} must hold one array (n, d), got {shape}")
    return found.float()


def _read_npy(path: Path) -> object:
    with path.open("rb") as file:
        found = np.lib.format.read_array(file, allow_pickle=False)
    if found.dtype.kind not in "biuf":
        raise ValueError(f"it holds values of type {found.dtype} instead of numbers")
    return torch.from_numpy(found.astype(np.float32))


def _read_pt(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if len(tensors) != 1:
        raise ValueError(f"it holds {len(tensors)} arrays instead of one")
    return next(iter(tensors.values()))
