"""How fast are a judge's questions asked, which faults do they survive, and does collecting need memory for the corpus?

python benchmarks/comsem_client.py

Questions go to a server on loopback in the same process, which speaks the OpenAI protocol, answers after a given time,
and fails as it is told to. For its memory, each length of corpus is collected by a process of its own.
"""

import asyncio
import json
import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import machine

from bae_lens import BAE, AnswerCache, BAEConfig, ChatClient, CorpusSettings, demo_dataset
from bae_lens.activations.demo_model import demo_model_folder
from bae_lens.comsem.collect.collector import collect
from bae_lens.comsem.collect.sampling import SamplingSettings
from bae_lens.comsem.judges.together import together
from bae_lens.storage import write_text

FAULTS = {"429": 0.15, "503": 0.10, "drop": 0.05, "malformed": 0.03, "no choices": 0.03, "slow": 0.03}
HOOK = "blocks.0.hook_resid_pre"


@dataclass
class Server:
    """Answers "Yes" after `latency` seconds, or with the fault that `fault` names for the n-th request."""

    latency: float = 0.0
    fault: Callable[[int], str | None] = lambda _: None
    received: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in head.decode().splitlines() if line.lower().startswith("content-length"))
                body = await reader.readexactly(int(length.partition(":")[2]))
                fault = self.fault(self.received)
                self.received += 1
                self.faults[fault or "none"] += 1
                await asyncio.sleep(self.latency + (0.5 if fault == "slow" else 0.0))
                if fault == "drop":
                    break
                if fault in (None, "slow"):
                    self.answered[body.decode()] += 1
                writer.write(_response(fault))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass  # the client has gone, or the loop ends
        finally:
            writer.close()


def _response(fault: str | None) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Yes"}, "finish_reason": "stop"}
    content = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
    if fault == "malformed":
        content = content[:40]
    if fault == "no choices":
        content = content.replace(json.dumps([choice]), "[]")
    status = fault if fault in ("429", "503") else "200"
    retry = "Retry-After: 0.05\r\n" if status == "429" else ""
    head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\n{retry}Content-Length: {len(content)}\r\n\r\n"
    return (head + content).encode()


def by_share(number: int) -> str | None:
    """Faults in the shares of `FAULTS`, the same for the same request numbers."""
    draw = (number * 0.6180339887) % 1
    for name, share in FAULTS.items():
        if draw < share:
            return name
        draw -= share
    return None


async def ask(server: Server, calls: int, concurrency: int) -> tuple[float, ChatClient, int]:
    """Seconds for so many calls, the client, and how many have no answer."""
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    client = ChatClient(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", AnswerCache(), concurrency)
    messages = [[{"role": "user", "content": f"question {number}"}] for number in range(calls)]
    start = time.perf_counter()
    requests = [{"model": "m", "messages": message, "max_completion_tokens": 8} for message in messages]
    answers = await together([client.ask(request, 2) for request in requests])
    seconds = time.perf_counter() - start
    await client.close()
    listening.close()
    return seconds, client, sum(answer.text is None for answer in answers)


def peak_memory(tokens: int, queue: Any) -> None:
    """MiB that a process has needed at most, before and after it collected from so many tokens, and seconds."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=64, n_ctx=128, d_head=16, n_heads=4, d_vocab=len(tokenizer), attn_only=True, seed=0
    )
    model = HookedSAETransformer(cfg, tokenizer)
    bae = BAE(BAEConfig(d_in=64, d_sae=2304))
    bae.b_enc.data.fill_(-2.3 * model.W_E.norm(dim=1).mean().item() * bae.W_enc.norm(dim=0).mean().item() / 8)
    bae.cfg.metadata.hook_name = HOOK
    documents = demo_dataset()
    before, start = _peak(), time.perf_counter()
    collection = collect(model, {"BAE": bae}, documents, CorpusSettings(tokens, 128, None), SamplingSettings())
    queue.put(
        {
            "tokens": tokens,
            "contexts": collection.n_contexts,
            "features_activated": collection.dictionaries["BAE"].feature_activated,
            "firing_rate": sum(f.firing_rate for f in collection.dictionaries["BAE"].features) / 256,
            "before_mib": before,
            "peak_mib": _peak(),
            "seconds": time.perf_counter() - start,
        }
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass(frozen=True)
class ComSemClient:
    """Throughput, faults and memory."""

    calls: int = 400
    concurrency: tuple[int, ...] = (1, 8, 32)
    latency: float = 0.05
    tokens: tuple[int, ...] = (16_384, 65_536)
    output: Path = field(default=Path(__file__).parent / "results" / "comsem_client.json")

    def run(self) -> None:
        result: dict[str, list[dict[str, Any]]] = {"throughput": [], "faults": [], "memory": []}
        for concurrency in self.concurrency:
            calls = self.calls if concurrency > 1 else self.calls // 4
            seconds, _, lost = asyncio.run(ask(Server(self.latency), calls, concurrency))
            row = {"concurrency": concurrency, "calls": calls, "seconds": seconds, "lost": lost}
            result["throughput"].append({**row, "calls_per_second": calls / seconds})
            print(result["throughput"][-1], flush=True)
        server = Server(self.latency, by_share)
        seconds, client, lost = asyncio.run(ask(server, self.calls, 16))
        result["faults"].append(
            {
                "calls": self.calls,
                "requests": server.received,
                "faults": server.faults,
                "lost": lost,
                "failed": client.usage.failed,
                "answered_twice": sum(n > 1 for n in server.answered.values()),
                "seconds": seconds,
            }
        )
        print(result["faults"][-1], flush=True)
        spawn = multiprocessing.get_context("spawn")
        for tokens in self.tokens:
            queue = spawn.Queue()
            process = spawn.Process(target=peak_memory, args=(tokens, queue))
            process.start()
            result["memory"].append(queue.get())
            process.join()
            print(result["memory"][-1], flush=True)
        write_text(self.output, json.dumps({**machine(), **result}, indent=1))


if __name__ == "__main__":
    tyro.cli(ComSemClient).run()
