"""How much faster than one process are two at the pass, at one training whose steps they share, and at a comparison?

OMP_NUM_THREADS=1 python benchmarks/scaling.py
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import machine
from sae_lens import TopKTrainingSAEConfig
from torch.multiprocessing.spawn import spawn

from bae_lens import (
    ContextSettings,
    Recipe,
    TrainingBAEConfig,
    TrainingSettings,
    cache_activations,
    choose_contexts,
    compare,
    demo_dataset,
    load_demo_model,
    train_dictionary,
)
from bae_lens.comparison.experiment import Contender, Experiment
from bae_lens.distributed.connection import connect, disconnect
from bae_lens.distributed.exchange import barrier
from bae_lens.storage import write_text

HOOK = "blocks.10.hook_resid_post"
SIZES: dict[str, Any] = {"d_in": 576, "d_sae": 2304}


@dataclass(frozen=True)
class Scaling:
    """SmolLM2-135M at layer 10, by one process and by two in turn, each with a thread."""

    cached_tokens: int = 4096
    """Of the pass."""
    steps: int = 32
    """Of each training, on 512 tokens each."""
    rounds: int = 3
    """Alternations between one process and two."""
    output: Path = field(default=Path(__file__).parent / "results" / "scaling.json")

    def run(self) -> None:
        about = machine()
        print(about)
        with tempfile.TemporaryDirectory() as folder:
            spawn(_take_turns, (self, Path(folder)), nprocs=2)
            measured = json.loads((Path(folder) / "measured.json").read_text())
        rows = [{"work": work, **_summary(rounds)} for work, rounds in measured.items()]
        for row in rows:
            print(row)
        settings = {name: value for name, value in asdict(self).items() if name != "output"}
        load = os.getloadavg()[0]
        write_text(self.output, json.dumps({**about, **settings, "load": load, "rows": rows}, indent=1))


def _summary(rounds: list[tuple[float, float]]) -> dict[str, float]:
    """Seconds, medians over the rounds, and ratios taken within a round."""
    ratios = sorted(alone / shared for alone, shared in rounds)
    alone, shared = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    times = {"seconds_of_one": alone, "seconds_of_two": shared, "speed_ratio": statistics.median(ratios)}
    return {**times, "lowest_ratio": ratios[0], "highest_ratio": ratios[-1]}


def _take_turns(rank: int, settings: Scaling, folder: Path) -> None:
    torch.set_num_threads(1)
    model, documents = load_demo_model(), demo_dataset()
    sizes = ContextSettings(cached_tokens=settings.cached_tokens, held_out_tokens=1024, loss_contexts=8)
    training = TrainingSettings(training_tokens=512 * settings.steps)
    contexts = choose_contexts(model.tokenizer, documents, sizes)["train"]
    bae = Recipe(TrainingBAEConfig.preset("default", **SIZES, training_steps=training.steps, target_l0=32.0), lr=6e-3)
    topk = Recipe(TopKTrainingSAEConfig(**SIZES, k=32), lr=1e-3)
    experiment = Experiment("smollm2", "sotu", HOOK, contexts=sizes, training=training, seeds=(0, 1), every_help=False)

    def train(run: Path) -> None:
        activations = cache_activations(model, contexts, [HOOK], folder / "activations")[HOOK]
        train_dictionary("bae", bae, activations, training, run)

    works: dict[str, Callable[[Path], Any]] = {
        "cache": lambda run: cache_activations(model, contexts, [HOOK], run),
        "train": train,
        "compare": lambda run: compare(
            model, documents, {"BAE": Contender((bae,)), "Top-k": Contender((topk,))}, experiment, run
        ),
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    if rank == 0:
        cache_activations(model, contexts, [HOOK], folder / "activations")
    for turn in range(settings.rounds):
        for name, work in works.items():
            alone = _seconds(work, folder / f"{name}-{turn}-one") if rank == 0 else 0.0
            connect("gloo", f"file://{folder}/{name}-{turn}", rank, 2)
            barrier()
            shared = _seconds(work, folder / f"{name}-{turn}-two")
            measured[name].append((alone, shared))
            disconnect()
            if rank == 0:
                print(name, alone, shared, flush=True)
    if rank == 0:
        write_text(folder / "measured.json", json.dumps(measured))


def _seconds(work: Callable[[Path], Any], run: Path) -> float:
    start = time.perf_counter()
    work(run)
    barrier()
    return time.perf_counter() - start


if __name__ == "__main__":
    tyro.cli(Scaling).run()
