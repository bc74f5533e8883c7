"""The result of a comparison: what was done, and what came out, as values that survive JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.streaming import StreamedActivations
from bae_lens.activations.vectors import VectorSplit
from bae_lens.comparison.experiment import Experiment
from bae_lens.comsem.table1 import Table1
from bae_lens.evaluation.features import FeatureDashboard
from bae_lens.evaluation.metrics import DictionaryMetrics, OptimizedCode
from bae_lens.evaluation.model_loss import LanguageModelLoss
from bae_lens.functional.rate_distortion import RatePoint
from bae_lens.markdown import markdown_table
from bae_lens.storage import Stage, read_json, validated, write_json

RESULT_FILE = "result.json"
AS_TRAINED, REFITTED, OPTIMIZED = "as trained", "best values", "with every help"


@dataclass(frozen=True)
class Trial:
    """One setting tried for a dictionary, measured on the documents held out for tuning."""

    recipe: dict[str, Any]
    """Learning rate and training config."""
    explained_variance: float
    """1 minus squared error over squared distance to the mean."""
    informative_l0: float
    """Features per token whose bit is not the more frequent one."""
    bits: float
    """Per token, support and values together."""


@dataclass(frozen=True)
class Run:
    """A dictionary trained with one seed, measured on held-out documents."""

    seed: int
    training_seconds: float | None
    """Time spent in optimizer steps; None for a pretrained dictionary."""
    memory_gib: float | None
    """Largest memory while it trained, see `TrainedDictionary`; None for a pretrained one."""
    curve: list[dict[str, int | float]]
    """Loss terms by training step; empty for a pretrained one."""
    metrics: DictionaryMetrics
    """On held-out activations."""
    language_model: LanguageModelLoss | None
    """Of the model with the dictionary in place; None without a model."""


@dataclass(frozen=True)
class DictionaryResult:
    """One dictionary of a `Comparison`."""

    name: str
    """Its name in the comparison."""
    architecture: str
    """SAELens' name of the architecture."""
    hook_name: str
    """Where it reads."""
    hook_name_out: str
    """Where it writes; the same unless it is a transcoder."""
    d_sae: int
    """Features that it has."""
    trials: list[Trial]
    """What was tried; empty if there was nothing to choose."""
    recipe: dict[str, Any]
    """Learning rate and training config that were chosen; empty for a pretrained dictionary."""
    runs: list[Run]
    """One a seed; a single one of a pretrained dictionary."""
    features: list[FeatureDashboard]
    """Of the first seed."""
    pretrained: str | None = None
    """Folder or RELEASE/SAE_ID of a dictionary that was not trained here."""

    @property
    def is_binary(self) -> bool:
        """Whether its features are bits."""
        return self.runs[0].metrics.is_binary


@dataclass(frozen=True)
class Corpus:
    """What was cached, or streamed, and what of it was left out of training and evaluation."""

    contexts: int
    """Contexts over which the model ran."""
    tokens: int
    """Tokens of content."""
    special_tokens: int
    """BOS and other special tokens, left out; padding not counted."""
    outlier_tokens: int
    """Tokens left out because of a norm over 5 times the median."""
    largest_norm: float
    """Of the tokens that are not special, in units of their median norm."""
    outlier_examples: list[str]
    """The most frequent of the outlier tokens."""
    sample_tokens: int | None = None
    """Tokens whose mean, scale and median norm stood for all, where activations were streamed and not all cached."""


