"""Ordinary tokens of a corpus, from sentences that nothing else is drawn from."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bae_lens.comsem.collect.reservoirs import Reservoirs

BACKGROUND_SIZE = 256
ONE_SENTENCE_IN = 16  # is kept apart


def kept_apart(text: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Which sentences, by the hashes of their texts, are background: the same wherever a sentence occurs."""
    return text % ONE_SENTENCE_IN == 0


class Background:
    """A uniform sample of the tokens of the sentences that are kept apart, as (place, position, token id, hash)."""

    def __init__(self, seed: int) -> None:
        self._tokens = Reservoirs(1, BACKGROUND_SIZE, width=4)
        self._keys = torch.Generator().manual_seed(seed)

    def add(self, item: Int[Tensor, "n 4"]) -> None:
        """Offers the tokens of a batch, each with the hash of its sentence's text."""
        item = item[kept_apart(item[:, 3])]
        key = torch.rand(len(item), generator=self._keys, dtype=torch.float64)
        self._tokens.add(torch.zeros(len(item), dtype=torch.int64), key, item)

    def outside(self, sentences: set[int]) -> list[list[int]]:
        """Place, position and token id of those that stand in none of the sentences."""
        return [item[:3] for item in self._tokens.of(0) if item[3] not in sentences]
