import inspect
from math import log2

import pytest
import torch

from bae_lens import marginal_entropy
from bae_lens.functional.losses import bit_price, reconstruction_error, tangent_entropy


def all_words(k: int) -> torch.Tensor:
    """The 2^k words of k bits."""
    return (torch.arange(2**k)[:, None] >> torch.arange(k) & 1).double()


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_all_words_of_k_bits_have_k_bits(k):
    assert marginal_entropy(all_words(k).mean(0)) == k


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_printed_form_gives_half_a_bit_to_a_fair_coin(k):
    assert marginal_entropy(all_words(k).mean(0), "printed") == k / 2


def test_entropy_by_hand():
    # p = 1/4: 1/4 * 2 + 3/4 * log2(4/3) = 0.5 + 0.75 * 0.41503750 = 0.81127812; 1/4 * 2 = 0.5 as printed
    # p = 1/2: 1; 1/2 as printed
    rate = torch.tensor([0.25, 0.5], dtype=torch.float64)

    assert marginal_entropy(rate).item() == pytest.approx(1.8112781244591328, rel=1e-15)
    assert marginal_entropy(rate, "printed").item() == pytest.approx(1.0, rel=1e-15)


def test_entropy_is_summed_over_the_last_axis_only():
    rate = torch.tensor([[0.5, 0.5, 0.0], [0.5, 1.0, 0.0]])

    assert marginal_entropy(rate).tolist() == [2, 1]


@pytest.mark.parametrize("form", ["bernoulli", "printed"])
def test_entropy_gradient(form):
    rate = torch.rand(3, 4, dtype=torch.float64).clamp(0.05, 0.95).requires_grad_()

    assert torch.autograd.gradcheck(lambda p: marginal_entropy(p, form), rate)


def test_entropy_gradient_by_hand():
    # d/dp = log2((1 - p) / p): log2 3 at 1/4, 0 at 1/2, -log2 3 at 3/4
    rate = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, requires_grad=True)

    marginal_entropy(rate).backward()

    torch.testing.assert_close(rate.grad, torch.tensor([log2(3), 0, -log2(3)], dtype=torch.float64))


@pytest.mark.parametrize("form", ["bernoulli", "printed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_constant_features_have_no_entropy_and_no_gradient(form, dtype):
    rate = torch.tensor([0.0, 1.0, 0.25], dtype=dtype, requires_grad=True)

    bits = marginal_entropy(rate, form)
    bits.backward()

    assert bits == marginal_entropy(torch.tensor([0.25], dtype=dtype), form)
    assert rate.grad is not None
    assert rate.grad[:2].tolist() == [0, 0]
    assert rate.grad[2].isfinite()
    assert rate.grad[2] != 0


@pytest.mark.parametrize("n_features", [0, 1])
def test_entropy_of_few_features(n_features):
    assert marginal_entropy(torch.full((n_features,), 0.5)) == n_features


@pytest.mark.parametrize("form", ["bernoulli", "printed"])
class TestPricedEntropy:
    def test_is_the_entropy_up_to_the_tangent_and_its_tangent_from_there(self, form):
        rate = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None].requires_grad_()
        at = torch.tensor([0.25], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(marginal_entropy(at, form), at)

        priced = tangent_entropy(rate, 0.25, form)

        low, high = rate[:, 0] <= 0.25, rate[:, 0] >= 0.25
        torch.testing.assert_close(priced[low], marginal_entropy(rate, form)[low])
        torch.testing.assert_close(priced[high], marginal_entropy(at, form) + slope * (rate[high, 0] - 0.25))
        (gradient,) = torch.autograd.grad(priced.sum(), rate)
        torch.testing.assert_close(gradient[high], slope.expand_as(gradient[high]))

    def test_gradient(self, form):
        rate = torch.rand(3, 8, dtype=torch.float64).clamp(0.01, 0.99).requires_grad_()

        assert torch.autograd.gradcheck(lambda p: tangent_entropy(p, 0.3, form), rate)

    def test_a_tangent_at_1_changes_nothing(self, form):
        rate = torch.rand(50)

        assert tangent_entropy(rate, 1.0, form).equal(marginal_entropy(rate, form))

    def test_a_silent_feature_is_not_pushed_and_one_that_is_always_on_is(self, form):
        rate = torch.tensor([0.0, 1.0], requires_grad=True)

        tangent_entropy(rate, 0.1, form).backward()

        assert rate.grad is not None
        assert rate.grad[0] == 0
        assert rate.grad[1] > 1

    @pytest.mark.parametrize("tangent_rate", [0.0, -0.1, 0.5, 1.1])
    def test_refuses_a_tangent_elsewhere(self, form, tangent_rate):
        with pytest.raises(ValueError, match="between 0 and 1/e, or be 1 for no tangent, got"):
            tangent_entropy(torch.rand(3), tangent_rate, form)


def test_priced_entropy_by_hand():
    # At 1/4 the entropy is 0.81127812 and rises by log2 3 = 1.58496250 a unit: 1/2 more costs 0.79248125.
    assert tangent_entropy(torch.tensor([0.75], dtype=torch.float64), 0.25).item() == pytest.approx(1.60375937481971)


def test_refuses_an_unknown_entropy():
    with pytest.raises(ValueError, match="entropy must be one of bernoulli, printed, got 'shannon'"):
        inspect.unwrap(marginal_entropy)(torch.rand(2), "shannon")


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        # errors (3, 4) and (0, 1): squared norms 25 and 1, norms 5 and 1
        ("sum", [[9, 16], [0, 1]]),
        ("mean", [[4.5, 8], [0, 0.5]]),
        ("l2_norm", [[5], [1]]),
    ],
)
def test_reconstruction_error_by_hand(convention, expected):
    target = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    sae_out = target + torch.tensor([[3.0, 4.0], [0.0, 1.0]])

    assert reconstruction_error(sae_out, target, convention).tolist() == expected


