"""Is an entropy that is known recovered at every position, and by which dictionary (section 3.2)?

A synthetic model whose states have a known entropy at every layer and position (`bae_lens.SyntheticModel`) takes the
place of the language model; all else is as in `bae-lens dynamics`. An interrupted run goes on.

    python benchmarks/entropy_by_position.py
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import machine

from bae_lens import DynamicsSettings, FitSettings, SyntheticModel, bit_model, random_embedding_model
from bae_lens.entropy.dynamics import position_entropies
from bae_lens.storage import write_text

RESULTS = Path(__file__).parent / "results"
D, LAYERS, POSITIONS = 64, (2, 4, 8), (1, 2, 4, 8, 16)  # LAYERS by their windows, in tokens
MODELS: dict[str, Callable[[torch.Generator], SyntheticModel]] = {
    "bits, independent": lambda g: bit_model(4, D, LAYERS, g),
    "bits, Markov": lambda g: bit_model(4, D, LAYERS, g, flip=0.1),
    "random embeddings": lambda g: random_embedding_model(5, D, LAYERS, g),
}


@dataclass(frozen=True)
class EntropyByPosition:
    """True and measured entropies by layer and position."""

    windows: tuple[int, ...] = (640, 2560, 10240)
    """Sequences, a fifth of them held out."""
    d_sae: int = 128
    prices: tuple[float, ...] = (0.01, 0.05, 0.2, 0.7, 3.0)
    steps: int = 1024
    seed: int = 0
    output: Path = field(default=RESULTS / "entropy_by_position.json")

    def run(self) -> None:
        rows: list[dict[str, Any]] = json.loads(self.output.read_text())["rows"] if self.output.exists() else []
        done = {(row["model"], row["dictionaries"], row["windows"], row["seed"]) for row in rows}
        for n, (name, make), dictionaries in product(self.windows, MODELS.items(), ("shared", "per position")):
            if (name, dictionaries, n, self.seed) in done:
                continue
            start = time.perf_counter()
            generator = torch.Generator().manual_seed(self.seed)
            model = make(generator)
            tokens = model.tokens(n, max(POSITIONS), generator)
            layers = range(len(LAYERS))
            states = [torch.stack([model.states(tokens, layer, p) for p in POSITIONS]) for layer in layers]
            fit = FitSettings(
                steps=self.steps, batch_size=256, lr=1e-2, entropy_from=0.05, encoder_bias=-2.0, elimination=False
            )
            settings = DynamicsSettings(self.d_sae, self.prices, dictionaries, fit, self.seed)
            measured = position_entropies(torch.stack(states), torch.arange(n), settings)
            seconds = time.perf_counter() - start
            for (layer, position, price), (estimate, _) in zip(
                product(layers, POSITIONS, self.prices), measured, strict=True
            ):
                truth = {
                    "true_bits": model.joint_bits(layer, position),
                    "marginal": model.marginal_bits(layer, position),
                }
                row = {"model": name, "dictionaries": dictionaries, "windows": n, "seed": self.seed, "layer": layer}
                rows.append({**row, "position": position, "price": price, **truth, "estimate": asdict(estimate)})
            write_text(self.output, json.dumps({**machine(), "rows": rows}))
            print(f"{name}, {dictionaries}, {n} windows: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    tyro.cli(EntropyByPosition).run()
