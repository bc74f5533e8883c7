import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bae_lens.functional.covariance
import bae_lens.functional.sparse_matmul
from bae_lens import covariance_penalty
from bae_lens.functional.covariance import code_times_signs, others_times_signs


@pytest.fixture(params=[("dense", 1), ("dense", 3), ("dense", 1024), ("sparse", 1), ("sparse", 3), ("sparse", 128)])
def tile(request, monkeypatch):
    """Both ways of making the covariances, in parts of several sizes."""
    way, size = request.param
    monkeypatch.setattr(bae_lens.functional.covariance, "TILE", size)
    monkeypatch.setattr(bae_lens.functional.covariance, "BLOCK", size)
    monkeypatch.setattr(bae_lens.functional.sparse_matmul, "GATHER_BELOW", 2.0 if way == "sparse" else 0.0)


def random_code(n: int, d_sae: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.rand(n, d_sae) < torch.rand(d_sae)).to(dtype)


def all_words(k: int) -> torch.Tensor:
    return (torch.arange(2**k)[:, None] >> torch.arange(k) & 1).float()


def penalty_and_gradient(code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    code = code.clone().requires_grad_()
    penalty = covariance_penalty(code)
    penalty.backward()
    assert code.grad is not None
    return penalty.detach(), code.grad


def exact_penalty_and_gradient(code: torch.Tensor) -> tuple[Fraction, torch.Tensor]:
    """In whole numbers: `n (n - 1) cov = n h^T h - c c^T` for column sums c; the gradient is `2 / (n - 1)` times the
    centered code times the signs.
    """
    h, n = code.long(), len(code)
    scaled = n * (h.T @ h) - torch.outer(h.sum(0), h.sum(0))
    scaled.fill_diagonal_(0)
    centered = n * h - h.sum(0)
    return Fraction(int(scaled.abs().sum()), n * (n - 1)), 2 * (centered @ scaled.sign()).double() / (n * (n - 1))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize(("n", "d_sae"), [(2, 5), (7, 1), (7, 2), (50, 7), (13, 9)])
def test_equals_the_off_diagonal_of_torch_cov(n, d_sae):
    code = random_code(n, d_sae)

    cov = torch.cov(code.T).reshape(d_sae, d_sae)

    torch.testing.assert_close(covariance_penalty(code), (cov - cov.diag().diag()).abs().sum(), rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize(("n", "d_sae"), [(2, 5), (3, 8), (50, 7), (96, 10), (777, 4)])
def test_equals_whole_number_arithmetic_in_float32(n, d_sae):
    code = random_code(n, d_sae, torch.float32)

    penalty, gradient = penalty_and_gradient(code)
    exact, exact_gradient = exact_penalty_and_gradient(code)

    assert penalty.item() == pytest.approx(float(exact), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("tile")
def test_signs_are_exact_up_to_4096_rows():
    code = torch.cat([all_words(12)[:-1], all_words(12)[1:2]])
    code[::5] = 1 - code[::5]

    _, gradient = penalty_and_gradient(code)

    torch.testing.assert_close(gradient.double(), exact_penalty_and_gradient(code)[1], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("n", [4097, 65_537])
def test_signs_are_exact_beyond(n):
    # Two coins that agree very nearly as often as chance: n^2 cov is small beside n^2, which float32 cannot count.
    code = torch.zeros(n, 3)
    code[: n // 2, 0] = 1
    code[: n // 4, 1] = 1
    code[n // 2 : n // 2 + n // 4 + 1, 1] = 1
    code[::7, 2] = 1

    _, gradient = penalty_and_gradient(code)

    torch.testing.assert_close(gradient.double(), exact_penalty_and_gradient(code)[1], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("repeats", [1, 3, 7])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_all_words_of_k_bits_have_no_covariance_and_no_gradient(k, repeats):
    penalty, gradient = penalty_and_gradient(all_words(k).repeat(repeats, 1))

    assert penalty == 0
    assert gradient.eq(0).all()


def test_by_hand():
    # Means 2/3 and 1/3; products of deviations 1/3 * 2/3, -2/3 * -1/3, 1/3 * -1/3 add up to 1/3.
    # Over n - 1 = 2 that is a covariance of 1/6, counted for both orders: 1/3. (Over n = 3 it would be 2/9.)
    # The gradient of a feature is 2 / (n - 1) times the deviation of the other one.
    code = torch.tensor([[1, 1], [0, 0], [1, 0]], dtype=torch.float64)

    penalty, gradient = penalty_and_gradient(code)

    assert penalty.item() == pytest.approx(1 / 3, rel=1e-15)
    torch.testing.assert_close(gradient * 3, torch.tensor([[2, 1], [-1, -2], [-1, 1]], dtype=torch.float64))


@pytest.mark.usefixtures("tile")
def test_gradient():
    feature_acts = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(covariance_penalty, feature_acts)


def test_gradient_scales_with_the_incoming_one():
    code = random_code(9, 4).requires_grad_()

    (-3 * covariance_penalty(code)).backward()

    assert code.grad is not None
    torch.testing.assert_close(code.grad, -3 * penalty_and_gradient(code.detach())[1])


def test_negative_covariance_counts_like_positive():
    code = random_code(20, 2)
    mirrored = torch.stack([code[:, 0], 1 - code[:, 1]], dim=1)

    torch.testing.assert_close(covariance_penalty(mirrored), covariance_penalty(code))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("n", [2, 7, 50])
def test_constant_features_contribute_nothing(n):
    varying = random_code(n, 4, torch.float32)
    constant = torch.tensor([0.0, 1.0]).expand(n, 2)

    penalty, gradient = penalty_and_gradient(torch.cat([varying, constant], dim=1))

    torch.testing.assert_close(penalty, covariance_penalty(varying))
    torch.testing.assert_close(gradient[:, :4], penalty_and_gradient(varying)[1])
    assert gradient[:, 4:].eq(0).all()


def test_one_feature_has_no_covariance_with_others():
    penalty, gradient = penalty_and_gradient(random_code(8, 1))

    assert penalty == 0
    assert gradient.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_codes_are_counted_in_float32(dtype):
    code = random_code(1000, 12, torch.float32)

    penalty, gradient = penalty_and_gradient(code.to(dtype))

    assert penalty.dtype == torch.float32
    assert penalty == covariance_penalty(code)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, penalty_and_gradient(code)[1].to(dtype))


def test_autocast_changes_nothing():
    code = random_code(1000, 12, torch.float32)

    with torch.autocast("cpu", torch.bfloat16):
        penalty, gradient = penalty_and_gradient(code)

    assert penalty == covariance_penalty(code)
    assert gradient.equal(penalty_and_gradient(code)[1])


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_never_holds_the_covariance_matrix(monkeypatch, density):
    monkeypatch.setattr(bae_lens.functional.covariance, "TILE", 8)
    monkeypatch.setattr(bae_lens.functional.covariance, "BLOCK", 4)
    n, d_sae, sizes = 4, 64, []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(tensor.numel() for tensor in [result] if isinstance(tensor, torch.Tensor))
            return result

    with Sizes():
        penalty_and_gradient((torch.rand(n, d_sae) < density).double())

    assert max(sizes) == n * d_sae


@pytest.mark.parametrize("n", [0, 1])
def test_refuses_fewer_than_two_rows(n):
    with pytest.raises(ValueError, match=f"at least 2 rows, got {n}; use a larger batch"):
        covariance_penalty(torch.zeros(n, 3))


@pytest.mark.parametrize("sample", [2, 3, 5])
def test_sampled_penalty_is_unbiased_with_the_variance_of_a_pair_sample(monkeypatch, sample):
    code = random_code(40, 5)
    subsets = list(itertools.combinations(range(5), sample))
    whole, gradient = penalty_and_gradient(code)
    penalties, gradients = [], []
    for subset in subsets:
        monkeypatch.setattr(torch, "randperm", lambda *_, drawn=subset, **__: torch.tensor([*drawn, 0, 0, 0]))
        acts = code.clone().requires_grad_()
        penalties.append(covariance_penalty(acts, sample))
        penalties[-1].backward()
        gradients.append(acts.grad)

    # Each pair is drawn with probability m (m - 1) / (d (d - 1)), and so on for two pairs with 3 or 4 features.
    pair, triple, quadruple = (math.perm(sample, k) / math.perm(5, k) for k in (2, 3, 4))
    cov = torch.cov(code.T).abs().fill_diagonal_(0)
    same, shares = cov.square().sum() / 2, cov.sum(0)
    touching = shares.square().sum() - 2 * same
    disjoint = (cov.sum() / 2) ** 2 - same - touching
    variance = 4 * ((pair * same + triple * touching + quadruple * disjoint) / pair**2) - whole**2
    torch.testing.assert_close(torch.stack(penalties).mean(), whole)
    torch.testing.assert_close(torch.stack(gradients).mean(0), gradient)
    torch.testing.assert_close(torch.stack(penalties).var(correction=0), variance)


def test_standard_error_of_a_sample_is_about_twice_the_variation_over_its_root():
    code = (torch.rand(256, 2000) < torch.rand(2000) ** 2 / 5).double()
    whole = covariance_penalty(code)
    shares = (code - code.mean(0)).T @ (code - code.mean(0))
    shares = shares.abs().fill_diagonal_(0).sum(0)
    generator = torch.Generator().manual_seed(0)

    estimates = torch.stack([covariance_penalty(code, 100, generator) for _ in range(200)])

    expected = 2 * shares.std() / shares.mean() / 100**0.5
    assert (estimates.std() / whole).item() == pytest.approx(expected.item(), rel=0.15)


@pytest.mark.parametrize("sample", [1, 4])
def test_refuses_a_sample_without_pairs_or_beyond_the_features(sample):
    with pytest.raises(ValueError, match=f"between 2 features and d_sae = 3, got {sample}"):
        covariance_penalty(torch.zeros(5, 3), sample)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("n_parts", [2, 3, 7])
def test_parts_of_the_work_add_up_and_are_of_equal_size(n_parts, monkeypatch):
    code, signs, calls = random_code(20, 13), bae_lens.functional.covariance._signs, []

    def counted(products, *counts):
        calls.append(len(counts))
        return signs(products, *counts)

    monkeypatch.setattr(bae_lens.functional.covariance, "_signs", counted)
    whole = bae_lens.functional.covariance.code_times_signs(code)
    n_blocks, sizes, parts = len(calls), [], []
    for part in range(n_parts):
        calls.clear()
        parts.append(bae_lens.functional.covariance.code_times_signs(code, part, n_parts))
        sizes.append(len(calls))
    assert torch.equal(torch.stack(parts).sum(0), whole)
    assert sum(sizes) == n_blocks
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("n_own", [0, 1, 5, 13])
def test_some_features_among_themselves_and_with_the_others_make_the_whole(n_own):
    code = random_code(20, 13)
    own, others = code[:, :n_own], code[:, n_own:]
    assert torch.equal(code_times_signs(own) + others_times_signs(others, own), code_times_signs(code)[:, :n_own])
