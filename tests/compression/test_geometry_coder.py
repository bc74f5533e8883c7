import re
from hashlib import blake2b

import numpy as np
import pytest
import torch

from bae_lens.compression.geometry_coder import (
    LARGEST_CHANGE,
    MOST_FEATURES,
    N_BIASES,
    N_WEIGHTS,
    PRIOR_BITS,
    RATES,
    Geometry,
    GeometryCode,
    decode_geometry,
    sparse_enough,
)
from bae_lens.functional.geometric_prior import geometric_bits


def random_geometry(d_sae, d_in=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    return Geometry(W_dec.T / d_in, W_dec)


def code_of(geometry, n, seed=0):
    """Bits that are as the prior says."""
    rng, products = np.random.default_rng(seed), (geometry.W_dec @ geometry.W_enc).numpy()
    bits = np.zeros((n, len(products)), np.uint8)
    for j in range(len(products)):
        bits[:, j] = rng.random(n) < 1 / (1 + np.exp(2.5 - 1.5 * bits[:, :j] @ products[:j, j]))
    return bits


@pytest.mark.parametrize("d_sae", [1, 7, 8, 63, 64, 65, 200])
@pytest.mark.parametrize("n", [1, 2, 9, 300])
def test_code_comes_back_exactly(n, d_sae):
    geometry = random_geometry(d_sae)
    bits = np.random.default_rng(0).random((n, d_sae)) < 0.1
    bits &= np.cumsum(bits).reshape(bits.shape) <= n * d_sae // 8
    packed = np.packbits(bits, axis=1)
    code = GeometryCode(packed, d_sae, geometry)
    np.testing.assert_array_equal(decode_geometry(code.words, n, d_sae, geometry), packed)


def test_length_is_what_the_prior_says():
    geometry = random_geometry(150)
    bits = code_of(geometry, 6000)
    code = GeometryCode(np.packbits(bits, axis=1), 150, geometry)
    expected = geometric_bits(torch.from_numpy(bits).float(), geometry.W_enc, geometry.W_dec)
    assert code.joint_bits / 6000 == pytest.approx(expected.joint, rel=2e-3)
    assert 32 * len(code.words) == pytest.approx(code.joint_bits + 150 * PRIOR_BITS, abs=96)
    rates = bits.mean(0)
    assert expected.joint < -0.85 * (rates * np.log2(rates) + (1 - rates) * np.log2(1 - rates)).sum()


def test_a_mean_far_from_0_changes_nothing():
    """A feature that is always on says the same of every vector."""
    n, (encoder, decoder) = 3000, np.random.default_rng(0).standard_normal((2, 12, 60))
    bits = (np.random.default_rng(1).random((n, 60)) < 0.05).astype(np.uint8)
    bits[:, 0] = 1
    for j in range(20, 60):
        bits[:, j] = (bits[:, 1:j] @ (decoder.T @ encoder)[1:j, j] > 6) & (np.random.default_rng(j).random(n) < 0.9)
    lengths = []
    for always in (0.0, 30.0):
        decoder[:, 0] = always * encoder.mean(1)
        geometry = Geometry(torch.from_numpy(encoder), torch.from_numpy(decoder.T.copy()))
        code = GeometryCode(np.packbits(bits, axis=1), 60, geometry)
        np.testing.assert_array_equal(decode_geometry(code.words, n, 60, geometry), np.packbits(bits, axis=1))
        lengths.append(code.joint_bits)
    assert lengths[1] == pytest.approx(lengths[0], rel=0.01)


def test_products_by_hand():
    W_enc, W_dec = torch.tensor([[5.0, 1.0, 3.0]]), torch.tensor([[2.0], [-0.25], [7.0]])
    # 2 and (6, -0.75) in units in which the largest of a column has 15 bits.
    expected = [[0, 16384, 24576], [0, 0, -3072], [0, 0, 0]]
    np.testing.assert_array_equal(Geometry(W_enc, W_dec).products, expected)
    assert Geometry(W_enc, W_dec).products.dtype == np.int16


@pytest.mark.parametrize("scale", [2.0**-40, 1.0, 2.0**40])
def test_products_are_the_same_in_any_unit(scale):
    geometry = random_geometry(70)
    scaled = Geometry(geometry.W_enc * scale, geometry.W_dec / scale)
    np.testing.assert_array_equal(scaled.products, geometry.products)
    exact = np.triu((geometry.W_dec.double() @ geometry.W_enc.double()).numpy(), 1)
    unit = np.abs(exact).max(0)[1:] / np.abs(geometry.products.astype(float)).max(0)[1:]
    np.testing.assert_allclose(geometry.products[:, 1:] * unit, exact[:, 1:], atol=2e-3 * np.abs(exact).max())


def test_features_without_direction():
    geometry = Geometry(torch.zeros(4, 30), torch.zeros(30, 4))
    packed = np.packbits(np.random.default_rng(0).random((500, 30)) < 0.1, axis=1)
    code = GeometryCode(packed, 30, geometry)
    np.testing.assert_array_equal(decode_geometry(code.words, 500, 30, geometry), packed)


@pytest.mark.parametrize("on", [[], [3], [0, 1]])
def test_constant_features(on):
    """Of a code that is all off nothing is left to say."""
    geometry, bits = random_geometry(40), np.zeros((300, 40), bool)
    bits[:, on] = True
    code = GeometryCode(np.packbits(bits, axis=1), 40, geometry)
    assert code.joint_bits < 40
    assert len(code.words) <= -(-40 * PRIOR_BITS // 32) + 2
    np.testing.assert_array_equal(decode_geometry(code.words, 300, 40, geometry), np.packbits(bits, axis=1))


def test_a_dictionary_of_another_width():
    with pytest.raises(ValueError, match="40 features instead of 30"):
        decode_geometry(np.zeros(5, np.uint32), 10, 30, random_geometry(40))


def test_sums_are_exact_in_float32():
    assert LARGEST_CHANGE * MOST_FEATURES < 2**24


def test_rates_are_the_same_on_every_machine():
    """None is so near to the middle between two whole numbers that another exponential would round it otherwise."""
    assert blake2b((RATES * 2**24).astype("<u4").tobytes(), digest_size=8).hexdigest() == "371e6a27c0e26e26"
    exact = 2.0**24 / (1 + np.exp(-np.arange(-480, 481) / 32))
    assert np.abs(exact - np.floor(exact) - 0.5).min() > 1e-5
    assert (np.diff(RATES) >= 0).all()
    assert 0 < RATES[0] < RATES[-1] < 1


def test_numbers_of_a_feature_take_some_14_bits():
    assert (N_WEIGHTS, N_BIASES) == (129, 129)
    assert pytest.approx(14.02, abs=0.01) == PRIOR_BITS


def test_one_bit_in_eight():
    assert sparse_enough(100, 10, 80)
    assert not sparse_enough(101, 10, 80)


def test_words_that_are_not_of_these_vectors_are_refused():
    geometry = random_geometry(60)
    packed = np.packbits(code_of(geometry, 200), axis=1)
    words = GeometryCode(packed, 60, geometry).words
    for damaged in (words[:-1], words[1:], np.append(words, np.uint32(5))):
        with pytest.raises(ValueError, match=r"words|one in 8"):
            decode_geometry(damaged, 200, 60, geometry)
    with pytest.raises(ValueError, match=r"words|one in 8"):
        decode_geometry(words, 199, 60, geometry)
    with pytest.raises(ValueError, match="zero word"):
        decode_geometry(np.append(words, np.uint32(0)), 200, 60, geometry)


def test_garbage_is_refused_or_the_code_of_something():
    """Of few words every one may be; more are left over, or say that more bits are on than may be."""
    rng, geometry = np.random.default_rng(0), random_geometry(30)
    for _ in range(300):
        words = rng.integers(0, 2**32, rng.integers(0, 120), dtype=np.uint32)
        try:
            packed = decode_geometry(words, 100, 30, geometry)
        except ValueError as error:
            reason = str(error)
        else:
            reason = "words of a code"
            assert packed.shape == (100, 4)
            assert sparse_enough(int(np.bitwise_count(packed).sum()), 100, 30)
        assert re.search(r"words|one in 8", reason)
