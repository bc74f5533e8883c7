"""Several dictionaries on the same hidden states with the same budget, as one result (Table 1)."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sae_lens import TrainingSAEConfig

from bae_lens.evals import (
    DictionaryMetrics,
    FeatureExamples,
    TokenInContext,
    evaluate_dictionary,
    feature_examples,
    language_model_loss,
)
from bae_lens.harvest import HiddenStates, write_text
from bae_lens.training import TrainingSettings, train_dictionary

RESULT_FILE = "result.json"
LOSS_CONTEXTS = 16  # held-out contexts on which the model's loss is measured
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Recipe:
    """A dictionary to be trained."""

    cfg: TrainingSAEConfig
    """SAELens training config, of any registered architecture."""
    lr: float
    """Learning rate of Adam."""


@dataclass(frozen=True)
class DictionaryResult:
    """One dictionary of a `Comparison`."""

    name: str
    architecture: str
    """SAELens' name of the architecture."""
    d_sae: int
    lr: float
    training_seconds: float
    curve: list[dict[str, int | float]]
    """Loss terms by training step."""
    metrics: DictionaryMetrics
    language_model: dict[str, float]
    """Cross entropies of the model with the dictionary spliced in, in nats per token; see `language_model_loss`."""
    features: list[FeatureExamples]


@dataclass(frozen=True)
class Corpus:
    """What was harvested, and what of it was left out of training and evaluation."""

    contexts: int
    tokens: int
    """Tokens of content."""
    special_tokens: int
    """BOS and other special tokens, left out; padding not counted."""
    massive_tokens: int
    """Tokens left out because of a norm over 5 times the median."""
    largest_norm: float
    """Of the tokens that are not special, in units of their median norm."""
    massive_examples: list[str]
    """The most frequent of the massive tokens."""


@dataclass(frozen=True)
class Stage:
    """A part of the work, as timed in the run that wrote the result."""

    name: str
    seconds: float
    peak_memory_gib: float
    """Largest resident memory of the process up to the end of this stage."""


@dataclass(frozen=True)
class Comparison:
    """Dictionaries side by side; `to_dict` and `from_dict` are inverse to each other."""

    settings: dict[str, Any]
    """Everything the result depends on: model, text, hook, sizes, seeds."""
    train: Corpus
    test: Corpus
    stages: list[Stage]
    dictionaries: list[DictionaryResult] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Comparison":
        return cls(
            settings=content["settings"],
            train=Corpus(**content["train"]),
            test=Corpus(**content["test"]),
            stages=[Stage(**stage) for stage in content["stages"]],
            dictionaries=[_dictionary_from_dict(dictionary) for dictionary in content["dictionaries"]],
        )

    def save(self, folder: Path) -> Path:
        """Writes `result.json` and returns its path."""
        path = folder / RESULT_FILE
        write_text(path, json.dumps(self.to_dict()))
        return path

    def table(self) -> str:
        """The held-out results as a table in Markdown."""
        rows = [list(TABLE), ["---", *["---:"] * (len(TABLE) - 1)]]
        rows += [[cell(dictionary) for cell in TABLE.values()] for dictionary in self.dictionaries]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


TABLE = {
    "dictionary": lambda d: d.name,
    "explained variance": lambda d: f"{d.metrics.explained_variance:.3f}",
    "CE recovered": lambda d: f"{d.language_model['ce_loss_score']:.3f}",
    "L0": lambda d: f"{d.metrics.l0:.1f}",
    "informative L0": lambda d: f"{d.metrics.informative_l0:.1f}",
    "support bits": lambda d: f"{d.metrics.support_bits:.0f}",
    "never on": lambda d: f"{d.metrics.never_on}",
    "always on": lambda d: f"{d.metrics.always_on}",
    "dense": lambda d: f"{d.metrics.dense}",
    "Feature Activated": lambda d: f"{d.metrics.feature_activated} of {d.d_sae}",
    "training": lambda d: f"{d.training_seconds:.0f} s",
}
"""Columns of the table: their headings, and how a `DictionaryResult` fills them."""


