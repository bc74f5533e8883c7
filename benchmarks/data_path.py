"""Rows a second from a cache of activations to the trainer: as they were read before, as they are now, and in order.

    python benchmarks/data_path.py

Before: all rows mixed with all, gathered from the memory map, each context's checksum looked at when a batch first held
one of its rows. Now: `CachedActivations.shuffled`. In order: the file alone, read in large parts. What is timed goes
round and round, so that other work on the machine hits all of them alike, and the table has the medians: by the clock,
and by the time that the process had a core. Rows are of the width of SmolLM2 in float32; from the page cache, or, where
it says so, with the file dropped from it before.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import tyro
from machine import machine
from torch import Tensor, nn

from bae_lens.activations.cache import ARRAY_FILE, CachedActivations
from bae_lens.activations.cache_writer import cache_activations
from bae_lens.activations.contexts import Contexts
from bae_lens.storage import checksum, write_json

HOOK = "blocks.0.hook_resid_post"
CONTEXT_SIZE, BATCH = 128, 512


class Drawn(nn.Module):
    """In the place of a language model: its activations are drawn."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.d_in, self.hook_dict = d_in, {HOOK: None}
        self.cfg = SimpleNamespace(device="cpu")
        self.tokenizer = SimpleNamespace(bos_token_id=0, all_special_ids=[0])
        self.generator = torch.Generator().manual_seed(0)

    def run_with_cache(self, tokens: Tensor, **_: Any) -> tuple[None, dict[str, Tensor]]:
        return None, {HOOK: torch.randn(*tokens.shape, self.d_in, generator=self.generator)}


@dataclass
class DataPath:
    """Sizes, and where the result goes."""

    rows: int = 524_288
    """Of the cache."""
    d_in: int = 576
    """Width of a row."""
    turns: int = 7
    """Each of which times everything once."""
    device: str = "cpu"
    """Where batches go."""
    output: Path = Path(__file__).parent / "results" / "data_path.json"
    """The result."""

    def run(self) -> None:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(prefix="data-path-") as folder:
            self.make(Path(folder))
            ways: dict[str, Callable[[], Iterator[Any]]] = {
                "before, first time": lambda: before(self.opened(), set()),
                "before": lambda: before(self.opened(), None),
                "now": lambda: self.opened().shuffled(BATCH, int(time.time_ns() % 2**31), device=self.device),
                "in order": self.parts,
            }
            measured: dict[str, list[tuple[float, float]]] = {}
            for turn in range(self.turns):
                for name, way in ways.items():
                    measured.setdefault(name, []).append(self.timed(way()))
                for name in ("now", "in order"):
                    self.drop()
                    measured.setdefault(f"{name}, from the disk", []).append(self.timed(ways[name]()))
                print(f"turn {turn + 1} of {self.turns}", flush=True)
        rates = {
            name: {
                clock: round(self.rows / statistics.median(column))
                for clock, column in zip(("clock", "core"), zip(*pairs, strict=True), strict=True)
            }
            for name, pairs in measured.items()
        }
        settings = {name: value for name, value in asdict(self).items() if name != "output"}
        write_json(self.output, {"machine": machine(), **settings, "rows a second": rates}, indent=1)
        print("| | k rows/s | GB/s | k rows/s of a core |\n| --- | ---: | ---: | ---: |")
        for name, rate in rates.items():
            gigabytes = rate["clock"] * 4 * self.d_in / 1e9
            print(f"| {name} | {rate['clock'] / 1e3:.0f} | {gigabytes:.2f} | {rate['core'] / 1e3:.0f} |")

    def make(self, folder: Path) -> None:
        """A cache, whose standardization is found, as it is once in its life."""
        tokens = torch.randint(1, 100, (self.rows // CONTEXT_SIZE, CONTEXT_SIZE), generator=torch.Generator())
        contexts = Contexts(tokens, torch.arange(len(tokens)))
        cached = cache_activations(Drawn(self.d_in), contexts, [HOOK], folder / "cache")[HOOK]
        assert cached.standardization.scale > 0
        self.folder, self.path = cached.folder, cached.folder / HOOK / ARRAY_FILE

    def opened(self) -> CachedActivations:
        """Anew, since what is mapped into memory cannot be dropped from it."""
        cached = CachedActivations(self.folder, HOOK)
        assert len(cached.content)
        return cached

    def parts(self) -> Iterator[int]:
        """The file from beginning to end."""
        part = bytearray(BATCH * self.d_in * 4)
        with self.path.open("rb", buffering=0) as file:
            while n_bytes := file.readinto(part):
                yield n_bytes

    def timed(self, batches: Any) -> tuple[float, float]:
        """Seconds that an epoch takes by the clock and on a core."""
        with closing(batches):
            clock, core = time.perf_counter(), time.process_time()
            for batch in islice(batches, self.rows // BATCH):
                if isinstance(batch, Tensor):
                    batch.to(self.device)
            if torch.device(self.device).type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - clock, time.process_time() - core

    def drop(self) -> None:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def before(cached: CachedActivations, checked: set[int] | None) -> Iterator[Tensor]:
    """With a set, of the contexts whose checksums were looked at already."""
    array, mean = np.load(cached.folder / HOOK / ARRAY_FILE, mmap_mode="r"), cached.standardization.mean
    norms = np.load(cached.folder / "norms.npy")
    order = torch.randperm(len(cached.content))
    for batch in order.split(BATCH):
        rows = cached.content[batch].numpy()
        for context in np.unique(rows // CONTEXT_SIZE) if checked is not None else ():
            if context not in checked:
                checksum([norms[context], array[context]])
                checked.add(context)
        yield (torch.from_numpy(array.reshape(-1, array.shape[-1])[rows]) - mean) * cached.standardization.scale


if __name__ == "__main__":
    tyro.cli(DataPath).run()
