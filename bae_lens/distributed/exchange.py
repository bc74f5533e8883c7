"""What processes tell one another: values, rows, sums. A single process has everything already."""

import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from bae_lens.distributed.connection import (
    current,
    finish,
    is_main_process,
    n_processes,
    naming_the_cause,
    process_index,
)


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order; anything that pickles."""
    if n_processes() == 1:
        return [value]
    own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    return [pickle.loads(part.numpy().tobytes()) for part in _everyones_rows(own)]


def shard(rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "own ..."]:
    """The share of this process. Those of all, one after another, are the whole; they differ by one row at most."""
    return rows.tensor_split(n_processes())[process_index()]


def sharers(n: int) -> Int[Tensor, " n"]:
    """Which process has each of n rows, as `shard` shares them."""
    parts = torch.arange(n).tensor_split(n_processes())
    return torch.cat([torch.full_like(part, index) for index, part in enumerate(parts)])


def redistribute(
    held: Shaped[Tensor, "held ..."], holder: Int[Tensor, " n"], place: Int[Tensor, " n"], receiver: Int[Tensor, " n"]
) -> Shaped[Tensor, "own ..."]:
    """Of n rows, each at a place among those that its holder has, the ones that this process is to receive, in order.

    Which process holds a row, where, and which receives it, is known alike to all.
    """
    if n_processes() == 1:
        return held[place]
    sent, received = ((side == process_index()).nonzero().flatten() for side in (holder, receiver))
    sent = sent[receiver[sent].sort(stable=True).indices]
    by_holder = holder[received].sort(stable=True).indices
    coming, going = (
        torch.bincount(side, minlength=n_processes()).tolist() for side in (holder[received], receiver[sent])
    )
    leaving, arriving = held[place[sent]], held.new_empty(len(received), *held.shape[1:])
    finish(dist.all_to_all_single, arriving, leaving, coming, going, current().group)
    del leaving
    rows = torch.empty_like(arriving)
    rows[by_holder] = arriving
    return rows


def gather_rows(rows: Shaped[Tensor, "own ..."], sent_as: torch.dtype | None = None) -> Shaped[Tensor, "n ..."]:
    """The rows of all processes one after another, differentiable with respect to this one's.

    They may differ in number, and travel as `sent_as`, which must hold their values: a code is whole in uint8.
    """
    if n_processes() == 1:
        return rows
    parts = [part.to(rows.dtype) for part in _everyones_rows(rows.detach(), sent_as)]
    parts[process_index()] = rows
    return torch.cat(parts)


def _everyones_rows(rows: Tensor, sent_as: torch.dtype | None = None) -> list[Tensor]:
    counts = [int(count) for count in _gathered(torch.tensor(len(rows)))]
    sent = rows.new_zeros((max(counts), *rows.shape[1:]), dtype=sent_as)
    sent[: len(rows)] = rows
    return [part[:count] for part, count in zip(_gathered(sent), counts, strict=True)]


def _gathered(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(n_processes())]
    finish(partial(dist.all_gather, parts), tensor, current().group)
    return parts


def all_reduce_sum(make: Callable[[Any, int, int], Tensor], argument: Any) -> Tensor:
    """`make(argument, part, n_parts)` summed over all parts, of which each process makes one."""
    tensor = make(argument, process_index(), n_processes())
    if n_processes() > 1:
        finish(dist.all_reduce, tensor, dist.ReduceOp.SUM, current().group)
    return tensor


def sum_parts(part: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The sum of what all processes pass, differentiable with respect to this one's part.

    All must go on to compute the same from it: what comes back is then the gradient of the whole already.
    """
    return part if n_processes() == 1 else cast(Tensor, _Sum.apply(part))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(part: Tensor) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        finish(dist.all_reduce, total, dist.ReduceOp.SUM, current().group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is needed to go back."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # noqa: ARG004
        return grad_outputs[0]


def in_turn(own: Shaped[Tensor, "n own"]) -> Iterator[Shaped[Tensor, "n other"]]:
    """The columns that each process passes, this one's among them, in order; all processes must go through all."""
    widths = [int(width) for width in _gathered(torch.tensor(own.shape[1]))]
    for index, width in enumerate(widths):
        columns = own.contiguous() if index == process_index() else own.new_empty(len(own), width)
        if width > 0:
            finish(dist.broadcast, columns, index, current().group)
        yield columns


def gather_on_first(own: Shaped[Tensor, "..."], axis: int) -> Shaped[Tensor, "..."] | None:
    """What all processes pass, one after another along an axis, on the CPU of the first; None in the others."""
    sizes = [int(size) for size in _gathered(torch.tensor(own.shape[axis]))]
    own = own.detach().cpu().contiguous()
    with naming_the_cause():
        if not is_main_process():
            dist.send(own, 0, current().group)
            return None
        parts = [own]
        for index, size in enumerate(sizes[1:], 1):
            parts.append(own.new_empty(*own.shape[:axis], size, *own.shape[axis + 1 :]))
            dist.recv(parts[-1], index, current().group)
    return torch.cat(parts, axis)


def any_process(*holds: bool) -> tuple[bool, ...]:
    """Which of these hold in any process. Returns when all of them have asked."""
    if n_processes() == 1:
        return holds
    flags = torch.tensor(holds, dtype=torch.uint8)
    finish(dist.all_reduce, flags, dist.ReduceOp.MAX, current().group)
    return tuple(map(bool, flags))


def barrier() -> None:
    """Returns when all processes have come here."""
    any_process(False)
