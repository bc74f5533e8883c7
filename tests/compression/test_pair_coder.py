import numpy as np
import pytest

from bae_lens.compression.pair_coder import RATES, PairCode, decode_pairs, parents_first
from bae_lens.functional.pair_tree import bernoulli_bits, pair_bits


def random_code(n, d_sae, density, seed=0):
    """Independent features and, of each of these, one that mostly is like it."""
    rng = np.random.default_rng(seed)
    half = rng.random((n, -(-d_sae // 2))) < np.clip(rng.exponential(density, -(-d_sae // 2)), 0, 1)
    return np.packbits(np.repeat(half, 2, axis=1)[:, :d_sae] ^ (rng.random((n, d_sae)) < density / 10), axis=1)


@pytest.mark.parametrize("d_sae", [1, 7, 8, 63, 64, 65, 200])
@pytest.mark.parametrize("n", [1, 2, 9, 300])
@pytest.mark.parametrize("density", [0.02, 0.5, 3.0])
def test_code_comes_back_exactly(n, d_sae, density):
    packed = random_code(n, d_sae, density)
    np.testing.assert_array_equal(decode_pairs(PairCode(packed, d_sae).encode(), n, d_sae), packed)


@pytest.mark.parametrize("density", [0.02, 0.2])
def test_length_is_what_bits_and_tree_need(density):
    packed = random_code(16_384, 256, density)
    code, fired = PairCode(packed, 256), np.unpackbits(packed, axis=1).sum(0, dtype=np.int64)
    assert code.joint_bits < 0.75 * bernoulli_bits(fired, 16_384).sum()
    assert (code.parents >= 0).sum() >= 128
    assert 32 * len(code.encode()) == pytest.approx(pair_bits(packed, 256), rel=2e-3)


def test_tree_is_of_the_features_that_are_alike():
    code = PairCode(random_code(2_000, 64, 0.2), 64)
    alike = np.arange(64) ^ 1
    assert ((code.parents == alike) | (code.parents[alike] == np.arange(64))).all()


def test_constant_features_cost_their_description():
    packed = np.packbits(np.tile([[1, 0, 1]], (50, 1)), axis=1)
    code = PairCode(packed, 3)
    assert code.joint_bits == 0
    assert pair_bits(packed, 3) == pytest.approx(3 * (2 + np.log2(len(RATES))))
    np.testing.assert_array_equal(decode_pairs(code.encode(), 50, 3), packed)


def test_rates_are_the_nearest_and_exact():
    """So that every machine codes by the same ones."""
    assert RATES.tolist() == sorted(set(RATES.tolist()))
    assert (np.rint(RATES * 2.0**17) == RATES * 2.0**17).all()
    np.testing.assert_array_equal(RATES, 1 - RATES[::-1])
    assert (RATES[2:58] / RATES[1:57] <= 1.25).all()
    assert 0 < RATES[1] < 1 / 32_767  # one in the longest chunk


def test_parents_come_first():
    parents = np.array([3, -1, 1, 1, 0, -1, 3])
    order = parents_first(parents).tolist()
    assert sorted(order) == list(range(7))
    assert all(order.index(parent) < order.index(i) for i, parent in enumerate(parents.tolist()) if parent >= 0)


@pytest.mark.parametrize("parents", [[0], [1, 0], [-1, 2, 3, 1], [1, 2, 2]])
def test_parents_in_a_circle_are_refused(parents):
    with pytest.raises(ValueError, match="in a circle"):
        parents_first(np.array(parents))


def test_a_long_chain_of_parents():
    np.testing.assert_array_equal(parents_first(np.arange(1000) - 1), np.arange(1000))


def test_words_that_are_not_of_these_vectors_are_refused():
    words = PairCode(random_code(100, 20, 0.3), 20).encode()
    for damaged in (words[:-1], words[1:], np.append(words, np.uint32(5)), words[:0]):
        with pytest.raises(ValueError, match=r"words|circle"):
            decode_pairs(damaged, 100, 20)
    with pytest.raises(ValueError, match=r"words|circle"):
        decode_pairs(words, 99, 20)
    with pytest.raises(ValueError, match="zero word"):
        decode_pairs(np.append(words, np.uint32(0)), 100, 20)


def test_garbage_never_decodes():
    rng = np.random.default_rng(0)
    for _ in range(300):
        words = rng.integers(0, 2**32, rng.integers(0, 120), dtype=np.uint32)
        with pytest.raises(ValueError, match=r"words|zero word|circle"):
            decode_pairs(words, 100, 30)
