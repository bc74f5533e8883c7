"""Ordinary tokens of a corpus, from sentences that nothing else is drawn from."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bae_lens.comsem.collect.reservoirs import Reservoirs, SampledToken

BACKGROUND_SIZE = 256
ONE_SENTENCE_IN = 16  # is kept apart


def kept_apart(text: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Which sentences, by the hashes of their texts, are background: the same wherever a sentence occurs."""
    return text % ONE_SENTENCE_IN == 0


class Background:
    """A uniform sample of the tokens of the sentences that are kept apart."""

    def __init__(self, seed: int) -> None:
        self._tokens = Reservoirs(1, BACKGROUND_SIZE)
        self._keys = torch.Generator().manual_seed(seed)

    def add(self, item: Int[Tensor, "n 5"]) -> None:
        """Offers the tokens of a batch, rows as `SampledToken`."""
        _, _, _, text, _ = item.unbind(1)
        item = item[kept_apart(text)]
        key = torch.rand(len(item), generator=self._keys, dtype=torch.float64)
        self._tokens.add(torch.zeros(len(item), dtype=torch.int64), key, item)

    def outside(self, sentences: set[int]) -> list[SampledToken]:
        """Those that stand in none of the sentences, which are hashes of texts."""
        return [token for token in self._tokens.of(0) if token.text not in sentences]
