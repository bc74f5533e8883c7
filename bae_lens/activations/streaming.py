"""Activations that are computed when training needs them: for a text whose activations do not fit on the disk.

Batches are those of a cache, in the order of `batch_order`: of a window of contexts, the model computes what a cache
would read. So a training that was interrupted goes on with the batches that it has not seen. (SAELens'
`ActivationsStore` streams too, but does not save the buffer in which it mixes: a resumed training sees other batches.)
"""

import warnings
from collections.abc import Generator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.activations.batch_order import BLOCK_ROWS, EpochOrder, order_name
from bae_lens.activations.cache import ARRAY_FILE, CHECKSUMS_FILE, NORMS_FILE, SOURCE_FILE, CachedActivations
from bae_lens.activations.contexts import Contexts
from bae_lens.activations.fingerprint import model_fingerprint, tensor_fingerprint
from bae_lens.activations.forward import norms_at, run_at_hooks
from bae_lens.activations.paired import PairedActivations
from bae_lens.activations.precision import STORED, as_tensor, stored, torch_dtype
from bae_lens.distributed.connection import is_main_process, n_processes, process_index
from bae_lens.distributed.exchange import barrier, gather_rows, redistribute, shard, sharers
from bae_lens.distributed.homes import is_first_at_home
from bae_lens.file_exchange import bring_rows
from bae_lens.functional.outliers import is_outlier
from bae_lens.saes.standardization import PairStandardization, Standardization
from bae_lens.storage import checksum, claim, make_array, open_array, reserve_rows

NORM_CHECKSUMS_FILE = "norm_checksums.npy"  # of each context's norms, 0 where they are not known yet

KeepActivations = Literal["all", "own", "none"]


