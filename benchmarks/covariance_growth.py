"""How do time and memory of the covariance penalty grow with features and rows?

    python benchmarks/covariance_growth.py

One thread, penalty and gradient; Linux, for the peak memory. Times are taken in turn; the peak memory of each, beyond
the code itself, in a process of its own. The plain formula is left out where its matrices would not fit.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from authors import LARGEST_D_SAE
from authors import covariance_penalty as plain_penalty
from machine import machine
from tqdm import tqdm

from bae_lens.functional.covariance import covariance_penalty
from bae_lens.storage import write_text

LARGEST_CODE = 2**26  # numbers, rows times features
PENALTIES = {"ours": covariance_penalty, "plain": plain_penalty}


@dataclass(frozen=True)
class CovarianceGrowth:
    """Time and peak memory against d_sae and batch size."""

    widths: tuple[int, ...] = (2304, 4608, 8192, 16_384, 32_768, 65_536)
    batch_sizes: tuple[int, ...] = (512, 4096)
    repeats: int = 3
    output: Path = field(default=Path(__file__).parent / "results" / "covariance_growth.json")

    def run(self) -> None:
        torch.set_num_threads(1)
        rows = []
        sizes = [(n, d_sae) for n in self.batch_sizes for d_sae in self.widths if n * d_sae <= LARGEST_CODE]
        cells = [(*size, code) for size in sizes for code in ("2 %", "64 a row")]
        for n, d_sae, code in tqdm(cells, desc="sizes"):
            rate = 0.02 if code == "2 %" else 64 / d_sae
            names = ["ours", "plain"] if d_sae <= LARGEST_D_SAE and n == min(self.batch_sizes) else ["ours"]
            row = {"batch_size": n, "d_sae": d_sae, "code": code, **self.times(names, n, d_sae, rate)}
            rows.append(row | {"extra_peak_memory_gib": {name: extra_memory(name, n, d_sae, rate) for name in names}})
            tqdm.write(json.dumps(rows[-1]))
        write_text(self.output, json.dumps({**machine(), "rows": rows}, indent=1))

    def times(self, names: list[str], n: int, d_sae: int, rate: float) -> dict[str, Any]:
        code = random_code(n, d_sae, rate)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(self.repeats):
            for name in names:
                start = time.perf_counter()
                PENALTIES[name](code).backward()
                seconds[name].append(time.perf_counter() - start)
        result: dict[str, Any] = {"seconds": {name: statistics.median(values) for name, values in seconds.items()}}
        if "plain" in names:
            result["times_faster"] = sorted(plain / ours for ours, plain in zip(*seconds.values(), strict=True))
        return result


def random_code(n: int, d_sae: int, rate: float) -> torch.Tensor:
    """Independent bits of one rate, (n, d_sae)."""
    return torch.zeros(n, d_sae).bernoulli_(rate, generator=torch.Generator().manual_seed(0)).requires_grad_()


def extra_memory(penalty: str, n: int, d_sae: int, rate: float) -> float:
    """GiB, measured by running this file as a process."""
    command = [sys.executable, __file__, "memory", penalty, str(n), str(d_sae), str(rate)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_extra_memory(penalty: str, n: str, d_sae: str, rate: str) -> None:
    """GiB of this process beyond what it took before."""
    torch.set_num_threads(1)
    code = random_code(int(n), int(d_sae), float(rate))
    PENALTIES[penalty](code[:, :8]).backward()
    Path("/proc/self/clear_refs").write_text("5")  # lets the peak begin anew
    before = memory_gib("VmRSS")
    PENALTIES[penalty](code).backward()
    print(memory_gib("VmHWM") - before)


def memory_gib(name: str) -> float:
    """Of this process: VmRSS is the memory now, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**20


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        print_extra_memory(*sys.argv[2:])
    else:
        tyro.cli(CovarianceGrowth).run()
