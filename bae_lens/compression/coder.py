"""Entropy coding of packed codes, feature by feature: within a few bits of `H(p)` for a whole chunk of vectors."""

from typing import Any

import constriction
import numpy as np

FEATURES_AT_ONCE = 64  # unpacked at a time; a multiple of 8
_stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]


def encode_columns(packed: np.ndarray, d_sae: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each feature fired, (d_sae,) of 16 bits, and the entropy-coded bits as words of 32 bits.

    `packed` (n, ceil(d_sae / 8)), 1 <= n < 65536, is what `pack_code` gives. Each feature is a column of n bits, coded
    under its own rate `count / n`, which is exact; all columns together need `n H(p)` bits (Eq. 4). Features that are
    constant over the n vectors need none.
    """
    n, counts = len(packed), np.zeros(d_sae, np.uint16)
    coder = _stream.stack.AnsCoder()
    for first in reversed(range(0, d_sae, FEATURES_AT_ONCE)):  # last in, first out
        columns = feature_columns(packed, first, d_sae)
        count = np.count_nonzero(columns, axis=1)
        counts[first : first + len(columns)] = count
        for column, fired in zip(columns[::-1], count[::-1], strict=True):
            if 0 < fired < n:
                coder.encode_reverse(column, bernoulli(fired / n))
    return counts, coder.get_compressed()


def decode_columns(counts: np.ndarray, words: np.ndarray, n: int) -> np.ndarray:
    """The packed code of n vectors that `encode_columns` was given.

    Raises ValueError if the words are not the code of columns that fired so often.
    """
    d_sae = len(counts)
    if (counts > n).any():
        raise ValueError(f"a feature cannot fire more than {n} times for {n} vectors, got {counts.max()}")
    packed = np.zeros((n, -(-d_sae // 8)), np.uint8)
    coder = _stream.stack.AnsCoder(words)
    for first in range(0, d_sae, FEATURES_AT_ONCE):
        count = counts[first : first + FEATURES_AT_ONCE].astype(np.int64)
        columns = np.repeat((count == n)[:, None], n, axis=1)
        for j, fired in enumerate(count):
            if 0 < fired < n:
                columns[j] = coder.decode(bernoulli(fired / n), n)
        if not np.array_equal(np.count_nonzero(columns, axis=1), count):
            raise ValueError("the words decode to features that fire more or less often than was counted")
        part = np.packbits(columns, axis=0)
        packed[:, first // 8 : first // 8 + len(part)] = part.T
    if not coder.is_empty():
        raise ValueError("there are words left over once all features are decoded")
    return packed


def feature_columns(packed: np.ndarray, first: int, d_sae: int) -> np.ndarray:
    """The bits of `FEATURES_AT_ONCE` features, or of those that are left, from `first` on: (features, n) of 32 bits."""
    width = min(FEATURES_AT_ONCE, d_sae - first)
    part = packed[:, first // 8 : (first + FEATURES_AT_ONCE) // 8]
    return np.unpackbits(part, axis=1, count=width).T.astype(np.int32, order="C")


def bernoulli(rate: float) -> Any:
    """The model of bits that are 1 at this rate."""
    return _stream.model.Bernoulli(rate, perfect=False)