class StreamedActivations:
    """The activations of `Contexts` at one hook, or the two of a transcoder, computed a window of training at a time.

    What takes all activations at once is that of `sample`, a cache of some of the contexts: mean and scale, and the
    median norm by which outlier tokens are told. Norms of what was computed stay in `folder`, 4 bytes a token and hook:
    by them a training that goes on knows how many rows the windows before had. If `keeps_own`, so do the activations,
    in a file that takes room on the disk for what this machine computes, and later epochs read them; what is no longer
    what was written is computed again, with a warning. Otherwise the model runs over every context once an epoch.

    Several processes share the contexts of a window, and send one another the rows of their batches. A process has its
    share of a window in memory, of 131,072 tokens at most in all, or 64 contexts if these are longer than 2,048; twice
    while a window begins, and three times while rows are sent. It also has the tokens and norms of the whole text: 20
    bytes a token at one hook. No thread has batches ready: the model's passes take turns with the training's steps. A
    training that is killed while a window is computed loses that window's pass. One at a time may use the folder.
    """

    def __init__(
        self,
        model: Any,
        contexts: Contexts,
        sample: CachedActivations | PairedActivations,
        folder: Path,
        *,
        keeps_own: bool = False,
    ) -> None:
        """All processes together make or open the folder.

        Raises ValueError for a sample of another model, for a folder that holds other activations, and OSError for a
        disk without room.
        """
        self.model, self.all_contexts, self.sample, self.folder = model, contexts, sample, folder
        self.hook_name, self.widths = sample.hook_name, sample.widths
        self._cached = sample.source if isinstance(sample, PairedActivations) else sample
        known = self._cached.identity
        self.identity: dict[str, Any] = {
            **known,
            "contexts": tensor_fingerprint(contexts.tokens, contexts.document),
            "sample": known["contexts"],
        }
        if (now := model_fingerprint(model)) != known.get("model"):
            raise ValueError(
                f"the sample must be of the model that runs, but {self._cached.folder} is of one with weights "
                f"{known.get('model')}, got {now}; cache a sample with this model"
            )
        self._hook_names: list[str] = known["hook_names"]
        n, size = contexts.tokens.shape
        self._block_contexts = max(1, BLOCK_ROWS // size)
        self._ordinary = (~contexts.is_special(self._cached.special_tokens)).nonzero().flatten()
        folder.mkdir(parents=True, exist_ok=True)
        claim(folder / SOURCE_FILE, self.identity)
        if is_first_at_home():
            make_array(folder / NORMS_FILE, (n, size, len(self._hook_names)))
            make_array(folder / NORM_CHECKSUMS_FILE, (n,), np.int64)
            if keeps_own:
                width = sum(self.widths.values())
                make_array(folder / ARRAY_FILE, (n, size, width), STORED[self._cached.dtype], sparse=True)
                make_array(folder / CHECKSUMS_FILE, (n,), np.int64)
            self._forget_damaged_norms()
        barrier()
        bring_rows(list(self._norm_files()), self._norm_files()[1] != 0, self._block_contexts)
        norms, sums = self._norm_files()
        self._norms, self._seen = np.array(norms), torch.from_numpy(np.array(sums != 0))
        self._own = None
        if keeps_own:
            blocks = range(-(-n // self._block_contexts))
            reserve_rows(folder / ARRAY_FILE, map(self._contexts_of, blocks[process_index() :: n_processes()]))
            self._own = (open_array(folder / ARRAY_FILE), open_array(folder / CHECKSUMS_FILE))

    @property
    def standardization(self) -> Standardization | PairStandardization:
        """That of the sample."""
        return self.sample.standardization

    @property
    def sample_tokens(self) -> int:
        """Tokens of content in the sample."""
        return len(self._cached.content)

    @property
    def order(self) -> str | None:
        """What batches are drawn from, see `batch_order`; None where that is everything at once."""
        return order_name(self._ordinary, self._block_rows)

    @property
    def contexts(self) -> Contexts:
        """Those over which the model ran so far, to which what follows refers."""
        return Contexts(self.all_contexts.tokens[self._seen], self.all_contexts.document[self._seen])

    @property
    def special(self) -> Bool[Tensor, " n_tokens"]:
        """Which rows are special tokens or padding."""
        return self.contexts.is_special(self._cached.special_tokens)

    @property
    def relative_norms(self) -> Float[Tensor, " n_tokens"]:
        """Each row's norm in units of the sample's median, where it is largest of all hooks."""
        return self._relative(torch.from_numpy(self._norms[self._seen.numpy()]).flatten(0, 1))

    @property
    def outliers(self) -> Bool[Tensor, " n_tokens"]:
        """Which rows are outlier tokens."""
        return ~self.special & is_outlier(self.relative_norms, 1.0)

    @property
    def content(self) -> Int[Tensor, " n_content"]:
        """Indices of the rows that are content."""
        return (~self.special & ~self.outliers).nonzero().flatten()

    def shuffled(
        self, batch_size: int, seed: int, start_step: int = 0, device: str = "cpu"
    ) -> Generator[Float[Tensor, "batch _"], None, None]:
        """The batches of `CachedActivations.shuffled` or, at two hooks, those of `PairedActivations.shuffled`.

        The tokens are the same, in the same order; blocks are of whole contexts, which makes another order of more than
        a window of contexts whose length does not divide `BLOCK_ROWS`.
        Raises ValueError if there is less content than a batch.
        """
        found = self.standardization
        sides = (found.source, found.target) if isinstance(found, PairStandardization) else (found,)
        mean = torch.cat([side.mean for side in sides]).to(device)
        scale = torch.cat([torch.full_like(side.mean, side.scale) for side in sides]).to(device)
        for batch in self._batches(batch_size, seed, start_step):
            yield (batch.to(device).float() - mean) * scale

    def _batches(self, batch_size: int, seed: int, start_step: int) -> Generator[Float[Tensor, "own _"], None, None]:
        """Rows of each batch, those of this process, as they are stored."""
        begin, over = 0, start_step * batch_size  # rows of an epoch that were seen before
        if self._seen.all() and (per_epoch := len(self.content) // batch_size):
            begin, first = divmod(start_step, per_epoch)
            over = first * batch_size
        own_size = len(shard(torch.arange(batch_size)))
        for epoch in count(begin):
            order = EpochOrder(self._ordinary, seed, epoch, self._block_rows)
            n, step, held = 0, over // batch_size, torch.empty(0, sum(self.widths.values()), dtype=self._dtype)
            for window in range(len(order.windows)):
                known = self._content_of(order, window)
                if known is None or n + len(known) > over:
                    own, known = self._own_rows(order, window, batch_size, n, over)
                    held = torch.cat([held, own])
                    del own
                n += len(known)
                while (step + 1) * batch_size <= n:
                    yield held[:own_size].clone()  # which holds no more of the window than its rows
                    step, held = step + 1, held[own_size:]
                held = held.clone()
            if n < batch_size:
                raise ValueError(f"a batch of {batch_size} needs as many tokens, but only {n} are content; add text")
            over = max(0, over - n // batch_size * batch_size)

    def _own_rows(
        self, order: EpochOrder, window: int, batch_size: int, n_before: int, over: int
    ) -> tuple[Float[Tensor, "own _"], Int[Tensor, " n"]]:
        """What this process gets of a window, before which an epoch had so many rows, and all its rows in order.

        The first `over` rows of the epoch were seen before.
        """
        blocks = order.windows[window]
        values = self._values(blocks)
        known = self._content_of(order, window)
        assert known is not None
        first = min(max(over - n_before, 0), len(known))
        rows = order.mixed(window, known)[first:]
        receiver = sharers(batch_size)[(n_before + first + torch.arange(len(rows))) % batch_size]
        return redistribute(values, *self._whereabouts(rows, blocks), receiver), known

    def _content_of(self, order: EpochOrder, window: int) -> Int[Tensor, " n"] | None:
        """The rows of a window that are content; None if the model did not run over all of it yet."""
        rows = order.in_order(window)
        if not self._seen[rows // self.all_contexts.tokens.shape[1]].all():
            return None
        norms = torch.from_numpy(self._norms).flatten(0, 1)[rows]
        return rows[~is_outlier(self._relative(norms), 1.0)]

    def _relative(self, norms: Float[Tensor, "n hooks"]) -> Float[Tensor, " n"]:
        return (norms / self._cached.median_norms).amax(-1)

    @property
    def _block_rows(self) -> int:
        return self._block_contexts * self.all_contexts.tokens.shape[1]

    @property
    def _dtype(self) -> torch.dtype:
        return torch_dtype(self._cached.dtype)

    def _contexts_of(self, block: int) -> slice:
        start = block * self._block_contexts
        return slice(start, min(start + self._block_contexts, len(self.all_contexts.tokens)))

    def _holders(self, blocks: Sequence[int]) -> list[int]:
        """Which process computes each block of a window: as many each or, if it keeps them, always the same."""
        return [(place if self._own is None else block) % n_processes() for place, block in enumerate(blocks)]

    def _whereabouts(
        self, rows: Int[Tensor, " n"], blocks: Sequence[int]
    ) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Which process has each row of a window among its `_values`, and where there."""
        holders, starts, ends = self._holders(blocks), [], [0] * n_processes()
        for block, holder in zip(blocks, holders, strict=True):
            starts.append(ends[holder])
            contexts = self._contexts_of(block)
            ends[holder] += (contexts.stop - contexts.start) * self.all_contexts.tokens.shape[1]
        which = torch.searchsorted(torch.tensor(blocks), rows // self._block_rows)
        return torch.tensor(holders)[which], torch.tensor(starts)[which] + rows % self._block_rows

    def _values(self, blocks: Sequence[int]) -> Float[Tensor, "n _"]:
        """All rows of those blocks of a window that are this process', after which the norms of all are known."""
        size, holders = self.all_contexts.tokens.shape[1], self._holders(blocks)
        shares: list[list[slice]] = [[] for _ in range(n_processes())]
        for block, holder in zip(blocks, holders, strict=True):
            shares[holder].append(self._contexts_of(block))
        own = shares[process_index()]
        n = sum(contexts.stop - contexts.start for contexts in own)
        values, end = torch.empty(n * size, sum(self.widths.values()), dtype=self._dtype), 0
        with tqdm(total=n, desc="activations", unit="context", leave=False, disable=not is_main_process()) as progress:
            for contexts in own:
                computed = self._at(contexts).flatten(0, 1)
                values[end : end + len(computed)] = computed
                end += len(computed)
                progress.update(contexts.stop - contexts.start)
        self._share_norms([[each for each in share if not self._seen[each].all()] for share in shares])
        return values

    def _at(self, contexts: slice) -> Float[Tensor, "n size _"]:
        """The activations of a block as they are stored; norms that are not known yet are noted."""
        seen = bool(self._seen[contexts].all())
        if seen and (kept := self._kept(contexts)) is not None:
            return kept
        try:
            computed = run_at_hooks(self.model, self.all_contexts.tokens[contexts].clamp(min=0), self._hook_names)
            values = np.concatenate([stored(computed[name], self._cached.dtype) for name in self.widths], axis=-1)
        except ValueError as error:
            raise ValueError(f"contexts {contexts.start} to {contexts.stop - 1}: {error}") from error
        if not seen:
            self._norms[contexts] = norms_at(computed, self._hook_names).numpy()
        if self._own is not None:
            activations, sums = self._own
            activations[contexts] = values
            activations.flush()
            sums[contexts] = [checksum([of_context]) for of_context in values]
            sums.flush()
        return as_tensor(values, self._cached.dtype)

    def _kept(self, contexts: slice) -> Float[Tensor, "n size _"] | None:
        """What is on the disk of a block; None if it is not all there, or is damaged, of which a warning tells."""
        if self._own is None or not self._own[1][contexts].all():
            return None
        values, sums = np.array(self._own[0][contexts]), self._own[1][contexts]
        damaged = sum(checksum([of_context]) != known for of_context, known in zip(values, sums, strict=True))
        if damaged:
            warnings.warn(f"{damaged} contexts in {self.folder} are damaged and computed again", stacklevel=2)
            return None
        return as_tensor(values, self._cached.dtype)

    def _share_norms(self, new: Sequence[Sequence[slice]]) -> None:
        """Norms that each process found in these contexts, given by process, are told to all, and written down."""
        indices = [[i for contexts in share for i in range(contexts.start, contexts.stop)] for share in new]
        if not any(indices):
            return
        norms = gather_rows(torch.from_numpy(self._norms[indices[process_index()]]))
        everyones = [i for share in indices for i in share]
        self._norms[everyones] = norms.numpy()
        self._seen[everyones] = True
        if is_first_at_home():
            on_disk, sums = self._norm_files()
            on_disk[everyones] = self._norms[everyones]
            on_disk.flush()
            sums[everyones] = [checksum([self._norms[i]]) for i in everyones]
            sums.flush()

    def _norm_files(self) -> tuple[np.memmap, np.memmap]:
        return open_array(self.folder / NORMS_FILE), open_array(self.folder / NORM_CHECKSUMS_FILE)

    def _forget_damaged_norms(self) -> None:
        norms, sums = self._norm_files()
        damaged = [i for i in sums.nonzero()[0] if sums[i] != checksum([norms[i]])]
        if damaged:
            sums[damaged] = 0
            sums.flush()
            warnings.warn(
                f"the norms of {len(damaged)} contexts in {self.folder} are damaged and found again", stacklevel=3
            )