@pytest.mark.parametrize("convention", ["sum", "mean", "l2_norm"])
def test_reconstruction_gradient(convention):
    sae_out = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, dtype=torch.float64)

    assert torch.autograd.gradcheck(lambda out: reconstruction_error(out, target, convention).sum(-1).mean(), sae_out)


def test_mean_convention_is_the_squared_error_averaged_over_samples_and_dimensions():
    sae_out, target = torch.randn(2, 6, 5)

    loss = reconstruction_error(sae_out, target, "mean").sum(-1).mean()

    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(sae_out, target))


@pytest.mark.parametrize("convention", ["sum", "mean", "l2_norm"])
def test_perfect_reconstruction_has_no_error_and_no_gradient(convention):
    sae_out = torch.ones(2, 3, requires_grad=True)

    reconstruction_error(sae_out, torch.ones(2, 3), convention).sum().backward()

    assert sae_out.grad is not None
    assert sae_out.grad.eq(0).all()


def test_refuses_an_unknown_convention():
    with pytest.raises(ValueError, match="reconstruction must be one of sum, mean, l2_norm, got 'rms'"):
        inspect.unwrap(reconstruction_error)(torch.rand(1, 2), torch.rand(1, 2), "rms")


@pytest.mark.parametrize(("convention", "expected"), [("sum", 0.3), ("mean", 2.4), ("l2_norm", 3.0)])
def test_price_of_a_bit_by_hand(convention, expected):
    # per squared error the mean over 8 dimensions falls by 1/8, and a norm of 5 by 1/10
    price = bit_price(torch.tensor(0.3), torch.tensor(5.0), 8, convention)

    assert price.item() == pytest.approx(expected)


@pytest.mark.parametrize("convention", ["sum", "mean", "l2_norm"])
def test_price_of_a_bit_balances_the_loss(convention):
    target = torch.randn(1, 8, dtype=torch.float64)
    sae_out = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    loss = reconstruction_error(sae_out, target, convention).sum()
    squared_error = (sae_out - target).square().sum()
    (of_loss,) = torch.autograd.grad(loss, sae_out, retain_graph=True)
    (of_error,) = torch.autograd.grad(squared_error, sae_out)

    price = bit_price(torch.tensor(0.3, dtype=torch.float64), loss.detach(), 8, convention)

    torch.testing.assert_close(of_loss * price, 0.3 * of_error)


def test_price_of_a_bit_refuses_an_unknown_convention():
    with pytest.raises(ValueError, match="reconstruction must be one of sum, mean, l2_norm, got 'median'"):
        inspect.unwrap(bit_price)(torch.tensor(0.3), torch.tensor(5.0), 8, "median")