@dataclass(frozen=True)
class Comparison:
    """Dictionaries side by side; `to_dict` and `from_dict` are inverse to each other."""

    experiment: Experiment
    """What all dictionaries share."""
    train: Corpus
    """What was trained on."""
    test: Corpus
    """What was measured on."""
    stages: list[Stage]
    """How long each part of the work took."""
    pca: list[RatePoint]
    """Of PCA with scalar quantization at `hook_name`, fitted on the training tokens, measured on the held-out ones."""
    gaussian_bound: list[RatePoint]
    """The best that any code could do if these activations were Gaussian."""
    sign_coding: list[RatePoint]
    """Of the signs of the activations' own dimensions, learned and measured as PCA."""
    dictionaries: list[DictionaryResult]
    """In the order in which they were given."""
    comsem: Table1 | None = None
    """What a judge says of their features; None as long as `bae-lens comsem` has not asked."""
    split: VectorSplit | None = None
    """How vectors were split that come without a model; None for tokens, whose documents are split."""
    random_coding: list[RatePoint] = field(default_factory=list)
    """Of random features that all fire equally often, as many as the widest dictionary has, at most 4096: what a binary
    code explains whose encoder was not trained. Empty in results of earlier versions."""

    @property
    def columns(self) -> dict[str, Callable[[DictionaryResult], str]]:
        """Those of `TABLE` for which something was measured."""
        left_out = () if self.split is None else OF_MODELS
        return {heading: cell for heading, cell in TABLE.items() if heading not in left_out}

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Comparison":
        """Raises ValueError for what is no result of this version."""
        return validated(cls, content, "this result")

    def save(self, folder: Path) -> Path:
        """Writes `result.json`, whose path it returns, and, with a model, each dictionary and seed as SAEBench does."""
        for dictionary in self.dictionaries:
            for run in dictionary.runs:
                if run.language_model is None:
                    continue
                (folder / "saebench").mkdir(parents=True, exist_ok=True)
                path = folder / "saebench" / f"{dictionary.name}_seed{run.seed}.json"
                write_json(path, saebench_core(self, dictionary, run), indent=2)
        write_json(folder / RESULT_FILE, self)
        return folder / RESULT_FILE

    def table(self) -> str:
        """The held-out results as a table in Markdown: the mean over seeds and, after ±, their standard deviation."""
        rows = [[cell(dictionary) for cell in self.columns.values()] for dictionary in self.dictionaries]
        return markdown_table(list(self.columns), rows)


def earlier_comsem(folder: Path) -> Table1 | None:
    """What `bae-lens comsem` has added to the result in a folder; None if nothing or if there is no result."""
    path = folder / RESULT_FILE
    content = read_json(path).get("comsem") if path.exists() else None
    return None if content is None else validated(Table1, content, str(path))


