"""`bae-lens comsem`: are the features of a run's dictionaries what they are described as?"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from filelock import FileLock, Timeout

from bae_lens.comsem import ComSem
from bae_lens.comsem.cache import AnswerCache
from bae_lens.comsem.corpus import CorpusSettings
from bae_lens.comsem.embedding_judge import EmbeddingJudge
from bae_lens.comsem.exports import save
from bae_lens.comsem.judge import ChatClient, LanguageModelJudge
from bae_lens.comsem.local_server import LOCAL_MODEL, local_server
from bae_lens.comsem.spending import Budget, Price, Tally
from bae_lens.harvest import read_json
from bae_lens.report_comsem import write_comsem_report
from bae_lens.run_folder import LOCK_FILE, RUN_FILE
from bae_lens.sources import load_model, load_text

CACHE_FILE = "answers.sqlite"
LOCAL_TIMEOUT = 600.0  # seconds for an answer of the local model, which may run on a busy machine


@dataclass(frozen=True)
class Comsem:
    """Describe features of a run's dictionaries and ask a judge whether the descriptions fit, on held-out documents.

    The key of the judge's server is read from OPENAI_API_KEY. Answers are kept: after an interruption, a kill or a
    spent budget the same command goes on, and a second run asks nothing.
    """

    run_folder: Annotated[Path, tyro.conf.Positional]
    """Folder that bae-lens demo or bae-lens train has written."""
    output: Path | None = None
    """Folder for the report and the answers; RUN_FOLDER/comsem by default."""
    model: str = "gpt-4.1-mini"
    """Model that judges, by its name on the server."""
    describer: str | None = None
    """Model that describes, by its name on the server; the judge by default."""
    base_url: str | None = None
    """Address of a server that speaks the OpenAI protocol; OPENAI_BASE_URL or OpenAI's own by default."""
    local_judge: bool = False
    """Judge with a small model on this machine instead. It exercises the wire; its judgements are near chance."""
    embedding_judge: bool = False
    """Judge by sentence embeddings instead: no server, no key; good at what words mean, at nothing else."""
    setting: Literal["paper", "robust"] = "robust"
    """The paper's procedure, or seeded samples with marked tokens in structured calls."""
    dictionaries: tuple[str, ...] = ()
    """Which of the run's dictionaries; all by default."""
    tokens: int = 32_768
    """Tokens of held-out documents from which instances are taken."""
    max_features: int = 256
    """Features scored per dictionary, a seeded sample; 0 for all."""
    passage_scores: bool = True
    """Ask for the detection and fuzzing scores too."""
    concurrency: int = 16
    """Calls at a time."""
    temperature: float | None = 0.0
    """Of the models; None for those that do not take one."""
    logprobs: bool = True
    """Ask for log-probabilities; not all models give them."""
    price_input: float | None = None
    """Of a million input tokens, for estimates and a budget."""
    price_output: float | None = None
    """Of a million output tokens."""
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
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the model and the dictionaries run."""

    def run(self) -> str:
        """The table, or the estimate."""
        run = self._read_run()
        price = self._price()
        folder = self.output or self.run_folder / "comsem"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / LOCK_FILE, timeout=0), self._judges(folder, price) as judges:
                return self._run(run, judges, folder, price)
        except Timeout as error:
            raise ValueError(
                f"another process is at work in {folder}; wait for it, or choose another folder"
            ) from error

    def _run(self, run: dict[str, Any], judges: dict[str, Any], folder: Path, price: Price | None) -> str:
        comsem = ComSem(
            **judges,
            setting=self.setting,
            corpus=CorpusSettings(tokens=self.tokens, context_size=run["contexts"]["context_size"], held_out_only=True),
            max_features=self.max_features or None,
            passage_scores=self.passage_scores,
            accept_failing_judge=self.accept_failing_judge or self.local_judge,
            seed=self.seed,
        )
        text = load_text(run["text"], run["text_column"], run["text_split"]).shuffle(seed=run["seed"])
        saes = self._dictionary_folders(run)
        if self.dry_run:
            return describe_estimate(comsem.estimate(load_model(run["model"], self.device), saes, text), price)
        report = comsem.score(load_model(run["model"], self.device), saes, text)
        report = replace(report, model=run["model"])
        save(report, folder)
        write_comsem_report(report, folder)
        return f"{report.table()}\n\nreport and scores are in {folder}"

    def _read_run(self) -> dict[str, Any]:
        path = self.run_folder / RUN_FILE
        if not path.exists():
            raise ValueError(f"{self.run_folder} holds no {RUN_FILE}; choose what bae-lens demo or train wrote")
        if self.local_judge and self.embedding_judge:
            raise ValueError("choose one of local_judge and embedding_judge")
        return read_json(path)

    def _dictionary_folders(self, run: dict[str, Any]) -> dict[str, Any]:
        finished = [name for name in run["recipes"] if (self.run_folder / "dictionaries" / name).is_dir()]
        for name in self.dictionaries or finished[:1] or ("any",):
            if name not in finished:
                known = ", ".join(finished) or "none"
                raise ValueError(f"{self.run_folder} has no finished dictionary {name!r}; finished ones: {known}")
        return {name: self.run_folder / "dictionaries" / name for name in self.dictionaries or finished}

    def _price(self) -> Price | None:
        if (self.price_input is None) != (self.price_output is None):
            raise ValueError("price_input and price_output go together; give both or none")
        return None if self.price_input is None else Price(self.price_input, self.price_output or 0.0)

    @contextmanager
    def _judges(self, folder: Path, price: Price | None) -> Iterator[dict[str, Any]]:
        if self.embedding_judge:
            yield {"judge": EmbeddingJudge()}
        elif self.local_judge:
            with local_server() as url:
                yield self._chat_judges(folder, price, LOCAL_MODEL, base_url=url, concurrency=1, timeout=LOCAL_TIMEOUT)
        else:
            yield self._chat_judges(folder, price, self.model, base_url=self.base_url, concurrency=self.concurrency)

    def _chat_judges(self, folder: Path, price: Price | None, model: str, **options: Any) -> dict[str, Any]:
        budget = Budget(self.budget_tokens, self.budget)
        client = ChatClient(cache=AnswerCache(folder / CACHE_FILE), budget=budget, price=price, **options)
        settings: dict[str, Any] = {"client": client, "temperature": self.temperature, "logprobs": self.logprobs}
        judges = {"judge": LanguageModelJudge(model, **settings)}
        if self.describer and not self.local_judge:
            judges["describer"] = LanguageModelJudge(self.describer, **settings)
        return judges


def describe_estimate(tally: Tally, price: Price | None) -> str:
    """What a run would take, in words."""
    cost = "" if price is None else f", cost about {price(tally.input_tokens, tally.output_tokens):.2f}"
    return (
        f"{tally.asked:,} calls would be made and {tally.cached:,} are cached: about {tally.input_tokens:,} input and "
        f"{tally.output_tokens:,} output tokens{cost}; nothing was asked"
    )
