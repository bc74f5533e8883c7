import inspect

import pytest
import torch

from bae_lens import step
from bae_lens.functional.binarize import step_of_largest


@pytest.mark.parametrize("surrogate", ["sigmoid", "straight_through", "authors"])
def test_fires_at_zero_and_above(surrogate):
    x = torch.tensor([-torch.inf, -1e-30, -0.0, 0.0, 1e-30, torch.inf, torch.nan])

    assert step(x, surrogate).tolist() == [0, 0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (2, 3, 4)])
def test_keeps_dtype_and_shape(dtype, shape):
    code = step(torch.randn(shape, dtype=dtype))

    assert code.dtype == dtype
    assert code.shape == shape


def test_sigmoid_surrogate_has_the_gradient_of_the_sigmoid():
    x = torch.linspace(-8, 8, 33, dtype=torch.float64, requires_grad=True)
    incoming = torch.randn(33, dtype=torch.float64)

    (expected,) = torch.autograd.grad(torch.sigmoid(x), x, incoming)
    (gradient,) = torch.autograd.grad(step(x), x, incoming)

    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_sigmoid_surrogate_by_hand():
    # s(ln 3) = 1 / (1 + 1/3) = 3/4, so the gradient is 2 * 3/4 * 1/4 = 3/8
    x = torch.tensor(3.0, dtype=torch.float64).log().requires_grad_()

    (2 * step(x, "sigmoid")).backward()

    torch.testing.assert_close(x.grad, torch.tensor(0.375, dtype=torch.float64))


def test_straight_through_passes_the_gradient_on():
    x, incoming = torch.randn(5, requires_grad=True), torch.randn(5)

    step(x, "straight_through").backward(incoming)

    assert x.grad is not None
    assert x.grad.equal(incoming)


def test_reference_squashes_the_incoming_gradient():
    # g (1 - g): 0.5 -> 0.25, -1 -> -2, 0.1 -> 0.09, whatever the input
    x = torch.tensor([-3.0, 0.0, 7.0], requires_grad=True)

    step(x, "authors").backward(torch.tensor([0.5, -1.0, 0.1]))

    torch.testing.assert_close(x.grad, torch.tensor([0.25, -2.0, 0.09]))


def test_step_of_the_largest_by_hand():
    x = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-2.0, -1.0, -3.0, 0.0]], requires_grad=True)
    code = step_of_largest(x, 2)
    assert code.tolist() == [[1, 0, 1, 0], [0, 0, 0, 1]]
    code.backward(torch.full_like(x, 2.0))
    assert x.grad is not None
    s = torch.sigmoid(x.detach())
    torch.testing.assert_close(x.grad, 2 * s * (1 - s) * torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]]))


def test_refuses_an_unknown_surrogate():
    with pytest.raises(ValueError, match="surrogate must be one of sigmoid, straight_through, authors, got 'ste'"):
        inspect.unwrap(step)(torch.zeros(1), "ste")
