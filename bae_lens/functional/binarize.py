"""The step that makes a code binary, and the gradients that stand in for its own (Eq. 2 and 6)."""

from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Surrogate = Literal["sigmoid", "straight_through", "authors"]
SURROGATES: tuple[str, ...] = get_args(Surrogate)


def step(x: Float[Tensor, "*shape"], surrogate: Surrogate = "sigmoid") -> Float[Tensor, "*shape"]:
    """1 where `x >= 0` and 0 elsewhere (Eq. 2), in the dtype of `x`; NaN gives 0.

    The step has no useful derivative of its own, so backward multiplies the incoming gradient `g` by a surrogate:

    - `"sigmoid"`: `s(x) * (1 - s(x))`, the derivative of the smoothed step (Eq. 6 of the paper).
    - `"straight_through"`: 1, the authors' `sign`.
    - `"authors"`: `1 - g`, so that the result is `g * (1 - g)`. This is the authors' `sign_s`, which squashes the
      incoming gradient instead of the input; it is here to reproduce their numbers.

    Raises ValueError for any other surrogate.
    """
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}, got {surrogate!r}")
    return cast(Tensor, _Step.apply(x, surrogate))


def step_of_largest(
    x: Float[Tensor, "*batch d_sae"], k: int, surrogate: Surrogate = "sigmoid"
) -> Float[Tensor, "*batch d_sae"]:
    """`step(x)` at the k largest of each row, 0 elsewhere, where there is no gradient either (arXiv 2509.25596)."""
    largest = torch.zeros_like(x).scatter_(-1, x.detach().topk(k, dim=-1, sorted=False).indices, 1.0)
    return step(x, surrogate) * largest


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, surrogate: Surrogate) -> Tensor:  # noqa: ARG004
        return (x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Surrogate], output: Tensor) -> None:  # noqa: ARG004
        x, ctx.surrogate = inputs
        if ctx.surrogate == "sigmoid":
            ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        if ctx.surrogate == "sigmoid":
            return torch.ops.aten.sigmoid_backward(grad, torch.sigmoid(ctx.saved_tensors[0])), None
        if ctx.surrogate == "authors":
            return grad * (1 - grad), None
        return grad, None
