"""Entropy against the number of demonstrations in the prompt: dynamics whose positions are ends of demonstrations.

Each prompt shows the first numbers of one arithmetic progression after another ("13 15 17 19", the step kept secret),
each in as many tokens, so that demonstration k ends at one position in all prompts. In half of the prompts the step is
the same throughout, and can be learnt from the demonstrations; in the other half it changes.

    python benchmarks/in_context.py --output runs/in_context
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from machine import machine

from bae_lens import DynamicsSettings, Windows, entropy_dynamics, load_demo_model
from bae_lens.report.dynamics import dynamics_table
from bae_lens.report.entropy import entropy_by_position
from bae_lens.storage import write_text


def demonstrations(
    tokenizer: Any, n_prompts: int, n_demonstrations: int, seed: int, constant: bool = True
) -> tuple[Windows, list[int]]:
    """Prompts, and the positions at which their demonstrations end."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n_prompts):
        steps = rng.integers(1, 6, size=n_demonstrations)
        steps = np.full_like(steps, steps[0]) if constant else steps
        starts = rng.integers(10, 60, size=n_demonstrations)
        lines = [" ".join(str(start + step * i) for i in range(4)) for start, step in zip(starts, steps, strict=True)]
        ids = tokenizer("\n".join(lines) + "\n", add_special_tokens=False)["input_ids"]
        rows.append([tokenizer.bos_token_id, *ids])
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise ValueError(f"demonstrations must be equally long, got prompts of {sorted(lengths)} tokens")
    per_demonstration = (lengths.pop() - 1) // n_demonstrations
    positions = [per_demonstration * (i + 1) for i in range(n_demonstrations)]
    return Windows(torch.tensor(rows), torch.arange(n_prompts), starts_with_bos=True), positions


@dataclass(frozen=True)
class InContext:
    """Entropy by the number of demonstrations, with and without something to learn from them."""

    output: Path
    n_prompts: int = 512
    n_demonstrations: int = 8
    layers: tuple[int, ...] = (5, 15)
    d_sae: int = 576
    entropy_coefficients: tuple[float, ...] = (1.0, 4.0)
    explained_variance: float = 0.5
    """At which the bits of both kinds of prompt are compared, beside those at the first price."""
    seed: int = 0
    results: Path = field(default=Path(__file__).parent / "results" / "in_context.json")

    def run(self) -> None:
        model = load_demo_model()
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in self.layers]
        settings = DynamicsSettings(self.d_sae, self.entropy_coefficients, seed=self.seed)
        results: dict[str, Any] = machine()
        for name, constant in (("one_step", True), ("changing_step", False)):
            sizes = (self.n_prompts, self.n_demonstrations, self.seed)
            windows, positions = demonstrations(model.tokenizer, *sizes, constant)
            folder = self.output / name
            dynamics = entropy_dynamics(model, windows, hooks, positions, settings, folder)
            entropy_by_position(dynamics).write_html(folder / "dynamics.html", config={"displayModeBar": False})
            results[name] = {**dynamics.to_dict(), "stages": json.loads((folder / "stages.json").read_text())}
            write_text(self.results, json.dumps(results, indent=1))
            tables = (dynamics_table(dynamics), dynamics_table(dynamics, self.explained_variance))
            print(f"\n{name}", *tables, sep="\n\n", flush=True)


if __name__ == "__main__":
    tyro.cli(InContext).run()
