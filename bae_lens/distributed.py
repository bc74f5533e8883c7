"""Several processes as one: torchrun starts them, torch.distributed connects them, each takes its share of the work.

Work is shared in two ways. Of a training step, all hold the same weights: each encodes and decodes its own rows,
gathers everybody's results and computes the loss of the whole batch from them; its gradient goes back into its own rows
only, and the sum over the processes of what reaches the weights is the gradient. (Where they share features instead,
see `saes.sharing`, each has all rows and its own features.) Of a list of works, such as trainings, each is done by one
process, `share`, which is alone while it does it; what comes out are files. A single process shares nothing, and every
function here then leaves things as they are.

Processes of several machines may share a folder or not. Those that do are at one home: one of them writes what all need
once.

gloo connects processes on CPUs, nccl those on GPUs, which is untested.
"""

import os
import pickle
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

JOIN_TIMEOUT = timedelta(minutes=5)  # to load torch, and to fail before
WORK_TIMEOUT = timedelta(days=7)  # between two exchanges: one may wait for as long as another trains
BEAT_SECONDS = 2.0  # between signs of life
SILENCE = timedelta(seconds=15)  # after which another process counts as lost
LAST_SECONDS = 10  # that a process has to end in, from when it lost another
GLANCE = timedelta(seconds=1)  # between looks at whether all others are there, in an exchange that takes longer
CLIP_MARGIN = 1e-6  # added to a norm by torch.nn.utils.clip_grad_norm_

_connected = False
_alone = False  # at work on its own item of a list
_group: Any = None
_store: Any = None
_homes: list[int] = []  # of the processes: the number of the folder that each of them sees
_heads: Any = None  # the group of the first processes of all homes
_shared_lists = 0
_watch: "_Watch | None" = None


