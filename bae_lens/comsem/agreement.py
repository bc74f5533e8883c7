"""How scores agree: with one another, with themselves elsewhere, and with explanations that are not right."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from bae_lens.comsem.estimates import NOTHING, Estimate, difference, estimate, mean, preference, rank_correlation
from bae_lens.comsem.results import ComSemReport, FeatureScore
from bae_lens.markdown import markdown_table
from bae_lens.storage import validated

MEASURES = ("detection", "intruder", "score", "balanced_accuracy", "simulation", "fuzzing")
"""Fields of `FeatureScore` that are compared; "score" is ComSem's own."""
ALL = "all dictionaries"
RANDOM = "random tokens"


@dataclass(frozen=True)
class ScorePair:
    """How two scores of the same features agree."""

    first: str
    """One of `MEASURES`."""
    second: str
    """Another."""
    correlation: Estimate
    """Of their ranks over features."""


@dataclass(frozen=True)
class ExplanationControl:
    """One score of the same features with three explanations."""

    measure: str
    """One of `MEASURES`."""
    right: Estimate
    """Mean with the feature's own explanation."""
    other: Estimate
    """Mean with another feature's."""
    vague: Estimate
    """Mean with one that says nothing."""
    over_other: Estimate
    """Share of features to which their own gives more than another's."""
    over_vague: Estimate
    """Share of features to which their own gives more than one that says nothing."""


@dataclass(frozen=True)
class ScoredRun:
    """One ComSem report: how its scores agree with one another, and what they give to other explanations."""

    name: str
    """By which it is told from the others."""
    model: str
    """Name of the language model."""
    judge: str
    """Name of what judged."""
    explainer: str
    """Name of what explained."""
    setting: str
    """Of the procedure."""
    dataset: str
    """Name of the text."""
    seed: int
    """Of the samples."""
    passed: bool
    """Whether the judge passed its self-test."""
    failed_tests: list[str]
    """Scores of which the judge failed the test of known cases."""
    n_features: dict[str, int]
    """Features scored, by dictionary."""
    means: dict[str, dict[str, Estimate]]
    """Mean of each measure by dictionary, with random tokens in the place of features last."""
    pairs: dict[str, list[ScorePair]]
    """By dictionary, and over the features of all."""
    controls: list[ExplanationControl]
    """Over the features of all dictionaries that were asked about so; empty if none were."""


@dataclass(frozen=True)
class Stability:
    """One score of the same features in two runs."""

    measure: str
    """One of `MEASURES`."""
    correlation: Estimate
    """Of ranks over features."""
    difference: Estimate
    """Mean of the second run's less the first's."""


@dataclass(frozen=True)
class Change:
    """Two runs, compared where both scored the same features."""

    first: str
    """Name of a run."""
    second: str
    """Name of another."""
    differ: list[str]
    """What is not the same: judge, explainer, setting, worked examples, seed, text."""
    n_both: int
    """Features scored in both."""
    n_only_first: int
    """Features of the first run that the second did not score; they are left out."""
    n_only_second: int
    """The other way round."""
    measures: list[Stability]
    """Those that both runs have."""


@dataclass(frozen=True)
class Agreement:
    """What several ComSem reports say of their scores; `to_dict` and `from_dict` are inverse to each other."""

    runs: list[ScoredRun]
    """In the order in which they were given."""
    changes: list[Change]
    """Each pair of runs."""

    def table(self) -> str:
        """How scores agree in each run, and how each changes between runs, as tables in Markdown."""
        tables = [markdown_table(["rank correlation", *(run.name for run in self.runs)], _pair_rows(self.runs))]
        if self.changes:
            names = [f"{change.first} and {change.second}" for change in self.changes]
            tables.append(markdown_table(["of each score with itself", *names], _change_rows(self.changes)))
        return "\n\n".join(tables)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Agreement":
        """Raises ValueError if it is none of this version."""
        return validated(cls, content, "this agreement")


def compare_scores(reports: Mapping[str, ComSemReport]) -> Agreement:
    """Compares the scores of reports by name. Raises ValueError without any."""
    if not reports:
        raise ValueError("there are no ComSem reports to compare")
    return Agreement(
        [_scored_run(name, report) for name, report in reports.items()],
        [_change(*first, *second) for first, second in combinations(reports.items(), 2)],
    )


