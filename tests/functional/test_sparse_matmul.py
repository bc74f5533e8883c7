import pytest
import torch

import bae_lens.functional.sparse_matmul
from bae_lens.functional.sparse_matmul import NonzeroEntries, SparseProducts, sparse_matmul, sums_rows


def sparse(n: int, k: int, density: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.randn(n, k) * (torch.rand(n, k) < density)).to(dtype)


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(bae_lens.functional.sparse_matmul, "GATHER_BELOW", 2.0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (5, 7, 3), (64, 33, 17)])
def test_equals_the_dense_product(n, k, m, density):
    matrix, dense = sparse(n, k, density), torch.randn(k, m, dtype=torch.float64)

    torch.testing.assert_close(sparse_matmul(matrix, dense), matrix @ dense)


@pytest.mark.usefixtures("always")
def test_gradients():
    matrix = sparse(6, 5, 0.4).requires_grad_()
    dense = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(sparse_matmul, (matrix, dense))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keeps_dtype_and_leading_axes(dtype):
    matrix, dense = sparse(12, 7, 0.3, dtype), torch.randn(7, 4).to(dtype)

    product = sparse_matmul(matrix.reshape(2, 6, 7), dense)

    assert product.dtype == dtype
    torch.testing.assert_close(product, (matrix @ dense).reshape(2, 6, 4), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("always")
def test_takes_strided_factors():
    matrix, dense = sparse(9, 8, 0.3).T, torch.randn(4, 9, dtype=torch.float64).T

    torch.testing.assert_close(sparse_matmul(matrix, dense), matrix @ dense)


def test_transposed_entries():
    matrix = sparse(9, 4, 0.4)

    torch.testing.assert_close(NonzeroEntries.of(matrix).transposed() @ torch.eye(9, dtype=torch.float64), matrix.T)


def test_rows_are_summed_where_few_are_named():
    few, many = torch.zeros(10, 10), torch.zeros(10, 10)
    few.view(-1)[:9] = 1
    many.view(-1)[:10] = 1

    assert sums_rows(few)
    assert not sums_rows(many)
    assert not sums_rows(few[:0])
    with torch.autocast("cpu", torch.bfloat16):
        assert not sums_rows(few)


def gradients(matrix: torch.Tensor, dense: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Product, and what comes back to both factors where only some of its entries count."""
    matrix, dense = matrix.clone().requires_grad_(), dense.clone().requires_grad_()
    product = matrix @ dense
    (product * mask).square().sum().backward()
    assert matrix.grad is not None
    assert dense.grad is not None
    return [product.detach(), matrix.grad, dense.grad]


@pytest.mark.parametrize("code_density", [0.02, 0.5])
@pytest.mark.parametrize("gradient_density", [0.02, 0.5])
def test_products_within_equal_dense_ones_forward_and_backward(code_density, gradient_density, monkeypatch):
    matrix, dense = sparse(40, 50, code_density), torch.randn(50, 30, dtype=torch.float64)
    mask = (torch.rand(40, 30) < gradient_density).double()
    expected = gradients(matrix, dense, mask)
    summed = []
    of = NonzeroEntries.of
    monkeypatch.setattr(NonzeroEntries, "of", lambda factor: summed.append(factor.shape) or of(factor))

    with SparseProducts():
        actual = gradients(matrix, dense, mask)

    torch.testing.assert_close(actual, expected)
    assert summed == [(40, 50)] * (code_density < 0.1) + [(40, 30)] * (gradient_density < 0.1)


def test_products_within_leave_other_shapes_and_autocast_alone():
    batch, vector, matrix = torch.randn(2, 3, 4), torch.randn(4), torch.randn(4, 5)

    with SparseProducts():
        torch.testing.assert_close(batch @ matrix, torch.einsum("abc,cd->abd", batch, matrix))
        torch.testing.assert_close(vector @ matrix, (vector[:, None] * matrix).sum(0))
        with torch.autocast("cpu", torch.bfloat16):
            assert (batch[0] @ matrix).dtype == torch.bfloat16
