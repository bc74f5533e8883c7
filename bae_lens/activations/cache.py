"""Activations of a language model on disk, as `cache_writer` writes them: for as many trainings as wanted."""

import os
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bae_lens.activations.batch_order import BLOCK_ROWS, EpochOrder, epochs, order_name
from bae_lens.activations.contexts import Contexts
from bae_lens.activations.fingerprint import tensor_fingerprint
from bae_lens.activations.precision import as_tensor
from bae_lens.distributed.exchange import shard
from bae_lens.distributed.homes import is_first_at_home
from bae_lens.functional.outliers import is_outlier
from bae_lens.saes.saelens_compat import PrefetchingIterator
from bae_lens.saes.standardization import Standardization
from bae_lens.storage import checksum, load_array, read_json, validated, write_json

SOURCE_FILE = "source.json"  # the model, contexts and hooks, by content
COMPLETE_FILE = "complete.json"  # the checksum of all norms, once everything is there
NORMS_FILE = "norms.npy"
ARRAY_FILE = "activations.npy"
CHECKSUMS_FILE = "checksums.npy"  # of each context's norms and activations, 0 where it is missing
STANDARDIZATION_FILE = "standardization.json"  # a `_Measured`


@dataclass(frozen=True)
class _Measured:
    """What a pass over all activations found, in which each had its checksum."""

    size: int
    """Bytes of the array's file."""
    modified: int
    """When it was last changed, in nanoseconds."""
    n_content: int
    """Rows of content."""
    mean: list[float]
    """Their mean, (d_in,)."""
    scale: float
    """To mean squared norm d_in."""


