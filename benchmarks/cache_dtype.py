"""What activations in half precision cost a dictionary: the same training on caches of three dtypes.

    python benchmarks/cache_dtype.py --train runs/recipe/activations/train --test runs/recipe/activations/test

The activations of one cache in float32 are written again in each dtype, a BAE is trained on each with the same seed,
and all are measured on the test activations in float32. Rounding is what is lost of the variance by the rounding alone.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tyro
from machine import machine
from torch import Tensor, nn

from bae_lens import Recipe, TrainingBAEConfig, TrainingSettings, evaluate_dictionary, train_dictionary
from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.cache_writer import cache_activations
from bae_lens.activations.precision import DTYPES
from bae_lens.functional.explained_variance import ExplainedVariance
from bae_lens.storage import write_json


class Replayed(nn.Module):
    """In the place of the language model: gives the activations of a cache, batch by batch."""

    def __init__(self, cached: CachedActivations) -> None:
        super().__init__()
        self.cached, self.next = cached, 0
        self.hook_dict = {cached.hook_name: None}
        self.cfg = SimpleNamespace(device="cpu")
        self.tokenizer = SimpleNamespace(bos_token_id=0, all_special_ids=cached.special_tokens)

    def run_with_cache(self, tokens: Tensor, **_: Any) -> tuple[None, dict[str, Tensor]]:
        if tokens.numel() == 1:  # asked for the width
            return None, {self.cached.hook_name: torch.zeros(1, 1, self.cached.d_in)}
        rows = torch.arange(self.next, self.next + tokens.numel())
        self.next += tokens.numel()
        return None, {self.cached.hook_name: self.cached.rows(rows).view(*tokens.shape, -1)}


@dataclass
class CacheDtype:
    """Which activations, and how long is trained."""

    train: Path
    """Folder of cached activations."""
    test: Path
    """Folder of held-out ones."""
    hook_name: str = "blocks.10.hook_resid_post"
    """At which of their hooks."""
    training_tokens: int = 196_608
    """For each dictionary."""
    seeds: int = 2
    """Trainings in each dtype."""
    target_bits: float = 200.0
    """Of the BAE."""
    test_tokens: int = 8192
    """On which it is measured."""
    output: Path = Path(__file__).parent / "results" / "cache_dtype.json"
    """The result."""

    def run(self) -> None:
        torch.set_num_threads(1)
        source, test = (CachedActivations(folder, self.hook_name) for folder in (self.train, self.test))
        x = test.rows(test.content[: self.test_tokens])
        settings = TrainingSettings(training_tokens=self.training_tokens)
        cfg = TrainingBAEConfig.preset(
            "default",
            d_in=x.shape[1],
            d_sae=4 * x.shape[1],
            training_steps=settings.steps,
            target_bits=self.target_bits,
        )
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory(prefix="cache-dtype-") as folder:
            for dtype in DTYPES:
                where = Path(folder) / dtype
                model: Any = Replayed(source)
                cached = cache_activations(model, source.contexts, [self.hook_name], where, dtype=dtype)[self.hook_name]
                rounding = ExplainedVariance()
                rounding.add(x, x.to(getattr(torch, dtype)).float())
                for seed in range(self.seeds):
                    trained = train_dictionary("bae", Recipe(cfg, 6e-3), cached, settings, where / str(seed), seed)
                    metrics = evaluate_dictionary(trained.sae, x, optimize=False)
                    rows.append(
                        {
                            "dtype": dtype,
                            "seed": seed,
                            "lost to rounding": 1 - rounding.explained,
                            "explained variance": metrics.explained_variance,
                            "bits": metrics.code.support_bits,
                        }
                    )
                    print(rows[-1], flush=True)
        own = {name: value for name, value in asdict(self).items() if not isinstance(value, Path)}
        write_json(self.output, {"machine": machine(), **own, "rows": rows}, indent=1)


if __name__ == "__main__":
    tyro.cli(CacheDtype).run()
