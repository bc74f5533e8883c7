"""Several processes as one: torchrun starts them, torch.distributed connects them, each takes its share of a batch.

All hold the same weights. Each encodes and decodes its own rows, gathers everybody's results and computes the loss of
the whole batch from them; its gradient goes back into its own rows only, and the sum over the processes of what reaches
the weights is the gradient. A single process shares nothing, and every function here then leaves things as they are.
Where they share features instead, see `saes.sharing`, each has all rows and its own features.

gloo connects processes on CPUs, nccl those on GPUs, which is untested.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn

JOIN_TIMEOUT = timedelta(minutes=5)  # to load torch, and to fail before
WORK_TIMEOUT = timedelta(minutes=30)  # between two exchanges, such as a batch of activations or a checkpoint
CLIP_MARGIN = 1e-6  # added to a norm by torch.nn.utils.clip_grad_norm_

_connected = False
_group: Any = None


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Joins the other processes, if torchrun started several, until the block ends; gives the device of this one.

    After an error the connections are left to the end of the process, by which the others notice. torchrun then ends
    them by SIGTERM, which raises ConnectionError here, unless this process is ending and has its own error to tell.
    """
    if n_launched() == 1:
        yield device
        return
    if os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        raise ValueError(
            "the processes must run on one machine, where they share files; start torchrun with --nnodes 1"
        )
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise ValueError(f"{n_launched()} processes need as many GPUs, but there are {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    connect(backend="cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    before = (
        signal.signal(signal.SIGTERM, _told_to_end) if threading.current_thread() is threading.main_thread() else None
    )
    yield device
    if before is not None:
        signal.signal(signal.SIGTERM, before)
    disconnect()


def _told_to_end(*_: Any) -> None:
    if sys.exc_info()[0] is None:
        raise ConnectionError(
            "this process was told to end, as all are when one of them has; an error that it printed says why, and the "
            "same command, with any number of processes, goes on from what is finished"
        )


def check_alike(settings: Mapping[str, Any]) -> None:
    """Raises ValueError in every process, naming what differs, unless all of them came here with equal settings."""
    if n_processes() == 1:
        return
    everyones: list[Any] = [None] * n_processes()
    with _naming_the_cause():
        dist.all_gather_object(everyones, {name: repr(value) for name, value in settings.items()}, _group)
    names = dict.fromkeys(name for each in everyones for name in each)
    values = {name: [each.get(name, "nothing") for each in everyones] for name in names}
    if differing := [name for name in names if len(set(values[name])) > 1]:
        named = "; ".join(f"{name}: {' and '.join(values[name])}" for name in differing)
        raise ValueError(f"the processes must be started alike, but differ in order of their rank ({named})")


def connect(**arguments: Any) -> None:
    """Joins the processes by `torch.distributed.init_process_group`. A group that others made is left alone.

    Raises ConnectionError if not all come within `JOIN_TIMEOUT`. Later, each waits `WORK_TIMEOUT` for the others.
    """
    global _connected, _group
    with _naming_the_cause():
        dist.init_process_group(timeout=JOIN_TIMEOUT, **arguments)
        _group = dist.new_group(timeout=WORK_TIMEOUT)
    _connected = True


def disconnect() -> None:
    """Parts them again, if they are joined."""
    global _connected
    if _connected:
        _connected = False
        dist.destroy_process_group()


def n_launched() -> int:
    """How many processes torchrun started, 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_available() and dist.is_torchelastic_launched() else 1


def launch_index() -> int:
    """Which of the processes that torchrun started this one is, counted from 0, joined or not."""
    return int(os.environ["RANK"]) if dist.is_available() and dist.is_torchelastic_launched() else 0


def n_processes() -> int:
    """How many processes are joined, 1 if none are."""
    return dist.get_world_size() if _connected else 1


def process_index() -> int:
    """Which of the joined processes this one is, counted from 0."""
    return dist.get_rank() if _connected else 0


def is_main_process() -> bool:
    """Whether this process is the one that writes what all of them need once."""
    return process_index() == 0


def shard(rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "own ..."]:
    """The share of this process. Those of all, one after another, are the whole; they differ by one row at most."""
    return rows.tensor_split(n_processes())[process_index()]


def gather_rows(rows: Shaped[Tensor, "own ..."], sent_as: torch.dtype | None = None) -> Shaped[Tensor, "n ..."]:
    """The rows of all processes one after another, differentiable with respect to this one's.

    They may differ in number, and travel as `sent_as`, which must hold their values: a code is whole in uint8.
    """
    if n_processes() == 1:
        return rows
    counts = [int(count) for count in _gathered(torch.tensor(len(rows)))]
    sent = rows.new_zeros((max(counts), *rows.shape[1:]), dtype=sent_as)
    sent[: len(rows)] = rows.detach()
    parts = [part[:count].to(rows.dtype) for part, count in zip(_gathered(sent), counts, strict=True)]
    parts[process_index()] = rows
    return torch.cat(parts)


def _gathered(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(n_processes())]
    with _naming_the_cause():
        dist.all_gather(parts, tensor, _group)
    return parts


def all_reduce_sum(make: Callable[[Any, int, int], Tensor], argument: Any) -> Tensor:
    """`make(argument, part, n_parts)` summed over all parts, of which each process makes one."""
    tensor = make(argument, process_index(), n_processes())
    if n_processes() > 1:
        with _naming_the_cause():
            dist.all_reduce(tensor, group=_group)
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
        with _naming_the_cause():
            dist.all_reduce(total, group=_group)
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
            with _naming_the_cause():
                dist.broadcast(columns, index, _group)
        yield columns


def gather_on_first(own: Shaped[Tensor, "..."], axis: int) -> Shaped[Tensor, "..."] | None:
    """What all processes pass, one after another along an axis, on the CPU of the first; None in the others."""
    sizes = [int(size) for size in _gathered(torch.tensor(own.shape[axis]))]
    own = own.detach().cpu().contiguous()
    with _naming_the_cause():
        if not is_main_process():
            dist.send(own, 0, _group)
            return None
        parts = [own]
        for index, size in enumerate(sizes[1:], 1):
            parts.append(own.new_empty(*own.shape[:axis], size, *own.shape[axis + 1 :]))
            dist.recv(parts[-1], index, _group)
    return torch.cat(parts, axis)


def sum_gradients(module: nn.Module) -> None:
    """From now on, every backward pass ends with the gradients of all processes added up in each of them.

    Every parameter that requires a gradient must get one in each pass.
    """

    def add_up(parameters: Mapping[str, nn.Parameter]) -> None:
        for parameter in parameters.values():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=_group)

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
        dist.all_reduce(own, group=_group)
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
            with _naming_the_cause():
                change(parameters)

    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(arrive)


def any_process(*holds: bool) -> tuple[bool, ...]:
    """Which of these hold in any process. Returns when all of them have asked."""
    if n_processes() == 1:
        return holds
    flags = torch.tensor(holds, dtype=torch.uint8)
    with _naming_the_cause():
        dist.all_reduce(flags, dist.ReduceOp.MAX, _group)
    return tuple(map(bool, flags))


def barrier() -> None:
    """Returns when all processes have come here."""
    any_process(False)


def leave_the_rest_to_the_first() -> None:
    """Parts the processes: the first goes on by itself, the others end, by SystemExit without an error."""
    if n_processes() > 1:
        first = is_main_process()
        disconnect()
        if not first:
            sys.exit(0)


@contextmanager
def _naming_the_cause() -> Iterator[None]:
    """Turns the many errors of a broken connection into ConnectionError with one line."""
    try:
        yield
    except RuntimeError as error:
        reason = (
            (str(error).splitlines() or [""])[0].split("] ", 1)[-1].split(". ")[0]
        )  # without file, line and good wishes
        raise ConnectionError(
            f"another process of this run has ended or cannot be reached ({reason}); an error that it printed says why"
        ) from error
