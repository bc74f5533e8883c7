import math

import pytest
import torch
from torch import Tensor

from bae_lens.functional.rate_distortion import (
    RatePoint,
    bits_at,
    covariance,
    gaussian_bits,
    gaussian_bound,
    pca_quantization,
    random_coding,
    sign_coding,
    water_level,
)

SPECTRUM = torch.tensor([16.0, 4.0, 1.0, 0.25])


def gaussian(n: int, variances: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(len(variances), len(variances), generator=generator))[0]
    return (torch.randn(n, len(variances), generator=generator) * variances.sqrt()) @ rotation + 3.0


def test_bound_by_hand():
    # Level 1: 1/2 log2(16) + 1/2 log2(4) = 3 bits, error 1 + 1 + 1 + 0.25.
    # Level 4: 1 bit on the first component, error 4 + 4 + 1 + 0.25.
    bound = gaussian_bound(SPECTRUM, torch.tensor([0.0, 1.0, 3.0]))
    assert bound.tolist() == pytest.approx([0.0, 1 - 9.25 / 21.25, 1 - 3.25 / 21.25], abs=1e-12)


def test_one_bit_quarters_the_error_of_one_component():
    assert gaussian_bound(torch.tensor([5.0]), torch.tensor(1.0)).item() == pytest.approx(0.75)


def test_bits_and_bound_are_inverse():
    bits = torch.tensor([[0.0, 0.7, 2.5], [3.0, 11.0, 40.0]], dtype=torch.float64)
    spectrum = torch.cat([SPECTRUM, torch.zeros(2)])
    torch.testing.assert_close(gaussian_bits(spectrum, gaussian_bound(spectrum, bits)), bits)


def test_bound_does_not_depend_on_order_or_scale():
    bits = torch.tensor([0.5, 4.0])
    torch.testing.assert_close(gaussian_bound(SPECTRUM, bits), gaussian_bound(7 * SPECTRUM.flip(0), bits))


def test_equal_components_share_the_bits():
    # d components of variance 1 at R bits: error d 2^(-2R/d).
    bound = gaussian_bound(torch.ones(8), torch.tensor([4.0, 16.0]))
    assert bound.tolist() == pytest.approx([1 - 2**-1, 1 - 2**-4])


def test_water_level_leaves_what_was_asked():
    share = torch.tensor([0.0, 0.3, 0.8, 0.99])
    level = water_level(SPECTRUM, share)
    left = torch.minimum(SPECTRUM.double(), level[:, None]).sum(1) / SPECTRUM.sum()
    torch.testing.assert_close(left, 1 - share.double())


@pytest.mark.parametrize(
    ("eigenvalues", "bits", "message"),
    [
        ([0.0, 0.0], 1.0, "finite variance"),
        ([1.0, math.nan], 1.0, "finite variance"),
        ([1.0, -0.5], 1.0, "at least 0, got -0.5"),
        ([1.0], -1.0, "bits must be at least 0, got -1.0"),
    ],
)
def test_bound_refuses(eigenvalues, bits, message):
    with pytest.raises(ValueError, match=message):
        gaussian_bound(torch.tensor(eigenvalues), torch.tensor(bits))


def test_explained_variance_of_one_has_no_rate():
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        gaussian_bits(SPECTRUM, torch.tensor(1.0))


def test_covariance_is_unbiased():
    vectors = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    # Column means 2 and 2: squares 8 and 6 and product 6, over n - 1 = 2.
    torch.testing.assert_close(covariance(vectors), torch.tensor([[4.0, 3.0], [3.0, 3.0]], dtype=torch.float64))


def test_quantized_gaussians_cost_a_quarter_bit_more_than_the_bound():
    # A uniform quantizer with entropy coding costs 1/2 log2(2 pi e / 12) = 0.2546 bits a component at high rate.
    variances = torch.ones(4)
    train, test = gaussian(40_000, variances), gaussian(40_000, variances)
    (point,) = pca_quantization(train, test, [0.98])
    excess = point.bits - gaussian_bits(variances, torch.tensor(point.explained_variance)).item()
    assert excess / 4 == pytest.approx(0.2546, abs=0.01)


def test_curve_lies_above_the_bound_and_near_its_targets():
    variances = torch.logspace(1, -2, 24)
    vectors = gaussian(24_000, variances)
    train, test = vectors[:20_000], vectors[20_000:]
    targets = [0.5, 0.7, 0.9, 0.98]
    curve = pca_quantization(train, test, targets)
    assert [point.bits for point in curve] == sorted(point.bits for point in curve)
    for point, target in zip(curve, targets, strict=True):
        assert point.explained_variance == pytest.approx(target, abs=0.2 * (1 - target) + 0.02)
        assert 0 < point.bits - gaussian_bits(variances, torch.tensor(point.explained_variance)).item() < 0.26 * 24


def test_one_fair_coin_costs_one_bit_and_leaves_nothing():
    generator = torch.Generator().manual_seed(0)
    coin = (torch.rand(4000, 1, generator=generator) < 0.5).float() @ torch.randn(1, 6, generator=generator)
    (point,) = pca_quantization(coin[:2000], coin[2000:], [0.9])
    assert point.bits == pytest.approx(1.0, abs=2e-3)
    assert point.explained_variance == pytest.approx(1.0, abs=1e-4)


def test_quantizer_is_judged_on_vectors_it_has_not_seen():
    train, test = gaussian(400, torch.ones(4)), 2 * gaussian(400, torch.ones(4), seed=0)
    (same,) = pca_quantization(train, train, [0.9])
    (other,) = pca_quantization(train, test, [0.9])
    assert other.bits > same.bits + 2  # the step is the training vectors', so twice the width is a bit more each