@contextmanager
def joined(device: str, folder: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """Joins the other processes, if torchrun started several, until the block ends; gives the device of this one.

    The block ends in all of them together. Raises ValueError as `check_alike` for the settings with which they were
    started, and as `find_homes` for the folder in which they write.

    After an error the connections are left to the end of the process, by which the others notice. torchrun then ends
    them by SIGTERM, which raises ConnectionError here, unless this process is ending and has its own error to tell.
    """
    if n_launched() == 1:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        n_here, n_gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if int(os.environ["LOCAL_RANK"]) >= n_gpus:
            raise ValueError(f"{n_here} processes on a machine need as many GPUs, but there are {n_gpus}")
        torch.cuda.set_device(device)
    connect(backend="cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _told_to_end) if in_main_thread else None
    check_alike(settings)
    find_homes(folder, int(os.environ["GROUP_RANK"]))
    yield device
    disconnect()
    if before is not None:
        signal.signal(signal.SIGTERM, before)


def _told_to_end(*_: Any) -> None:
    if sys.exc_info()[0] is None:
        check_connected()
        raise ConnectionError(
            "this process was told to end, as all are when one of them has; an error that it printed says why, and the "
            "same command, with any number of processes, goes on from what is finished"
        )


def check_alike(settings: Mapping[str, Any]) -> None:
    """Raises ValueError in every process, naming what differs, unless all of them came here with equal settings.

    The version of bae_lens is one of these.
    """
    own = {name: repr(value) for name, value in {"bae_lens": version("bae-lens"), **settings}.items()}
    everyones = gather(own)
    names = dict.fromkeys(name for each in everyones for name in each)
    values = {name: [each.get(name, "nothing") for each in everyones] for name in names}
    if differing := [name for name in names if len(set(values[name])) > 1]:
        named = "; ".join(f"{name}: {' and '.join(values[name])}" for name in differing)
        raise ValueError(f"the processes must be started alike, but differ in order of their rank ({named})")


def connect(backend: str, init_method: str = "env://", rank: int = -1, world_size: int = -1) -> None:
    """Joins the processes by `torch.distributed.init_process_group`.

    Raises ConnectionError if not all come within `JOIN_TIMEOUT`. From then on they give one another signs of life: one
    that is silent for `SILENCE` is lost, and every exchange raises ConnectionError.
    """
    global _connected, _group, _store, _homes, _watch
    with _naming_the_cause():
        meeting = rendezvous(init_method, rank, world_size, timeout=JOIN_TIMEOUT)
        store, rank, world_size = next(iter(meeting))
        # torchrun keeps its store when it starts all processes again, and with it the addresses of those that ended.
        store = PrefixStore(f"start {store.add(f'starts of {rank}', 1)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=JOIN_TIMEOUT)
        _group = dist.new_group(timeout=WORK_TIMEOUT)
        _store = PrefixStore("bae_lens", store)
        _watch = _Watch(dist.new_group(timeout=SILENCE, backend="gloo"))
    _homes = world_size * [0]
    _connected = True


def disconnect() -> None:
    """Parts them again, if they are joined, once all have come here."""
    global _connected, _watch
    if _connected:
        assert _watch is not None
        _watch.end()
        _connected, _watch = False, None
        dist.destroy_process_group()
        signal.alarm(0)


class _Watch(threading.Thread):
    """Signs of life: all processes meet every two seconds, whatever they are at, until all want to part."""

    def __init__(self, group: Any) -> None:
        super().__init__(daemon=True)
        self.lost: str | None = None
        """Why another process cannot be reached, if one cannot."""
        self._group, self._leaving = group, threading.Event()
        self.start()

    def run(self) -> None:
        while True:
            leaving = torch.tensor([self._leaving.is_set()], dtype=torch.uint8)
            try:
                dist.all_reduce(leaving, dist.ReduceOp.MIN, self._group)
            except RuntimeError as error:
                self._lose(str(error))
                return
            if leaving:
                return
            self._leaving.wait(BEAT_SECONDS)

    def _lose(self, reason: str) -> None:
        """Tells the process to end, and ends it if it waits for the lost one where nothing can be told."""
        self.lost = _first_words(reason)
        signal.alarm(LAST_SECONDS + 1)  # for what waits where Python does not come
        main = threading.main_thread()
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL and main.ident is not None:
            signal.pthread_kill(main.ident, signal.SIGTERM)
        if not self._leaving.wait(LAST_SECONDS):
            sys.stderr.write(f"error in process {dist.get_rank()}: {_cause(self.lost)}\n")
            os._exit(2)

    def end(self) -> None:
        """Returns when all processes want to part, or one is lost."""
        self._leaving.set()
        self.join()


def check_connected() -> None:
    """Raises ConnectionError if another process was lost."""
    if _watch is not None and _watch.lost is not None:
        raise ConnectionError(_cause(_watch.lost))


def end(status: int) -> NoReturn:
    """Ends this process: at once if another was lost, for which connections would wait."""
    if _watch is not None and _watch.lost is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def find_homes(folder: Path, machine: int) -> None:
    """Finds out which processes see the same folder, of which those on one machine, by its number, do.

    Raises ValueError if some machines share it and others do not.
    """
    global _homes, _heads
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".run.json.{gather(uuid.uuid4().hex)[0]}.partial"
    if is_main_process():
        mark.touch()
    barrier()
    machines = gather((machine, mark.exists()))
    if is_main_process():
        mark.unlink()
    seeing = {number for number, sees in machines if sees}
    _homes = [0 if number in seeing else number for number, _ in machines]
    if len(seeing) > 1 and any(_homes):
        blind = ", ".join(map(str, sorted(set(_homes) - {0})))
        raise ValueError(
            f"{folder} must be shared by all machines or by none, but {len(seeing)} share it and number {blind} does "
            "not; mount it there too"
        )
    heads = [_homes.index(home) for home in sorted(set(_homes))]
    if len(heads) > 1:
        _heads = dist.new_group(heads, timeout=WORK_TIMEOUT, backend="gloo")
    barrier()


def share(items: Iterable[T], work: Callable[[T], object]) -> None:
    """Does the work on each item in one process, each of which takes the next item when it is done with one.

    At work a process is alone: it shares nothing, and writes for itself. What the work finds it writes to files, and
    it leaves alone what is there already, so that any number of processes goes on. Returns when all items are done.
    """
    global _shared_lists
    items = list(items)
    if n_processes() == 1:
        for item in items:
            work(item)
        return
    _shared_lists += 1
    while (index := _next_number(f"list {_shared_lists}")) < len(items):
        with _working_alone():
            work(items[index])
    barrier()


def _next_number(counter: str) -> int:
    """Counted from 0, by all processes together."""
    with _naming_the_cause():
        return _store.add(counter, 1) - 1


@contextmanager
def _working_alone() -> Iterator[None]:
    global _alone
    _alone = True
    try:
        yield
    except KeyboardInterrupt:
        check_connected()
        raise
    finally:
        _alone = False


def n_launched() -> int:
    """How many processes torchrun started, 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_available() and dist.is_torchelastic_launched() else 1


def launch_index() -> int:
    """Which of the processes that torchrun started this one is, counted from 0, joined or not."""
    return int(os.environ["RANK"]) if dist.is_available() and dist.is_torchelastic_launched() else 0


def n_processes() -> int:
    """How many processes are joined and at the same work, 1 if none are."""
    return dist.get_world_size() if _connected and not _alone else 1


def process_index() -> int:
    """Which of these this one is, counted from 0."""
    return dist.get_rank() if _connected and not _alone else 0


def is_main_process() -> bool:
    """Whether this process is the first of all, which says what all have to say."""
    return not _connected or dist.get_rank() == 0


def is_first_at_home() -> bool:
    """Whether this process writes what all that see its folder need once."""
    return place_at_home()[0] == 0


def place_at_home() -> tuple[int, int]:
    """Which of the processes that see its folder this one is, counted from 0, and how many they are."""
    if n_processes() == 1:
        return 0, 1
    there = [index for index, home in enumerate(_homes) if home == _homes[process_index()]]
    return there.index(process_index()), len(there)


def n_homes() -> int:
    """In how many folders, on as many machines, the processes that are at the same work write."""
    return len(set(_homes)) if n_processes() > 1 else 1


def all_homes(holds: bool) -> bool:
    """Whether it holds in some process of every home."""
    theirs = list(zip(_homes, gather(holds), strict=True)) if n_processes() > 1 else [(0, holds)]
    return all(any(held for home, held in theirs if home == which) for which, _ in theirs)


def home_index() -> int:
    """Which of the homes this process is at, counted from 0."""
    return sorted(set(_homes)).index(_homes[process_index()]) if n_processes() > 1 else 0


def send_between_homes(tensor: Shaped[Tensor, "..."], home: int) -> None:
    """Fills the tensor with what it is at that home; for the first processes of all homes together."""
    source = _homes.index(sorted(set(_homes))[home])
    _finish(dist.broadcast, tensor, source, _heads)


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order; anything that pickles."""
    if n_processes() == 1:
        return [value]
    own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    return [pickle.loads(part.numpy().tobytes()) for part in _everyones_rows(own)]


def shard(rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "own ..."]:
    """The share of this process. Those of all, one after another, are the whole; they differ by one row at most."""
    return rows.tensor_split(n_processes())[process_index()]


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
    _finish(partial(dist.all_gather, parts), tensor, _group)
    return parts


def all_reduce_sum(make: Callable[[Any, int, int], Tensor], argument: Any) -> Tensor:
    """`make(argument, part, n_parts)` summed over all parts, of which each process makes one."""
    tensor = make(argument, process_index(), n_processes())
    if n_processes() > 1:
        _finish(dist.all_reduce, tensor, dist.ReduceOp.SUM, _group)
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
        _finish(dist.all_reduce, total, dist.ReduceOp.SUM, _group)
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
            _finish(dist.broadcast, columns, index, _group)
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
            _finish(dist.all_reduce, parameter.grad, dist.ReduceOp.SUM, _group)

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
        _finish(dist.all_reduce, own, dist.ReduceOp.SUM, _group)
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


def any_process(*holds: bool) -> tuple[bool, ...]:
    """Which of these hold in any process. Returns when all of them have asked."""
    if n_processes() == 1:
        return holds
    flags = torch.tensor(holds, dtype=torch.uint8)
    _finish(dist.all_reduce, flags, dist.ReduceOp.MAX, _group)
    return tuple(map(bool, flags))


def barrier() -> None:
    """Returns when all processes have come here."""
    any_process(False)


def _finish(exchange: Callable[..., Any], tensor: Any, *arguments: Any) -> None:
    """Returns when the exchange is done. Raises ConnectionError if another process is lost before."""
    with _naming_the_cause():
        check_connected()
        work = exchange(tensor, *arguments, async_op=True)
        if tensor.device.type != "cpu":
            work.wait()  # which returns at once; the device waits
            return
        while True:
            try:
                work.wait(GLANCE)
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # raises what went wrong; nothing, if it was done just now
                    return
                check_connected()
            else:
                return


@contextmanager
def _naming_the_cause() -> Iterator[None]:
    """Turns the many errors of a broken connection into ConnectionError with one line."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(_cause(_first_words(str(error)))) from error


def _cause(reason: str) -> str:
    return f"another process of this run has ended or cannot be reached ({reason}); an error that it printed says why"


def _first_words(error: str) -> str:
    """Without file, line and good wishes."""
    return (error.splitlines() or [""])[0].split("] ", 1)[-1].split(". ")[0]
