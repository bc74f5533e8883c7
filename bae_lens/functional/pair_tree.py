"""Trees of pairs: a code's bits, each given one other (Chow and Liu, 1968, doi:10.1109/TIT.1968.1054142).

Of all distributions in which every feature depends on at most one other, that along the tree whose pairs share most
information is nearest to the code's own. It needs the sum of the features' entropies less what those pairs share, which
bounds the joint entropy from above, as the marginal entropy (Eq. 4) does, but more tightly.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy.sparse import csr_array

_LOW = np.array([(4 + quarter) / 2.0 ** (4 + octave) for octave in reversed(range(14)) for quarter in range(4)])
RATES = np.concatenate([[0.0], _LOW, [0.5], 1 - _LOW[::-1], [1.0]])
"""Of never, of always, and between them exact numbers, four an octave, from 1 in 32,768 on."""
RATE_BITS = float(np.log2(len(RATES)))
"""What it takes to say one of them."""
ROWS = 1024  # unpacked at once
MOST_PAIRS = 2**23  # of bits that are on together: if there are more, only every so many vectors are looked at


def bernoulli_bits(count: Int[np.ndarray, "*shape"], n: Int[np.ndarray, "*shape"] | int) -> Float[np.ndarray, "*shape"]:
    """`n h(count / n)`: what n bits need of which `count` are on, each by its share alone (Eq. 4)."""
    return _n_log_n(n) - _n_log_n(count) - _n_log_n(n - count)


def conditional_bits(
    fired: Int[np.ndarray, " k"],
    parent_fired: Int[np.ndarray, " k"] | int,
    together: Int[np.ndarray, " k"],
    n: int,
) -> Float[np.ndarray, " k"]:
    """`n H(feature | parent)`: what n bits of each feature need where those of its parent are known.

    From how often each fired, its parent, and both; a feature without parent has one that never fires. It is less than
    `bernoulli_bits(fired, n)` by the bits that the two share, `n I(feature; parent)`.
    """
    return bernoulli_bits(together, parent_fired) + bernoulli_bits(fired - together, n - parent_fired)


def spanning_forest(weights: Callable[[int], Float[np.ndarray, " k"]], k: int) -> Int[np.ndarray, " k"]:
    """The trees of largest total weight that span k nodes; each node's parent in them, or -1 for a root (Prim, 1957).

    `weights(i)` are those of node i's pairs with all nodes, asked for once each; pairs of weight 0 or less are none.
    Memory is that of one row.
    """
    parents, nearest = np.full(k, -1), np.full(k, -1)
    best, outside = np.zeros(k), np.ones(k, bool)
    for _ in range(k):
        node = int(np.where(outside, best, -1.0).argmax())
        parents[node], outside[node] = nearest[node], False
        row = weights(node)
        nearer = row > best
        best[nearer], nearest[nearer] = row[nearer], node
    return parents


def pair_tree(packed: UInt8[np.ndarray, "n n_bytes"], d_sae: int, cost: float) -> Int[np.ndarray, " d_sae"]:
    """Each feature's parent in the tree of pairs that share most bits over these vectors, or -1 if it has none.

    Pairs that share no more than `cost` bits, what it takes to describe one, are left out. `packed` is as `pack_code`
    gives it, n at least 1. Counts every pair of bits that differ from what their features are mostly, so the time is
    that of the mean square of their number per vector and not of d_sae^2, in memory of their number. Where there are
    more than `MOST_PAIRS`, only every so many vectors are looked at.
    """
    rare = _rare_bits(packed, d_sae)
    by_feature, lengths = rare.tocsc(), np.diff(rare.indptr)
    fired, n = np.diff(by_feature.indptr).astype(np.int64), len(lengths)
    alone = bernoulli_bits(fired, n) - cost

    def worth(feature: int) -> np.ndarray:
        vectors = by_feature.indices[by_feature.indptr[feature] : by_feature.indptr[feature + 1]]
        length = lengths[vectors]
        begins = rare.indptr[vectors] - length.cumsum() + length  # of each vector's bits, less where they come to lie
        where = np.arange(length.sum()) + np.repeat(begins, length)
        together = np.bincount(rare.indices[where], minlength=d_sae)
        return alone - conditional_bits(fired, int(fired[feature]), together, n)

    return spanning_forest(worth, d_sae)


def pair_bits(packed: UInt8[np.ndarray, "n n_bytes"], d_sae: int) -> float:
    """What n vectors need coded along their tree of pairs, in bits, with all that describes it, as in a `.bae` file.

    Of each feature its parent, and one or two of `RATES`; then its bits given the parent's.
    """
    parents = pair_tree(packed, d_sae, RATE_BITS)
    paired, n = parents >= 0, len(packed)
    fired, together = np.zeros((2, d_sae), np.int64)
    for first in range(0, n, ROWS):
        bits = np.unpackbits(packed[first : first + ROWS], axis=1, count=d_sae)
        fired += bits.sum(0, dtype=np.int64)
        together += (bits & bits[:, parents]).sum(0, dtype=np.int64)
    given = conditional_bits(fired, np.where(paired, fired[parents], 0), np.where(paired, together, 0), n)
    side = d_sae * np.log2(d_sae + 1) + (d_sae + paired.sum()) * RATE_BITS
    return float(given.sum() + side)


def _rare_bits(packed: np.ndarray, d_sae: int) -> csr_array:
    """Where bits differ from what their features mostly are, in as many vectors, evenly spaced, as are looked at.

    Two features share as much if one is negated.
    """
    parts = [packed[first : first + ROWS] for first in range(0, len(packed), ROWS)]
    fired = sum(np.unpackbits(part, axis=1, count=d_sae).sum(0, dtype=np.int64) for part in parts)
    differing = packed ^ np.packbits(2 * fired > len(packed))
    pairs = np.square(np.bitwise_count(differing).sum(1, dtype=np.int64)).sum()
    differing = differing[:: -(-max(1, pairs) // MOST_PAIRS)]
    parts = [differing[first : first + ROWS] for first in range(0, len(differing), ROWS)]
    indices = [np.nonzero(np.unpackbits(part, axis=1, count=d_sae))[1].astype(np.int32) for part in parts]
    indptr = np.append(0, np.bitwise_count(differing).sum(1, dtype=np.int64).cumsum())
    return csr_array((np.ones(indptr[-1], np.uint8), np.concatenate(indices), indptr), shape=(len(differing), d_sae))


def _n_log_n(n: np.ndarray | int) -> Any:
    return n * np.log2(np.maximum(n, 1))
