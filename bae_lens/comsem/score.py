"""ComSem: explain what activates a feature, then ask whether the explanation fits others (4.2, appendix B)."""

import asyncio
import sys
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args

from tqdm.auto import tqdm

from bae_lens.activations.fingerprint import model_fingerprint
from bae_lens.activations.models import load_model
from bae_lens.activations.sources import load_text
from bae_lens.comsem.collect.collector import collect
from bae_lens.comsem.collect.corpus import CorpusSettings
from bae_lens.comsem.collect.dictionaries import Dictionary, load_dictionaries
from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.collect.sampling import CollectedDictionary, Collection, SamplingSettings
from bae_lens.comsem.judges.client import ChatClient
from bae_lens.comsem.judges.judge import Judge, Question
from bae_lens.comsem.judges.language_model import LanguageModelJudge
from bae_lens.comsem.judges.self_test import SelfTest, ask_cases, run_self_test
from bae_lens.comsem.judges.spending import Usage
from bae_lens.comsem.judges.together import together
from bae_lens.comsem.results import ComSemReport, DictionaryScores, FeatureScore
from bae_lens.comsem.scorer import FeatureScorer
from bae_lens.comsem.scores.catalog import ScoreName, check_scores
from bae_lens.comsem.scores.score_test import TESTS, ScoreTest

ROBUST_FEATURES = 256  # scored per dictionary by default
AUTHORS_SENTENCES = 8192  # of the corpus that the authors read
LONGEST_SENTENCE = 1024  # tokens
SETTINGS = (
    "examples",
    "held_out",
    "controls",
    "explanation_controls",
    "baseline_features",
    "match_firing_rates",
    "rescale",
    "seed",
)
Setting = Literal["robust", "paper", "authors"]
T = TypeVar("T")


