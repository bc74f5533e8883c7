"""What a feature costs a judge that is a language model: calls, tokens and seconds, with one and the same features.

python benchmarks/judge_costs.py                           # the packaged model of 135 M, on llama.cpp
python benchmarks/judge_costs.py --judge-file MODEL.gguf

To compare with another version of the questions, run it there too.
"""

import asyncio
import json
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro
from machine import machine

from bae_lens.activations.contexts import held_out_documents
from bae_lens.activations.models import load_model
from bae_lens.activations.sources import load_text
from bae_lens.comsem import AnswerCache, ChatClient, ComSem, CorpusSettings, LanguageModelJudge
from bae_lens.comsem.collect.instances import FeatureInstances
from bae_lens.comsem.judges.local_server import LOCAL_MODEL, local_server
from bae_lens.comsem.results import FeatureScore
from bae_lens.comsem.scorer import FeatureScorer
from bae_lens.storage import read_json, write_text

TIMEOUT = 600.0


@dataclass(frozen=True)
class JudgeCosts:
    """Of the first features of each of a demo's dictionaries."""

    run_folder: Path = Path("demo")
    features: int = 2
    """Of each dictionary."""
    n_tokens: int = 8192
    judge_file: Path | None = None
    """A chat model as a GGUF file; by default the packaged one."""
    output: Path = field(default=Path(__file__).parent / "results" / "judge_costs.json")

    def run(self) -> None:
        run = read_json(self.run_folder / "run.json")
        text = held_out_documents(load_text(run["dataset"]), run["seed"])
        saes = {folder.name: folder for folder in sorted((self.run_folder / "dictionaries").iterdir())}
        weights = [] if self.judge_file is None else [self.judge_file]
        with local_server(*weights) as url, closing(AnswerCache()) as cache:
            client = ChatClient(url, cache, concurrency=1, timeout=TIMEOUT)
            judge = LanguageModelJudge(LOCAL_MODEL, client)
            corpus = CorpusSettings(tokens=self.n_tokens, context_size=run["contexts"]["context_size"])
            comsem = ComSem(judge, corpus=corpus, max_features=self.features)
            _, _, collection = comsem.collect(load_model(run["model"]), saes, text)
            features = [feature for found in collection.dictionaries.values() for feature in found.features]
            start = time.monotonic()
            scores = asyncio.run(scored(judge, features))
            seconds = time.monotonic() - start
        usage = {name: number / len(features) for name, number in asdict(client.usage).items()}
        widths = [score.interval[1] - score.interval[0] for score in scores if score.interval]
        result = {"features": len(features), "seconds": seconds / len(features), **usage}
        result["half_interval"] = sum(widths) / len(widths) / 2
        print(json.dumps(result, indent=1))
        write_text(self.output, json.dumps({**machine(), **result}, indent=1))


async def scored(judge: LanguageModelJudge, features: list[FeatureInstances]) -> list[FeatureScore]:
    """Explained, and asked about in the three ways of the robust setting."""
    scorer = FeatureScorer(judge, judge, "marked token", None, True, ("detection", "fuzzing"), False, 0)
    try:
        return (await scorer.score_features(features, "features"))[0]
    finally:
        await judge.close()


if __name__ == "__main__":
    tyro.cli(JudgeCosts).run()
