"""Entropy coding of packed codes given a tree of pairs: each feature's bits where its parent is on and where off.

What describes the tree is coded with the bits: each feature's parent in `log2(d_sae + 1)` bits and, of its one or two
columns, the rate, one of `RATES`, in 7 bits. So a chunk stays readable alone, and the tree fits its vectors.
"""

from typing import Any

import constriction
import numpy as np

from bae_lens.compression.coder import FEATURES_AT_ONCE, bernoulli, feature_columns
from bae_lens.functional.pair_tree import RATE_BITS, RATES, conditional_bits, pair_tree

MOST_FEATURES = 2**24 - 1  # that the coder can tell apart
_stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]


class PairCode:
    """The code of n vectors by features, and the tree of pairs that it is coded with."""

    def __init__(self, packed: np.ndarray, d_sae: int) -> None:
        """Finds the tree of `packed` (n, ceil(d_sae / 8)), 1 <= n < 65536, as `pack_code` gives it."""
        self.n, self.d_sae = len(packed), d_sae
        self._columns = np.zeros((d_sae, -(-self.n // 8)), np.uint8)
        for first in range(0, d_sae, FEATURES_AT_ONCE):
            part = np.packbits(feature_columns(packed, first, d_sae).astype(bool), axis=1)
            self._columns[first : first + len(part)] = part
        self.parents = pair_tree(packed, d_sae, RATE_BITS)
        of_parents = np.where(self.parents[:, None] < 0, 0, self._columns[self.parents])
        fired, on, together = map(_fired, (self._columns, of_parents, self._columns & of_parents))
        self.joint_bits = float(conditional_bits(fired, on, together, self.n).sum())
        """What the bits need given the tree, each column at its own rate, without what describes tree and rates."""
        self._rates = np.stack([_nearest(fired - together, self.n - on), _nearest(together, on)], axis=1)

    def encode(self) -> np.ndarray:
        """Tree, rates and bits as words of 32 bits: `pair_bits` and some for the rates being rounded."""
        coder, rows = _stream.stack.AnsCoder(), _RowsOfParents(self._columns, self.n)
        parents, rates = self.parents.tolist(), self._rates.tolist()
        for feature in reversed(parents_first(self.parents).tolist()):  # last in, first out
            bits = np.unpackbits(self._columns[feature], count=self.n).astype(np.int32)
            for part, rate in zip(reversed(rows.of(parents[feature])), reversed(rates[feature]), strict=True):
                if _varies(rate):
                    coder.encode_reverse(bits[part], bernoulli(float(RATES[rate])))
        paired = self.parents >= 0
        names = np.where(paired, self.parents, self.d_sae)
        for values in (self._rates[paired, 1], self._rates[:, 0]):
            coder.encode_reverse(values.astype(np.int32), _stream.model.Uniform(len(RATES)))
        coder.encode_reverse(names.astype(np.int32), _stream.model.Uniform(self.d_sae + 1))
        return coder.get_compressed()


def decode_pairs(words: np.ndarray, n: int, d_sae: int) -> np.ndarray:
    """The packed code of n vectors that `PairCode.encode` made the words of.

    Raises ValueError if they are not such words.
    """
    coder, columns = _stream.stack.AnsCoder(words), np.zeros((d_sae, -(-n // 8)), np.uint8)
    parents = coder.decode(_stream.model.Uniform(d_sae + 1), d_sae)
    parents = np.where(parents == d_sae, -1, parents)
    rates = np.zeros((d_sae, 2), np.int64)
    rates[:, 0] = coder.decode(_stream.model.Uniform(len(RATES)), d_sae)
    rates[parents >= 0, 1] = coder.decode(_stream.model.Uniform(len(RATES)), int((parents >= 0).sum()))
    rows = _RowsOfParents(columns, n)
    parent_of, rates_of = parents.tolist(), rates.tolist()
    for feature in parents_first(parents).tolist():
        bits = np.zeros(n, np.uint8)
        for part, rate in zip(rows.of(parent_of[feature]), rates_of[feature], strict=True):
            bits[part] = (
                coder.decode(bernoulli(float(RATES[rate])), len(part)) if _varies(rate) and len(part) else RATES[rate]
            )
        columns[feature] = np.packbits(bits)
    if not coder.is_empty():
        raise ValueError("there are words left over once all features are decoded")
    packed = np.zeros((n, -(-d_sae // 8)), np.uint8)
    for first in range(0, d_sae, FEATURES_AT_ONCE):
        part = np.packbits(np.unpackbits(columns[first : first + FEATURES_AT_ONCE], axis=1, count=n), axis=0)
        packed[:, first // 8 : first // 8 + len(part)] = part.T
    return packed


def parents_first(parents: np.ndarray) -> np.ndarray:
    """The features in an order in which each one's parent, -1 for none, comes before it, and siblings in a row.

    Raises ValueError if there is none.
    """
    d_sae = len(parents)
    ancestor = np.append(np.where(parents < 0, d_sae, parents), d_sae)  # the last stands for none
    depth = (ancestor < d_sae).astype(np.int64)
    for _ in range(d_sae.bit_length()):
        depth, ancestor = depth + depth[ancestor], ancestor[ancestor]
    if (ancestor < d_sae).any():
        raise ValueError("the features' parents go round in a circle")
    return np.lexsort((parents, depth[:d_sae]))


class _RowsOfParents:
    """In which vectors a parent is off and on; it is asked for siblings in a row."""

    def __init__(self, columns: np.ndarray, n: int) -> None:
        self.columns, self.n = columns, n
        self.parent, self.rows = -1, (np.arange(n), np.arange(0))
        self.all = self.rows

    def of(self, parent: int) -> tuple[np.ndarray, np.ndarray]:
        if parent < 0:
            return self.all
        if parent != self.parent:
            bits = np.unpackbits(self.columns[parent], count=self.n)
            self.parent, self.rows = parent, (np.flatnonzero(bits == 0), np.flatnonzero(bits))
        return self.rows


def _fired(columns: np.ndarray) -> np.ndarray:
    return np.bitwise_count(columns).sum(1, dtype=np.int64)


def _nearest(count: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Which of `RATES` is nearest to `count / n`; never and always only for what is."""
    rate = count / np.maximum(n, 1)
    between = np.searchsorted((RATES[1:-2] + RATES[2:-1]) / 2, rate) + 1
    return np.where(count == 0, 0, np.where(count == n, len(RATES) - 1, between))


def _varies(rate: int) -> bool:
    return 0 < rate < len(RATES) - 1
