"""Products with a mostly-zero matrix, such as a sparse code, which sum the rows that it names where that is faster."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag
from torch.overrides import TorchFunctionMode
from typing_extensions import override

MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
GATHER_BELOW = 0.1  # density under which summing rows takes less time than a dense product, on a CPU


def sparse_matmul(matrix: Float[Tensor, "*batch k"], dense: Float[Tensor, "k m"]) -> Float[Tensor, "*batch m"]:
    """`matrix @ dense`, by the way that the density of `matrix` makes fast; differentiable with respect to both.

    Where `sums_rows` says so, the product and the gradient of `dense` add up only the rows of the other factor that
    nonzero entries name. The gradient of `matrix` reaches its zeros as well, as a surrogate does, and is a sum of rows
    only if what comes back is sparse.
    Sums of rows have no second derivative, and raise RuntimeError where one is asked for.
    """
    rows = matrix.reshape(-1, matrix.shape[-1])
    if not sums_rows(rows):
        return matrix @ dense
    return cast(Tensor, _SparseMatmul.apply(rows, dense)).reshape(*matrix.shape[:-1], -1)


@torch.no_grad()
def sums_rows(matrix: Float[Tensor, "n k"]) -> bool:
    """Whether `matrix` is sparse enough that products with it are sums of rows; never on a GPU, in a compiled graph or
    under autocast, where dense products are faster or the only ones that are understood.
    """
    return _can_sum_rows(matrix) and int(matrix.count_nonzero()) < GATHER_BELOW * matrix.numel()


def _can_sum_rows(matrix: Tensor) -> bool:
    return not (matrix.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))


@dataclass(frozen=True)
class NonzeroEntries:
    """The nonzero entries of a matrix on a CPU, row by row, as the left factor of products."""

    row: Int[Tensor, " entries"]
    column: Int[Tensor, " entries"]
    """Of each entry."""
    value: Float[Tensor, " entries"]
    """Of each entry, not 0."""
    shape: tuple[int, int]
    """Of the matrix."""

    @classmethod
    def of(cls, matrix: Float[Tensor, "n k"]) -> "NonzeroEntries":
        """The entries of a matrix on a CPU."""
        flat = matrix.reshape(-1)
        index = torch.from_numpy(np.flatnonzero(flat.bool().numpy()))  # a third of the time of torch's nonzero
        n, k = matrix.shape
        return cls(index // k, index % k, flat[index], (n, k))

    def transposed(self) -> "NonzeroEntries":
        """The entries of the transposed matrix."""
        column, order = self.column.sort(stable=True)
        return NonzeroEntries(column, self.row[order], self.value[order], (self.shape[1], self.shape[0]))

    @cached_property
    def start(self) -> Int[Tensor, " n"]:
        """Where each row's entries begin."""
        return torch.searchsorted(self.row, torch.arange(self.shape[0]))

    def __matmul__(self, dense: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
        value = self.value.to(dense.dtype)
        return embedding_bag(self.column, dense.contiguous(), self.start, mode="sum", per_sample_weights=value)


class SparseProducts(TorchFunctionMode):
    """While it is entered, products of two matrices on a CPU are made as `sparse_matmul` makes them, and so are those
    of their backward pass: for dictionaries whose code is sparse and whose own products are dense.
    """

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in MATMULS and not kwargs and all(map(_is_dense_matrix, args)):
            return _SparseMatmul.apply(*args)
        return func(*args, **(kwargs or {}))


def _is_dense_matrix(factor: Tensor) -> bool:
    return factor.ndim == 2 and factor.layout == torch.strided and _can_sum_rows(factor)


class _SparseMatmul(torch.autograd.Function):
    """A product; of it and the two of its backward pass, each is a sum of rows where `sums_rows` says so."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, dense: Tensor) -> Tensor:
        ctx.entries = _entries(matrix)  # kept for backward, so not in setup_context
        ctx.save_for_backward(matrix, dense)
        return torch.mm(matrix, dense) if ctx.entries is None else ctx.entries @ dense

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        matrix, dense = ctx.saved_tensors
        (grad,) = grad_outputs
        of_code, of_grad = ctx.entries, _entries(grad)
        to_matrix = to_dense = None
        if ctx.needs_input_grad[0]:
            to_matrix = torch.mm(grad, dense.T) if of_grad is None else of_grad @ dense.T
        if ctx.needs_input_grad[1]:
            if of_code is not None:
                to_dense = of_code.transposed() @ grad
            else:
                to_dense = torch.mm(matrix.T, grad) if of_grad is None else (of_grad.transposed() @ matrix).T
        return to_matrix, to_dense


def _entries(matrix: Tensor) -> NonzeroEntries | None:
    return NonzeroEntries.of(matrix) if sums_rows(matrix) else None
