"""How fast are activations written, checked and read again, beside the model that makes them?

    python benchmarks/hidden_states.py

The model's pass alone and the pass with everything kept on disk take turns, on different contexts.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
import tyro
from machine import machine
from tqdm import tqdm

from bae_lens import Contexts, ContextSettings, cache_activations, choose_contexts, demo_dataset, load_demo_model
from bae_lens.activations.forward import stop_layer
from bae_lens.storage import write_text


@dataclass(frozen=True)
class HiddenStatesBenchmark:
    """Tokens a second through each part of the way from the model to a training batch."""

    hook_name: str = "blocks.10.hook_resid_post"
    rounds: int = 5
    """Batches of 16 contexts, for each of the two ways."""
    read_batches: int = 50
    """Shuffled batches of 512 that are read again."""
    output: Path = field(default=Path(__file__).parent / "results" / "hidden_states.json")

    def run(self) -> None:
        model = load_demo_model()
        settings = ContextSettings(cached_tokens=2 * self.rounds * 16 * 127, held_out_tokens=127)
        contexts = choose_contexts(model.tokenizer, demo_dataset(), settings, seed=0)["train"]
        seconds: dict[str, list[float]] = {"the model's pass": [], "pass and disk": [], "checked again": []}
        with tempfile.TemporaryDirectory() as folder:
            for number in tqdm(range(self.rounds), desc="rounds"):
                alone, kept = (part(contexts, 2 * number + offset) for offset in (0, 1))
                start = time.perf_counter()
                with torch.no_grad():
                    model.run_with_cache(
                        alone.tokens, names_filter=self.hook_name, stop_at_layer=stop_layer([self.hook_name])
                    )
                seconds["the model's pass"].append(time.perf_counter() - start)
                for name in ("pass and disk", "checked again"):
                    start = time.perf_counter()
                    cache_activations(model, kept, [self.hook_name], Path(folder) / str(number))
                    seconds[name].append(time.perf_counter() - start)
            states = cache_activations(model, contexts, [self.hook_name], Path(folder) / "all")[self.hook_name]
            batches = states.shuffled(512, seed=0)
            next(batches)
            start = time.perf_counter()
            read = sum(len(batch) for batch in islice(batches, self.read_batches))
            reading = time.perf_counter() - start
        per_batch = alone.tokens.numel()
        rates = {name: per_batch / statistics.median(values) for name, values in seconds.items()}
        rates["read in shuffled batches"] = read / reading
        ratios = [disk / bare for bare, disk in zip(*list(seconds.values())[:2], strict=True)]
        result = {
            **machine(),
            "tokens_per_second": rates,
            "pass_and_disk_over_pass_quartiles": statistics.quantiles(ratios, n=4),
            "bytes_per_token": states.d_in * 4,
        }
        print(json.dumps(result, indent=1))
        write_text(self.output, json.dumps(result, indent=1))


def part(contexts: Contexts, number: int) -> Contexts:
    """The given sixteen contexts."""
    rows = slice(16 * number, 16 * (number + 1))
    return replace(contexts, tokens=contexts.tokens[rows], document=contexts.document[rows])


if __name__ == "__main__":
    tyro.cli(HiddenStatesBenchmark).run()