def _pair_rows(runs: Sequence[ScoredRun]) -> list[list[str]]:
    """Over the features of all dictionaries of a run."""
    found = [{(p.first, p.second): p.correlation for p in next(iter(run.pairs.values()), [])} for run in runs]
    pairs = dict.fromkeys(pair for of_run in found for pair in of_run)
    return [[" and ".join(pair), *(str(of_run.get(pair, NOTHING)) for of_run in found)] for pair in pairs]


def _change_rows(changes: Sequence[Change]) -> list[list[str]]:
    found = [{stability.measure: stability.correlation for stability in change.measures} for change in changes]
    rows = [["differ in", *(", ".join(change.differ) or "nothing" for change in changes)]]
    rows += [["features in both", *(str(change.n_both) for change in changes)]]
    rows += [["left out", *(str(change.n_only_first + change.n_only_second) for change in changes)]]
    measures = [measure for measure in MEASURES if any(measure in of_change for of_change in found)]
    return rows + [[name, *(str(of_change.get(name, NOTHING)) for of_change in found)] for name in measures]


def _scored_run(name: str, report: ComSemReport) -> ScoredRun:
    groups = {dictionary.name: dictionary.features for dictionary in report.dictionaries}
    everything = [feature for features in groups.values() for feature in features]
    measured = [measure for measure in MEASURES if _any_known(_values(everything, measure))]
    together = {ALL: everything} if len(groups) > 1 else {}
    return ScoredRun(
        name=name,
        model=report.model,
        judge=report.judge,
        explainer=report.explainer,
        setting=report.setting,
        dataset=report.dataset,
        seed=report.settings["seed"],
        passed=report.self_test.passed,
        failed_tests=[score for score, test in report.score_tests.items() if not test.passed],
        n_features={dictionary: len(features) for dictionary, features in groups.items()},
        means={
            group: {measure: estimate(_values(features, measure), mean) for measure in measured}
            for group, features in {**groups, RANDOM: report.random_features}.items()
        },
        pairs={
            group: [
                ScorePair(first, second, rank_correlation(_values(features, first), _values(features, second)))
                for first, second in combinations(measured, 2)
            ]
            for group, features in {**together, **groups}.items()
        },
        controls=[control for measure in measured if (control := _control(measure, everything)) is not None],
    )


def _control(measure: str, features: Sequence[FeatureScore]) -> ExplanationControl | None:
    """Over the features of which all three are known; None if there are none."""
    known = [
        values
        for feature in features
        if None not in (values := (getattr(feature, measure), *(of.get(measure) for of in _controls(feature))))
    ]
    if not known:
        return None
    right, other, vague = zip(*known, strict=True)
    return ExplanationControl(
        measure,
        estimate(right, mean),
        estimate(other, mean),
        estimate(vague, mean),
        preference(right, other),
        preference(right, vague),
    )


def _controls(feature: FeatureScore) -> tuple[dict[str, float | None], dict[str, float | None]]:
    return feature.with_other, feature.with_vague


def _change(first_name: str, first: ComSemReport, second_name: str, second: ComSemReport) -> Change:
    features = _by_key(first), _by_key(second)
    both = [key for key in features[0] if key in features[1]]
    of_first, of_second = ([by_key[key] for key in both] for by_key in features)
    pairs = {measure: (_values(of_first, measure), _values(of_second, measure)) for measure in MEASURES}
    measured = {measure: values for measure, values in pairs.items() if all(map(_any_known, values))}
    return Change(
        first=first_name,
        second=second_name,
        differ=[name for name, value in _circumstances(first).items() if value != _circumstances(second)[name]],
        n_both=len(both),
        n_only_first=len(features[0]) - len(both),
        n_only_second=len(features[1]) - len(both),
        measures=[Stability(measure, rank_correlation(a, b), difference(a, b)) for measure, (a, b) in measured.items()],
    )


def _by_key(report: ComSemReport) -> dict[tuple[Any, ...], FeatureScore]:
    """Features by all that says which they are."""
    return {
        (report.model, dictionary.hook_name, dictionary.name, dictionary.weights, feature.feature): feature
        for dictionary in report.dictionaries
        for feature in dictionary.features
    }


def _circumstances(report: ComSemReport) -> dict[str, Any]:
    return {
        "judge": report.judge,
        "explainer": report.explainer,
        "setting": report.setting,
        "worked examples": report.settings.get("worked_examples", False),
        "seed": report.settings["seed"],
        "text": (report.dataset, report.settings["corpus"]),
    }


def _values(features: Sequence[FeatureScore], measure: str) -> list[float | None]:
    return [getattr(feature, measure) for feature in features]


def _any_known(values: Sequence[float | None]) -> bool:
    return any(value is not None for value in values)
