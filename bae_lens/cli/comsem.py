"""`bae-lens comsem`: are the features of a run's dictionaries what they are explained as?"""

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bae_lens.activations.contexts import held_out_documents
from bae_lens.activations.fingerprint import model_fingerprint
from bae_lens.activations.models import load_model
from bae_lens.activations.precision import Dtype, check_dtype
from bae_lens.activations.sources import load_text
from bae_lens.cli.device import DEFAULT_DEVICE, check_device
from bae_lens.comparison.experiment import FOLDER_NAME
from bae_lens.comsem import ComSem
from bae_lens.comsem.collect.corpus import CorpusSettings
from bae_lens.comsem.exports import save
from bae_lens.comsem.judges.answer_cache import AnswerCache
from bae_lens.comsem.judges.client import MAX_ANSWER_BYTES, ChatClient
from bae_lens.comsem.judges.language_model import AnswerFormat, LanguageModelJudge, LimitName
from bae_lens.comsem.judges.local_server import LOCAL_MODEL, local_label, local_server
from bae_lens.comsem.judges.offline import OfflineJudge
from bae_lens.comsem.judges.spending import Budget, Price
from bae_lens.comsem.scores.catalog import ScoreName
from bae_lens.distributed import is_main_process, joined
from bae_lens.file_exchange import bring_together
from bae_lens.report.comsem import write_comsem_report
from bae_lens.storage import RUN_FILE, check_same, flat, locked, read_json, validated

CACHE_FILE = "answers.sqlite"
TIMEOUT = 60.0  # seconds
LOCAL_TIMEOUT = 600.0  # for the local model, which may run on a busy machine


@dataclass(frozen=True)
class AnalyzedRun:
    """What is read of a run's file."""

    model: str
    """Name of the language model."""
    model_weights: str
    """By which the model is known."""
    dataset: str
    """Name of the text."""
    text_column: str
    """Where the text is in its rows."""
    dataset_split: str
    """Of the text."""
    seed: int
    """Of the order of documents."""
    contexts: dict[str, Any]
    """How the text was cut, with `context_size`."""
    recipes: dict[str, Any]
    """By name of the dictionary."""
    model_dtype: Dtype = "float32"
    """What the model's weights were in."""


