"""Cached activations at two hooks, row by row, as a transcoder is trained on them."""

from collections.abc import Generator
from contextlib import closing

import torch
from jaxtyping import Float
from torch import Tensor

from bae_lens.activations.cache import CachedActivations
from bae_lens.saes.standardization import PairStandardization


class PairedActivations:
    """Activations at two hooks of one cache: what a transcoder reads, and what it should write for that token."""

    def __init__(self, source: CachedActivations, target: CachedActivations) -> None:
        """Raises ValueError for activations of two caches, whose rows are not the same tokens."""
        if source.folder != target.folder:
            raise ValueError(
                f"a transcoder needs both hooks from one cache, got {source.folder} and {target.folder}; "
                "cache them together"
            )
        self.source, self.target = source, target
        self.hook_name, self.hook_name_out = source.hook_name, target.hook_name
        self.identity = source.identity
        self.widths = {**source.widths, **target.widths}

    @property
    def standardization(self) -> "PairStandardization":
        """That of both sides."""
        return PairStandardization(self.source.standardization, self.target.standardization)

    @property
    def order(self) -> str | None:
        """That of both sides; see `CachedActivations`."""
        return self.source.order

    def shuffled(
        self, batch_size: int, seed: int, start_step: int = 0, device: str = "cpu"
    ) -> Generator[Float[Tensor, "batch _"], None, None]:
        """The batches of `CachedActivations.shuffled`, the same tokens in the same order, (batch, d_in + d_out)."""
        sides = [side.shuffled(batch_size, seed, start_step, device) for side in (self.source, self.target)]
        with closing(sides[0]), closing(sides[1]):
            for source, target in zip(*sides, strict=True):
                yield torch.cat([source, target], dim=-1)
