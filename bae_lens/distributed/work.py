"""A list of works of which each is done by one process, alone."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from bae_lens.distributed.connection import check_connected, current, n_processes, naming_the_cause
from bae_lens.distributed.exchange import barrier

T = TypeVar("T")


def share(items: Iterable[T], work: Callable[[T], object]) -> None:
    """Does the work on each item in one process, each of which takes the next item when it is done with one.

    At work a process is alone: it shares nothing, and writes for itself. What the work finds it writes to files, and
    it leaves alone what is there already, so that any number of processes goes on. Returns when all items are done.
    """
    items = list(items)
    if n_processes() == 1:
        for item in items:
            work(item)
        return
    current().n_lists += 1
    while (index := _next_number(f"list {current().n_lists}")) < len(items):
        with _working_alone():
            work(items[index])
    barrier()


def _next_number(counter: str) -> int:
    """Counted from 0, by all processes together."""
    with naming_the_cause():
        return current().store.add(counter, 1) - 1


@contextmanager
def _working_alone() -> Iterator[None]:
    current().alone = True
    try:
        yield
    except KeyboardInterrupt:
        check_connected()
        raise
    finally:
        current().alone = False
