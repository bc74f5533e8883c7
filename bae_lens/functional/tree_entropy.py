"""The bits that a code needs if each feature is coded given one other, along a tree learnt from other vectors.

The tree is that of `pair_tree`, of largest shared information (Chow and Liu, 1968). Measured where it was learnt, it
finds bits in features that share nothing; on vectors of its own the mean of `-log2 q` is a cross entropy, which bounds
the entropy of the code from above, whatever the tree.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bae_lens.functional.pair_tree import spanning_forest

ROWS = 8192  # of a float32 product that is then added in float64; counts up to 2^24 stay exact
ENTRIES = 2**24  # of the matrix of shared bits that are worked on at a time
MOST_FEATURES = 2**13  # whose pairs are counted: time and memory grow with their square


@dataclass(frozen=True)
class PairTree:
    """A distribution of codes in which every feature depends on at most one other."""

    parents: Int[Tensor, " d_sae"]
    """Of each feature; -1 for none."""
    rate: Float[Tensor, " d_sae"]
    """How often a feature fires, if its parent does not or if it has none."""
    rate_given: Float[Tensor, " d_sae"]
    """How often it fires if its parent does."""

    def bits(self, feature_acts: Float[Tensor, "n d_sae"]) -> Float[Tensor, " n"]:
        """`-log2 q` of each code, in float64."""
        parent = torch.where(self.parents >= 0, feature_acts[:, self.parents.clamp(min=0)] > 0, False)
        on, off = (torch.stack([q.log2(), (1 - q).log2()]) for q in (self.rate_given, self.rate))
        fires = feature_acts > 0
        given = [torch.where(fires, likelihood[0], likelihood[1]) for likelihood in (on, off)]
        return -torch.where(parent, *given).sum(1)

    def mean_bits(self, counts: "PairCounts") -> float:
        """The same in the mean over codes, of which this tree's pairs were counted."""
        pairs, parent_fired = counts.of_pairs(self.parents)
        fired, n = counts.fired, counts.n
        cells = (pairs, parent_fired - pairs, fired - pairs, n - fired - parent_fired + pairs)
        q = (self.rate_given, 1 - self.rate_given, self.rate, 1 - self.rate)
        return -sum((count * share.log2()).sum().item() for count, share in zip(cells, q, strict=True)) / n


class PairCounts:
    """How often features fired, and two of them together, exactly, over codes that come in batches.

    Of a code with more than `MOST_FEATURES` (8192), pairs are counted among those that vary most in the first batch, on
    every device.
    """

    def __init__(self, feature_acts: Float[Tensor, "n d_sae"]) -> None:
        """For codes like these, which are not counted."""
        d_sae = feature_acts.shape[1]
        zeros = partial(feature_acts.new_zeros, dtype=torch.float64)
        rate = feature_acts.float().mean(0)
        self.features = (rate * (1 - rate)).topk(min(d_sae, MOST_FEATURES)).indices.sort().values
        self.fired, self.together = zeros(d_sae), zeros(len(self.features), len(self.features))
        self.n = 0

    def add(self, feature_acts: Float[Tensor, "n d_sae"]) -> None:
        """A batch of codes."""
        self.n += len(feature_acts)
        for rows in feature_acts.split(ROWS):
            self.fired += rows.sum(0, dtype=torch.float64)
            chosen = rows[:, self.features].float()
            self.together += chosen.T @ chosen

    def of_pairs(self, parents: Int[Tensor, " d_sae"]) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
        """How often each feature fired with its parent, and its parent; one that is none never does."""
        has, parent = parents >= 0, parents.clamp(min=0)
        place = torch.zeros_like(parents)
        place[self.features] = torch.arange(len(self.features), device=place.device)
        return self.together[place, place[parent]] * has, self.fired[parent] * has


def learn_tree(counts: PairCounts) -> PairTree:
    """The tree that shares most bits over the codes that were counted.

    Pairs that share no more than it takes to describe them are none. Rates count one vector more: a feature by itself
    half a firing more (Krichevsky and Trofimov, 1981), given its parent as often as by itself.
    """
    n, k = counts.n, len(counts.features)
    worth = _shared_bits(counts.together, n) - (np.log2(max(k, 2)) + np.log2(n) / 2)
    forest = torch.from_numpy(spanning_forest(worth.cpu().numpy().__getitem__, k)).to(counts.features)
    parents = torch.full_like(counts.fired, -1, dtype=torch.int64)
    parents[counts.features] = torch.where(forest >= 0, counts.features[forest.clamp(min=0)], -1)
    pairs, parent_fired = counts.of_pairs(parents)
    alone = (counts.fired + 0.5) / (n + 1)
    rate = torch.where(parents >= 0, (counts.fired - pairs + alone) / (n - parent_fired + 1), alone)
    return PairTree(parents, rate, (pairs + alone) / (parent_fired + 1))


def _shared_bits(together: Float[Tensor, "k k"], n: int) -> Float[Tensor, "k k"]:
    """`n I(feature; feature)` of every two features, in float32: what coding one given the other saves over n codes."""
    fired = together.diagonal()
    whole = n * np.log2(n)
    alone = whole - _n_log_n(fired) - _n_log_n(n - fired)
    shared = together.new_empty(together.shape, dtype=torch.float32)
    for rows in torch.arange(len(fired), device=fired.device).split(max(1, ENTRIES // len(fired))):
        both, first = together[rows], fired[rows, None]
        cells = (both, first - both, fired - both, n - first - fired + both)
        shared[rows] = (alone[rows, None] + alone - whole + sum(map(_n_log_n, cells))).float()
    return shared


def _n_log_n(count: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`n log2 n`, 0 at 0."""
    return torch.special.xlogy(count, count) / np.log(2)