class CachedActivations:
    """The activations of `Contexts` at one hook, on disk, and which of them are content.

    Rows are tokens in order. BOS and other special tokens, padding, and tokens whose norm is over `OUTLIER_NORM` times
    the median of the rest are not content. What is an outlier at any of the hooks cached together is one at all of
    them, so that they have the same rows.
    """

    def __init__(self, folder: Path, hook_name: str) -> None:
        """Opens what `cache_activations` wrote.

        Raises FileNotFoundError if there is no complete cache of this hook, and ValueError for damaged tokens or norms.
        """
        if not ((folder / COMPLETE_FILE).exists() and (folder / hook_name / ARRAY_FILE).exists()):
            raise FileNotFoundError(f"no complete cache of {hook_name} at {folder}; cache_activations makes one")
        self.folder, self.hook_name = folder, hook_name
        self.identity: dict[str, Any] = read_json(folder / SOURCE_FILE)
        self.special_tokens: list[int] = self.identity["special_tokens"]
        self.activations = load_array(folder / hook_name / ARRAY_FILE, mmap_mode="r")
        self.dtype: str = self.identity.get("dtype", "float32")
        """In which they lie there."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch fears for an array that cannot be written to, which nobody will
            self._rows = as_tensor(self.activations, self.dtype).flatten(0, 1)
        self.norms = torch.from_numpy(load_array(folder / NORMS_FILE)).flatten(0, 1)
        self.contexts = Contexts(
            *(torch.from_numpy(load_array(folder / f"{part}.npy")) for part in ("tokens", "document"))
        )
        if tensor_fingerprint(self.contexts.tokens, self.contexts.document) != self.identity["contexts"]:
            raise ValueError(f"tokens.npy or document.npy in {folder} are damaged; remove the folder to start over")
        if checksum([self.norms.numpy()]) != read_json(folder / COMPLETE_FILE)["norms"]:
            self._give_up("its norms")
        self._checksums = load_array(folder / hook_name / CHECKSUMS_FILE)

    @property
    def d_in(self) -> int:
        """Width of the activations; at hook_z that of all heads together."""
        return self.activations.shape[-1]

    @property
    def widths(self) -> dict[str, int]:
        """The hook and its width."""
        return {self.hook_name: self.d_in}

    @cached_property
    def special(self) -> Bool[Tensor, " n_tokens"]:
        """Which rows are special tokens or padding."""
        return self.contexts.is_special(self.special_tokens)

    @cached_property
    def median_norms(self) -> Float[Tensor, " hooks"]:
        """Of the rows that are not special, at each of the hooks cached together."""
        return self.norms[~self.special].median(0).values

    @cached_property
    def relative_norms(self) -> Float[Tensor, " n_tokens"]:
        """Each row's norm in units of the median of those that are not special, where it is largest of all hooks."""
        return (self.norms / self.median_norms).amax(-1)

    @cached_property
    def outliers(self) -> Bool[Tensor, " n_tokens"]:
        """Which rows are outlier tokens."""
        return ~self.special & is_outlier(self.relative_norms, 1.0)

    @cached_property
    def content(self) -> Int[Tensor, " n_content"]:
        """Indices of the rows that are content."""
        return (~self.special & ~self.outliers).nonzero().flatten()

    @property
    def order(self) -> str | None:
        """What batches are drawn from, see `batch_order`; None where that is everything at once."""
        return order_name(self.content, BLOCK_ROWS)

    def rows(self, indices: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        """Raw activations of the given rows, in float32.

        Raises ValueError if they are no longer what was written. Each context is checked when it is first read, unless
        it was before `standardization` was found, and the file has not changed since.
        """
        self._check(np.unique(indices.numpy() // self.contexts.tokens.shape[1]))
        return self._rows.index_select(0, indices).float()

    @cached_property
    def _measured(self) -> _Measured | None:
        """What is known of the activations as they are now; of a file that another version wrote, nothing is."""
        path = self.folder / self.hook_name / STANDARDIZATION_FILE
        with suppress(FileNotFoundError, ValueError):
            measured = validated(_Measured, read_json(path), str(path))
            known = (measured.size, measured.modified, measured.n_content)
            return measured if known == (*self._stamp(), len(self.content)) else None
        return None

    @cached_property
    def _unchecked(self) -> Bool[np.ndarray, " n_contexts"]:
        return np.full(len(self._checksums), self._measured is None)

    def _stamp(self) -> tuple[int, int]:
        status = (self.folder / self.hook_name / ARRAY_FILE).stat()
        return status.st_size, status.st_mtime_ns

    def _check(self, contexts: Int[np.ndarray, " n_contexts"]) -> None:
        contexts = contexts[self._unchecked[contexts]]
        norms = self.norms.unflatten(0, self.contexts.tokens.shape).numpy()
        if damaged := damaged_contexts(contexts, self._checksums, norms, self.activations):
            self._give_up(f"{len(damaged)} contexts")
        self._unchecked[contexts] = False

    def _give_up(self, damaged: str) -> NoReturn:
        """Takes back that the cache is complete, so that `cache_activations` computes again what is damaged."""
        (self.folder / COMPLETE_FILE).unlink(missing_ok=True)
        raise ValueError(f"{damaged} in {self.folder} are damaged; run the same again, which computes them again")

    def batches(self, batch_size: int) -> Iterator[Float[Tensor, "n d_in"]]:
        """The raw activations of all content, in order."""
        for indices in self.content.split(batch_size):
            yield self.rows(indices)

    @cached_property
    def standardization(self) -> Standardization:
        """Mean and scale of the content, accumulated in float64. Raises ValueError for content without variance.

        Sums are of differences from the first row: where activations lie close together far from zero, the difference
        of two large sums of squares would be noise. Found once, and kept in the folder with the size and the time of
        the file, by which it is known that its checksums need not be looked at again.
        """
        if self._measured is not None:
            return Standardization(torch.tensor(self._measured.mean), self._measured.scale)
        stamp = self._stamp()
        if len(self.content) < 2:
            raise ValueError(f"{len(self.content)} tokens of content are too few to standardize; cache more")
        origin = self.rows(self.content[:1]).double()
        total, squares = torch.zeros(self.d_in, dtype=torch.float64), 0.0
        for batch in self.batches(8192):
            difference = batch.double() - origin
            total += difference.sum(0)
            squares += difference.square().sum().item()
        shift = total / len(self.content)
        mean_square = squares / len(self.content) - shift.square().sum().item()
        if not mean_square > 0:
            raise ValueError("the activations are all the same, so there is nothing to learn from them")
        found = Standardization((origin[0] + shift).float(), (self.d_in / mean_square) ** 0.5)
        self._check(np.arange(len(self._unchecked)))
        if is_first_at_home():
            with suppress(OSError):  # a cache that cannot be written to is read again the next time
                path = self.folder / self.hook_name / STANDARDIZATION_FILE
                write_json(path, _Measured(*stamp, len(self.content), found.mean.tolist(), found.scale))
        return found

    def shuffled(
        self, batch_size: int, seed: int, start_step: int = 0, device: str = "cpu"
    ) -> Generator[Float[Tensor, "batch d_in"], None, None]:
        """Endless standardized batches, every epoch in a new order that depends on the seed alone; batches are full.

        The order is that of `batch_order`. Begins at `start_step`, so that a resumed run goes on where it stopped. Of
        several processes, each gets its own rows of these batches. For another device than a CPU, a thread has some of
        them ready; it ends when the generator is closed.
        Raises ValueError if there is less content than a batch.
        """
        if len(self.content) < batch_size:
            raise ValueError(f"a batch of {batch_size} needs as many tokens, but only {len(self.content)} were cached")
        mean, scale = self.standardization.mean.to(device), self.standardization.scale
        kind = torch.device(device).type
        batches = self._gathered(batch_size, seed, start_step, pinned=kind == "cuda")
        with closing(batches if kind == "cpu" else PrefetchingIterator(batches)) as ready:
            for batch in ready:
                yield batch.to(device, non_blocking=True).float().sub_(mean).mul_(scale)

    def _gathered(
        self, batch_size: int, seed: int, start_step: int, pinned: bool
    ) -> Generator[Float[Tensor, "own d_in"], None, None]:
        """Raw batches as they are on the disk, this process' rows of them."""
        for epoch, first in epochs(len(self.content) // batch_size, start_step):
            order = EpochOrder(self.content, seed, epoch, BLOCK_ROWS)
            over, held = first * batch_size, self.content[:0]
            for window, blocks in enumerate(order.windows):
                if over >= order.size(window):
                    over -= order.size(window)
                    continue
                self._ask_for([*blocks, *(order.windows[window + 1] if window + 1 < len(order.windows) else [])])
                self._check_blocks(blocks)
                *full, held = torch.cat([held, order.rows(window)[over:]]).split(batch_size)
                over = 0
                for rows in full:
                    yield self._gather(shard(rows), pinned)
            if len(held) == batch_size:
                yield self._gather(shard(held), pinned)

    def _gather(self, rows: Int[Tensor, " n"], pinned: bool) -> Float[Tensor, "n d_in"]:
        batch = torch.empty(len(rows), self.d_in, dtype=self._rows.dtype, pin_memory=pinned)
        return torch.index_select(self._rows, 0, rows, out=batch)

    def _check_blocks(self, blocks: list[int]) -> None:
        rows = BLOCK_ROWS * np.array(blocks)[:, None] + np.arange(BLOCK_ROWS)
        self._check(np.unique(rows.clip(max=len(self._rows) - 1) // self.contexts.tokens.shape[1]))

    def _ask_for(self, blocks: list[int]) -> None:
        """Has the disk read these blocks in the order of the file, while those before are looked at row by row."""
        if not hasattr(os, "posix_fadvise"):
            return
        assert isinstance(self.activations, np.memmap)
        n_bytes, begin = BLOCK_ROWS * self.d_in * self.activations.itemsize, self.activations.offset
        with (self.folder / self.hook_name / ARRAY_FILE).open("rb") as file:
            for block in blocks:
                os.posix_fadvise(file.fileno(), begin + block * n_bytes, n_bytes, os.POSIX_FADV_WILLNEED)


def damaged_contexts(
    contexts: Iterable[Any],
    sums: Int[np.ndarray, " n"],
    norms: Float[np.ndarray, "n size hooks"],
    activations: np.ndarray,
) -> list[int]:
    """Those of the given contexts that were written with another checksum; 0 stands for one that was not written."""
    return [int(i) for i in contexts if sums[i] != checksum([norms[i], activations[i]])]
