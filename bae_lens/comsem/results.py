"""What ComSem found, as plain values."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import compress
from typing import Any

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.firing_rates import frequency_bin, frequency_matched
from bae_lens.comsem.judges.judge import Verdict
from bae_lens.comsem.judges.measures import mean, standard_error
from bae_lens.comsem.judges.self_test import SelfTest
from bae_lens.comsem.judges.spending import Usage
from bae_lens.comsem.scores.catalog import SCORES
from bae_lens.comsem.scores.score_test import ScoreTest
from bae_lens.markdown import markdown_table
from bae_lens.storage import validated

WEIGHTED = "weighted "  # of a column of means in which each feature counts as often as it fires


@dataclass(frozen=True)
class Judged:
    """An instance and the verdict on it."""

    instance: Instance
    verdict: Verdict


@dataclass(frozen=True)
class FeatureScore:
    """One feature; None is what could not be measured."""

    feature: int
    firing_rate: float
    """Share of the tokens on which it fires."""
    n_instances: int
    """Tokens that activate it."""
    explanation: str | None
    """What the explainer said that its examples have in common."""
    examples: list[Instance]
    """From which it was explained."""
    held_out: list[Judged]
    """Tokens that activate it, and the judge's answers."""
    controls: list[Judged]
    """Tokens that do not, and the judge's answers."""
    score: float | None
    """Share of yes on `held_out`: the paper's score."""
    interval: tuple[float, float] | None
    """Jeffreys' 95 % interval of the score."""
    specificity: float | None
    """Share of no on `controls`."""
    balanced_accuracy: float | None
    """Mean of score and specificity; 1/2 is chance."""
    auc: float | None
    """Of the yes-probabilities of `held_out` against those of `controls`."""
    probability: float | None
    """Mean yes-probability on `held_out`, calibrated on the judge's self-test."""
    detection: float | None
    """Balanced accuracy at telling passages that activate the feature from passages that do not."""
    fuzzing: float | None
    """Balanced accuracy at telling highlighted tokens that are right from others."""
    unparsable: int
    """Answers, of all questions, that could not be parsed."""
    failed: int
    """Questions without an answer."""
    abstained: int = 0
    """Questions that the judge says it cannot judge, since the explanation is of a kind that it does not know."""
    shuffled: float | None = None
    """Share of yes on `held_out` with another feature's explanation."""
    intruder: float | None = None
    """Share of the puzzles in which the judge finds the one token that does not activate it; 1/5 is chance."""
    intruder_interval: tuple[float, float] | None = None
    """Jeffreys' 95 % interval of that share; the puzzles are of the same few instances."""
    simulation: float | None = None
    """Correlation of the activations that the judge predicts from the explanation with the true ones."""
    with_other: dict[str, float | None] = field(default_factory=dict)
    """What other fields would be with another feature's explanation."""
    with_vague: dict[str, float | None] = field(default_factory=dict)
    """What they would be with an explanation that says nothing."""


