"""Activations of a language model on disk: one pass over chosen contexts, then as many trainings as wanted."""

import json
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens.util import get_special_token_ids
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.activations.contexts import PADDING, Contexts
from bae_lens.activations.forward import run_at_hooks
from bae_lens.activations.sources import resolve_hook
from bae_lens.distributed import any_process, barrier, is_main_process, n_processes, process_index, shard
from bae_lens.functional.outliers import OUTLIER_NORM
from bae_lens.saes.standardization import Standardization
from bae_lens.storage import checksum, load_array, open_array, read_json, save_array, write_text

CHECKSUMS = "checksums.npy"  # of each context, 0 where it is missing


class CachedActivations:
    """The activations of `Contexts` at one hook, on disk, and which of them are content.

    Rows are tokens in order. BOS and other special tokens, padding, and tokens whose norm is over `OUTLIER_NORM` times
    the median of the rest are not content. The norm is that at the first of the hooks cached together, whatever this
    one is, so that all of them have the same rows.
    """

    def __init__(self, folder: Path, hook_name: str) -> None:
        """Opens what `cache_activations` wrote. Raises FileNotFoundError if it is missing or not complete."""
        if not (folder / "complete.json").exists():
            raise FileNotFoundError(f"no complete cache at {folder}")
        self.folder, self.hook_name = folder, hook_name
        info = read_json(folder / "complete.json")
        self.special_tokens: list[int] = info["special_tokens"]
        self.states = load_array(folder / hook_name / "states.npy", mmap_mode="r")
        self.norms = torch.from_numpy(load_array(folder / "norms.npy")).flatten()
        self.contexts = Contexts(
            *(torch.from_numpy(load_array(folder / f"{part}.npy")) for part in ("tokens", "document"))
        )

    @property
    def d_in(self) -> int:
        """Width of the activations; at hook_z that of all heads together."""
        return self.states.shape[-1]

    @property
    def widths(self) -> dict[str, int]:
        """The hook and its width."""
        return {self.hook_name: self.d_in}

    @cached_property
    def special(self) -> Bool[Tensor, " n_tokens"]:
        """Which rows are special tokens or padding."""
        tokens = self.contexts.tokens.flatten()
        return torch.isin(tokens, torch.tensor([PADDING, *self.special_tokens]))

    @cached_property
    def relative_norms(self) -> Float[Tensor, " n_tokens"]:
        """Each row's norm in units of the median of those that are not special."""
        return self.norms / self.norms[~self.special].median()

    @cached_property
    def outliers(self) -> Bool[Tensor, " n_tokens"]:
        """Which rows are outlier tokens."""
        return ~self.special & (self.relative_norms > OUTLIER_NORM)

    @cached_property
    def content(self) -> Int[Tensor, " n_content"]:
        """Indices of the rows that are content."""
        return (~self.special & ~self.outliers).nonzero().flatten()

    def rows(self, indices: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        """Raw activations of the given rows, in float32."""
        return torch.from_numpy(self.states.reshape(-1, self.d_in)[indices.numpy()])

    def batches(self, batch_size: int) -> Iterator[Float[Tensor, "n d_in"]]:
        """The raw activations of all content, in order."""
        for indices in self.content.split(batch_size):
            yield self.rows(indices)

    @cached_property
    def standardization(self) -> Standardization:
        """Mean and scale of the content, accumulated in float64. Raises ValueError for content without variance."""
        if len(self.content) < 2:
            raise ValueError(f"{len(self.content)} tokens of content are too few to standardize; cache more")
        total, squares = torch.zeros(self.d_in, dtype=torch.float64), 0.0
        for batch in self.batches(8192):
            total += batch.double().sum(0)
            squares += batch.double().square().sum().item()
        mean = total / len(self.content)
        mean_square = squares / len(self.content) - mean.square().sum().item()
        if not mean_square > 0:
            raise ValueError("the activations are all the same, so there is nothing to learn from them")
        return Standardization(mean.float(), (self.d_in / mean_square) ** 0.5)

    def shuffled(self, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Endless standardized batches, every epoch in a new order that depends on the seed alone; batches are full.

        Begins at `start_step`, so that a resumed run goes on where it stopped. Of several processes, each gets its own
        rows of these batches.
        Raises ValueError if there is less content than a batch.
        """
        per_epoch = len(self.content) // batch_size
        if per_epoch == 0:
            raise ValueError(f"a batch of {batch_size} needs as many tokens, but only {len(self.content)} were cached")
        step = start_step
        while True:
            epoch, first = divmod(step, per_epoch)
            epoch_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
            order = torch.randperm(len(self.content), generator=torch.Generator().manual_seed(epoch_seed))
            for batch in order[: per_epoch * batch_size].view(per_epoch, batch_size)[first:]:
                yield self.standardization(self.rows(self.content[shard(batch)]))
            step = (epoch + 1) * per_epoch


@torch.no_grad()
def cache_activations(
    model: Any, contexts: Contexts, hook_names: Sequence[str], folder: Path, batch_size: int = 16
) -> dict[str, CachedActivations]:
    """Runs the model over the contexts once, up to the deepest hook's layer, and keeps the activations at all hooks.

    They lie in `folder` in float32, and are returned under the names that were asked for. By the norms at the first
    hook it is decided which tokens are outliers. An interrupted cache goes on with the batches that are missing; one
    that is complete is opened as it is, but for contexts that are no longer what was written, of which a warning gives
    the number, and which are computed again. Several processes share the batches, and write into the same folder.
    Raises ValueError for an unknown hook, one that is not one vector a token, activations that are not finite
    (naming the batch), and a folder that holds activations of other hooks, another model or other contexts.
    """
    resolved = {hook_name: resolve_hook(model, hook_name) for hook_name in hook_names}
    folder.mkdir(parents=True, exist_ok=True)
    source = {
        "model": model.cfg.model_name,
        "hook_names": list(dict.fromkeys(resolved.values())),
        "special_tokens": sorted(get_special_token_ids(model.tokenizer)),
    }
    _claim(folder, source, contexts)
    (complete,) = any_process((folder / "complete.json").exists())
    if complete:
        _forget_damaged(folder, source["hook_names"])
    if not (folder / "complete.json").exists():
        _cache_missing(model, contexts, source["hook_names"], folder, batch_size)
        barrier()
        if is_main_process():
            if not load_array(folder / CHECKSUMS).all():
                raise ValueError(f"not all contexts arrived in {folder}; the processes must share it")
            write_text(folder / "complete.json", json.dumps(source))
        barrier()
    return {hook_name: CachedActivations(folder, name) for hook_name, name in resolved.items()}


def _claim(folder: Path, source: dict[str, Any], contexts: Contexts) -> None:
    """Writes down what the folder is for, or compares it with what it is for already."""
    path = folder / "source.json"
    if is_main_process() and not path.exists():
        save_array(folder / "tokens.npy", contexts.tokens)
        save_array(folder / "document.npy", contexts.document)
        write_text(path, json.dumps(source))
    barrier()
    same_contexts = np.array_equal(load_array(folder / "tokens.npy"), contexts.tokens.numpy())
    if read_json(path) != source or not same_contexts:
        raise ValueError(f"{folder} holds activations of another model, other hooks or text; choose another folder")


def _cache_missing(model: Any, contexts: Contexts, hook_names: list[str], folder: Path, batch_size: int) -> None:
    n, context_size = contexts.tokens.shape
    norms = open_array(folder / "norms.npy", (n, context_size))
    sums = open_array(folder / CHECKSUMS, (n,), np.int64)
    missing = [start for start in range(0, n, batch_size) if not sums[start : start + batch_size].all()]
    barrier()  # before one of them is done
    states: dict[str, np.memmap] = {}
    description = f"activations at {', '.join(hook_names)}"
    with tqdm(
        total=n, initial=int((sums != 0).sum()), desc=description, unit="context", disable=not is_main_process()
    ) as progress:
        for start in missing[process_index() :: n_processes()]:
            tokens = contexts.tokens[start : start + batch_size].clamp(min=0)
            rows = slice(start, start + len(tokens))
            try:
                batches = run_at_hooks(model, tokens, hook_names)
            except ValueError as error:
                raise ValueError(f"batch {start // batch_size}: {error}") from error
            for hook_name, batch in batches.items():
                if hook_name not in states:
                    (folder / hook_name).mkdir(exist_ok=True)
                    shape = (n, context_size, batch.shape[-1])
                    states[hook_name] = open_array(folder / hook_name / "states.npy", shape)
                states[hook_name][rows] = batch.numpy()
                states[hook_name].flush()
            norms[rows] = batches[hook_names[0]].norm(dim=-1).numpy()
            norms.flush()
            parts = [norms[rows], *(batches[name].numpy() for name in sorted(batches))]
            sums[rows] = [checksum(context) for context in zip(*parts, strict=True)]
            sums.flush()
            progress.update(int((sums != 0).sum()) - progress.n)


def _forget_damaged(folder: Path, hook_names: list[str]) -> None:
    """Contexts whose activations do not have the checksum that they were written with count as missing.

    Everything is read for it, at the speed of the disk.
    """
    files = ["norms.npy", *(f"{hook_name}/states.npy" for hook_name in sorted(hook_names))]
    parts = [load_array(folder / file, mmap_mode="r") for file in files]
    sums = open_array(folder / CHECKSUMS, (len(parts[0]),), np.int64)
    contexts = tqdm(range(process_index(), len(sums), n_processes()), desc="checking what is on disk", unit="context")
    damaged = [context for context in contexts if sums[context] != checksum(part[context] for part in parts)]
    if damaged:
        warnings.warn(
            f"{len(damaged)} of {len(sums)} contexts in {folder} are damaged and computed again", stacklevel=3
        )
        sums[damaged] = 0
        sums.flush()
        (folder / "complete.json").unlink(missing_ok=True)
    barrier()
