"""Who sees whose files: processes that see one folder are at one home, where one of them writes what all need once."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from bae_lens.distributed.connection import (
    WORK_TIMEOUT,
    current,
    finish,
    is_main_process,
    n_processes,
    process_index,
)
from bae_lens.distributed.exchange import barrier, gather


@contextmanager
def made_if_used(folder: Path) -> Iterator[None]:
    """A folder that is there for as long as the block runs, and afterwards only if something is in it, or it was."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # of a folder with something in it
            for path in missing:
                path.rmdir()


def find_homes(folder: Path, machine: int) -> None:
    """Finds out which processes see the same folder, which is there, of which those on one machine, by its number, do.

    Raises ValueError if some machines share it and others do not.
    """
    mark = folder / f".run.json.{gather(uuid.uuid4().hex)[0]}.partial"
    if is_main_process():
        mark.touch()
    barrier()
    machines = gather((machine, mark.exists()))
    if is_main_process():
        mark.unlink()
    seeing = {number for number, sees in machines if sees}
    homes = [0 if number in seeing else number for number, _ in machines]
    if len(seeing) > 1 and any(homes):
        blind = ", ".join(map(str, sorted(set(homes) - {0})))
        raise ValueError(
            f"{folder} must be shared by all machines or by none, but {len(seeing)} share it and number {blind} does "
            "not; mount it there too"
        )
    current().homes = homes
    heads = [homes.index(home) for home in sorted(set(homes))]
    if len(heads) > 1:
        current().heads = dist.new_group(heads, timeout=WORK_TIMEOUT, backend="gloo")
    barrier()


def is_first_at_home() -> bool:
    """Whether this process writes what all that see its folder need once."""
    return place_at_home()[0] == 0


def place_at_home() -> tuple[int, int]:
    """Which of the processes that see its folder this one is, counted from 0, and how many they are."""
    if n_processes() == 1:
        return 0, 1
    homes = current().homes
    there = [index for index, home in enumerate(homes) if home == homes[process_index()]]
    return there.index(process_index()), len(there)


def n_homes() -> int:
    """In how many folders, on as many machines, the processes that are at the same work write."""
    return len(set(current().homes)) if n_processes() > 1 else 1


def all_homes(holds: bool) -> bool:
    """Whether it holds in some process of every home."""
    theirs = list(zip(current().homes, gather(holds), strict=True)) if n_processes() > 1 else [(0, holds)]
    return all(any(held for home, held in theirs if home == which) for which, _ in theirs)


def home_index() -> int:
    """Which of the homes this process is at, counted from 0."""
    return sorted(set(current().homes)).index(current().homes[process_index()]) if n_processes() > 1 else 0


def send_between_homes(tensor: Shaped[Tensor, "..."], home: int) -> None:
    """Fills the tensor with what it is at that home; for the first processes of all homes together."""
    source = current().homes.index(sorted(set(current().homes))[home])
    finish(dist.broadcast, tensor, source, current().heads)
