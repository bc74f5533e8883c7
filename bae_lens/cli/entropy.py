"""`bae-lens entropy`."""

from dataclasses import dataclass
from pathlib import Path

from bae_lens.activations.vector_files import VectorFile
from bae_lens.cli.device import DEFAULT_DEVICE, check_device
from bae_lens.entropy.estimate import EntropyEstimate, estimate_entropy, fit_tree
from bae_lens.entropy.fit import FitSettings, fit_bae
from bae_lens.entropy.recovery import WIDTHS, recover
from bae_lens.saes.loading import load_bae
from bae_lens.storage import write_json, write_text

HELD_OUT = 5  # one vector in so many, from the end, is not trained on
SMALL_RANKS, SMALL_WIDTHS, SMALL_VECTORS = (2, 8, 32), WIDTHS[:2], 20_000


@dataclass(frozen=True)
class Entropy:
    """Estimate the entropy of vectors in a file, or, with --benchmark, of vectors whose entropy is known.

    With a dictionary the vectors are encoded by it. Without one a BAE is trained on four fifths of them, and measured
    on the last fifth.
    """

    vectors: Path | None = None
    """A .npy, .pt or .safetensors file that holds one array (..., d), of which all axes but the last count vectors."""
    dictionary: Path | None = None
    """Folder of a saved BAE."""
    d_sae: int | None = None
    """Features of the BAE that is trained; by default four a dimension."""
    entropy_coefficient: float = 0.3
    """Weight of the entropy in the loss of the BAE that is trained: the squared error that a bit must save, of vectors
    with mean square d."""
    steps: int = FitSettings.steps
    """Training steps."""
    batch_size: int = FitSettings.batch_size
    """Vectors per step."""
    benchmark: bool = False
    """Recover known entropies instead, on the CPU, with the penalties on and off: a small version of
    benchmarks/entropy_recovery.py, a few minutes. Of the other flags it takes --entropy-coefficient, --seed and
    --output."""
    output: Path | None = None
    """A .json file for the result; a figure of --benchmark goes into an .html file beside it."""
    seed: int = 0
    """Seed of the initial weights, the order of the vectors and the resampling."""
    device: str = DEFAULT_DEVICE
    """Where the BAE runs."""

    def run(self) -> str:
        """Returns the estimate, or the benchmark's table, and writes it to `output`.

        Raises as `VectorFile`, `fit_bae` and `estimate_entropy` do, and ValueError without anything to do.
        """
        check_device(self.device)
        if self.output is not None and not self.output.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {self.output.parent}; make it, or choose another --output")
        if self.benchmark:
            return self._recovery()
        if self.vectors is None:
            raise ValueError("give a file of --vectors, or --benchmark")
        x = VectorFile(self.vectors).read().to(self.device)
        if self.dictionary is not None:
            sae = load_bae(self.dictionary, self.device)
            return self._report(estimate_entropy(sae, x, self.seed))
        train = x[: len(x) - len(x) // HELD_OUT]
        settings = FitSettings(steps=self.steps, batch_size=self.batch_size)
        bae = fit_bae(
            train, 4 * x.shape[1] if self.d_sae is None else self.d_sae, self.seed, self.entropy_coefficient, settings
        )
        return self._report(estimate_entropy(bae, x[len(train) :], self.seed, tree=fit_tree(bae, train)))

    def _report(self, estimate: EntropyEstimate) -> str:
        self._write(estimate.to_dict())
        low, high = estimate.interval
        return (
            f"{estimate.bits:.2f} bits per vector over {estimate.n_vectors} vectors "
            f"({estimate.varying_features} of {estimate.d_sae} features vary)\n"
            f"{estimate.corrected_bits:.2f} bits corrected for their number, 95 % interval {low:.2f} to {high:.2f}\n"
            f"at most {estimate.joint_bits_bound:.2f} bits jointly, each feature given one other\n"
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
                for row in recover(SMALL_RANKS, d_sae, self.seed, coefficient, settings, SMALL_VECTORS)
            ]
            for penalties, (coefficient, settings) in recipes.items()
        }
        self._write({penalties: [row.to_dict() for row in rows] for penalties, rows in found.items()})
        if self.output is not None:
            from bae_lens.report.entropy import recovery_chart
            from bae_lens.report.figures import draw

            figure = draw(recovery_chart({f"penalties {name}": rows for name, rows in found.items()}))
            page = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False})
            write_text(self.output.with_suffix(".html"), page)
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
            write_json(self.output, result, indent=1)
