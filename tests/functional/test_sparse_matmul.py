import pytest
import torch

import bae_lens.functional.sparse_matmul
from bae_lens.functional.sparse_matmul import NonzeroEntries, sparse_matmul, sums_rows


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
