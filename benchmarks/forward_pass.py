"""How fast the demo's pass is: tokens/s of caching activations against transformers' forward of the same layers.

    BAE_LENS_CACHE=... python benchmarks/forward_pass.py

Caching includes what a forward alone does not do: hooks, looking for outlier tokens, checksums and writing to disk. The
ways take turns on the same contexts and batches, and the first turn of each does not count.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from machine import machine
from transformers import AutoModel

from bae_lens import ContextSettings, cache_activations, choose_contexts, demo_dataset, load_demo_model
from bae_lens.activations.demo_model import demo_model_folder
from bae_lens.storage import write_json

BATCH = 16  # contexts


@dataclass
class ForwardPass:
    """How much of the demo's pass is timed."""

    tokens: int = 8192
    """In each turn."""
    turns: int = 5
    """Of each way, that count."""
    layer: int = 10
    """The last that is computed."""
    output: Path = Path(__file__).parent / "results" / "forward_pass.json"
    """The result."""

    @torch.no_grad()
    def run(self) -> None:
        block = f"blocks.{self.layer}"
        model, settings = load_demo_model(), ContextSettings(cached_tokens=self.tokens, held_out_tokens=1024)
        contexts = choose_contexts(model.tokenizer, demo_dataset(), settings)["train"]
        plain = AutoModel.from_pretrained(demo_model_folder(), dtype=torch.float32).eval()
        plain.layers = plain.layers[: self.layer + 1]

        def cached(hooks: list[str]) -> None:
            with tempfile.TemporaryDirectory() as folder:
                cache_activations(model, contexts, hooks, Path(folder) / "activations")

        def forward() -> None:
            for batch in contexts.tokens.clamp(min=0).split(BATCH):
                plain(batch, use_cache=False)

        ways: dict[str, Callable[[], None]] = {
            "transformers' forward": forward,
            "cached at one hook": partial(cached, [f"{block}.hook_resid_post"]),
            "cached at three hooks": partial(
                cached, [f"{block}.{hook}" for hook in ("hook_resid_post", "mlp.hook_in", "hook_mlp_out")]
            ),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(self.turns + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if turn:
                    rates[name].append(contexts.tokens.numel() / (time.perf_counter() - start))
        medians = {name: statistics.median(each) for name, each in rates.items()}
        theirs = medians["transformers' forward"]
        write_json(
            self.output,
            {**machine(), "tokens_per_second": rates, "of_transformers": {n: m / theirs for n, m in medians.items()}},
        )
        for name, median in medians.items():
            print(f"{name}: {median:.0f} tokens/s, {median / theirs:.2f} of transformers'")


if __name__ == "__main__":
    tyro.cli(ForwardPass).run()