@dataclass(frozen=True)
class DictionaryScores:
    """One dictionary of a `ComSemReport`."""

    name: str
    """Its name in the run."""
    architecture: str
    """SAELens' name of the architecture."""
    hook_name: str
    """Where it reads."""
    d_sae: int
    """Features that it has."""
    feature_activated: int
    """Features activated by at least 8 tokens (Table 1)."""
    scoreable: int
    """Features with enough instances to be scored."""
    features: list[FeatureScore]
    """Those that were scored: the scoreable ones or a sample of them."""
    never_fire: int = 0
    """Features that fire on none of the tokens."""
    left_out: list[int] = field(default_factory=list)
    """Features that were asked for and have too few instances to be scored."""
    weights: str = ""
    """By which it is known; see `model_fingerprint`."""

    @property
    def scores(self) -> list[float]:
        """The scores of the features that have one."""
        return [feature.score for feature in self.features if feature.score is not None]

    @property
    def above_zero(self) -> int:
        """Features with a score over 0 (Table 1)."""
        return sum(score > 0 for score in self.scores)

    @property
    def perfect(self) -> int:
        """Features with a score of 1."""
        return sum(score == 1 for score in self.scores)

    @property
    def share_perfect(self) -> float | None:
        """Share of the scored features that have a score of 1 (Table 1)."""
        return self.perfect / len(self.scores) if self.scores else None

    def mean(self, measure: str) -> float | None:
        """Mean over features of one of the fields of `FeatureScore`."""
        return mean([getattr(feature, measure) for feature in self.features])

    def weighted(self, measure: str) -> float | None:
        """Mean over features of one of the fields of `FeatureScore`, in which each counts as often as it fires.

        The frequency-adjusted score of Binary Sparse Coding (arXiv 2509.25596), as the code of its authors computes it
        (EleutherAI/sparsify, `ablation_impact.py` of the branch `binary`), there of the F1 score of detection.
        """
        known = [(f.firing_rate, value) for f in self.features if (value := getattr(f, measure)) is not None]
        total = sum(rate for rate, _ in known)
        return sum(rate * value for rate, value in known) / total if total > 0 else None

    def by_frequency(self, measure: str) -> dict[int, tuple[int, float]]:
        """Number of features and mean of a measure in each bin of the firing rate; see `firing_rates.bin_edges`."""
        bins: dict[int, list[float]] = {}
        for feature in self.features:
            if (value := getattr(feature, measure)) is not None:
                bins.setdefault(frequency_bin(feature.firing_rate), []).append(value)
        return {number: (len(values), sum(values) / len(values)) for number, values in sorted(bins.items())}


@dataclass(frozen=True)
class ComSemReport:
    """Scores of dictionaries by one judge; `to_dict` and `from_dict` are inverse to each other."""

    setting: str
    """"robust", "paper" or "authors"."""
    model: str
    """Name of the language model that the features are of."""
    judge: str
    explainer: str
    """Name of what explained."""
    base_url: str | None
    """Address of the judge's server; None for one that needs none."""
    settings: dict[str, Any]
    """Everything else that was chosen."""
    self_test: SelfTest
    """The judge's answers to cases with known answers."""
    n_tokens: int
    """Tokens of content in the corpus."""
    n_sentences: int
    """Sentences of the corpus."""
    dictionaries: list[DictionaryScores]
    random_features: list[FeatureScore]
    """Random tokens in the place of features: what a score means."""
    usage: Usage
    """Calls and tokens of this run."""
    failures: dict[str, int]
    """Why calls failed, and how often."""
    stopped: str | None
    """Why not all features were scored; None if all were."""
    unparsable: dict[str, int] = field(default_factory=dict)
    """What was missing in answers of this run that could not be parsed, and how often."""
    dataset: str = ""
    """Name of the text; empty where it has none."""
    score_tests: dict[str, ScoreTest] = field(default_factory=dict)
    """The judge's answers to known cases of the scores of which the self-test says nothing."""

    @property
    def mark(self) -> str:
        """† if the judge failed its self-test: it stands beside all its scores."""
        return "" if self.self_test.passed else "†"

    def matched(self, measure: str) -> dict[str, float | None]:
        """Mean of a measure by dictionary, as if all dictionaries' features fired equally often."""
        return frequency_matched(
            {
                dictionary.name: [
                    (feature.firing_rate, getattr(feature, measure))
                    for feature in dictionary.features
                    if getattr(feature, measure) is not None
                ]
                for dictionary in self.dictionaries
            }
        )

    def rows(self) -> list[list[str]]:
        """The table's cells, the headings first."""
        matched = self.matched("score"), self.matched("balanced_accuracy")
        baseline = DictionaryScores("random tokens", "", "", 0, 0, len(self.random_features), self.random_features)
        rows = [
            [cell(dictionary) for cell in TABLE.values()] + [_number(values.get(dictionary.name)) for values in matched]
            for dictionary in [*self.dictionaries, baseline]
        ]
        headings = [*TABLE, "matched score", "matched balanced accuracy"]
        rows = [headings, *[[row[0] + self.mark, *row[1:]] for row in rows]]
        shown = [
            heading.removeprefix(WEIGHTED) not in SCORES or any(cells) for heading, *cells in zip(*rows, strict=True)
        ]
        return [list(compress(row, shown)) for row in rows]

    def table(self) -> str:
        """Scores and controls as a table in Markdown, with the judge's self-test below."""
        headings, *rows = self.rows()
        notes = [self.self_test.summary, *(test.summary for test in self.score_tests.values())]
        notes += filter(None, [self.warning, self.lost, self.too_few, self.stopped])
        return "\n".join([markdown_table(headings, rows), "", *notes])

    @property
    def warning(self) -> str:
        """What the mark means; empty if there is none."""
        return self.mark and "† by a judge that failed its self-test: differences may be the judge's, not the features'"

    @property
    def lost(self) -> str:
        """What became of calls that failed and of answers that could not be parsed; empty if all are well."""
        found = []
        if self.failures:
            found.append(f"{self.usage.failed} calls failed ({_counts(self.failures)})")
        if self.unparsable:
            found.append(f"{sum(self.unparsable.values())} answers could not be parsed ({_counts(self.unparsable)})")
        return " and ".join(found) + "; the same command asks them again" if found else ""

    @property
    def too_few(self) -> str:
        """Which of the features that were asked for have too few instances; empty if none."""
        found = [
            f"{', '.join(map(str, dictionary.left_out))} of {dictionary.name}"
            for dictionary in self.dictionaries
            if dictionary.left_out
        ]
        return f"too few tokens activate features {'; '.join(found)}; they are not scored" if found else ""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "self_test": self.self_test.to_dict()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "ComSemReport":
        """Raises ValueError if it is none of this version."""
        return validated(cls, content, "this report")


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{kind}: {n}" for kind, n in numbers.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _score(dictionary: DictionaryScores) -> str:
    error = standard_error(dictionary.scores)
    return _number(dictionary.mean("score")) + (f" ± {error:.3f}" if error is not None else "")


