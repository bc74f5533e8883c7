"""In which order training goes through rows: at random, and as fast as a disk reads, or a model computes, in order.

Rows of a cache lie on the disk in blocks of `BLOCK_ROWS`; a stream computes them by blocks of whole contexts. In
every epoch the blocks are drawn anew into windows of `WINDOW_BLOCKS`, read in the order of the file, and the rows of a
window are mixed. So a row can come at any place of an epoch, beside any other, but a batch holds rows of one window, or
of the end of one and the beginning of the next: from 64 random places, 131,072 rows in all. Up to so many rows, all are
mixed with all.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

BLOCK_ROWS = 2048  # some megabytes, beside which finding their place on a disk takes little time
WINDOW_BLOCKS = 64
# Windows' seeds end in 0, blocks' in 1. Zeros at the end change no seed, so the first window is mixed as all rows were
# before there were windows.
BLOCK_SEED = 1


class EpochOrder:
    """The windows of one epoch over the rows `content`, which are in the order of the file."""

    def __init__(self, content: Int[Tensor, " n"], seed: int, epoch: int, block_rows: int) -> None:
        self._content, self._seeds = content, (seed, epoch)
        n_blocks = _n_blocks(content, block_rows)
        self._bounds = torch.searchsorted(content, block_rows * torch.arange(n_blocks + 1)).tolist()
        blocks = torch.randperm(n_blocks, generator=self._generator(0, BLOCK_SEED))
        self.windows = [sorted(window.tolist()) for window in blocks.split(WINDOW_BLOCKS)]
        """The numbers of the blocks of each."""

    def size(self, window: int) -> int:
        """How many rows a window has."""
        return sum(self._bounds[block + 1] - self._bounds[block] for block in self.windows[window])

    def rows(self, window: int) -> Int[Tensor, " n"]:
        """The rows of a window, mixed."""
        return self.mixed(window, self.in_order(window))

    def in_order(self, window: int) -> Int[Tensor, " n"]:
        """The rows of a window as they lie in the file."""
        return torch.cat([self._content[slice(*self._bounds[block : block + 2])] for block in self.windows[window]])

    def mixed(self, window: int, rows: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Rows of a window, all or some of them, in the order in which they come."""
        return rows[torch.randperm(len(rows), generator=self._generator(window, 0))]

    def _generator(self, *own: int) -> torch.Generator:
        state = np.random.SeedSequence([*self._seeds, *own]).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))


def order_name(content: Int[Tensor, " n"], block_rows: int) -> str | None:
    """What batches are drawn from; None where that is everything at once."""
    several = _n_blocks(content, block_rows) > WINDOW_BLOCKS
    return f"windows of {WINDOW_BLOCKS} blocks of {block_rows} rows" if several else None


def _n_blocks(content: Int[Tensor, " n"], block_rows: int) -> int:
    """Up to the one that holds the last row."""
    return int(content[-1]) // block_rows + 1


def epochs(per_epoch: int, start_step: int) -> Iterator[tuple[int, int]]:
    """Endlessly the numbers of epochs of so many steps, with the step in which each begins: 0 but for the first."""
    epoch, first = divmod(start_step, per_epoch)
    while True:
        yield epoch, first
        epoch, first = epoch + 1, 0
