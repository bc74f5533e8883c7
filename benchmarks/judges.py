"""Does a judge know answers that are known: of the self-test, and of cases that were kept out of the judge's making?

python benchmarks/judges.py                                                      # the offline judge
python benchmarks/judges.py --judge-model NAME --base-url http://127.0.0.1:8080/v1   # a model on a server
python benchmarks/judges.py --local-judge                                        # the packaged model of 135 M
python benchmarks/judges.py --judge-file MODEL.gguf                              # any other that llama.cpp runs
"""

import asyncio
import json
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from judge_cases import HELD_OUT_CASES
from machine import machine

from bae_lens import demo_dataset
from bae_lens.comsem import ChatClient, Judge, LanguageModelJudge, OfflineJudge
from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.collect.sentences import sentence_spans
from bae_lens.comsem.judges.local_server import local_name, local_server
from bae_lens.comsem.judges.self_test import SelfTest, run_self_test
from bae_lens.comsem.judges.self_test_cases import CASES, CaseGroup
from bae_lens.markdown import markdown_table
from bae_lens.storage import write_text

N_ORDINARY = 256
LOCAL_TIMEOUT = 600.0  # seconds
DOCUMENTS = slice(0, 60, 3)


@dataclass(frozen=True)
class Judges:
    """Balanced accuracy by kind of case."""

    judge_model: str | None = None
    """Model on a server; by default the offline judge."""
    base_url: str | None = None
    local_judge: bool = False
    """The packaged model."""
    judge_file: Path | None = None
    """Any other, as a GGUF file."""
    worked_examples: bool = False
    """Ask about one token at a time, after examples."""
    output: Path = field(default=Path(__file__).parent / "results" / "judges.json")
    """An earlier file keeps what other judges answered."""

    def run(self) -> None:
        results: dict[str, Any] = json.loads(self.output.read_text()) if self.output.exists() else {}
        with self._judge() as judge:
            if judge.needs_background:
                judge.prepare(ordinary_tokens())
            tests = {}
            for name, cases in (("self-test", CASES), ("held-out cases", HELD_OUT_CASES)):
                tests[name] = asyncio.run(_closing(judge, cases))
                print(f"{name}: {tests[name].summary}", flush=True)
        name = f"{judge.name}, worked examples" if self.worked_examples else judge.name
        results[name] = {**machine(), **{name: test.to_dict() for name, test in tests.items()}}
        write_text(self.output, json.dumps(results, indent=1))
        print(table(tests))

    @contextmanager
    def _judge(self) -> Iterator[Judge]:
        if self.local_judge or self.judge_file:
            with local_server(self.judge_file) as url:
                client = ChatClient(url, concurrency=1, timeout=LOCAL_TIMEOUT)
                yield self._language_model(local_name(self.judge_file), client)
        elif self.judge_model:
            yield self._language_model(self.judge_model, ChatClient(self.base_url))
        else:
            yield OfflineJudge()

    def _language_model(self, name: str, client: ChatClient) -> LanguageModelJudge:
        return LanguageModelJudge(name, client, worked_examples=self.worked_examples)


async def _closing(judge: Judge, cases: Sequence[CaseGroup]) -> SelfTest:
    try:
        return await run_self_test(judge, "marked token", cases)
    finally:
        await judge.close()


def ordinary_tokens(seed: int = 0) -> list[Instance]:
    """Random words of random sentences of the addresses."""
    generator, found = random.Random(seed), []
    for text in demo_dataset()["text"][DOCUMENTS]:
        for start, end in sentence_spans(text):
            words = [match.span() for match in re.finditer(r"\w+|[^\w\s]", text[start:end])]
            if words and end - start < 300 and "\n" not in text[start:end]:
                word = generator.choice(words)
                found.append(Instance(text[start:end], word, [word]))
    return generator.sample(found, N_ORDINARY)


def table(tests: dict[str, SelfTest]) -> str:
    """In Markdown."""
    kinds = list(next(iter(tests.values())).kinds)
    rows = []
    for name, test in tests.items():
        accuracies = [f"{test.kinds[kind].balanced_accuracy:.2f}" for kind in kinds]
        rows.append([name, *accuracies, f"{test.overall.balanced_accuracy:.2f}", str(test.abstained)])
    return markdown_table(["", *kinds, "all", "abstained"], rows)


if __name__ == "__main__":
    tyro.cli(Judges).run()
