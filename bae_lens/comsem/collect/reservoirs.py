"""Samples of bounded size from streams of any length, in tensors: what has the smallest keys is kept."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class SampledToken(NamedTuple):
    """A token of the corpus as samples keep it, in a row of integers."""

    place: int
    """Of its context, in the store."""
    position: int
    """In the context."""
    token: int
    """Token id."""
    text: int
    """Hash of its sentence's text, which may occur several times."""
    nearby: int
    """Tokens of its sentence on which its feature fires, as bits; see `sampling.nearby_positions`."""


WIDTH = len(SampledToken._fields)


class Reservoirs:
    """One sample of up to `capacity` tokens for each of `n` features.

    With random keys the samples are uniform, with rising ones first come.
    """

    def __init__(self, n: int, capacity: int) -> None:
        self.keys = torch.full((n, capacity), torch.inf, dtype=torch.float64)
        self.items = torch.zeros(n, capacity, WIDTH, dtype=torch.int64)

    def add(self, feature: Int[Tensor, " m"], key: Float[Tensor, " m"], item: Int[Tensor, "m 5"]) -> None:
        """Offers m tokens, rows as `SampledToken`, any number of them for one feature."""
        order = _lexsort(feature, key)
        feature, key, item = feature[order], key[order], item[order]
        rank = torch.arange(len(feature)) - torch.searchsorted(feature, feature)
        fits = rank < self.keys.shape[1]
        touched, row = feature[fits].unique(return_inverse=True)
        new_keys = torch.full((len(touched), self.keys.shape[1]), torch.inf, dtype=torch.float64)
        new_items = torch.zeros(*new_keys.shape, self.items.shape[2], dtype=torch.int64)
        new_keys[row, rank[fits]] = key[fits]
        new_items[row, rank[fits]] = item[fits]
        best = torch.cat([self.keys[touched], new_keys], 1).topk(self.keys.shape[1], largest=False)
        self.keys[touched] = best.values
        everything = torch.cat([self.items[touched], new_items], 1)
        self.items[touched] = everything.gather(1, best.indices[..., None].expand(-1, -1, everything.shape[2]))

    def sizes(self) -> Int[Tensor, " n"]:
        """How many items each feature has."""
        return self.keys.isfinite().sum(1)

    def of(self, feature: int) -> list[SampledToken]:
        """A feature's tokens, smallest keys first."""
        return [SampledToken(*item) for item in self.items[feature][self.keys[feature].isfinite()].tolist()]


def first_of_each(group: Int[Tensor, " m"], key: Float[Tensor, " m"]) -> Int[Tensor, " n_groups"]:
    """Index of the item with the smallest key in each group."""
    order = _lexsort(group, key)
    ordered = group[order]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return order[first]


class TokenPool:
    """A uniform sample of tokens, one a sentence, that remembers which features fire anywhere in their sentences."""

    def __init__(self, capacity: int, d_sae: int) -> None:
        self.capacity = capacity
        self.keys = torch.empty(0, dtype=torch.float64)
        self.items = torch.empty(0, WIDTH, dtype=torch.int64)
        self.bits = torch.empty(0, -(-d_sae // 8), dtype=torch.uint8)

    def add(self, key: Float[Tensor, " m"], item: Int[Tensor, "m 5"], sentence_fires: Bool[Tensor, "m d_sae"]) -> None:
        """Offers m tokens, rows as `SampledToken`, with random keys."""
        keys = torch.cat([self.keys, key])
        kept = keys.argsort()[: self.capacity]
        new = kept[kept >= len(self.keys)] - len(self.keys)
        bits = torch.zeros(len(keys), self.bits.shape[1], dtype=torch.uint8)
        bits[: len(self.bits)] = self.bits
        bits[len(self.bits) + new] = torch.from_numpy(np.packbits(sentence_fires[new].numpy(), axis=1))
        self.items, self.bits, self.keys = torch.cat([self.items, item])[kept], bits[kept], keys[kept]

    def tokens(self, indices: Int[Tensor, " n"]) -> list[SampledToken]:
        """Those at the indices."""
        return [SampledToken(*item) for item in self.items[indices].tolist()]

    def silent(self, feature: int) -> Int[Tensor, " n"]:
        """Indices of the tokens in whose sentences the feature fires nowhere."""
        return ((self.bits[:, feature // 8] >> (7 - feature % 8)) & 1 == 0).nonzero().flatten()

    def matched(
        self,
        candidates: Int[Tensor, " n"],
        token: Int[Tensor, " m"],
        position: Int[Tensor, " m"],
        token_counts: Int[Tensor, " vocabulary"],
    ) -> Int[Tensor, " k"]:
        """One of the candidates for each of m tokens, without replacement, as long as there are any.

        It is the nearest in log2 of how often its token occurs in the corpus and log2 of its position in the context.
        """
        _, own_position, own_token, *_ = self.items[candidates].unbind(1)
        wanted = _features(token, position, token_counts)
        distance = torch.cdist(wanted, _features(own_token, own_position, token_counts))
        chosen = []
        for row in distance[: len(candidates)]:
            nearest = int(row.argmin())
            chosen.append(nearest)
            distance[:, nearest] = torch.inf
        return candidates[torch.tensor(chosen, dtype=torch.int64)]


def _features(
    token: Int[Tensor, " m"], position: Int[Tensor, " m"], token_counts: Int[Tensor, " vocabulary"]
) -> Float[Tensor, "m 2"]:
    return torch.stack([token_counts[token].double().clamp(min=1).log2(), (position + 1).double().log2()], 1)


def _lexsort(group: Int[Tensor, " m"], key: Float[Tensor, " m"]) -> Int[Tensor, " m"]:
    """Order by group, then by key."""
    by_key = key.argsort(stable=True)
    return by_key[group[by_key].argsort(stable=True)]
