from itertools import product

import numpy as np
import pytest
from scipy.sparse.csgraph import minimum_spanning_tree

from bae_lens.compression.pair_coder import PairCode
from bae_lens.functional import pair_tree as module
from bae_lens.functional.pair_tree import (
    RATE_BITS,
    bernoulli_bits,
    conditional_bits,
    pair_bits,
    pair_tree,
    spanning_forest,
)


def tree_bits(bits, parents):
    """What a code needs per vector, each feature given its parent."""
    bits = bits.astype(np.int64)
    of_parents = np.where(parents < 0, 0, bits[:, parents])
    return conditional_bits(bits.sum(0), of_parents.sum(0), (bits * of_parents).sum(0), len(bits)).sum() / len(bits)


def pack(bits):
    return np.packbits(bits.astype(bool), axis=1)


def tree_distribution():
    """All 2^5 words of a code along the tree 0 - 1, 0 - 2, 2 - 3, 2 - 4, as often as its probabilities, in units of
    10^-5, say; and its entropy by enumeration.
    """
    parent = [None, 0, 0, 2, 2]
    on = [(0.3, 0.3), (0.1, 0.9), (0.2, 0.6), (0.5, 0.1), (0.3, 0.8)]  # rates given that the parent is off and on
    words = np.array(list(product([0, 1], repeat=5)))
    probability = np.ones(32)
    for feature, rates in enumerate(on):
        given = np.zeros(32, int) if parent[feature] is None else words[:, parent[feature]]
        rate = np.where(given, rates[1], rates[0])
        probability *= np.where(words[:, feature], rate, 1 - rate)
    times = np.rint(100_000 * probability).astype(int)
    assert np.allclose(times, 100_000 * probability)
    return np.repeat(words, times, axis=0), -(probability * np.log2(probability)).sum()


def test_bernoulli_bits_by_hand():
    # A quarter of 8 bits: 8 (2/4 + 3/4 log2(4/3)).
    np.testing.assert_allclose(bernoulli_bits(np.array([0, 2, 4, 8]), 8), [0, 4 + 6 * np.log2(4 / 3), 8, 0])
    assert bernoulli_bits(np.array([0]), 0) == 0


def test_conditional_bits_by_hand():
    # Of 8 vectors the parent fires in 2. Features that fire in 2, one of them the parent's; that are its copy; its
    # negation; independent of it; and silent.
    together, fired = np.array([1, 2, 0, 1, 0]), np.array([2, 2, 6, 4, 0])
    given = 2 + np.log2(6) + 5 * np.log2(6 / 5)
    np.testing.assert_allclose(conditional_bits(fired, 2, together, 8), [given, 0, 0, 8, 0], atol=1e-12)
    parents = np.full(5, 2)
    np.testing.assert_array_equal(
        conditional_bits(fired, parents, together, 8), conditional_bits(fired, 2, together, 8)
    )


def test_features_share_as_much_with_each_other():
    rng = np.random.default_rng(0)
    bits = rng.random((100, 6)) < rng.random(6)
    together, fired = bits.astype(int).T @ bits.astype(int), bits.sum(0)
    alone = bernoulli_bits(fired, 100)
    rows = np.stack([alone - conditional_bits(fired, int(fired[i]), together[i], 100) for i in range(6)])
    np.testing.assert_allclose(rows, rows.T, atol=1e-10)
    np.testing.assert_allclose(rows.diagonal(), alone)
    assert (rows > -1e-10).all()


@pytest.mark.parametrize("seed", range(5))
def test_forest_is_the_heaviest(seed):
    weights = np.random.default_rng(seed).normal(0.3, 1, (30, 30))
    weights = np.triu(weights, 1) + np.triu(weights, 1).T
    parents = spanning_forest(weights.__getitem__, 30)
    found = weights[np.flatnonzero(parents >= 0), parents[parents >= 0]]
    assert (found > 0).all()
    assert found.sum() == pytest.approx(-minimum_spanning_tree(np.minimum(-weights, 0)).sum())


def test_pairs_of_no_weight_are_no_pairs():
    assert spanning_forest(np.zeros((4, 4)).__getitem__, 4).tolist() == [-1] * 4
    assert spanning_forest(np.zeros((1, 1)).__getitem__, 1).tolist() == [-1]