def _dictionary_from_dict(content: dict[str, Any]) -> DictionaryResult:
    features = [
        FeatureExamples(
            feature["feature"], feature["firing_rate"], [TokenInContext(**example) for example in feature["examples"]]
        )
        for feature in content["features"]
    ]
    return DictionaryResult(**{**content, "metrics": DictionaryMetrics(**content["metrics"]), "features": features})


class Stopwatch:
    """Times the stages of a run."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds a `Stage` when the block ends."""
        start = time.monotonic()
        yield
        self.stages.append(Stage(name, time.monotonic() - start, _peak_memory_gib()))


def compare(
    model: Any,
    train: HiddenStates,
    test: HiddenStates,
    recipes: Mapping[str, Recipe],
    training: TrainingSettings,
    folder: Path,
    settings: dict[str, Any],
    stopwatch: Stopwatch,
    seed: int = 0,
    device: str = "cpu",
) -> Comparison:
    """Trains every recipe on `train` with the same batches in the same order, and measures all of them on `test`.

    Dictionaries are trained and measured one after the other, and each is kept when it is finished, so that an
    interrupted comparison goes on where it stopped; see `train_dictionary`. `settings` are kept with the result and
    name the model and the text.
    """
    metadata = {
        "model_name": settings["model"],
        "model_class_name": type(model).__name__,
        "hook_name": train.hook_name,
        "dataset_path": settings["text"],
        "context_size": train.contexts.tokens.shape[1],
        "prepend_bos": model.tokenizer.bos_token_id is not None,
        "exclude_special_tokens": train.special_tokens,
    }
    held_out = test.rows(test.content)

    def result(name: str, recipe: Recipe) -> DictionaryResult:
        with stopwatch.stage(f"train {name}"):
            trained = train_dictionary(name, recipe.cfg, train, training, folder, recipe.lr, seed, device, metadata)
        with stopwatch.stage(f"evaluate {name}"):
            metrics = evaluate_dictionary(trained.sae, held_out)
            return DictionaryResult(
                name=name,
                architecture=recipe.cfg.architecture(),
                d_sae=recipe.cfg.d_sae,
                lr=recipe.lr,
                training_seconds=trained.seconds,
                curve=trained.curve,
                metrics=metrics,
                language_model=language_model_loss(model, trained.sae, test, LOSS_CONTEXTS),
                features=feature_examples(trained.sae, test, model.tokenizer, metrics.firing_rates),
            )

    results = []
    for name, recipe in recipes.items():
        path = folder / "results" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_text(path, json.dumps(asdict(result(name, recipe))))
        results.append(_dictionary_from_dict(json.loads(path.read_text())))
    corpora = describe(train, model.tokenizer), describe(test, model.tokenizer)
    return Comparison(settings, *corpora, stopwatch.stages, results)


def describe(states: HiddenStates, tokenizer: Any) -> Corpus:
    """Counts what is content and what is not."""
    norms, tokens = states.norms.flatten(), states.contexts.tokens.flatten()
    values, counts = tokens[states.massive].unique(return_counts=True)
    frequent = values[counts.argsort(descending=True)][:8].tolist()
    ordinary = norms[~states.special]
    return Corpus(
        contexts=len(states.contexts.tokens),
        tokens=len(states.content),
        special_tokens=int((states.special & (tokens >= 0)).sum()),
        massive_tokens=int(states.massive.sum()),
        largest_norm=(ordinary.max() / ordinary.median()).item(),
        massive_examples=[tokenizer.decode([token]) for token in frequent],
    )


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Makes `folder` the home of a run with these settings, or finds that it already is; raises as `check_folder`."""
    check_folder(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RUN_FILE, json.dumps(settings, indent=2))


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if `folder` holds a run with other settings (saying which), other files, or is not writable."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"the output folder {folder} is not writable: check {existing}, or choose another folder")
    claim = folder / RUN_FILE
    if not claim.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"the output folder {folder} holds files of something else; choose an empty one")
        return
    earlier, now = json.loads(claim.read_text()), json.loads(json.dumps(settings))
    changed = [key for key in {**earlier, **now} if earlier.get(key) != now.get(key)]
    if changed:
        differences = "; ".join(f"{key}: {earlier.get(key)!r} there, {now.get(key)!r} now" for key in changed)
        raise ValueError(f"the output folder {folder} holds another run ({differences}); choose another folder")


def _peak_memory_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
