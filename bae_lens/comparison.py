"""Several dictionaries on the same hidden states with the same budget, as one result (Table 1)."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bae_lens.contexts import ContextSettings
from bae_lens.evals import (
    DictionaryMetrics,
    FeatureExamples,
    LanguageModelLoss,
    LossMeter,
    TokenInContext,
    evaluate_dictionary,
    feature_examples,
)
from bae_lens.harvest import HiddenStates, read_json, write_text
from bae_lens.sources import TEXT_COLUMN
from bae_lens.training import Recipe, TrainingSettings, train_dictionary

RESULT_FILE = "result.json"
LOSS_CONTEXTS = 32  # held-out contexts on which the model's loss is measured
RUN_FILE = "run.json"
LOCK_FILE = ".lock"


@dataclass(frozen=True)
class Experiment:
    """What all dictionaries of a comparison share."""

    model: str
    """Name of the model, as `load_model` takes it."""
    text: str
    """Name of the text, as `load_text` takes it."""
    hook_name: str
    """Where in the model the hidden states are taken."""
    text_column: str = TEXT_COLUMN
    """Column of the text."""
    text_split: str = "train"
    """Split of the text, if it comes from the hub."""
    contexts: ContextSettings = field(default_factory=ContextSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    seed: int = 0
    """Seed of the choice of documents, the order of tokens and the initial weights."""


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
    language_model: LanguageModelLoss
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
    """A part of the work, over all runs that it took."""

    name: str
    seconds: float
    peak_memory_gib: float
    """Largest resident memory of a process up to the end of this stage."""


@dataclass(frozen=True)
class Comparison:
    """Dictionaries side by side; `to_dict` and `from_dict` are inverse to each other."""

    experiment: Experiment
    train: Corpus
    test: Corpus
    stages: list[Stage]
    dictionaries: list[DictionaryResult] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Comparison":
        return cls(
            experiment=_experiment_from_dict(content["experiment"]),
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
    "CE recovered": lambda d: f"{d.language_model.recovered:.3f}",
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


def _experiment_from_dict(content: dict[str, Any]) -> Experiment:
    contexts, training = ContextSettings(**content["contexts"]), TrainingSettings(**content["training"])
    return Experiment(**{**content, "contexts": contexts, "training": training})


def _dictionary_from_dict(content: dict[str, Any]) -> DictionaryResult:
    features = [
        FeatureExamples(
            feature["feature"], feature["firing_rate"], [TokenInContext(**example) for example in feature["examples"]]
        )
        for feature in content["features"]
    ]
    metrics, loss = DictionaryMetrics(**content["metrics"]), LanguageModelLoss(**content["language_model"])
    return DictionaryResult(**{**content, "metrics": metrics, "language_model": loss, "features": features})


class Stopwatch:
    """Times the stages of a run, adding to the times of earlier runs in the same folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "stages.json"
        earlier = read_json(self.path) if self.path.exists() else []
        self.stages = {stage["name"]: Stage(**stage) for stage in earlier}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time that the block takes, even if it is interrupted."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - start)

    def add(self, name: str, seconds: float) -> None:
        """Adds time to a stage, in seconds, and notes the peak memory."""
        before = self.stages.get(name, Stage(name, 0.0, 0.0))
        peak = max(before.peak_memory_gib, _peak_memory_gib())
        self.stages[name] = Stage(name, before.seconds + seconds, peak)
        write_text(self.path, json.dumps([asdict(stage) for stage in self.stages.values()]))


def compare(
    model: Any,
    train: HiddenStates,
    test: HiddenStates,
    recipes: Mapping[str, Recipe],
    experiment: Experiment,
    folder: Path,
    stopwatch: Stopwatch,
    device: str = "cpu",
) -> Comparison:
    """Trains every recipe on `train` with the same batches in the same order, and measures all of them on `test`.

    Dictionaries are trained and measured one after the other, and each is kept when it is finished, so that an
    interrupted comparison goes on where it stopped; see `train_dictionary`.
    """
    metadata = {
        "model_name": experiment.model,
        "model_class_name": type(model).__name__,
        "dataset_path": experiment.text,
        "context_size": experiment.contexts.context_size,
        "prepend_bos": model.tokenizer.bos_token_id is not None,
        "exclude_special_tokens": train.special_tokens,
    }
    held_out, loss = test.rows(test.content), LossMeter(model, test, LOSS_CONTEXTS)
    results = []
    for name, recipe in recipes.items():
        with stopwatch.stage(f"train {name}"):
            trained = train_dictionary(
                name, recipe, train, experiment.training, folder, experiment.seed, device, metadata
            )
        evaluation = folder / "dictionaries" / name / "evaluation.json"
        if not evaluation.exists():
            with stopwatch.stage(f"evaluate {name}"):
                metrics = evaluate_dictionary(trained.sae, held_out)
                result = DictionaryResult(
                    name=name,
                    architecture=recipe.cfg.architecture(),
                    d_sae=recipe.cfg.d_sae,
                    lr=recipe.lr,
                    training_seconds=trained.seconds,
                    curve=trained.curve,
                    metrics=metrics,
                    language_model=loss(trained.sae),
                    features=feature_examples(trained.sae, test, model.tokenizer, metrics.firing_rates),
                )
            write_text(evaluation, json.dumps(asdict(result)))
        results.append(_dictionary_from_dict(read_json(evaluation)))
    corpora = describe(train, model.tokenizer), describe(test, model.tokenizer)
    return Comparison(experiment, *corpora, list(stopwatch.stages.values()), results)


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


def check_folder(folder: Path) -> None:
    """Raises ValueError if `folder` holds files that are not those of a run, or cannot be written to."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"the output folder {folder} is not writable: check {existing}, or choose another folder")
    ours = {LOCK_FILE, RUN_FILE, f"{RUN_FILE}.partial"}
    if folder.exists() and not (folder / RUN_FILE).exists() and {path.name for path in folder.iterdir()} - ours:
        raise ValueError(f"the output folder {folder} holds files of something else; choose an empty one")


def claim_folder(folder: Path, experiment: Experiment, recipes: Mapping[str, Recipe]) -> None:
    """Makes `folder` the home of a run, or finds that it already is.

    Raises ValueError as `check_folder`, and if it holds another run, saying what differs.
    """
    check_folder(folder)
    recipe_values = {name: recipe.to_dict() for name, recipe in recipes.items()}
    now = json.loads(json.dumps({**asdict(experiment), "recipes": recipe_values, "version": version("bae-lens")}))
    if (folder / RUN_FILE).exists():
        earlier, new = _flat(read_json(folder / RUN_FILE)), _flat(now)
        changed = [key for key in {**earlier, **new} if earlier.get(key) != new.get(key)]
        if changed:
            differences = "; ".join(f"{key}: {earlier.get(key)!r} there, {new.get(key)!r} now" for key in changed)
            raise ValueError(f"the output folder {folder} holds another run ({differences}); choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RUN_FILE, json.dumps(now, indent=2))


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _peak_memory_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
