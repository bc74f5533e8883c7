"""From which density on is a dense decoder faster than summing the rows that a code names?

python benchmarks/decode.py
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from machine import machine
from tqdm import tqdm

from bae_lens.functional.sparse_matmul import NonzeroEntries
from bae_lens.storage import write_text


@dataclass(frozen=True)
class Decoding:
    """Dense and gathered decoding in turn, forward and the gradient of the decoder."""

    shapes: tuple[tuple[int, int], ...] = ((576, 2304), (2048, 8192))
    """Pairs of d_in and d_sae."""
    densities: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    batch_size: int = 512
    rounds: int = 9
    output: Path = field(default=Path(__file__).parent / "results" / "decode.json")

    def run(self) -> None:
        torch.set_num_threads(1)
        rows = []
        cells = [(*shape, density) for shape in self.shapes for density in self.densities]
        for d_in, d_sae, density in tqdm(cells, desc="shapes and densities"):
            torch.manual_seed(0)
            code, W_dec = (torch.rand(self.batch_size, d_sae) < density).float(), torch.randn(d_sae, d_in)
            grad = torch.randn(self.batch_size, d_in)

            def dense(code=code, W_dec=W_dec, grad=grad) -> None:
                code @ W_dec, code.T @ grad

            def gathered(code=code, W_dec=W_dec, grad=grad) -> None:
                code.count_nonzero()
                entries = NonzeroEntries.of(code)
                entries @ W_dec, entries.transposed() @ grad

            seconds: dict[str, list[float]] = {"dense": [], "gathered": []}
            for _ in range(self.rounds):
                for name, decode in (("dense", dense), ("gathered", gathered)):
                    start = time.perf_counter()
                    decode()
                    seconds[name].append(time.perf_counter() - start)
            ratios = [a / b for a, b in zip(seconds["dense"], seconds["gathered"], strict=True)]
            rows.append(
                {
                    "d_in": d_in,
                    "d_sae": d_sae,
                    "density": density,
                    "times_faster_quartiles": statistics.quantiles(ratios, n=4),
                    "seconds": {name: statistics.median(values) for name, values in seconds.items()},
                }
            )
            tqdm.write(json.dumps(rows[-1]))
        write_text(self.output, json.dumps({**machine(), "batch_size": self.batch_size, "rows": rows}, indent=1))


if __name__ == "__main__":
    tyro.cli(Decoding).run()
