"""ComSem: describe what activates a feature, then ask whether the description fits others (4.2, appendix B)."""

import asyncio
import sys
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

from tqdm.auto import tqdm

from bae_lens.comsem.collect import collect
from bae_lens.comsem.corpus import CorpusSettings
from bae_lens.comsem.dictionaries import Dictionary, load_dictionaries
from bae_lens.comsem.instances import Judge, Question
from bae_lens.comsem.interview import Interview
from bae_lens.comsem.judge import LanguageModelJudge
from bae_lens.comsem.results import ComSemReport, DictionaryScores, FeatureScore
from bae_lens.comsem.sampling import CollectedDictionary, Collection, SamplingSettings
from bae_lens.comsem.self_test import SelfTest, ask_cases, run_self_test
from bae_lens.comsem.spending import Tally
from bae_lens.sources import load_model, load_text

SETTINGS = ("max_features", "examples", "held_out", "controls", "passage_scores", "baseline_features", "seed")
T = TypeVar("T")


@dataclass(frozen=True)
class ComSem:
    """Scores the features of dictionaries; see each field.

    The paper's score is always the share of yes on held-out activating tokens. What stands beside it (matched tokens
    that do not activate the feature, other features' descriptions, random tokens) is asked in questions of its own and
    never changes it.
    """

    judge: Judge
    """Says whether a description fits a token."""
    describer: Judge | None = None
    """Describes; the judge itself by default."""
    setting: Literal["paper", "robust"] = "robust"
    """"paper": instances in corpus order, one call for each, the sentence unmarked. "robust": a seeded sample with no
    sentence twice, the token marked in its sentence, one structured call for all."""
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    """What is analysed. In the paper's setting all contexts of a document are, in order."""
    max_features: int | None = 256
    """Features scored per dictionary, a seeded sample of those with enough instances; None for all, as in the paper."""
    examples: int = 5
    """Instances from which a feature is described (m in the paper)."""
    held_out: int = 8
    """Other instances that are judged, at most."""
    controls: bool = True
    """Ask about matched tokens that do not activate the feature."""
    passage_scores: bool = True
    """Ask for the detection and fuzzing scores too."""
    baseline_features: int = 32
    """Features asked about with another's description, and random features, at most; 0 for none."""
    accept_failing_judge: bool = False
    """Go on, with marked scores, although the judge is near chance on its self-test."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that leave nothing to describe or judge."""
        for name in ("examples", "held_out", "max_features"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.setting not in ("paper", "robust"):
            raise ValueError(f"setting must be 'paper' or 'robust', got {self.setting!r}")

    def score(
        self, model: Any, sae: Dictionary | Mapping[str, Dictionary], dataset: Iterable[Any] | str
    ) -> ComSemReport:
        """Tests the judge, collects instances in one pass over the text, and scores every dictionary.

        `model` and `dataset` are objects, or names as `load_model` and `load_text` take them; `dataset` holds strings,
        or rows with a column `text`. `sae` is one dictionary or several by name: SAELens objects, folders, or
        RELEASE/SAE_ID. Raises ValueError if the judge is near chance on its self-test or a dictionary does not fit the
        model, and what the judge raises.
        """
        self_test = self.test_judge()
        tqdm.write(self_test.summary, file=sys.stderr)
        if self_test.near_chance and not self.accept_failing_judge:
            raise ValueError(
                f"{self_test.summary}, which is near chance: use a better judge, or accept_failing_judge to go on"
            )
        model, saes, collection = self.collect(model, sae, dataset)
        return _finish(self._score(str(model.cfg.model_name), saes, collection, self_test))

    def estimate(self, model: Any, sae: Dictionary | Mapping[str, Dictionary], dataset: Iterable[Any] | str) -> Tally:
        """Collects instances as `score` does, and counts what would be asked: calls, and tokens by estimate.

        What the cache holds already counts as cached. Raises ValueError for a judge that is no language model.
        """
        if not isinstance(self.judge, LanguageModelJudge):
            raise ValueError(f"{self.judge.name} costs nothing, so there is nothing to estimate")
        model, saes, collection = self.collect(model, sae, dataset)
        describer = self._describer
        with self.judge.client.dry_run() as tally:
            if isinstance(describer, LanguageModelJudge) and describer.client is not self.judge.client:
                with describer.client.dry_run() as other:
                    _finish(self._estimate(saes, collection))
                return Tally(**{name: value + getattr(other, name) for name, value in asdict(tally).items()})
            _finish(self._estimate(saes, collection))
        return tally

    def test_judge(self) -> SelfTest:
        """The judge's answers to the built-in cases."""
        return _finish(self._closing(run_self_test(self.judge, self._question)))

    def collect(
        self, model: Any, sae: Dictionary | Mapping[str, Dictionary], dataset: Iterable[Any] | str
    ) -> tuple[Any, dict[str, Any], Collection]:
        """The model, the dictionaries, and the instances to be asked about."""
        model = load_model(model) if isinstance(model, str) else model
        saes = load_dictionaries(sae, str(model.cfg.device))
        documents = load_text(dataset) if isinstance(dataset, str) else dataset
        paper = self.setting == "paper"
        sampling = SamplingSettings(self.examples, self.held_out, paper, self.max_features, self.seed)
        return model, saes, collect(model, saes, documents, self._corpus, sampling)

    @property
    def _corpus(self) -> CorpusSettings:
        return replace(self.corpus, contexts_per_document=None) if self.setting == "paper" else self.corpus

    @property
    def _question(self) -> Question:
        return "token" if self.setting == "paper" else "marked token"

    @property
    def _describer(self) -> Judge:
        return self.describer or self.judge

    async def _closing(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        finally:
            await self.judge.close()
            await self._describer.close()

    async def _estimate(self, saes: dict[str, Any], collection: Collection) -> None:
        await ask_cases(self.judge, self._question)
        await self._closing(self._ask_everything(saes, collection, None))

    async def _score(
        self, model_name: str, saes: dict[str, Any], collection: Collection, self_test: SelfTest
    ) -> ComSemReport:
        asked = self._ask_everything(saes, collection, self_test)
        dictionaries, random_features, stopped = await self._closing(asked)
        clients = {
            id(judge.client): judge.client
            for judge in (self.judge, self._describer)
            if isinstance(judge, LanguageModelJudge)
        }.values()
        tallies = [asdict(client.tally) for client in clients]
        costs = [client.cost for client in clients if client.cost is not None]
        return ComSemReport(
            setting=self.setting,
            model=model_name,
            judge=self.judge.name,
            describer=self._describer.name,
            base_url=self.judge.client.base_url if isinstance(self.judge, LanguageModelJudge) else None,
            settings={name: getattr(self, name) for name in SETTINGS} | {"corpus": asdict(self._corpus)},
            self_test=self_test,
            n_tokens=collection.n_tokens,
            n_sentences=collection.n_sentences,
            dictionaries=dictionaries,
            random_features=random_features,
            tally=Tally(**{name: sum(tally[name] for tally in tallies) for name in asdict(Tally())}),
            cost=sum(costs) if costs else None,
            stopped=stopped,
        )

    async def _ask_everything(
        self, saes: dict[str, Any], collection: Collection, self_test: SelfTest | None
    ) -> tuple[list[DictionaryScores], list[FeatureScore], str | None]:
        """Scores, random tokens' scores, and why it stopped early if it did."""
        first = next(iter(collection.dictionaries.values()))
        for judge in (self.judge, self._describer):
            judge.prepare(first.background)
        calibration = self_test.calibration if self_test else None
        interview = Interview(
            self.judge, self._describer, self._question, calibration, self.controls, self.passage_scores, self.seed
        )
        random_features, stopped = await interview.score_features(
            first.random_features[: self.baseline_features], "random tokens"
        )
        dictionaries = []
        for name, collected in collection.dictionaries.items():
            features: list[FeatureScore] = []
            if stopped is None:
                features, stopped = await interview.score_features(collected.features, name)
            if stopped is None:
                features, stopped = await interview.shuffle(features, self.baseline_features)
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
