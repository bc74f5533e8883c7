"""Entropy against the number of demonstrations in the prompt, with correct and with shuffled labels (section 3.2).

    python benchmarks/in_context.py --output runs/in_context

Each demonstration is a sentence of a State of the Union address and its century. It is `bae-lens dynamics --prompts` on
a file that this writes beside the output folder.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from machine import machine

from bae_lens.activations.prompts import century_prompts
from bae_lens.cli.device import DEFAULT_DEVICE
from bae_lens.cli.dynamics import Dynamics
from bae_lens.storage import read_json, write_json, write_text


@dataclass(frozen=True)
class InContext:
    """Both groups of prompts, measured and compared."""

    output: Path
    n_prompts: int = 512
    """In each group."""
    n_demonstrations: int = 8
    layers: tuple[int, ...] = (5, 15)
    entropy_coefficients: tuple[float, ...] = (0.01, 0.1, 0.5, 2.0, 8.0)
    steps: int = 256
    """Of training: some 20 epochs of a layer's vectors."""
    seed: int = 0
    device: str = DEFAULT_DEVICE
    results: Path = field(default=Path(__file__).parent / "results" / "in_context.json")

    def run(self) -> None:
        prompts = self.output.with_name(f"{self.output.name}.jsonl")
        prompts.parent.mkdir(parents=True, exist_ok=True)
        rows = century_prompts(self.n_prompts, self.n_demonstrations, self.seed)
        write_text(prompts, "".join(f"{json.dumps(row)}\n" for row in rows))
        dynamics = Dynamics(
            self.output,
            prompts=str(prompts),
            layers=self.layers,
            entropy_coefficients=self.entropy_coefficients,
            steps=self.steps,
            seed=self.seed,
            device=self.device,
        )
        print(dynamics.run())
        stages = {group: read_json(self.output / group / "stages.json") for group in ("correct", "shuffled")}
        write_json(
            self.results, {**machine(), **read_json(self.output / "demonstrations.json"), "stages": stages}, indent=1
        )


if __name__ == "__main__":
    tyro.cli(InContext).run()
