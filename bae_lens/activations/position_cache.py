"""Activations at chosen hooks and positions of many windows of text, on disk, from one pass of the model."""

import hashlib
import json
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

from bae_lens.activations.forward import hook_widths, run_at_hooks
from bae_lens.activations.sources import TEXT_COLUMN, resolve_hook
from bae_lens.storage import read_json, write_text

OUTLIER_NORM = 10.0  # times the median norm of a hook and position: such states would be all that a BAE sees
TOKENS_AT_A_TIME = 1024  # through the model; more are slower where its activations leave the cache
WINDOWS_PER_DOCUMENT = 8  # at most, so that a few long documents do not make the sample


@dataclass(frozen=True)
class Windows:
    """Token sequences of one length, whose positions mean the same in each."""

    tokens: Int[Tensor, "n_windows length"]
    """Token ids."""
    starts_with_bos: bool = False
    """Whether the first column is BOS. Positions count the tokens after it from 1; BOS itself is position 0."""
    too_short: int = 0
    """Documents that were dropped because they are shorter than a window."""
    documents: Int[Tensor, " n_windows"] | None = None
    """A number for the document that each window is from; None if every window is a document of its own."""

    @property
    def document(self) -> Int[Tensor, " n_windows"]:
        """A number for the document that each window is from."""
        return torch.arange(len(self.tokens)) if self.documents is None else self.documents

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
        for number, document in enumerate(documents):
            ids = tokenizer(document[TEXT_COLUMN], add_special_tokens=False, verbose=False)["input_ids"]
            room = len(ids) // length
            too_short += room == 0
            count = min(room, per_document, n_windows - len(windows))
            # Gaps of random sizes before non-overlapping windows at random places.
            gaps = np.sort(rng.integers(0, len(ids) - count * length + 1, size=count))
            windows += [bos + ids[gap + i * length : gap + (i + 1) * length] for i, gap in enumerate(gaps)]
            origin += [number] * count
            progress.update(count)
            if len(windows) == n_windows:
                return Windows(torch.tensor(windows), bool(bos), too_short, torch.tensor(origin))
    raise ValueError(
        f"the text gives {len(windows)} of {n_windows} windows of {length} tokens, at most {per_document} a document "
        f"({too_short} documents are shorter); add text, or ask for fewer or shorter windows, or more a document"
    )


class PositionStates:
    """What `collect` wrote: `states` (hooks, positions, windows, d_in) in float32, memory-mapped.

    Windows with a state of outlier norm, over 10 times the median, at any hook and position are left out everywhere, so
    that all entropies are of the same windows.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the folder. Raises FileNotFoundError if it is missing or not complete."""
        if not (folder / "complete.json").exists():
            raise FileNotFoundError(f"no complete activations at {folder}")
        source = read_json(folder / "complete.json")
        self.hook_names: list[str] = source["hook_names"]
        self.positions: list[int] = source["positions"]
        self.all_documents = torch.tensor(source["documents"])
        self.states = np.load(folder / "states.npy", mmap_mode="r")

    @cached_property
    def kept(self) -> Int[Tensor, " n_kept"]:
        """Indices of the windows without a outliers state."""
        outliers = np.zeros(self.states.shape[2], dtype=bool)
        for hook, position in np.ndindex(*self.states.shape[:2]):
            norms = np.linalg.norm(self.states[hook, position], axis=-1)
            outliers |= norms > OUTLIER_NORM * np.median(norms)
        return torch.from_numpy((~outliers).nonzero()[0])

    @property
    def documents(self) -> Int[Tensor, " n_kept"]:
        """A number for the document of each window without a outliers state."""
        return self.all_documents[self.kept]

    def vectors(self, pairs: Sequence[tuple[int, int]]) -> Float[Tensor, "pairs n_kept d_in"]:
        """Activations of (hook, position) pairs, by their indices."""
        kept = self.kept.numpy()
        return torch.from_numpy(np.stack([self.states[hook, position][kept] for hook, position in pairs]))


@torch.no_grad()
def collect(
    model: Any,
    windows: Windows,
    hook_names: Sequence[str],
    positions: Sequence[int],
    folder: Path,
    batch_size: int | None = None,
) -> PositionStates:
    """Runs the model over the windows, up to the deepest hook's layer, and keeps the activations at the positions.

    `batch_size` is in windows; by default they hold about a thousand tokens.
    An interrupted pass goes on after its last complete batch; a complete one is opened as it is.
    Raises ValueError for a hook the model does not have or that is not one vector a token, hooks of different widths, a
    position beyond the windows or windows beyond the model's context, activations that are not finite, and a folder
    that holds activations of something else.
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
        "model": model.cfg.model_name,
        "hook_names": hooks,
        "positions": list(positions),
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "documents": windows.document.tolist(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "source.json").exists():
        write_text(folder / "source.json", json.dumps(source))
    if read_json(folder / "source.json") != source:
        raise ValueError(f"{folder} holds activations of another model, hook, position or text; choose another folder")
    if not (folder / "complete.json").exists():
        _collect_missing(model, tokens, hooks, columns, folder, batch_size or max(1, TOKENS_AT_A_TIME // length))
        write_text(folder / "complete.json", json.dumps(source))
    return PositionStates(folder)


def _collect_missing(
    model: Any,
    tokens: Int[Tensor, "n_windows length"],
    hooks: list[str],
    columns: list[int],
    folder: Path,
    batch_size: int,
) -> None:
    progress_file = folder / "progress.json"
    done = read_json(progress_file)["windows"] if progress_file.exists() else 0
    states = np.load(folder / "states.npy", mmap_mode="r+") if done else None
    with tqdm(total=len(tokens), initial=done, desc="activations by position", unit="window") as progress:
        for start in range(done, len(tokens), batch_size):
            batch = _at_positions(model, tokens[start : start + batch_size], hooks, columns)
            if states is None:
                shape = (len(hooks), len(columns), len(tokens), batch.shape[-1])
                states = np.lib.format.open_memmap(folder / "states.npy", mode="w+", dtype=np.float32, shape=shape)
            states[:, :, start : start + batch.shape[2]] = batch.numpy()
            states.flush()
            write_text(progress_file, json.dumps({"windows": start + batch.shape[2]}))
            progress.update(batch.shape[2])


def _at_positions(
    model: Any, tokens: Int[Tensor, "n length"], hooks: list[str], columns: list[int]
) -> Float[Tensor, "hooks positions n d_in"]:
    activations = run_at_hooks(model, tokens, hooks)
    return torch.stack([activations[hook][:, columns] for hook in hooks]).transpose(1, 2).contiguous()
