import math

import pytest
import torch

from bae_lens.entropy.synthetic import biased_coins, correlated_coins, oblique_directions, random_directions, with_noise


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def empirical_joint_bits(coins: torch.Tensor) -> float:
    share = coins.unique(dim=0, return_counts=True)[1] / len(coins)
    return -(share * share.log2()).sum().item()


def test_random_directions_unpack_and_are_orthonormal(generator):
    data = random_directions(4000, 3, 8, generator)
    vectors, coefficients = data
    assert vectors.shape == (4000, 8)
    torch.testing.assert_close(data.directions @ data.directions.T, torch.eye(3))
    torch.testing.assert_close(vectors @ data.directions.T, coefficients)
    assert data.joint_bits == data.marginal_bits == 3.0
    assert empirical_joint_bits(coefficients) == pytest.approx(3.0, abs=0.01)


def test_same_generator_same_data():
    first, again, other = (
        random_directions(50, 3, 8, torch.Generator().manual_seed(seed)).vectors for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_biased_coins_by_hand(generator):
    data = biased_coins(200_000, [0.25, 0.5, 0.0], 4, generator)
    # h(1/4) = 2 - 3/4 log2 3, h(1/2) = 1, h(0) = 0.
    assert data.joint_bits == pytest.approx(3 - 0.75 * math.log2(3))
    torch.testing.assert_close(data.coefficients.mean(0), torch.tensor([0.25, 0.5, 0.0]), atol=5e-3, rtol=0)
    assert empirical_joint_bits(data.coefficients) == pytest.approx(data.joint_bits, abs=0.01)


def test_correlated_coins_are_known_together_and_one_by_one(generator):
    data = correlated_coins(200_000, 5, 8, generator, flip=0.11)
    assert data.marginal_bits == 5.0
    assert data.joint_bits == pytest.approx(1 + 4 * 0.49992, abs=1e-4)  # h(0.11) is half a bit
    assert empirical_joint_bits(data.coefficients) == pytest.approx(data.joint_bits, abs=0.01)
    torch.testing.assert_close(data.coefficients.mean(0), torch.full((5,), 0.5), atol=5e-3, rtol=0)


def test_oblique_directions_have_the_cosine(generator):
    data = oblique_directions(10, 4, 8, generator, cosine=0.6)
    expected = torch.full((4, 4), 0.6).fill_diagonal_(1.0)
    torch.testing.assert_close(data.directions @ data.directions.T, expected)


def test_more_directions_than_dimensions_are_unit_vectors(generator):
    data = oblique_directions(10, 12, 4, generator)
    torch.testing.assert_close(data.directions.norm(dim=1), torch.ones(12))
    assert data.joint_bits == 12.0


def test_noise_has_its_share_and_leaves_the_coins(generator):
    clean = random_directions(50_000, 4, 16, generator)
    noisy = with_noise(clean, 4.0, generator)
    noise = noisy.vectors - clean.vectors
    assert (clean.vectors.var(0).sum() / noise.var(0).sum()).item() == pytest.approx(4.0, rel=0.02)
    assert torch.equal(noisy.coefficients, clean.coefficients)
    assert noisy.joint_bits == 4.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: random_directions(4, 9, 8, g), "between 1 and the 8 dimensions, got 9"),
        (lambda g: random_directions(4, 0, 8, g), "got 0"),
        (lambda g: biased_coins(4, [0.5, 1.5], 8, g), r"rates must lie in \[0, 1\]"),
        (lambda g: biased_coins(4, [math.nan], 8, g), r"rates must lie in \[0, 1\]"),
        (lambda g: correlated_coins(4, 3, 8, g, flip=-0.1), "flip must lie"),
        (lambda g: oblique_directions(4, 3, 8, g, cosine=1.0), "cosine must lie"),
        (lambda g: with_noise(random_directions(4, 2, 8, g), 0.0, g), "snr must be positive, got 0.0"),
    ],
)
def test_impossible_data_are_refused(make, message, generator):
    with pytest.raises(ValueError, match=message):
        make(generator)