def test_a_code_that_is_a_tree_has_its_entropy():
    bits, entropy = tree_distribution()
    parents = pair_tree(pack(bits), 5, 10.0)
    pairs = {frozenset((feature, parent)) for feature, parent in enumerate(parents.tolist()) if parent >= 0}
    assert pairs == {frozenset(pair) for pair in ((0, 1), (0, 2), (2, 3), (2, 4))}
    assert tree_bits(bits, parents) == pytest.approx(entropy, rel=1e-12)
    assert bernoulli_bits(bits.sum(0), len(bits)).sum() / len(bits) > 1.1 * entropy


def test_a_tree_bounds_the_entropy_of_any_code():
    rng = np.random.default_rng(0)
    bits = rng.random((3000, 6)) < rng.random(6)
    bits[:, 3:] ^= bits[:, :1] & (rng.random((3000, 3)) < 0.8)
    bits[:, 5] = bits[:, 1] ^ bits[:, 2]  # what no pair can see
    _, times = np.unique(bits, axis=0, return_counts=True)
    entropy = -(times / 3000 * np.log2(times / 3000)).sum()
    parents = pair_tree(pack(bits), 6, 10.0)
    assert entropy < tree_bits(bits, parents) < bernoulli_bits(bits.sum(0), 3000).sum() / 3000


def test_one_feature_and_one_vector():
    for bits in ([[1]], [[0]], [[1], [0]]):
        assert pair_tree(pack(np.array(bits)), 1, 0.0).tolist() == [-1]
    assert pair_tree(pack(np.ones((1, 9))), 9, 0.0).tolist() == [-1] * 9


def test_constant_features_are_in_no_pair():
    bits = np.random.default_rng(0).random((200, 5)) < 0.4
    bits[:, 1], bits[:, 3], bits[:, 4] = 0, 1, bits[:, 0]
    parents = pair_tree(pack(bits), 5, 1.0)
    assert (parents[[1, 3]] == -1).all()
    assert sorted(parents[[0, 4]].tolist()) in ([-1, 0], [-1, 4])
    assert not np.isin(parents, (1, 3)).any()


def test_independent_features_are_in_no_pair():
    rng = np.random.default_rng(0)
    bits = rng.random((2000, 40)) < rng.random(40)
    assert (pair_tree(pack(bits), 40, 20.0) == -1).all()


def test_negated_features_are_in_the_same_pairs():
    """Whether a feature means a thing or its absence."""
    rng = np.random.default_rng(0)
    bits = np.repeat(rng.random((500, 6)) < 0.2, 3, axis=1) ^ (rng.random((500, 18)) < 0.03)
    negated = bits ^ (rng.random(18) < 0.5)
    np.testing.assert_array_equal(pair_tree(pack(bits), 18, 7.0), pair_tree(pack(negated), 18, 7.0))


def test_more_pairs_than_are_counted(monkeypatch):
    """Some of the vectors then say the same."""
    bits = np.repeat(np.random.default_rng(0).random((4000, 10)) < 0.3, 2, axis=1)
    whole = pair_tree(pack(bits), 20, 7.0)
    monkeypatch.setattr(module, "MOST_PAIRS", 20_000)
    some = pair_tree(pack(bits), 20, 7.0)
    pairs = [{frozenset((i, p)) for i, p in enumerate(parents.tolist()) if p >= 0} for parents in (whole, some)]
    assert pairs[0] >= {frozenset((2 * i, 2 * i + 1)) for i in range(10)} <= pairs[1]


def test_bits_of_the_tree_are_those_of_a_file_up_to_the_rounding_of_its_rates():
    packed = np.packbits(np.random.default_rng(0).random((3000, 40)) < 0.2, axis=1)
    packed[:, 3:] &= packed[:, :2]
    pairs = PairCode(packed, 40)
    described = 40 * np.log2(41) + (40 + (pairs.parents >= 0).sum()) * RATE_BITS
    assert pair_bits(packed, 40) == pytest.approx(pairs.joint_bits + described)
    assert 32 * len(pairs.encode()) == pytest.approx(pair_bits(packed, 40), rel=0.02)
