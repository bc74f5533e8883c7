"""Vectors of files or arrays as a cache of activations, in one pass over them."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.activations.cache import (
    ARRAY_FILE,
    CHECKSUMS_FILE,
    COMPLETE_FILE,
    NORMS_FILE,
    SOURCE_FILE,
    CachedActivations,
)
from bae_lens.activations.cache_writer import complete, forget_damaged, make_arrays
from bae_lens.activations.contexts import Contexts
from bae_lens.activations.fingerprint import tensor_fingerprint
from bae_lens.activations.precision import Dtype, stored, torch_dtype
from bae_lens.activations.vectors import VECTORS_HOOK, Vectors
from bae_lens.distributed.connection import is_main_process
from bae_lens.distributed.exchange import barrier
from bae_lens.distributed.homes import all_homes, is_first_at_home
from bae_lens.storage import checksum, claim, locked, open_array


def cache_vectors(vectors: Vectors, contexts: Contexts, folder: Path, dtype: Dtype = "float32") -> CachedActivations:
    """The vectors that `choose_vectors` chose for one split, copied to `folder` in this dtype.

    Trainings read rows in another order than they lie in files, some of which can be read in order only; so they are
    copied once, a batch at a time. A complete cache is opened as it is; one that was interrupted goes on with what is
    missing. Of the processes on a machine the first copies.
    Raises ValueError for vectors that are not finite, naming the row, or too large for the dtype, for a folder that
    holds other vectors, another choice or another dtype, or at which another process is at work, and OSError for a disk
    without room.
    """
    source = {
        "vectors": vectors.fingerprint,
        "contexts": tensor_fingerprint(contexts.tokens, contexts.document),
        "hook_names": [VECTORS_HOOK],
        "special_tokens": [],
        **({} if torch_dtype(dtype) == torch.float32 else {"dtype": dtype}),
    }
    working = is_first_at_home() and not (folder / COMPLETE_FILE).exists()
    with locked(folder) if working else nullcontext():
        claim(folder / SOURCE_FILE, source)
        if not all_homes((folder / COMPLETE_FILE).exists()):
            make_arrays(folder, contexts, {VECTORS_HOOK: vectors.d}, dtype)
            forget_damaged(folder, [VECTORS_HOOK])
            if is_first_at_home():
                _copy(vectors, contexts.tokens.flatten().numpy(), folder, dtype)
            barrier()
            complete(folder, [VECTORS_HOOK])
    return CachedActivations(folder, VECTORS_HOOK)


def check_vectors(vectors: Vectors, contexts: Iterable[Contexts], dtype: Dtype = "float32") -> None:
    """Raises ValueError as `cache_vectors` would for what is not finite or too large, in one pass over them."""
    rows = torch.cat([each.tokens.flatten() for each in contexts]).sort().values.numpy()
    for of_batch, chosen in _batches(vectors, rows):
        _checked(vectors, of_batch, chosen, dtype)


def _checked(
    vectors: Vectors, rows: Int[np.ndarray, " n"], chosen: Float[Tensor, "n d"], dtype: Dtype
) -> Shaped[np.ndarray, "n d"]:
    """These vectors as they are stored."""
    finite = torch.isfinite(chosen).all(-1)
    if not finite.all():
        bad = int(rows[int((~finite).nonzero()[0])])
        raise ValueError(f"vectors must be finite, but {vectors.row_name(bad)} holds NaN or infinity; remove it")
    return stored(chosen, dtype)


def _batches(
    vectors: Vectors, rows: Int[np.ndarray, " n_rows"]
) -> Iterator[tuple[Int[np.ndarray, " n"], Float[Tensor, "n d"]]]:
    """Those of the given rows, in ascending order, that are in each batch, and their vectors."""
    first = 0
    for batch in vectors:
        own = rows[slice(*np.searchsorted(rows, [first, first + len(batch)]).tolist())]
        yield own, batch[torch.from_numpy(own - first)]
        first += len(batch)


def _copy(vectors: Vectors, rows: np.ndarray, folder: Path, dtype: Dtype) -> None:
    """The given rows, in ascending order, as far as they are not there yet."""
    norms = open_array(folder / NORMS_FILE)
    array, sums = (open_array(folder / VECTORS_HOOK / file) for file in (ARRAY_FILE, CHECKSUMS_FILE))
    end = 0
    with tqdm(total=len(rows), desc="copying vectors", unit="vector", disable=not is_main_process()) as progress:
        for of_batch, chosen in _batches(vectors, rows):
            own = slice(end, end := end + len(chosen))
            progress.update(len(chosen))
            if len(chosen) == 0 or sums[own].all():
                continue
            values = _checked(vectors, of_batch, chosen, dtype)
            norms[own] = torch.linalg.vector_norm(chosen, dim=-1, dtype=torch.float64).float().numpy()[:, None, None]
            array[own] = values[:, None]
            norms.flush()
            array.flush()
            sums[own] = [checksum(parts) for parts in zip(norms[own], array[own], strict=True)]
            sums.flush()
