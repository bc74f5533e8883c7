"""Entropy coding of packed codes given the dictionary's geometry: a feature's bits given what those before decode to.

The prior is that of `functional.geometric_prior`, in whole numbers, so that every machine decodes by the same rates.
A feature is decoded for all vectors before the next one, whose mean score is then known.
`Geometry` has the products `W_dec_k . W_enc_j`, which the file does not hold; what describes a chunk's prior is coded
with its bits: of each feature a weight and a bias, in 7 bits each.
"""

from functools import cached_property
from typing import Any

import constriction
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from scipy.sparse import csr_array, hstack
from torch import Tensor
from torch.nn.functional import embedding_bag

from bae_lens.compression.coder import FEATURES_AT_ONCE, feature_columns
from bae_lens.functional.geometric_prior import (
    BIASES_PER_NAT,
    LARGEST_BIAS,
    ROWS_OF_FIT,
    WEIGHTS_PER_OCTAVE,
    fit_prior,
    rounded_bias,
    rounded_weight,
)

MOST_FEATURES = 8192  # so that the products take no more than 128 MiB, and sums of so many are exact in float32
ROWS = 1024  # unpacked at once
ONE_IN = 8  # bits may be on, so that a list of them stays small
PER_NAT = 32  # units of a logit
LARGEST_CHANGE = 2047  # units by which one feature changes the logit of another: times MOST_FEATURES less than 2^24
LARGEST_LOGIT = 15 * PER_NAT
RATES = np.rint(2.0**24 / (1 + np.exp(-np.arange(-LARGEST_LOGIT, LARGEST_LOGIT + 1) / PER_NAT))) / 2.0**24
"""Of each logit, in units of 2^-24, which no machine's way to compute exponentials changes."""
LARGEST_EXPONENT = -2
N_WEIGHTS = 1 + 16 * WEIGHTS_PER_OCTAVE  # none, and in 16 octaves below 2^LARGEST_EXPONENT, in units per product
N_BIASES = 1 + int(2 * LARGEST_BIAS * BIASES_PER_NAT)
PRIOR_BITS = float(np.log2(N_WEIGHTS) + np.log2(N_BIASES))  # a feature
_WEIGHT_BITS = 15  # of the dictionary's weights, and of the products, beside the sign
_stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]
_bernoulli = _stream.model.Bernoulli(perfect=False)


class Geometry:
    """What the features of a dictionary decode to along each other's encoders, in whole numbers."""

    def __init__(self, W_enc: Float[Tensor, "d_in d_sae"], W_dec: Float[Tensor, "d_sae d_in"]) -> None:
        self.W_enc, self.W_dec = W_enc, W_dec

    @cached_property
    def products(self) -> Int[np.ndarray, "d_sae d_sae"]:
        """`W_dec_k . W_enc_j` for k < j, else 0; each column in a unit of its own that is a power of two, in 16 bits.

        Weights are rounded to 16 bits, so that sums of their products in float64 are exact in any order.
        """
        decoder = _whole(self.W_dec.detach().cpu().double().numpy(), None)
        encoder = _whole(self.W_enc.detach().cpu().double().numpy(), 0)
        products = np.zeros((len(decoder), len(decoder)), np.int16)
        for first in range(0, len(decoder), FEATURES_AT_ONCE):
            columns = slice(first, first + FEATURES_AT_ONCE)
            before = np.triu(decoder[: columns.stop] @ encoder[:, columns], 1 - first)
            products[: len(before), columns] = _whole(before, 0)
        return products


def _whole(values: np.ndarray, axis: int | None) -> np.ndarray:
    """In units of a power of two in which the largest along an axis has `_WEIGHT_BITS` bits."""
    _, exponent = np.frexp(np.abs(values).max(axis, keepdims=True, initial=0))
    largest = 2.0**_WEIGHT_BITS - 1
    return np.rint(np.ldexp(values, _WEIGHT_BITS - exponent)).clip(-largest, largest)


