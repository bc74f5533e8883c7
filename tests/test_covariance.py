from fractions import Fraction

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bae_lens.covariance
from bae_lens import covariance_penalty


@pytest.fixture(params=[1, 3, 1024])
def tile(request, monkeypatch):
    monkeypatch.setattr(bae_lens.covariance, "TILE", request.param)


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
    centred code times the signs.
    """
    h, n = code.long(), len(code)
    scaled = n * (h.T @ h) - torch.outer(h.sum(0), h.sum(0))
    scaled.fill_diagonal_(0)
    centred = n * h - h.sum(0)
    return Fraction(int(scaled.abs().sum()), n * (n - 1)), 2 * (centred @ scaled.sign()).double() / (n * (n - 1))


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


def test_signs_are_exact_up_to_4096_rows():
    code = torch.cat([all_words(12)[:-1], all_words(12)[1:2]])
    code[::5] = 1 - code[::5]

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


def test_never_holds_the_covariance_matrix(monkeypatch):
    monkeypatch.setattr(bae_lens.covariance, "TILE", 8)
    n, d_sae, sizes = 4, 64, []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(tensor.numel() for tensor in [result] if isinstance(tensor, torch.Tensor))
            return result

    with Sizes():
        penalty_and_gradient(random_code(n, d_sae))

    assert max(sizes) == n * d_sae


@pytest.mark.parametrize("n", [0, 1])
def test_refuses_fewer_than_two_rows(n):
    with pytest.raises(ValueError, match=f"at least 2 rows, got {n}; use a larger batch"):
        covariance_penalty(torch.zeros(n, 3))
