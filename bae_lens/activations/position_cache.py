"""Activations at chosen hooks and positions of many windows of text, on disk, from one pass of the model."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.activations.cache import ARRAY_FILE, CHECKSUMS_FILE, COMPLETE_FILE, SOURCE_FILE
from bae_lens.activations.fingerprint import model_fingerprint, tensor_fingerprint
from bae_lens.activations.forward import hook_widths, run_at_hooks
from bae_lens.activations.models import resolve_hook
from bae_lens.activations.sources import texts
from bae_lens.functional.outliers import is_outlier
from bae_lens.storage import (
    checksum,
    claim,
    load_array,
    locked,
    make_array,
    open_array,
    read_json,
    save_array,
    write_json,
)

TOKENS_AT_A_TIME = 1024  # through the model; more are slower where its activations leave the cache
DOCUMENTS_FILE = "documents.npy"
WINDOWS_PER_DOCUMENT = 8  # at most, so that a few long documents do not make the sample


@dataclass(frozen=True)
class Windows:
    """Token sequences of one length, whose positions mean the same in each."""

    tokens: Int[Tensor, "n_windows length"]
    """Token ids."""
    document: Int[Tensor, " n_windows"]
    """A number for the document that each window is from."""
    starts_with_bos: bool = False
    """Whether the first column is BOS. Positions count the tokens after it from 1; BOS itself is position 0."""
    too_short: int = 0
    """Documents that were dropped because they are shorter than a window."""

    def column(self, position: int) -> int:
        """Of `tokens`, for a position. Raises ValueError for one beyond the windows."""
        length = self.tokens.shape[1] - self.starts_with_bos
        if not 1 <= position <= length:
            raise ValueError(f"positions must lie between 1 and the windows' {length} tokens, got {position}")
        return position - 1 + self.starts_with_bos


def random_windows(
    tokenizer: Any,
    documents: Iterable[Any],
    length: int,
    n_windows: int,
    seed: int = 0,
    per_document: int = WINDOWS_PER_DOCUMENT,
) -> Windows:
    """Windows of `length` tokens from random places of documents (rows with a column `text`), in their order.

    Documents begin alike, so windows from their beginnings would hold few different tokens at position 1. Each window
    begins with BOS, where the tokenizer has one: the model's first token gathers attention, and its state is that of no
    content. Windows of a document do not overlap, and there are at most `per_document`.

    Raises ValueError if the documents give fewer windows, and for a length or number of windows below 1.
    """
    if length < 1:
        raise ValueError(f"windows must be at least 1 token long, got {length}")
    if n_windows < 1 or per_document < 1:
        raise ValueError(f"ask for at least 1 window, and 1 a document, got {n_windows} and {per_document}")
    rng = np.random.default_rng(seed)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    windows: list[list[int]] = []
    origin: list[int] = []
    too_short = 0
    with tqdm(total=n_windows, desc="choosing windows", unit="window") as progress:
        for number, text in enumerate(texts(documents)):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            room = len(ids) // length
            too_short += room == 0
            count = min(room, per_document, n_windows - len(windows))
            # Gaps of random sizes before non-overlapping windows at random places.
            gaps = np.sort(rng.integers(0, len(ids) - count * length + 1, size=count))
            windows += [bos + ids[gap + i * length : gap + (i + 1) * length] for i, gap in enumerate(gaps)]
            origin += [number] * count
            progress.update(count)
            if len(windows) == n_windows:
                return Windows(torch.tensor(windows), torch.tensor(origin), bool(bos), too_short)
    raise ValueError(
        f"the text gives {len(windows)} of {n_windows} windows of {length} tokens, at most {per_document} a document "
        f"({too_short} documents are shorter); add text, or ask for fewer or shorter windows, or more a document"
    )


class PositionActivations:
    """What `collect` wrote: `activations` (hooks, positions, windows, d_in) in float32, memory-mapped.

    A window with an outlier (`is_outlier`, by the median of a hook and position) at any hook and position is left out
    everywhere, so that all entropies are of the same windows and no BAE sees little else than a few huge vectors.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the folder.

        Raises FileNotFoundError if it is missing or not complete, and ValueError for damaged numbers of documents.
        """
        if not _is_complete(folder):
            raise FileNotFoundError(f"no complete activations at {folder}; collect makes them")
        self.folder = folder
        self.identity: dict[str, Any] = read_json(folder / SOURCE_FILE)
        self.hook_names: list[str] = self.identity["hook_names"]
        self.positions: list[int] = self.identity["positions"]
        self.all_documents = torch.from_numpy(load_array(folder / DOCUMENTS_FILE))
        self.activations = load_array(folder / ARRAY_FILE, mmap_mode="r")
        if checksum([self.all_documents.numpy()]) != read_json(folder / COMPLETE_FILE)["documents"]:
            raise ValueError(f"{DOCUMENTS_FILE} in {folder} is damaged; remove the folder to start over")

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.activations.shape[-1]

    @cached_property
    def kept(self) -> Int[Tensor, " n_kept"]:
        """Indices of the windows without an outlier.

        Raises ValueError if the activations are no longer what was written, and `collect` then computes them again.
        """
        if damaged := _damaged(self.activations, load_array(self.folder / CHECKSUMS_FILE)):
            (self.folder / COMPLETE_FILE).unlink(missing_ok=True)
            raise ValueError(
                f"{len(damaged)} windows in {self.folder} are damaged; run the same again, which computes them again"
            )
        outliers = torch.zeros(len(self.all_documents), dtype=torch.bool)
        for hook, position in np.ndindex(*self.activations.shape[:2]):
            norms = torch.from_numpy(np.linalg.norm(self.activations[hook, position].astype(np.float64), axis=-1))
            outliers |= is_outlier(norms, norms.median())
        return (~outliers).nonzero().flatten()

    @property
    def documents(self) -> Int[Tensor, " n_kept"]:
        """A number for the document of each window without an outlier."""
        return self.all_documents[self.kept]

    def vectors(self, pairs: Sequence[tuple[int, int]]) -> Float[Tensor, "pairs n_kept d_in"]:
        """Activations of (hook, position) pairs, by their indices."""
        kept = self.kept.numpy()
        return torch.from_numpy(np.stack([self.activations[hook, position][kept] for hook, position in pairs]))


@torch.no_grad()
def collect(
    model: Any,
    windows: Windows,
    hook_names: Sequence[str],
    positions: Sequence[int],
    folder: Path,
    batch_size: int | None = None,
) -> PositionActivations:
    """Runs the model over the windows, up to the deepest hook's layer, and keeps the activations at the positions.

    `batch_size` is in windows; by default they hold about a thousand tokens.
    An interrupted pass goes on after its last complete batch; a complete one is opened as it is. Windows whose
    activations are no longer what was written are computed again, and a warning gives their number.
    Raises ValueError for a hook the model does not have or that is not one vector a token, hooks of different widths, a
    position beyond the windows or windows beyond the model's context, activations that are not finite, and a folder
    that holds activations of something else or at which another process is at work; OSError for a full disk.
    """
    hooks = [resolve_hook(model, name) for name in hook_names]
    columns = [windows.column(position) for position in positions]
    if not hooks or not columns:
        raise ValueError("choose at least one hook and one position")
    widths = hook_widths(model, hooks)
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{hook} is {width} wide" for hook, width in widths.items())
        raise ValueError(f"hooks must be equally wide, but {listed}; look at them one after the other")
    length = max(columns) + 1
    if length > model.cfg.n_ctx:
        raise ValueError(f"position {max(positions)} lies beyond the model's context of {model.cfg.n_ctx} tokens")
    tokens = windows.tokens[:, :length]
    source = {
        "model": model_fingerprint(model),
        "windows": tensor_fingerprint(windows.tokens, windows.document),
        "hook_names": hooks,
        "positions": list(positions),
    }
    with locked(folder):
        claim(folder / SOURCE_FILE, source)
        if not _is_complete(folder):
            save_array(folder / DOCUMENTS_FILE, windows.document)
            make_array(folder / ARRAY_FILE, (len(hooks), len(columns), len(tokens), widths[hooks[0]]))
            make_array(folder / CHECKSUMS_FILE, (len(tokens),), np.int64)
            _forget_damaged(folder)
            _collect_missing(model, tokens, hooks, columns, folder, batch_size or max(1, TOKENS_AT_A_TIME // length))
            write_json(folder / COMPLETE_FILE, {"documents": checksum([windows.document.numpy()])})
    return PositionActivations(folder)


def _collect_missing(
    model: Any,
    tokens: Int[Tensor, "n_windows length"],
    hooks: list[str],
    columns: list[int],
    folder: Path,
    batch_size: int,
) -> None:
    array, sums = open_array(folder / ARRAY_FILE), open_array(folder / CHECKSUMS_FILE)
    n = len(tokens)
    missing = [rows for start in range(0, n, batch_size) if not sums[rows := slice(start, start + batch_size)].all()]
    with tqdm(total=n, initial=int((sums != 0).sum()), desc="activations by position", unit="window") as progress:
        for rows in missing:
            batch = run_at_hooks(model, tokens[rows], hooks)
            for index, hook in enumerate(hooks):
                array[index, :, rows] = batch[hook][:, columns].transpose(0, 1).numpy()
            array.flush()
            sums[rows] = [checksum([array[:, :, window]]) for window in range(rows.start, min(rows.stop, n))]
            sums.flush()
            progress.update(int((sums != 0).sum()) - progress.n)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).exists() for name in (COMPLETE_FILE, ARRAY_FILE, CHECKSUMS_FILE))


def _forget_damaged(folder: Path) -> None:
    """Windows whose activations do not have the checksum that they were written with count as missing."""
    array, sums = load_array(folder / ARRAY_FILE, mmap_mode="r"), open_array(folder / CHECKSUMS_FILE)
    damaged = _damaged(array, sums)
    sums[damaged] = 0
    sums.flush()
    if damaged:
        warnings.warn(f"{len(damaged)} of {len(sums)} windows in {folder} are damaged and computed again", stacklevel=4)


def _damaged(array: Float[np.ndarray, "hooks positions n d_in"], sums: Int[np.ndarray, " n"]) -> list[int]:
    return [int(window) for window in sums.nonzero()[0] if sums[window] != checksum([array[:, :, window]])]
