"""The pass of a language model over chosen contexts that fills a cache of activations."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from tqdm.auto import tqdm

from bae_lens.activations.cache import (
    ARRAY_FILE,
    CHECKSUMS_FILE,
    COMPLETE_FILE,
    NORMS_FILE,
    SOURCE_FILE,
    CachedActivations,
    damaged_contexts,
)
from bae_lens.activations.contexts import Contexts
from bae_lens.activations.fingerprint import model_fingerprint, tensor_fingerprint
from bae_lens.activations.forward import hook_widths, norms_at, run_at_hooks
from bae_lens.activations.models import resolve_hook
from bae_lens.activations.precision import STORED, Dtype, stored, torch_dtype
from bae_lens.distributed.connection import is_main_process, n_processes, process_index
from bae_lens.distributed.exchange import barrier
from bae_lens.distributed.homes import all_homes, is_first_at_home, place_at_home
from bae_lens.file_exchange import bring_rows
from bae_lens.saes.saelens_compat import get_special_token_ids
from bae_lens.storage import checksum, claim, load_array, locked, make_array, open_array, save_array, write_json


@torch.no_grad()
def cache_activations(
    model: Any,
    contexts: Contexts,
    hook_names: Sequence[str],
    folder: Path,
    batch_size: int = 16,
    dtype: Dtype = "float32",
) -> dict[str, CachedActivations]:
    """Runs the model over the contexts once, up to the deepest hook's layer, and keeps the activations at all hooks.

    They lie in `folder` in this dtype, and are returned under the names that were asked for. By the norms at all hooks
    it is decided which tokens are outliers. A complete cache is opened as it is. One that was interrupted, or in
    which damage was found, goes on with the batches that are missing; contexts that are no longer what was written are
    computed again, and a warning gives their number. Several processes share the batches. Machines that share no folder
    have the whole cache each: what one of them has is brought to the others, and only what none has is computed.
    Raises ValueError for no hook, an unknown one, one that is not one vector a token, activations that are not finite
    or too large for the dtype (naming the batch), a folder that holds activations of other hooks, another model, other
    contexts or another dtype, or at which another process is at work, and OSError for a disk without room for all of
    them.
    """
    if not hook_names:
        raise ValueError("choose at least one hook, got none")
    resolved = {hook_name: resolve_hook(model, hook_name) for hook_name in hook_names}
    names = list(dict.fromkeys(resolved.values()))
    source = {
        "model": model_fingerprint(model),
        "contexts": tensor_fingerprint(contexts.tokens, contexts.document),
        "hook_names": names,
        "special_tokens": sorted(get_special_token_ids(model.tokenizer)),
        **({} if torch_dtype(dtype) == torch.float32 else {"dtype": dtype}),
    }
    working = is_first_at_home() and not (folder / COMPLETE_FILE).exists()
    with locked(folder) if working else nullcontext():
        claim(folder / SOURCE_FILE, source)
        if not all_homes((folder / COMPLETE_FILE).exists()):
            widths = hook_widths(model, names)
            make_arrays(folder, contexts, {name: widths[name] for name in names}, dtype)
            forget_damaged(folder, names)
            _cache_missing(model, contexts, names, folder, batch_size, dtype)
            complete(folder, names)
    return {hook_name: CachedActivations(folder, name) for hook_name, name in resolved.items()}


def make_arrays(folder: Path, contexts: Contexts, widths: dict[str, int], dtype: Dtype) -> None:
    """Everything that will be written, before anything is computed."""
    if is_first_at_home():
        save_array(folder / "tokens.npy", contexts.tokens)
        save_array(folder / "document.npy", contexts.document)
        n, context_size = contexts.tokens.shape
        make_array(folder / NORMS_FILE, (n, context_size, len(widths)))
        for hook_name, width in widths.items():
            make_array(folder / hook_name / ARRAY_FILE, (n, context_size, width), STORED[dtype])
            make_array(folder / hook_name / CHECKSUMS_FILE, (n,), np.int64)
    barrier()


def forget_damaged(folder: Path, hook_names: list[str]) -> None:
    """Contexts whose activations do not have the checksum that they were written with count as missing."""
    norms, damaged = load_array(folder / NORMS_FILE, mmap_mode="r"), set()
    for hook_name in hook_names:
        activations, sums = (
            load_array(folder / hook_name / ARRAY_FILE, "r"),
            open_array(folder / hook_name / CHECKSUMS_FILE),
        )
        own, n_readers = place_at_home()
        written = sums.nonzero()[0][own::n_readers]
        checking = tqdm(written, desc="checking what is on disk", unit="context", disable=not is_main_process())
        at_hook = damaged_contexts(checking, sums, norms, activations)
        sums[at_hook] = 0
        sums.flush()
        damaged |= set(at_hook)
    if damaged:
        warnings.warn(
            f"{len(damaged)} of {len(norms)} contexts in {folder} are damaged and computed again", stacklevel=4
        )
    barrier()


def _cache_missing(
    model: Any, contexts: Contexts, hook_names: list[str], folder: Path, batch_size: int, dtype: Dtype
) -> None:
    """By process, every so many batches."""
    n = len(contexts.tokens)
    norms = open_array(folder / NORMS_FILE)
    arrays = {hook_name: open_array(folder / hook_name / ARRAY_FILE) for hook_name in hook_names}
    sums = {hook_name: open_array(folder / hook_name / CHECKSUMS_FILE) for hook_name in hook_names}

    def written(rows: slice = slice(None)) -> Bool[np.ndarray, " n"]:
        return np.all([at_hook[rows] != 0 for at_hook in sums.values()], axis=0)

    bring_rows([norms, *arrays.values(), *sums.values()], written(), batch_size)
    missing = [rows for start in range(0, n, batch_size) if not written(rows := slice(start, start + batch_size)).all()]
    barrier()  # before one of them is done
    description = f"activations at {', '.join(hook_names)}"
    with tqdm(
        total=n, initial=int(written().sum()), desc=description, unit="context", disable=not is_main_process()
    ) as progress:
        for rows in missing[process_index() :: n_processes()]:
            try:
                batch = run_at_hooks(model, contexts.tokens[rows].clamp(min=0), hook_names)
                on_disk = {hook_name: stored(activations, dtype) for hook_name, activations in batch.items()}
            except ValueError as error:
                raise ValueError(f"batch {rows.start // batch_size}: {error}") from error
            norms[rows] = norms_at(batch, hook_names).numpy()
            norms.flush()
            for hook_name, activations in on_disk.items():
                arrays[hook_name][rows] = activations
                arrays[hook_name].flush()
                sums[hook_name][rows] = [checksum(parts) for parts in zip(norms[rows], activations, strict=True)]
                sums[hook_name].flush()
            progress.update(int(written().sum()) - progress.n)
    barrier()
    bring_rows([norms, *arrays.values(), *sums.values()], written(), batch_size)


def complete(folder: Path, hook_names: list[str]) -> None:
    """Says in the folder that everything is there. Raises ValueError if it is not."""
    if is_first_at_home():
        if not all(load_array(folder / hook_name / CHECKSUMS_FILE).all() for hook_name in hook_names):
            raise ValueError(f"not all contexts arrived in {folder}; start the same command again")
        write_json(folder / COMPLETE_FILE, {"norms": checksum([load_array(folder / NORMS_FILE)])})
    barrier()