@dataclass(frozen=True)
class ComSem:
    """Scores the features of dictionaries; see each field.

    The paper's score is always the share of yes on held-out activating tokens. What stands beside it (matched tokens
    that do not activate the feature, other features' explanations, random tokens) is never counted in it, and in the
    paper's setting not in its questions either. In the robust one, held-out tokens and those that do not activate the
    feature are mixed in one question in seeded order, because in a list of nothing but the former a judge that answers
    by place or by habit could not be told from a good one; so there `controls` is part of what a judge sees.
    """

    judge: Judge
    """Says whether an explanation fits a token."""
    explainer: Judge | None = None
    """Explains; the judge itself by default."""
    setting: Setting = "robust"
    """"robust": a seeded sample with no sentence twice, the token marked in its sentence, one structured call for all,
    controls among them. "paper": instances in corpus order, one call for each, the sentence unmarked. "authors": as
    their code, which differs from the paper in that each sentence is read by itself, no token is left out but BOS, and
    every token activates ten features however weak; a language model must be one with `worked_examples`."""
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    """What is analyzed. In the paper's setting all contexts of a document are, in order; in the authors' the first 8192
    sentences, up to `tokens`."""
    max_features: int | None = None
    """Features scored per dictionary, a seeded sample of those with enough instances; 0 for all. By default 256 in the
    robust setting, and all in the others, as published."""
    features: tuple[int, ...] = ()
    """Score these of each dictionary instead."""
    match_firing_rates: bool = False
    """Draw samples in which all dictionaries' features fire equally often, so far as they have such."""
    rescale: bool = False
    """Whether a token's strongest features, of SAEs and transcoders, are those that are furthest above their mean over
    the corpus in units of their deviation (the authors' `--SAE_rescale`), and not those of largest activation."""
    examples: int = 5
    """Instances from which a feature is explained (m in the paper)."""
    held_out: int = 8
    """Other instances that are judged, at most."""
    controls: bool = True
    """Ask about matched tokens that do not activate the feature."""
    scores: tuple[ScoreName, ...] = ("detection", "fuzzing")
    """Scores to ask for beside ComSem's own. "detection" is the one to lead with, "intruder" needs no explanation,
    "simulation" needs log-probabilities and a call for each instance, "fuzzing" is unreliable."""
    baseline_features: int = 32
    """Features asked about with another's explanation, at most, and random features, of which there are up to 32."""
    explanation_controls: bool = False
    """Ask of these features every score with the other explanation, and with one that says nothing."""
    accept_failing_judge: bool = False
    """Go on, with marked scores, although the judge is near chance on its self-test."""
    seed: int = 0
    """Of the samples and of the order of questions."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that leave nothing to explain or judge."""
        for name, least in (("examples", 1), ("held_out", 1), ("max_features", 0), ("baseline_features", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.setting not in get_args(Setting):
            raise ValueError(f"setting must be one of {', '.join(get_args(Setting))}, got {self.setting!r}")
        for judge in self._judges if self.setting == "authors" else []:
            if isinstance(judge, LanguageModelJudge) and not judge.worked_examples:
                raise ValueError(
                    "the authors' questions come with worked examples: give LanguageModelJudge(worked_examples=True)"
                )

    def score(
        self, model: Any, sae: Dictionary | Mapping[str, Dictionary], dataset: Iterable[Any] | str
    ) -> ComSemReport:
        """Tests the judge, collects instances in one pass over the text, and scores every dictionary.

        A judge that compares with the corpus is tested after the collection, as it will judge. Where there is a budget,
        what asking about the features takes is written to stderr before.

        `model` and `dataset` are objects, or names as `load_model` and `load_text` take them; `dataset` holds strings,
        or rows with a column `text`. `sae` is one dictionary or several by name: SAELens objects, folders, or
        RELEASE/SAE_ID. All stay as they are. Raises ValueError if the judge is near chance on its self-test or a
        dictionary does not fit the model, OSError if the judge left too many of its cases unanswered to tell, and what
        the judge raises.
        """
        check_scores(self.scores, self.judge)
        tested = None if self.judge.needs_background else self._tested()
        model, saes, collection = self.collect(model, sae, dataset)
        self._prepare(collection.background)
        self_test, score_tests = tested or self._tested()
        if any(client.budget.limited for client in self._clients):
            tqdm.write(f"to ask about features: {self._estimate(saes, collection).estimate}", file=sys.stderr)
        report = _finish(self._score(str(model.cfg.model_name), saes, collection, self_test))
        return replace(report, dataset=dataset if isinstance(dataset, str) else "", score_tests=score_tests)

    def estimate(self, model: Any, sae: Dictionary | Mapping[str, Dictionary], dataset: Iterable[Any] | str) -> Usage:
        """Collects instances as `score` does, and counts what would be asked: calls, and tokens by estimate.

        What the cache holds already counts as cached. Raises ValueError without a language model to ask.
        """
        if not self._clients:
            raise ValueError(f"{self.judge.name} costs nothing, so there is nothing to estimate")
        check_scores(self.scores, self.judge)
        model, saes, collection = self.collect(model, sae, dataset)
        self._prepare(collection.background)
        return self._estimate(saes, collection)

    def test_judge(self, background: list[Instance] | None = None) -> SelfTest:
        """The judge's answers to the built-in cases; `background` are ordinary tokens, for a judge that needs them."""
        if background:
            self.judge.prepare(background)
        return _finish(self._closing(run_self_test(self.judge, self._question)))

    def _tested(self) -> tuple[SelfTest, dict[str, ScoreTest]]:
        self_test = self._passed_test()
        score_tests: dict[str, ScoreTest] = {}
        for name in self._scores_to_test:
            score_tests[name] = _finish(self._closing(TESTS[name](self.judge)))
            tqdm.write(score_tests[name].summary, file=sys.stderr)
            if score_tests[name].n == 0 and not self.accept_failing_judge:
                raise ValueError(
                    f"{self.judge.name} answered none of the cases of {name}'s test in a way that can be read "
                    f"({dict(self._unparsable)}); leave it out of scores, use a judge that can (simulation needs "
                    "log-probabilities), or accept_failing_judge to go on"
                )
        return self_test, score_tests

    @property
    def _scores_to_test(self) -> list[ScoreName]:
        return [name for name in self.scores if name in TESTS]

    def _passed_test(self) -> SelfTest:
        self_test = self.test_judge()
        tqdm.write(self_test.summary, file=sys.stderr)
        if self.accept_failing_judge:
            return self_test
        if not self_test.enough:
            raise OSError(f"{self_test.summary}: too few to tell; the same command asks the others again")
        if self_test.near_chance and 2 * self_test.unparsable > self_test.n_answered:
            kinds = ", ".join(f"{kind}: {n}" for kind, n in self._unparsable.items())
            raise ValueError(
                f"{self_test.summary}: most answers could not be parsed ({kinds}), which says nothing of the judge; "
                "use one that answers in the form that is asked for, or accept_failing_judge to go on"
            )
        if self_test.near_chance:
            raise ValueError(
                f"{self_test.summary}, which is near chance: use a better judge, or accept_failing_judge to go on"
            )
        return self_test

    def collect(
        self, model: Any, sae: Dictionary | Mapping[str, Dictionary], dataset: Iterable[Any] | str
    ) -> tuple[Any, dict[str, Any], Collection]:
        """The model, the dictionaries, and the instances to be asked about.

        Raises ValueError for a text in which no feature has enough instances.
        """
        model = load_model(model) if isinstance(model, str) else model
        saes = load_dictionaries(sae, str(model.cfg.device))
        documents = load_text(dataset) if isinstance(dataset, str) else dataset
        sampling = SamplingSettings(
            examples=self.examples,
            held_out=self.held_out,
            in_corpus_order=self._as_published,
            max_features=self._max_features,
            features=self.features,
            match_firing_rates=self.match_firing_rates,
            rescale=self.rescale,
            seed=self.seed,
            excerpts="simulation" in self.scores,
            leave_nothing_out=self.setting == "authors",
        )
        collection = collect(model, saes, documents, self._corpus, sampling)
        if not any(collected.features for collected in collection.dictionaries.values()):
            never = ", ".join(f"{found.never_fire} of {name}" for name, found in collection.dictionaries.items())
            raise ValueError(
                f"no feature {'that was named ' if self.features else ''}has the {self.examples + 1} instances that it "
                f"takes in {collection.n_tokens:,} tokens (features that never fire: {never}); give more text"
            )
        return model, saes, collection

    @property
    def _as_published(self) -> bool:
        """Whether instances come in the order of the corpus and are asked about one at a time."""
        return self.setting != "robust"

    @property
    def _corpus(self) -> CorpusSettings:
        if self.setting == "authors":
            size = max(LONGEST_SENTENCE, self.corpus.context_size)
            sentences = self.corpus.sentences or AUTHORS_SENTENCES
            return replace(self.corpus, contexts_per_document=None, context_size=size, sentences=sentences)
        return replace(self.corpus, contexts_per_document=None) if self.setting == "paper" else self.corpus

    @property
    def _max_features(self) -> int | None:
        """None for all."""
        if self.features:
            return None
        default = None if self._as_published else ROBUST_FEATURES
        return default if self.max_features is None else self.max_features or None

    @property
    def _question(self) -> Question:
        return "token" if self._as_published else "marked token"

    @property
    def _explainer(self) -> Judge:
        return self.explainer or self.judge

    @property
    def _judges(self) -> list[Judge]:
        return [self.judge] if self._explainer is self.judge else [self.judge, self._explainer]

    @property
    def _clients(self) -> list[ChatClient]:
        models = [judge for judge in self._judges if isinstance(judge, LanguageModelJudge)]
        return list({id(judge.client): judge.client for judge in models}.values())

    @property
    def _unparsable(self) -> dict[str, int]:
        return dict(sum((client.unparsable for client in self._clients), Counter()))

    def _prepare(self, background: list[Instance]) -> None:
        for judge in self._judges:
            judge.prepare(background)

    async def _closing(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        finally:
            for judge in self._judges:
                await judge.close()

    def _estimate(self, saes: dict[str, Any], collection: Collection) -> Usage:
        async def everything() -> None:
            await ask_cases(self.judge, self._question)
            await together([TESTS[name](self.judge) for name in self._scores_to_test])
            await self._closing(self._ask_everything(saes, collection, None))

        with ExitStack() as stack:
            usages = [stack.enter_context(client.dry_run()) for client in self._clients]
            _finish(everything())
        return Usage.total(usages)

    async def _score(
        self, model_name: str, saes: dict[str, Any], collection: Collection, self_test: SelfTest
    ) -> ComSemReport:
        asked = self._ask_everything(saes, collection, self_test)
        dictionaries, random_features, stopped = await self._closing(asked)
        return ComSemReport(
            setting=self.setting,
            model=model_name,
            judge=self.judge.name,
            explainer=self._explainer.name,
            base_url=self.judge.client.base_url if isinstance(self.judge, LanguageModelJudge) else None,
            settings={name: getattr(self, name) for name in SETTINGS}
            | {
                "scores": list(self.scores),
                "worked_examples": isinstance(self.judge, LanguageModelJudge) and self.judge.worked_examples,
                "features": list(self.features),
                "max_features": self._max_features,
                "corpus": asdict(self._corpus),
            },
            self_test=self_test,
            n_tokens=collection.n_tokens,
            n_sentences=collection.n_sentences,
            dictionaries=dictionaries,
            random_features=random_features,
            usage=Usage.total(client.usage for client in self._clients),
            failures=dict(sum((client.failures for client in self._clients), Counter())),
            stopped=stopped,
            unparsable=self._unparsable,
        )

    async def _ask_everything(
        self, saes: dict[str, Any], collection: Collection, self_test: SelfTest | None
    ) -> tuple[list[DictionaryScores], list[FeatureScore], str | None]:
        """Scores, random tokens' scores, and why it stopped early if it did."""
        first = next(iter(collection.dictionaries.values()))
        calibration = self_test.calibration if self_test else None
        scorer = FeatureScorer(
            self.judge,
            self._explainer,
            self._question,
            calibration,
            self.controls,
            self.scores,
            self.explanation_controls,
            self.seed,
            "scoring" if self_test else "estimating",
        )
        random_features, stopped = await scorer.score_features(
            first.random_features[: self.baseline_features], "random tokens"
        )
        dictionaries = []
        for name, collected in collection.dictionaries.items():
            features: list[FeatureScore] = []
            if stopped is None:
                features, stopped = await scorer.score_features(collected.features, name)
            if stopped is None:
                features, stopped = await scorer.ask_explanation_controls(
                    features, collected.features, self.baseline_features
                )
            dictionaries.append(_dictionary_scores(name, saes[name], collected, features))
        return dictionaries, random_features, stopped


def _dictionary_scores(
    name: str, sae: Any, collected: CollectedDictionary, features: list[FeatureScore]
) -> DictionaryScores:
    return DictionaryScores(
        name=name,
        architecture=sae.cfg.architecture(),
        hook_name=str(sae.cfg.metadata.hook_name),
        d_sae=collected.d_sae,
        feature_activated=collected.feature_activated,
        scoreable=collected.scoreable,
        never_fire=collected.never_fire,
        left_out=collected.left_out,
        weights=model_fingerprint(sae),
        features=features,
    )


def _finish(work: Coroutine[Any, Any, T]) -> T:
    """Runs to the end, in a notebook too, whose own event loop is running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
