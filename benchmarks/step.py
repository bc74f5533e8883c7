"""What does a training step of a BAE cost, beside the authors' formulas and SAELens' dictionaries?

    python benchmarks/step.py
    python benchmarks/step.py --device cuda --shapes 2048 8192 2048 65536 --batch-size 4096 --densities 0.004 \
        --precisions float32 tf32 bfloat16 --compiled --output benchmarks/results/step_gpu.json

One thread. All contenders take steps in turn, so that they share whatever else the machine is doing. The code fires at
`density`, held there by a learning rate of 0, which costs what any other does.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from authors import LARGEST_D_SAE, AuthorsBAE
from machine import machine
from sae_lens import (
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from tqdm import tqdm

from bae_lens import TrainingBAE, TrainingBAEConfig
from bae_lens.storage import write_text

Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True)
class StepBenchmark:
    """Time of a training step."""

    shapes: tuple[tuple[int, int], ...] = ((576, 2304), (576, 4608), (2048, 8192))
    """Pairs of d_in and d_sae."""
    densities: tuple[float, ...] = (0.02, 0.08, 0.5)
    """Share of features that fire."""
    batch_size: int = 512
    rounds: int = 9
    """Steps of each contender, at least 3; the first is not counted."""
    device: str = "cpu"
    """Where all contenders are."""
    precisions: tuple[Precision, ...] = ("float32",)
    """Of matrix products: float32, on a GPU also tf32, and bfloat16 by SAELens' autocast; weights stay float32."""
    compiled: bool = False
    """Whether a BAE compiled as SAELens' `compile_sae` does it takes part."""
    output: Path = field(default=Path(__file__).parent / "results" / "step.json")

    def run(self) -> None:
        torch.set_num_threads(1)
        print(machine(), flush=True)
        cells = list(product(self.shapes, self.densities, self.precisions))
        rows = []
        for (d_in, d_sae), density, precision in tqdm(cells, desc="shapes, densities and precisions"):
            rows.append(self.cell(d_in, d_sae, density, precision))
            content = {**machine(), "device": self.device, "batch_size": self.batch_size, "rows": rows}
            write_text(self.output, json.dumps(content, indent=1))

    def cell(self, d_in: int, d_sae: int, density: float, precision: Precision) -> dict[str, Any]:
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        x = torch.randn(self.batch_size, d_in, device=self.device)
        seconds: dict[str, list[float]] = {}
        steps = contenders(x, d_sae, density, precision == "bfloat16", self.compiled)
        memory = {name: step_gib(step, x.device) for name, step in steps.items()}
        for _ in range(self.rounds - 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if x.is_cuda:
                    torch.cuda.synchronize()
                seconds.setdefault(name, []).append(time.perf_counter() - start)
        row = {"d_in": d_in, "d_sae": d_sae, "density": density, "precision": precision, **summary(seconds)}
        row |= {"step_gib": memory} if x.is_cuda else {}
        tqdm.write(json.dumps(row))
        return row


def step_gib(step: Callable[[], Any], device: torch.device) -> float:
    """What a step, the first, takes on a GPU at most beyond what was there before, moments and gradients included."""
    if device.type != "cuda":
        step()
        return math.nan
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def contenders(
    x: torch.Tensor, d_sae: int, density: float, autocast: bool, compiled: bool
) -> dict[str, Callable[[], Any]]:
    """A step of each on the batch `x`, with fused Adam for all."""
    d_in = x.shape[1]
    bias = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(density)).item()
    sizes = {"d_in": d_in, "d_sae": d_sae}
    saes: dict[str, TrainingSAE[Any]] = {
        "BAE": TrainingBAE(TrainingBAEConfig(**sizes, encoder_bias_init=bias, covariance_coefficient=1e-4)),
        "BAE, no covariance": TrainingBAE(TrainingBAEConfig(**sizes, encoder_bias_init=bias)),
        "Top-k": TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, k=round(density * d_sae))),
        "ReLU": StandardTrainingSAE(StandardTrainingSAEConfig(**sizes)),
        "Gated": GatedTrainingSAE(GatedTrainingSAEConfig(**sizes)),
    }
    if compiled:
        bae = saes["BAE, compiled"] = deepcopy(saes["BAE"])
        bae.training_forward_pass = torch.compile(bae.training_forward_pass)
    steps = {name: trainer_step(sae.to(x.device), x, autocast) for name, sae in saes.items()}
    if not autocast and d_sae <= LARGEST_D_SAE:
        steps["authors' formulas"] = authors_step(AuthorsBAE(d_in, d_sae, bias).to(x.device), x)
    return {**steps, "five dense products": dense_products(x.bfloat16() if autocast else x, d_sae)}


def trainer_step(sae: TrainingSAE[Any], x: torch.Tensor, autocast: bool) -> Callable[[], Any]:
    """A step of SAELens' trainer."""
    cfg = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=len(x),
        lr=1e-3,
        lr_end=1e-3,
        device=str(x.device),
        autocast=autocast,
    )
    trainer = SAETrainer(cfg, sae, data_provider=iter(()))
    trainer.lr_scheduler.step = lambda *_: None  # which would set the rate again
    for group in trainer.optimizer.param_groups:
        group.update(lr=0.0, fused=True)

    def step() -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def authors_step(bae: AuthorsBAE, x: torch.Tensor) -> Callable[[], Any]:
    """Loss, gradients and Adam, with nothing around them."""
    optimizer = torch.optim.Adam(bae.parameters(), lr=0.0, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        bae.loss(x).backward()
        optimizer.step()

    return step


def dense_products(x: torch.Tensor, d_sae: int) -> Callable[[], Any]:
    """What a step of a dense autoencoder multiplies: encoder, decoder, and the gradients of both and of the code."""
    W_enc, W_dec = x.new_empty(x.shape[1], d_sae).normal_(), x.new_empty(d_sae, x.shape[1]).normal_()
    acts = x.new_empty(len(x), d_sae).normal_()
    return lambda: (x @ W_enc, acts @ W_dec, x.T @ acts, acts.T @ x, x @ W_dec.T)


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Median seconds of each, and how many times faster a BAE is: the median and quartiles over the rounds."""
    ratios = {}
    for name, values in seconds.items():
        times_faster = [other / own for other, own in zip(values, seconds["BAE"], strict=True)]
        ratios[name] = [round(value, 3) for value in statistics.quantiles(times_faster, n=4)]
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "times_a_bae_step_quartiles": ratios,
    }


if __name__ == "__main__":
    tyro.cli(StepBenchmark).run()
