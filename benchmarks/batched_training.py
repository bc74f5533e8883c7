"""How much faster are BAEs trained together than one after the other, and do they come out the same?

    python benchmarks/batched_training.py

Both ways run in turn, so that they share whatever else the machine is doing; the ratio of the medians is reported.
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from machine import machine

from bae_lens import FitSettings, estimate_entropy, fit_bae, fit_baes, random_directions
from bae_lens.storage import write_text

SHAPES = ((64, 64, 256), (64, 256, 256), (576, 576, 256))  # d_in, d_sae, batch_size


@dataclass(frozen=True)
class BatchedTraining:
    """Batched against looped training."""

    models: int = 8
    steps: int = 20
    repeats: int = 3
    output: Path = field(default=Path(__file__).parent / "results" / "batched_training.json")

    def run(self) -> None:
        rows = []
        for d_in, d_sae, batch_size in SHAPES:
            data = [random_directions(1024, 16, d_in, torch.Generator().manual_seed(i)) for i in range(self.models)]
            vectors = torch.stack([known.vectors for known in data])
            settings = FitSettings(steps=self.steps, batch_size=batch_size, elimination=False)
            seconds: dict[str, list[float]] = {"batched": [], "looped": []}
            for _ in range(self.repeats):
                start = time.perf_counter()
                batched = fit_baes(vectors, d_sae, settings=settings)
                middle = time.perf_counter()
                looped = [fit_bae(x, d_sae, settings=settings) for x in vectors]
                seconds["batched"].append(middle - start)
                seconds["looped"].append(time.perf_counter() - middle)
            estimates = [
                (estimate_entropy(a, x), estimate_entropy(b, x))
                for a, b, x in zip(batched, looped, vectors, strict=True)
            ]
            median = {name: statistics.median(values) for name, values in seconds.items()}
            rows.append(
                {
                    "d_in": d_in,
                    "d_sae": d_sae,
                    "batch_size": batch_size,
                    "models": self.models,
                    "times_faster": median["looped"] / median["batched"],
                    "largest_difference_in_bits": max(abs(a.bits - b.bits) for a, b in estimates),
                    "largest_difference_in_fvu": max(abs(a.fvu - b.fvu) for a, b in estimates),
                    "seconds": seconds,
                }
            )
            print(rows[-1], flush=True)
        write_text(self.output, json.dumps({**machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    tyro.cli(BatchedTraining).run()