def over_seeds(values: list[int] | list[float], digits: int) -> str:
    """Mean and, of several values, standard deviation."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def losses_of(dictionary: DictionaryResult) -> list[LanguageModelLoss]:
    """Of the model with a dictionary in place, one a seed; none without a model."""
    return [run.language_model for run in dictionary.runs if run.language_model is not None]


def unless_pretrained(values: list[float | None], digits: int, unit: str, otherwise: str) -> str:
    """As `over_seeds`, or otherwise where nothing was trained."""
    known = [value for value in values if value is not None]
    return f"{over_seeds(known, digits)} {unit}" if known else otherwise


# Columns: their headings, and how a `DictionaryResult` fills them.
TABLE: dict[str, Callable[[DictionaryResult], str]] = {
    "dictionary": lambda d: d.name,
    "writes": lambda d: d.hook_name_out,
    "explained variance": lambda d: over_seeds([run.metrics.explained_variance for run in d.runs], 3),
    "CE recovered": lambda d: over_seeds([loss.recovered for loss in losses_of(d)], 3),
    "KL recovered": lambda d: over_seeds([loss.kl_recovered for loss in losses_of(d)], 3),
    "L0": lambda d: over_seeds([run.metrics.code.l0 for run in d.runs], 1),
    "informative L0": lambda d: over_seeds([run.metrics.code.informative_l0 for run in d.runs], 1),
    "support bits": lambda d: over_seeds([run.metrics.code.support_bits for run in d.runs], 0),
    "value bits": lambda d: over_seeds([run.metrics.value_bits for run in d.runs], 0),
    "dead": lambda d: over_seeds([run.metrics.code.dead for run in d.runs], 0),
    "always on": lambda d: over_seeds([run.metrics.code.always_on for run in d.runs], 0),
    "dense": lambda d: over_seeds([run.metrics.code.dense for run in d.runs], 0),
    "Feature Activated": lambda d: f"{over_seeds([r.metrics.code.feature_activated for r in d.runs], 0)} of {d.d_sae}",
    "training": lambda d: unless_pretrained([run.training_seconds for run in d.runs], 0, "s", "pretrained"),
    "memory": lambda d: unless_pretrained([run.memory_gib for run in d.runs], 2, "GiB", "-"),
}
OF_MODELS = ("writes", "CE recovered", "KL recovered")  # columns for which there must be a model


def codes_of(dictionary: DictionaryResult) -> dict[str, list[DictionaryMetrics] | list[OptimizedCode]]:
    """The codes of a dictionary that were measured, by what was done to choose them, each with one entry a seed."""
    metrics = [run.metrics for run in dictionary.runs]
    refitted = [run.refitted for run in metrics if run.refitted is not None]
    optimized = [run.optimized for run in metrics if run.optimized is not None]
    codes = {AS_TRAINED: metrics, REFITTED: refitted, OPTIMIZED: optimized}
    return {name: measured for name, measured in codes.items() if measured}


HELP_TABLE = {  # columns of the table of codes: their headings, and how one code's entries for all seeds fill them
    "explained variance": lambda codes: over_seeds([code.coded.explained_variance for code in codes], 3),
    "support bits": lambda codes: over_seeds([code.code.support_bits for code in codes], 0),
    "joint bits": lambda codes: over_seeds([code.code.joint_bits for code in codes], 0),
    "value bits": lambda codes: over_seeds([code.value_bits for code in codes], 0),
    "bits": lambda codes: over_seeds([code.jointly_coded.bits for code in codes], 0),
    "L0": lambda codes: over_seeds([code.code.l0 for code in codes], 1),
    "dead": lambda codes: over_seeds([code.code.dead for code in codes], 0),
    "dense": lambda codes: over_seeds([code.code.dense for code in codes], 0),
    "Feature Activated": lambda codes: over_seeds([code.code.feature_activated for code in codes], 0),
}


def saebench_core(comparison: Comparison, dictionary: DictionaryResult, run: Run) -> dict[str, Any]:
    """The run's measures, with a model, under the keys of SAEBench's core evaluation."""
    metrics, loss, code, rates = run.metrics, run.language_model, run.metrics.code, run.metrics.code.firing_rates
    assert loss is not None
    return {
        "eval_type_id": "core",
        "sae_lens_id": f"{dictionary.name}_seed{run.seed}",
        "eval_config": {
            "model_name": comparison.experiment.model,
            "dataset": comparison.experiment.dataset,
            "context_size": comparison.experiment.contexts.context_size,
        },
        "eval_result_metrics": {
            "model_behavior_preservation": {
                "kl_div_score": loss.kl_recovered,
                "kl_div_with_ablation": loss.kl_ablated,
                "kl_div_with_sae": loss.kl_with_sae,
            },
            "model_performance_preservation": {
                "ce_loss_score": loss.recovered,
                "ce_loss_with_ablation": loss.ablated,
                "ce_loss_with_sae": loss.with_sae,
                "ce_loss_without_sae": loss.clean,
            },
            "reconstruction_quality": {
                "explained_variance": metrics.explained_variance,
                "mse": metrics.mean_squared_error,
                "cossim": metrics.cosine_similarity,
            },
            "shrinkage": {"l2_ratio": metrics.l2_ratio},
            "sparsity": {"l0": code.l0},
            "token_stats": {
                "total_tokens_eval_reconstruction": loss.n_tokens,
                "total_tokens_eval_sparsity_variance": code.n_tokens,
            },
            "misc_metrics": {
                "freq_over_1_percent": sum(rate > 0.01 for rate in rates) / len(rates),
                "freq_over_10_percent": sum(rate > 0.1 for rate in rates) / len(rates),
            },
        },
        "eval_result_details": [{"index": index, "feature_density": rate} for index, rate in enumerate(rates)],
    }


def corpus_of(activations: CachedActivations | StreamedActivations, shown: Callable[[int], str]) -> Corpus:
    """Counts what is content and what is not; `shown` names an outlier token."""
    tokens = activations.contexts.tokens.flatten()
    values, counts = tokens[activations.outliers].unique(return_counts=True)
    frequent = values[counts.argsort(descending=True)][:8].tolist()
    return Corpus(
        contexts=len(activations.contexts.tokens),
        tokens=len(activations.content),
        special_tokens=int((activations.special & (tokens >= 0)).sum()),
        outlier_tokens=int(activations.outliers.sum()),
        largest_norm=activations.relative_norms[~activations.special].max().item(),
        outlier_examples=[shown(token) for token in frequent],
        sample_tokens=activations.sample_tokens if isinstance(activations, StreamedActivations) else None,
    )