def test_components_and_rows_beyond_a_block_count():
    vectors = gaussian(20_000, torch.ones(40))
    (point,) = pca_quantization(vectors, vectors[:5000], [0.9])
    (half,) = pca_quantization(vectors[:, :20], vectors[:5000, :20], [0.9])
    assert point.bits == pytest.approx(2 * half.bits, rel=0.05)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (torch.randn(1, 3), torch.randn(4, 3), "train needs at least 2 vectors, got 1"),
        (torch.randn(4, 3), torch.randn(0, 3), "test needs at least 2 vectors, got 0"),
        (torch.randn(4, 3), torch.randn(4, 2), "same width, got 3 and 2"),
        (torch.randn(4, 3), torch.full((4, 3), math.inf), "test must be finite"),
        (torch.ones(4, 3), torch.randn(4, 3), "finite variance"),
    ],
)
def test_pca_refuses(train, test, message):
    with pytest.raises(ValueError, match=message):
        pca_quantization(train, test)


def test_signs_of_an_isotropic_gaussian_explain_two_over_pi_at_a_bit_a_dimension():
    x = 5 + 3 * torch.randn(40_000, 16)
    curve = sign_coding(x[:20_000], x[20_000:])
    assert len(curve) == 8
    for i, point in enumerate(curve, 1):
        assert point.bits == pytest.approx(2 * i, rel=1e-3)
        assert point.explained_variance == pytest.approx(i / 8 * 2 / math.pi, abs=6e-3)


def test_signs_explain_coins_and_cost_their_entropy():
    coin = (torch.rand(8000, 1) < 0.25).float()
    x = torch.cat([torch.zeros(8000, 1), 0.1 * coin, coin.flip(0)], dim=1)
    first, second, third = sign_coding(x, x, points=3)
    entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert first.bits == pytest.approx(entropy, rel=0.05)
    assert first.explained_variance == pytest.approx(1 / 1.01, abs=1e-3)
    assert second.bits == third.bits == pytest.approx(2 * entropy, rel=0.05)
    assert third.explained_variance == pytest.approx(1)


def test_signs_are_judged_on_vectors_they_were_not_learned_from():
    known, new = torch.randn(5000, 4), 10 + torch.randn(5000, 4)
    (point,) = sign_coding(known, new, points=1)
    assert point.bits == pytest.approx(0, abs=1e-3)
    assert point.explained_variance < -10
    with pytest.raises(ValueError, match="must be finite"):
        sign_coding(known, torch.full((3, 4), torch.nan))


def test_random_features_fire_equally_often_and_are_decoded_by_least_squares():
    x = 5 + torch.randn(4000, 3).square() @ torch.tensor([[2.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0.5, 1]])
    points = random_coding(x, x, 40, [8, 2])
    directions = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).double()
    centered = x.double() - x.double().mean(0)
    for point, l0 in zip(points, (2, 8), strict=True):
        rate = l0 / 40
        entropy = -(rate * math.log2(rate) + (1 - rate) * math.log2(1 - rate))
        assert point.bits == pytest.approx(40 * entropy, rel=1e-3)
        pre = centered @ directions
        code = (pre >= pre.sort(0, descending=True).values[int(rate * 4000) - 1]).double()
        code = torch.cat([code, torch.ones(4000, 1).double()], 1)
        left = centered - code @ torch.linalg.lstsq(code, centered, driver="gelsd").solution
        explained = 1 - left.square().sum() / centered.square().sum()
        assert point.explained_variance == pytest.approx(explained.item(), abs=1e-3)
        assert point.explained_variance < explained + 1e-6
    assert points[0].explained_variance < points[1].explained_variance - 0.05


def test_random_features_are_judged_on_vectors_they_were_not_learned_from():
    known, new = torch.randn(2000, 4), 10 + torch.randn(2000, 4)
    (point,) = random_coding(known, new, 16, [4])
    assert point.explained_variance < -10
    with pytest.raises(ValueError, match="same width, got 4 and 3"):
        random_coding(known, torch.randn(5, 3), 16, [4])
    assert random_coding(known, new, 16, []) == []
    for l0 in (0, 16):
        with pytest.raises(ValueError, match=f"l0 must lie between 0 and n_features = 16, got {l0}"):
            random_coding(known, new, 16, [4, l0])


def test_bits_at_goes_through_the_members_and_between_them_in_the_logarithm():
    curve = [RatePoint(10.0, 0.5), RatePoint(20.0, 0.75), RatePoint(0.0, 0.0)]
    assert bits_at(curve, 0.75) == pytest.approx(20.0)
    assert bits_at(curve, 1 - math.sqrt(0.5 * 0.25)) == pytest.approx(15.0)


def test_bits_at_leaves_out_members_that_others_beat():
    curve = [RatePoint(10.0, 0.5), RatePoint(20.0, 0.75), RatePoint(18.0, 0.4)]
    assert bits_at(curve, 0.6) == pytest.approx(bits_at(curve[:2], 0.6))


@pytest.mark.parametrize("share", [0.4, 0.9, math.nan])
def test_bits_at_does_not_extrapolate(share):
    with pytest.raises(ValueError, match=r"between 0\.5 and 0\.75"):
        bits_at([RatePoint(10.0, 0.5), RatePoint(20.0, 0.75)], share)


def test_bits_at_of_no_codes():
    with pytest.raises(ValueError, match="nothing"):
        bits_at([], 0.5)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**60, 2.0**100])
def test_scale_of_the_vectors_makes_no_difference(scale):
    x = torch.randn(600, 6)
    assert torch.equal(covariance(x * scale), covariance(x) * scale**2)
    scaled, plain = (torch.tensor(pca_quantization(y[:300], y[300:])) for y in (x * scale, x))
    assert torch.allclose(scaled, plain)