def _activated(dictionary: DictionaryScores) -> str:
    return f"{dictionary.feature_activated} of {dictionary.d_sae}" if dictionary.d_sae else ""


TABLE: dict[str, Callable[[DictionaryScores], str]] = {
    "dictionary": lambda d: d.name,
    "Feature Activated": _activated,
    "scored": lambda d: f"{len(d.scores)} of {d.scoreable}",
    "score > 0": lambda d: f"{d.above_zero}",
    "score = 1": lambda d: f"{d.perfect}",
    "share = 1": lambda d: _number(d.share_perfect),
    "mean score": _score,
    WEIGHTED + "score": lambda d: _number(d.weighted("score")),
    "specificity": lambda d: _number(d.mean("specificity")),
    "balanced accuracy": lambda d: _number(d.mean("balanced_accuracy")),
    "AUC": lambda d: _number(d.mean("auc")),
    "P(yes)": lambda d: _number(d.mean("probability")),
    "shuffled": lambda d: _number(d.mean("shuffled")),
    "detection": lambda d: _number(d.mean("detection")),
    WEIGHTED + "detection": lambda d: _number(d.weighted("detection")),
    "intruder": lambda d: _number(d.mean("intruder")),
    "simulation": lambda d: _number(d.mean("simulation")),
    "fuzzing": lambda d: _number(d.mean("fuzzing")),
    "unparsable": lambda d: f"{sum(feature.unparsable for feature in d.features)}",
    "abstained": lambda d: f"{sum(feature.abstained for feature in d.features)}",
    "failed": lambda d: f"{sum(feature.failed for feature in d.features)}",
}
"""Columns of the table: their headings, and how `DictionaryScores` fill them."""
