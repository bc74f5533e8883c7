"""What a feature costs a language model as judge: calls and tokens, all of one and the same features of a demo.

python benchmarks/judge_costs.py --run-folder demo --judge-file MODEL.gguf

Every request of the robust setting is made and counted by the model's own tokenizer, and none is answered by it: its
verdicts are yes. What a request begins with that one of the last four began with too, a server need not read again. To
compare versions of the questions, run it in both; --spaced-answers counts JSON as models write it unasked.
"""

import asyncio
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx2
import tyro
from machine import machine

from bae_lens.activations.contexts import held_out_documents
from bae_lens.activations.models import load_model
from bae_lens.activations.sources import load_text
from bae_lens.comsem import ChatClient, ComSem, CorpusSettings, LanguageModelJudge
from bae_lens.comsem.judges.client import Answer
from bae_lens.comsem.judges.local_server import local_server
from bae_lens.comsem.scorer import FeatureScorer
from bae_lens.storage import read_json, write_text

EXPLANATION = "{} duties of officers in a young republic"
KEPT = 4  # requests of which a server still knows what it read
TURN_TOKENS = 5  # of a chat template around a message: begin, role, line, end, line


@dataclass(frozen=True)
class JudgeCosts:
    """Of the first features of each of a demo's dictionaries."""

    run_folder: Path = Path("demo")
    features: int = 40
    """Of each dictionary."""
    n_tokens: int = 32_768
    judge_file: Path | None = None
    """A chat model as a GGUF file; by default the packaged one."""
    spaced_answers: bool = False
    """Each verdict on a line of its own."""
    output: Path = field(default=Path(__file__).parent / "results" / "judge_costs.json")

    def run(self) -> None:
        run = read_json(self.run_folder / "run.json")
        text = held_out_documents(load_text(run["dataset"]), run["seed"])
        saes = {folder.name: folder for folder in sorted((self.run_folder / "dictionaries").iterdir())}
        client = CountedClient(self.spaced_answers)
        judge = LanguageModelJudge("m", client)
        corpus = CorpusSettings(tokens=self.n_tokens, context_size=run["contexts"]["context_size"])
        comsem = ComSem(judge, corpus=corpus, max_features=self.features)
        _, _, collection = comsem.collect(load_model(run["model"]), saes, text)
        features = [feature for found in collection.dictionaries.values() for feature in found.features]
        scorer = FeatureScorer(judge, judge, "marked token", None, True, ("detection", "fuzzing"), False, 0)
        scores, _ = asyncio.run(scorer.score_features(features, "features"))
        weights = [] if self.judge_file is None else [self.judge_file]
        with local_server(*weights) as url:
            result = {name: n / len(features) for name, n in counted(client.asked, tokenizer(url)).items()}
        widths = [score.interval[1] - score.interval[0] for score in scores if score.interval]
        result |= {"features": len(features), "half_interval": sum(widths) / len(widths) / 2}
        print(json.dumps(result, indent=1))
        write_text(self.output, json.dumps({**machine(), **result}, indent=1))


class CountedClient(ChatClient):
    """Answers by itself, each question once, and remembers what was asked."""

    def __init__(self, spaced: bool) -> None:
        super().__init__("http://127.0.0.1/v1")
        self.asked: dict[str, tuple[dict[str, Any], str]] = {}
        self._spaced = spaced

    async def ask(self, request: dict[str, Any], *_: Any, **__: Any) -> Answer:
        text = EXPLANATION.format(len(self.asked))
        if "response_format" in request:
            names = request["response_format"]["json_schema"]["schema"]["required"]
            options: dict[str, Any] = {"indent": 2} if self._spaced else {"separators": (",", ":")}
            text = json.dumps(dict.fromkeys(names, "yes"), **options)
        self.asked[json.dumps(request, sort_keys=True)] = (request, text)
        return Answer(text, [])


def tokenizer(url: str) -> Callable[[str], list[int]]:
    """Of the model that llama.cpp's server has."""

    def tokenize(text: str) -> list[int]:
        return httpx2.post(f"{url.removesuffix('/v1')}/tokenize", json={"content": text}).json()["tokens"]

    return tokenize


def counted(asked: dict[str, tuple[dict[str, Any], str]], tokenize: Callable[[str], list[int]]) -> Counter[str]:
    """Calls, tokens sent, those of them that one of the last requests began with too, and tokens answered."""
    total: Counter[str] = Counter()
    before: deque[list[int]] = deque(maxlen=KEPT)
    for request, text in asked.values():
        sent = [token for message in request["messages"] for token in [0] * TURN_TOKENS + tokenize(message["content"])]
        total["calls"] += 1
        total["sent"] += len(sent)
        total["reused"] += max((len(list(common(sent, other))) for other in before), default=0)
        total["answered"] += len(tokenize(text)) + 1
        before.append(sent)
    return total


def common(first: list[int], second: list[int]) -> Iterator[tuple[int, int]]:
    """What both begin with."""
    return takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))


if __name__ == "__main__":
    tyro.cli(JudgeCosts).run()
