"""How much faster do two processes train one BAE than one, and how much of a step do they spend on each other?

OMP_NUM_THREADS=1 python benchmarks/parallel.py
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import tyro
from machine import machine
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from tqdm.auto import tqdm

from bae_lens import TrainingBAE, TrainingBAEConfig
from bae_lens.distributed.connection import connect, disconnect
from bae_lens.distributed.exchange import shard
from bae_lens.distributed.gradients import sum_gradients
from bae_lens.storage import write_text


@dataclass(frozen=True)
class Parallel:
    """Steps of one process and of two, in turn, on the same random batches, with both penalties on."""

    sizes: tuple[str, ...] = ("576x2304", "2048x8192")
    """d_in x d_sae."""
    batch_size: int = 512
    rounds: int = 5
    """Alternations between one process and two; the first of them is not counted."""
    steps: int = 4
    """Steps at a time."""
    output: Path = field(default=Path(__file__).parent / "results" / "parallel.json")

    def run(self) -> None:
        about = machine()
        print(about)
        rows: list[dict[str, Any]] = []
        for size in self.sizes:
            d_in, d_sae = map(int, size.split("x"))
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(_take_turns, (self, d_in, d_sae, Path(folder)), nprocs=2)
                measured = json.loads((Path(folder) / "measured.json").read_text())
            rows.append({"size": size, **_summary(measured), "load": os.getloadavg()[0]})
            print(rows[-1], flush=True)
        settings = {name: value for name, value in asdict(self).items() if name != "output"}
        write_text(self.output, json.dumps({**about, **settings, "rows": rows}, indent=1, default=str))


def _summary(measured: list[dict[str, float]]) -> dict[str, float]:
    """Of each, the median over the rounds, of ratios taken within a round."""
    median = {name: statistics.median(turn[name] for turn in measured) for name in measured[0]}
    ratios = sorted(turn["alone"] / turn["shared"] for turn in measured)
    return {
        **median,
        "steps_per_second_ratio": statistics.median(ratios),
        "lowest_ratio": ratios[0],
        "highest_ratio": ratios[-1],
        "cpu_ratio": statistics.median(turn["cpu_alone"] / turn["cpu_shared"] for turn in measured),
        "share_in_communication": statistics.median(turn["talking"] / turn["shared"] for turn in measured),
    }


def _take_turns(rank: int, settings: Parallel, d_in: int, d_sae: int, folder: Path) -> None:
    torch.set_num_threads(1)
    alone, shared = (_trainer(settings, d_in, d_sae) for _ in range(2))
    measured: list[dict[str, float]] = []
    for turn in tqdm(range(settings.rounds + 1), f"{d_in} x {d_sae}", disable=rank > 0):
        batches = torch.randn(settings.steps, settings.batch_size, d_in)
        seconds, cpu, density = _time(alone, batches) if rank == 0 else (0.0, 0.0, 0.0)
        connect(backend="gloo", init_method=f"file://{folder}/{turn}", rank=rank, world_size=2)
        if turn == 0:
            sum_gradients(shared.sae)
        dist.barrier()
        with _timed_collectives() as talking:
            together, cpu_together, _ = _time(shared, torch.stack([shard(batch) for batch in batches]))
        disconnect()
        if turn > 0:
            times = {"alone": seconds, "shared": together, "cpu_alone": cpu, "cpu_shared": cpu_together}
            times["talking"] = sum(talking)
            measured.append({name: value / settings.steps for name, value in times.items()} | {"density": density})
    if rank == 0:
        write_text(folder / "measured.json", json.dumps(measured))


def _trainer(settings: Parallel, d_in: int, d_sae: int) -> SAETrainer[TrainingBAE, TrainingBAEConfig]:
    torch.manual_seed(0)
    cfg = TrainingBAEConfig(d_in=d_in, d_sae=d_sae, entropy_coefficient=0.3, covariance_coefficient=1e-4)
    trainer = SAETrainerConfig(
        total_training_samples=10**6, train_batch_size_samples=settings.batch_size, lr=1e-3, lr_end=1e-3
    )
    made = SAETrainer(trainer, TrainingBAE(cfg), data_provider=iter(()))
    for group in made.optimizer.param_groups:
        group["fused"] = True  # as in `training`
    return made


def _time(trainer: SAETrainer[TrainingBAE, TrainingBAEConfig], batches: torch.Tensor) -> tuple[float, float, float]:
    """Seconds of all steps, by the clock and of this process's work, and the density of the last code."""
    start, work = time.perf_counter(), time.process_time()
    for batch in batches:
        output = trainer.step(batch)
        trainer.n_training_steps += 1
    return time.perf_counter() - start, time.process_time() - work, output.feature_acts.mean().item()


@contextmanager
def _timed_collectives() -> Iterator[list[float]]:
    """The seconds of each call, in which a process also waits for the other."""
    seconds: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **options)
            seconds.append(time.perf_counter() - start)
            return result

        return wrapped

    names = ("all_reduce", "all_gather")
    with mock.patch.multiple(dist, **{name: timed(getattr(dist, name)) for name in names}):
        yield seconds


if __name__ == "__main__":
    tyro.cli(Parallel).run()
