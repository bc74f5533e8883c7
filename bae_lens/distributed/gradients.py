"""Gradients of several processes as one, at the end of every backward pass."""

from collections.abc import Callable, Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bae_lens.distributed.connection import current, finish, n_processes

CLIP_MARGIN = 1e-6  # added to a norm by torch.nn.utils.clip_grad_norm_


def sum_gradients(module: nn.Module) -> None:
    """From now on, every backward pass ends with the gradients of all processes added up in each of them.

    Every parameter that requires a gradient must get one in each pass.
    """

    def add_up(parameters: Mapping[str, nn.Parameter]) -> None:
        for parameter in parameters.values():
            assert parameter.grad is not None
            finish(dist.all_reduce, parameter.grad, dist.ReduceOp.SUM, current().group)

    _after_backward(module, add_up)


def clip_gradients_together(module: nn.Module, alike: Collection[str]) -> None:
    """From now on, every backward pass ends with the gradients of all processes, taken as one, of norm 1 at most.

    So SAELens clips a dictionary's gradients, which finds nothing left to clip where each process has a part of them.
    Those named in `alike` are the same in all, and count once. Every parameter that requires a gradient must get one.
    """

    def clip(parameters: Mapping[str, nn.Parameter]) -> None:
        squares = {
            name: torch.linalg.vector_norm(parameter.grad, dtype=torch.float64).square()  # pyright: ignore[reportArgumentType]
            for name, parameter in parameters.items()
        }
        own = torch.stack([square for name, square in squares.items() if name not in alike]).sum()
        finish(dist.all_reduce, own, dist.ReduceOp.SUM, current().group)
        norm = (own + sum(square for name, square in squares.items() if name in alike)).sqrt()
        factor = (1 / (norm + CLIP_MARGIN)).clamp(max=1.0)
        for parameter in parameters.values():
            assert parameter.grad is not None
            parameter.grad.mul_(factor)

    _after_backward(module, clip)


def _after_backward(module: nn.Module, change: Callable[[Mapping[str, nn.Parameter]], None]) -> None:
    """Where there are several processes, has each backward pass end with a change of the gradients, in all of them."""
    if n_processes() == 1:
        return
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    arrived = set()

    def arrive(parameter: Tensor) -> None:
        # Not one by one: processes may disagree on the order, since the graph of a sparse code is another.
        arrived.add(parameter)
        if len(arrived) == len(parameters):
            arrived.clear()
            change(parameters)

    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(arrive)
