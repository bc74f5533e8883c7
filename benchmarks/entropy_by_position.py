"""Is an entropy that is known recovered at every position, and by which dictionary (section 3.2)?

A synthetic model whose states have a known entropy at every layer and position (`bae_lens.SyntheticModel`) takes the
place of the language model; all else is as in `bae-lens dynamics`. An interrupted run goes on.

    python benchmarks/entropy_by_position.py
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from machine import machine

from bae_lens import DynamicsSettings, SyntheticModel, bit_model, position_entropies, random_embedding_model
from bae_lens.entropy.dynamics import FEW_VECTORS
from bae_lens.entropy.results import marks_of
from bae_lens.report.entropy import opacity
from bae_lens.report.figures import draw
from bae_lens.report.png import write_panels
from bae_lens.report.series import COLORS, GRAY, Chart, Series
from bae_lens.storage import write_text

RESULTS = Path(__file__).parent / "results"
SHOWN_PRICE = 0.05  # in the picture
D, LAYERS, POSITIONS = 64, (2, 8), (1, 2, 4, 8, 16)  # LAYERS by what they see, in tokens
MODELS: dict[str, Callable[[torch.Generator], SyntheticModel]] = {
    "bits, independent": lambda g: bit_model(4, D, LAYERS, g),
    "bits, Markov": lambda g: bit_model(4, D, LAYERS, g, flip=0.1),
    "random embeddings": lambda g: random_embedding_model(5, D, LAYERS, g),
}
CODES: dict[str, dict[str, Any]] = {
    "shared": {"dictionaries": "shared"},
    "shared, flips": {"dictionaries": "shared", "max_flips": 30},
    "per position": {"dictionaries": "per position"},
}


@dataclass(frozen=True)
class EntropyByPosition:
    """True and measured entropies by layer and position."""

    windows: tuple[int, ...] = (640, 5120)
    """Sequences, a fifth of them held out."""
    d_sae: int = 128
    prices: tuple[float, ...] = (0.01, 0.05, 0.2, 0.7, 3.0)
    steps: int = 2048
    seed: int = 0
    output: Path = field(default=RESULTS / "entropy_by_position.json")

    def run(self) -> None:
        rows: list[dict[str, Any]] = json.loads(self.output.read_text())["rows"] if self.output.exists() else []
        done = {(row["model"], row["codes"], row["windows"], row["seed"]) for row in rows}
        for n, (name, make), codes in product(self.windows, MODELS.items(), CODES):
            if (name, codes, n, self.seed) in done:
                continue
            start = time.perf_counter()
            generator = torch.Generator().manual_seed(self.seed)
            model = make(generator)
            tokens = model.tokens(n, max(POSITIONS), generator)
            layers = range(len(LAYERS))
            states = torch.stack([torch.stack([model.states(tokens, i, p) for p in POSITIONS]) for i in layers])
            fit = replace(FEW_VECTORS, steps=self.steps)
            settings = DynamicsSettings(self.d_sae, self.prices, fit=fit, seed=self.seed, **CODES[codes])
            measured = position_entropies(states, torch.arange(n), settings)
            run = {"model": name, "codes": codes, "windows": n, "seed": self.seed}
            run["seconds"] = time.perf_counter() - start
            for (layer, position, price), (estimate, whole) in zip(
                product(layers, POSITIONS, self.prices), measured, strict=True
            ):
                rows.append(
                    {
                        **run,
                        "window": LAYERS[layer],
                        "position": position,
                        "price": price,
                        "true_bits": model.joint_bits(layer, position),
                        "true_marginal_bits": model.marginal_bits(layer, position),
                        "marks": marks_of(estimate.joint_bits_bound, [(estimate, whole)]),
                        "estimate": asdict(estimate),
                        "all_windows": asdict(whole),
                    }
                )
            write_text(self.output, json.dumps({**machine(), "rows": rows}))
            print(f"{name}, {codes}, {n} windows: {run['seconds']:.0f} s", flush=True)
        charts = {
            f"{name}, {n:,} windows": chart([row for row in rows if (row["model"], row["windows"]) == (name, n)])
            for n, name in product(self.windows, MODELS)
        }
        write_panels(charts, self.output.with_suffix(".png"), columns=len(MODELS))
        figures = [draw(each).update_layout(title=name).to_html(full_html=False) for name, each in charts.items()]
        write_text(self.output.with_suffix(".html"), "\n".join(figures))


def chart(rows: list[dict[str, Any]]) -> Chart:
    """Joint bits by position at one price for each kind of code, and the truth."""
    series = []
    styles: tuple[Literal["dashed", "line"], ...] = ("dashed", "line")
    for window, style in zip(LAYERS, styles, strict=True):
        first = [r for r in rows if (r["window"], r["price"], r["codes"]) == (window, SHOWN_PRICE, "shared")]
        truth = [(float(r["position"]), r["true_bits"]) for r in first]
        series.append(Series(f"true, {window} tokens seen", truth, GRAY, style))
        for codes, color in zip(CODES, COLORS, strict=False):
            own = [r for r in rows if (r["window"], r["price"], r["codes"]) == (window, SHOWN_PRICE, codes)]
            estimates = [r["estimate"] for r in own]
            series.append(
                Series(
                    f"{codes} dictionaries",
                    [(float(r["position"]), r["estimate"]["joint_bits_bound"]) for r in own],
                    color,
                    "marked line",
                    in_legend=window == LAYERS[0],
                    intervals=[tuple(e["joint_interval"]) for e in estimates],
                    opacities=[opacity(e["explained_variance"]) for e in estimates],
                    hollow=[bool(r["marks"]) for r in own],
                    notes=[f"explained variance {e['explained_variance']:.3f}" for e in estimates],
                )
            )
    ticks = [float(p) for p in POSITIONS]
    title = f"joint bits, price {SHOWN_PRICE:g}"
    return Chart("position", title, "position %{x}: %{y:.1f} bits", series, log_x=True, x_ticks=ticks)


if __name__ == "__main__":
    tyro.cli(EntropyByPosition).run()