class GeometryCode:
    """The code of n vectors by features, coded given the geometry of their dictionary."""

    def __init__(self, packed: UInt8[np.ndarray, "n n_bytes"], d_sae: int, geometry: Geometry) -> None:
        """Learns a prior from `packed`, 1 <= n < 65536, as `pack_code` gives it, and codes the bits by it.

        No more of them may be on than `sparse_enough` says.
        """
        coder = _stream.stack.AnsCoder()
        before, step = _sparse(packed, d_sae), -(-len(packed) // ROWS_OF_FIT)
        weights, biases = np.zeros((2, d_sae), np.int32)
        for first in reversed(range(0, d_sae, FEATURES_AT_ONCE)):  # last in, first out
            columns = feature_columns(packed, first, d_sae)
            part = slice(first, first + len(columns))
            products = geometry.products[: part.stop, part]
            before = before[:, : part.stop]
            scores = _sums(before[::step], products.astype(np.float32))
            weights[part], biases[part] = _indices(scores, torch.from_numpy(columns[:, ::step].T.astype(bool)))
            scores = _scores(before, _changes(products, weights[part]))
            for column, own, bias in zip(columns[::-1], scores[::-1], biases[part].tolist()[::-1], strict=True):
                coder.encode_reverse(column, _bernoulli, _rates(own, bias))
        self.joint_bits = float(coder.num_valid_bits())
        """What the bits need given the prior."""
        coder.encode_reverse(biases, _stream.model.Uniform(N_BIASES))
        coder.encode_reverse(weights, _stream.model.Uniform(N_WEIGHTS))
        self.words = coder.get_compressed()
        """Prior and bits, of 32 bits each."""


def decode_geometry(words: np.ndarray, n: int, d_sae: int, geometry: Geometry) -> UInt8[np.ndarray, "n n_bytes"]:
    """The packed code of n vectors that `GeometryCode` made the words of, with the same dictionary.

    Raises ValueError if they are not such words.
    """
    if len(geometry.W_dec) != d_sae:
        raise ValueError(f"the dictionary has {len(geometry.W_dec)} features instead of {d_sae}")
    coder, packed = _stream.stack.AnsCoder(words), np.zeros((n, -(-d_sae // 8)), np.uint8)
    weights = coder.decode(_stream.model.Uniform(N_WEIGHTS), d_sae)
    biases = coder.decode(_stream.model.Uniform(N_BIASES), d_sae)
    before = csr_array((n, 0), dtype=np.int8)
    for first in range(0, d_sae, FEATURES_AT_ONCE):
        part = slice(first, min(first + FEATURES_AT_ONCE, d_sae))
        changes = _changes(geometry.products[: part.stop, part], weights[part])
        scores = _scores(before, changes[:first])
        within, columns = changes[first:].astype(np.int32), np.zeros((len(scores), n), bool)
        for j, (own, bias) in enumerate(zip(scores, biases[part].tolist(), strict=True)):
            columns[j] = coder.decode(_bernoulli, _rates(own, bias))
            on = np.flatnonzero(columns[j])
            scores[j + 1 :, on] += within[j, j + 1 :, None]
        bits = np.packbits(columns, axis=0).T
        packed[:, first // 8 : first // 8 + bits.shape[1]] = bits
        before = csr_array(hstack([before, _sparse(bits, len(columns))], format="csr"))
        if not sparse_enough(before.nnz, n, d_sae):
            raise ValueError(f"more of its bits are on than one in {ONE_IN}")
    if not coder.is_empty():
        raise ValueError("there are words left over once all features are decoded")
    return packed


def sparse_enough(n_on: int, n: int, d_sae: int) -> bool:
    """Whether a list of the bits that are on takes little memory, for n vectors that any file can hold."""
    return ONE_IN * n_on <= n * d_sae


def _sparse(packed: np.ndarray, d_sae: int) -> csr_array:
    """The bits that are on, row by row."""
    parts = [packed[first : first + ROWS] for first in range(0, len(packed), ROWS)]
    indices = [np.nonzero(np.unpackbits(part, axis=1, count=d_sae))[1].astype(np.int32) for part in parts]
    indptr = np.append(0, np.bitwise_count(packed).sum(1, dtype=np.int64).cumsum()).astype(np.int32)
    return csr_array((np.ones(indptr[-1], np.int8), np.concatenate(indices), indptr), shape=(len(packed), d_sae))


def _sums(on: csr_array, rows: Float[np.ndarray, "d k"]) -> Float[np.ndarray, "n k"]:
    """For each vector the sum of the rows of the features that are on; exact for whole numbers up to 2^24."""
    index, offset, table = (torch.from_numpy(x) for x in (on.indices, on.indptr, rows))
    return embedding_bag(index, table, offset, mode="sum", include_last_offset=True).numpy()


def _indices(
    scores: Float[np.ndarray, "n k"], on: Bool[Tensor, "n k"]
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
    """Of each feature's rounded weight and bias, learned from sums of products."""
    weight, bias = fit_prior(torch.from_numpy(scores), on)
    digits, exponent = torch.frexp(rounded_weight(weight * PER_NAT))
    octave = exponent - LARGEST_EXPONENT + 15
    index = 1 + WEIGHTS_PER_OCTAVE * octave + (2 * WEIGHTS_PER_OCTAVE * digits).int() - WEIGHTS_PER_OCTAVE
    index = torch.where((digits > 0) & (octave >= 0), index.clamp(max=N_WEIGHTS - 1), 0)
    return index.numpy(), ((rounded_bias(bias) + LARGEST_BIAS) * BIASES_PER_NAT).int().numpy()


def _changes(products: Int[np.ndarray, "d k"], weights: Int[np.ndarray, " k"]) -> Float[np.ndarray, "d k"]:
    """By how many units a feature that is on changes the logits of others: whole numbers, exact on every machine."""
    octave, digits = np.divmod(weights - 1, WEIGHTS_PER_OCTAVE)
    factor = np.ldexp(WEIGHTS_PER_OCTAVE + digits, octave - 15 + LARGEST_EXPONENT - 4) * (weights > 0)
    return np.rint(products * factor.astype(np.float32)).clip(-LARGEST_CHANGE, LARGEST_CHANGE)


def _scores(on: csr_array, changes: Float[np.ndarray, "d k"]) -> Int[np.ndarray, "k n"]:
    """For each feature and vector, by how many units the features that are on change the logit."""
    return _sums(on, changes).T.astype(np.int32, order="C")


def _rates(scores: Int[np.ndarray, " n"], bias: int) -> Float[np.ndarray, " n"]:
    """At which a feature fires: by `RATES` at its score less the mean, plus the bias; beyond their ends as at them."""
    at_mean = bias * (PER_NAT // BIASES_PER_NAT) - int(LARGEST_BIAS) * PER_NAT + LARGEST_LOGIT
    mean = int(scores.sum(dtype=np.int64)) // len(scores)
    return RATES.take(scores + (at_mean - mean), mode="clip")
