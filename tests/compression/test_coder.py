import numpy as np
import pytest

from bae_lens.compression.coder import decode_columns, encode_columns


def random_code(n, d_sae, density, seed=0):
    rng = np.random.default_rng(seed)
    rate = np.clip(rng.exponential(density, d_sae), 0, 1)
    return np.packbits(rng.random((n, d_sae)) < rate, axis=1)


def entropy_bits(packed, d_sae):
    rate = np.unpackbits(packed, axis=1, count=d_sae).mean(0)
    rate = rate[(rate > 0) & (rate < 1)]
    return -(rate * np.log2(rate) + (1 - rate) * np.log2(1 - rate)).sum()


@pytest.mark.parametrize("d_sae", [1, 7, 8, 63, 64, 65, 200])
@pytest.mark.parametrize("n", [1, 2, 300])
@pytest.mark.parametrize("density", [0.02, 0.5, 3.0])
def test_code_comes_back_exactly(n, d_sae, density):
    packed = random_code(n, d_sae, density)
    counts, words = encode_columns(packed, d_sae)
    assert counts.tolist() == np.unpackbits(packed, axis=1, count=d_sae).sum(0).tolist()
    np.testing.assert_array_equal(decode_columns(counts, words, n), packed)


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2])
def test_length_is_the_entropy(density):
    packed = random_code(16_384, 256, density)
    _, words = encode_columns(packed, 256)
    assert 32 * len(words) / len(packed) == pytest.approx(entropy_bits(packed, 256), rel=1e-3)


def test_constant_features_cost_nothing():
    packed = np.packbits(np.tile([[1, 0, 1]], (50, 1)), axis=1)
    counts, words = encode_columns(packed, 3)
    assert counts.tolist() == [50, 0, 50]
    assert len(words) == 0
    np.testing.assert_array_equal(decode_columns(counts, words, 50), packed)


def test_words_that_are_not_of_these_counts_are_refused():
    packed = random_code(100, 20, 0.3)
    counts, words = encode_columns(packed, 20)
    with pytest.raises(ValueError, match="more than 100 times"):
        decode_columns(counts + np.uint16(100), words, 100)
    with pytest.raises(ValueError, match="fire more or less often"):
        decode_columns(counts, words[1:], 100)
    with pytest.raises(ValueError, match="left over"):
        decode_columns(np.zeros(20, np.uint16), words, 100)
    with pytest.raises(ValueError, match="zero word"):
        decode_columns(counts, np.concatenate([words, [np.uint32(0)]]), 100)


def test_garbage_never_decodes():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 99, 30).astype(np.uint16)
    for _ in range(300):
        words = rng.integers(0, 2**32, rng.integers(0, 120), dtype=np.uint32)
        with pytest.raises(ValueError, match=r"words|zero word"):
            decode_columns(counts, words, 100)
