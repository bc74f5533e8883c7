"""What does it cost to choose the bits of each vector, beside the encoder alone?

python benchmarks/optimized_code.py                                                       # random dictionaries
python benchmarks/optimized_code.py --dictionary FOLDER --activations FOLDER --hook-name NAME    # and a trained one
"""

import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import machine
from sae_lens import SAE
from torch import Tensor
from tqdm import tqdm

from bae_lens import BAE, BAEConfig, CachedActivations
from bae_lens.storage import write_text

FIRING = 30  # features of a random vector


@dataclass(frozen=True)
class OptimizedCode:
    """The encoder's code, ten flips and as many as pay, in turn, in processor time of one thread."""

    dictionary: Path | None = None
    """A saved BAE."""
    activations: Path | None = None
    """Cached activations for it."""
    hook_name: str = "blocks.10.hook_resid_post"
    shapes: tuple[tuple[int, int], ...] = ((576, 2304), (576, 9216), (2048, 8192), (2048, 16384))
    """Pairs of d_in and d_sae of random dictionaries, whose vectors are sums of some rows and noise."""
    n_vectors: int = 4096
    rounds: int = 7
    output: Path = field(default=Path(__file__).parent / "results" / "optimized_code.json")

    def run(self) -> None:
        torch.set_num_threads(1)
        rows = []
        if self.dictionary is not None and self.activations is not None:
            bae, cached = SAE.load_from_disk(self.dictionary), CachedActivations(self.activations, self.hook_name)
            assert isinstance(bae, BAE)
            rows.append({"name": "trained", **self.measured(bae, cached.rows(cached.content[: self.n_vectors]))})
        for d_in, d_sae in tqdm(self.shapes, "shapes"):
            rows.append({"name": "random", **self.measured(*random_dictionary(d_in, d_sae, self.n_vectors))})
        write_text(self.output, json.dumps({**machine(), "n_vectors": self.n_vectors, "rows": rows}, indent=1))

    @torch.no_grad()
    def measured(self, bae: BAE, x: Tensor) -> dict[str, Any]:
        """Vectors per second of processor time, how many times the encoder's time that is, and how many flips."""
        bae.cfg.max_flips = 0
        bae.encode_optimized(x)  # computes the couplings, which are kept
        jobs = {
            "encoder": lambda: bae.encode(x),
            "ten flips": lambda: bae.encode_optimized(x, 10),
            "all flips": lambda: bae.encode_optimized(x),
        }
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        codes = {}
        for _ in range(self.rounds):
            for name, job in jobs.items():
                start = time.process_time()
                codes[name] = job()
                seconds[name].append(time.process_time() - start)
        times = {
            name: statistics.median(a / b for a, b in zip(seconds[name], seconds["encoder"], strict=True))
            for name in jobs
        }
        changed = {name: (code != codes["encoder"]).sum(-1).float().mean().item() for name, code in codes.items()}
        row = {
            "d_in": bae.cfg.d_in,
            "d_sae": bae.cfg.d_sae,
            "l0": codes["all flips"].sum(-1).mean().item(),
            "bits_changed": changed,
            "vectors_per_second": {name: len(x) / statistics.median(values) for name, values in seconds.items()},
            "times_the_encoder": times,
        }
        tqdm.write(json.dumps(row))
        return row


def random_dictionary(d_in: int, d_sae: int, n_vectors: int) -> tuple[BAE, Tensor]:
    """A dictionary of random directions, and vectors that it describes but for noise."""
    torch.manual_seed(0)
    bae = BAE(BAEConfig(d_in=d_in, d_sae=d_sae))
    W_dec = 3 * torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
    bae.load_state_dict(
        {
            "W_enc": W_dec.T / 3,
            "b_enc": torch.full((d_sae,), -2.6),
            "W_dec": W_dec,
            "b_dec": torch.zeros(d_in),
            "prior": torch.full((d_sae,), FIRING / d_sae),
            "bit_price": torch.tensor(0.37),
        }
    )
    code = (torch.rand(n_vectors, d_sae) < FIRING / d_sae).float()
    return bae, code @ W_dec + 0.5 * torch.randn(n_vectors, d_in)


if __name__ == "__main__":
    tyro.cli(OptimizedCode).run()