@dataclass(frozen=True)
class Comsem:
    """Explain features of a run's dictionaries and ask a judge whether the explanations fit, on held-out documents.

    The key of the judge's server is read from OPENAI_API_KEY. Answers are kept, but those that are of no use:
    after an interruption, a kill or a spent budget the same command goes on, and a second run asks nothing else.
    """

    run_folder: Annotated[Path, tyro.conf.Positional]
    """Folder that bae-lens demo or bae-lens train has written."""
    output: Path | None = None
    """Folder for the report and the answers; RUN_FOLDER/comsem by default."""
    judge_model: str = "gpt-4.1-mini"
    """Model that judges, by its name on the server."""
    explainer: str | None = None
    """Model that explains, by its name on the same server; the judge by default."""
    base_url: str | None = None
    """Address of a server that speaks the OpenAI protocol; OPENAI_BASE_URL or OpenAI's own by default."""
    local_judge: bool = False
    """Judge with a small model on this machine instead. It exercises the wire; its judgements are near chance."""
    offline_judge: bool = False
    """Judge by a tagger and sentence embeddings instead: no server, no key; see the self-test for what it can judge."""
    setting: Literal["paper", "robust"] = "robust"
    """The paper's procedure (all features, instances in the order of the corpus, a call for each question; see with
    --dry-run first what that costs), or seeded samples with marked tokens in structured calls."""
    dictionaries: tuple[str, ...] = ()
    """Which of the run's dictionaries; all by default."""
    tokens: int = 32_768
    """Tokens of held-out documents from which instances are taken."""
    max_features: int | None = None
    """Features scored per dictionary, a seeded sample; 0 for all. By default 256, and all in the paper's setting."""
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
    answer_format: AnswerFormat = "json_schema"
    """What is asked for where several verdicts come in one answer; json_object or text for servers that know less."""
    limit_name: LimitName = "max_completion_tokens"
    """What the server calls the limit of an answer; max_tokens on older ones."""
    timeout: float | None = None
    """Seconds to wait for an answer, and as many for its rest; by default 60, and 600 for the local judge."""
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

    def run(self) -> str:
        """The table, or the estimate."""
        with joined(self.device, self.run_folder, flat(asdict(self))) as device:
            bring_together(self.run_folder)
            return replace(self, device=device)._run_here()

    def _run_here(self) -> str:
        """In one process, which with others shares the collecting of instances; the first alone asks."""
        check_device(self.device)
        run = self._read_run()
        prices = self._prices()
        folder = self.output or self.run_folder / "comsem"
        if not is_main_process():
            return self._run(run, {"judge": None}, folder)
        with locked(folder), self._judges(folder, prices) as judges:
            return self._run(run, judges, folder)

    def _model(self, run: AnalyzedRun) -> Any:
        check_dtype(run.model_dtype, self.device)
        model = load_model(run.model, self.device, run.contexts["context_size"], run.model_dtype)
        check_same({"model_weights": run.model_weights}, {"model_weights": model_fingerprint(model)}, self.run_folder)
        return model

    def _run(self, run: AnalyzedRun, judges: dict[str, Any], folder: Path) -> str:
        comsem = ComSem(
            **judges,
            setting=self.setting,
            corpus=CorpusSettings(tokens=self.tokens, context_size=run.contexts["context_size"]),
            max_features=self.max_features,
            scores=self.scores,
            explanation_controls=self.explanation_controls,
            accept_failing_judge=self.accept_failing_judge or self.local_judge,
            seed=self.seed,
        )
        text = held_out_documents(
            load_text(run.dataset, run.text_column, run.dataset_split), run.seed, self.setting == "paper"
        )
        saes = self._dictionary_folders(run)
        if not is_main_process():
            comsem.collect(self._model(run), saes, text)
            return ""
        if self.dry_run:
            estimate = comsem.estimate(self._model(run), saes, text)
            return f"{estimate.estimate}; nothing was asked"
        report = comsem.score(self._model(run), saes, text)
        report = replace(report, model=run.model, dataset=run.dataset)
        save(report, folder)
        write_comsem_report(report, folder)
        return f"{report.table()}\n\nreport and scores are in {folder}"

    def _read_run(self) -> AnalyzedRun:
        path = self.run_folder / RUN_FILE
        if not path.exists():
            raise ValueError(f"{self.run_folder} holds no {RUN_FILE}; choose what demo, compare or train wrote")
        if self.local_judge and self.offline_judge:
            raise ValueError("choose one of local_judge and offline_judge")
        if self.explainer and (self.local_judge or self.offline_judge):
            raise ValueError("explainer is a model on a server; leave it out with local_judge and offline_judge")
        run = validated(AnalyzedRun, read_json(path), str(path))
        for name in (run.model, run.dataset):
            if Path(name).is_absolute() and not Path(name).exists():
                raise ValueError(f"{path} names {name}, which is not there; bring it back, or write there where it is")
        for name in run.recipes:
            if not re.fullmatch(FOLDER_NAME, name):
                raise ValueError(f"{path} names a dictionary {name!r}, which is no name of a folder in it; rename it")
        return run

    def _dictionary_folders(self, run: AnalyzedRun) -> dict[str, Path]:
        finished = [name for name in run.recipes if (self.run_folder / "dictionaries" / name).is_dir()]
        for name in self.dictionaries or finished[:1] or ("any",):
            if name not in finished:
                known = ", ".join(finished) or "none"
                raise ValueError(f"{self.run_folder} has no finished dictionary {name!r}; finished ones: {known}")
        return {name: self.run_folder / "dictionaries" / name for name in self.dictionaries or finished}

    def _prices(self) -> dict[str, Price]:
        """By model; empty without."""
        judge = LOCAL_MODEL if self.local_judge else self.judge_model
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

    @contextmanager
    def _judges(self, folder: Path, prices: dict[str, Price]) -> Iterator[dict[str, Any]]:
        if self.offline_judge:
            yield {"judge": OfflineJudge()}
            return
        with closing(AnswerCache(folder / CACHE_FILE)) as cache:
            client: dict[str, Any] = {
                "cache": cache,
                "budget": Budget(self.budget_tokens, self.budget),
                "prices": prices,
                "max_answer_bytes": self.max_answer_bytes,
            }
            if self.local_judge:
                with local_server() as url:
                    client |= {"base_url": url, "label": local_label(), "concurrency": 1}
                    client |= {"timeout": self.timeout or LOCAL_TIMEOUT}
                    yield self._chat_judges(ChatClient(**client), LOCAL_MODEL)
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
        }
        judges = {"judge": LanguageModelJudge(model, **settings)}
        if self.explainer:
            judges["explainer"] = LanguageModelJudge(self.explainer, **settings)
        return judges


def _price(of_input: float | None, of_output: float | None, name: str) -> Price | None:
    if (of_input is None) != (of_output is None):
        raise ValueError(f"{name}_input and {name}_output go together; give both or none")
    return None if of_input is None or of_output is None else Price(of_input, of_output)
