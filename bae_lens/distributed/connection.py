"""The connections between processes: how they are made, watched and given up, and which process this one is."""

import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from bae_lens.memory import is_shortage

JOIN_TIMEOUT = timedelta(minutes=5)  # to load torch, and to fail before
CONNECT_TIMEOUT = timedelta(seconds=15)  # once all have come
LOOK_SECONDS = 0.1  # between looks at who has come
WORK_TIMEOUT = timedelta(days=7)  # between two exchanges: one may wait for as long as another trains
BEAT_SECONDS = 2.0  # between signs of life
SILENCE = timedelta(seconds=15)  # after which another process counts as lost
LAST_SECONDS = 10  # that a process has to end in, from when it lost another
GLANCE = timedelta(seconds=1)  # between looks at whether all others are there, in an exchange that takes longer


@dataclass
class Connection:
    """What connects this process with the others."""

    group: Any
    """Of all, for their work."""
    store: Any
    """What they write for one another to read."""
    watch: "Watch"
    """Whether all are alive."""
    homes: list[int] = field(default_factory=list)
    """Of the processes: the number of the folder that each of them sees."""
    heads: Any = None
    """The group of the first processes of all homes; None if there is one home."""
    n_lists: int = 0
    """Lists of works that they have shared."""
    alone: bool = False
    """Whether this process is at work on its own item of a list."""


_connection: Connection | None = None


def current() -> Connection:
    """The connection of this process, which must be joined."""
    assert _connection is not None
    return _connection


def connect(backend: str, init_method: str = "env://", rank: int = -1, world_size: int = -1) -> None:
    """Joins the processes by `torch.distributed.init_process_group`.

    Raises ConnectionError if not all come within `JOIN_TIMEOUT`, or if they do not reach one another within
    `CONNECT_TIMEOUT` from then. Afterwards they give one another signs of life: one that is silent for `SILENCE` is
    lost, and every exchange raises ConnectionError.
    """
    global _connection
    with naming_the_cause():
        meeting = rendezvous(init_method, rank, world_size, timeout=JOIN_TIMEOUT)
        store, rank, world_size = next(iter(meeting))
        store = PrefixStore(_agreed_name(store, rank, world_size), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=CONNECT_TIMEOUT)
        watch = Watch(dist.new_group(timeout=SILENCE, backend="gloo"))  # before all that may wait for longer
        group, own = dist.new_group(timeout=WORK_TIMEOUT), PrefixStore("bae_lens", store)
    _connection = Connection(group, own, watch, world_size * [0])


def _agreed_name(store: Any, rank: int, world_size: int) -> str:
    """A name that these processes give their start, and that no other start of them has.

    torchrun may keep its store when it starts processes again, with the addresses of those that ended, and its agents
    do not count starts alike. So each process writes a new name in its place. All names together are the name of the
    start, once every process has counted itself as having seen them; one that has ended does not, so that a set with
    its name in it is never complete.

    Raises ConnectionError if not all come within `JOIN_TIMEOUT`, and if another process takes this one's place.
    """
    own, seen, end = uuid.uuid4().hex, "", time.monotonic() + JOIN_TIMEOUT.total_seconds()
    places = [f"process {each} of {world_size}" for each in range(world_size)]
    store.set(places[rank], own)
    while time.monotonic() < end:
        if store.check(places):
            names = [store.get(place).decode() for place in places]
            if names[rank] != own:
                raise ConnectionError(_cause(f"another one has come as {places[rank]}"))
            everyone = " ".join(names)
            if store.add(everyone, int(everyone != seen)) == world_size:
                return everyone
            seen = everyone
        time.sleep(LOOK_SECONDS)
    raise ConnectionError(_cause(f"not all {world_size} have come within {JOIN_TIMEOUT}"))


def disconnect() -> None:
    """Parts them again, if they are joined, once all have come here."""
    global _connection
    if _connection is not None:
        _connection.watch.end()
        _connection = None
        dist.destroy_process_group()
        signal.alarm(0)


class Watch(threading.Thread):
    """Signs of life: all processes meet every two seconds, whatever they are at, until all want to part."""

    def __init__(self, group: Any) -> None:
        super().__init__(daemon=True)
        self.lost: str | None = None
        """Why another process cannot be reached, if one cannot."""
        self._group, self._leaving = group, threading.Event()
        self.start()

    def run(self) -> None:
        """The thread's work: one meeting after another, until all want to part or one cannot be reached."""
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
    if _connection is not None and _connection.watch.lost is not None:
        raise ConnectionError(_cause(_connection.watch.lost))


def end(status: int) -> NoReturn:
    """Ends this process: at once if another was lost, for which connections would wait."""
    if _connection is not None and _connection.watch.lost is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def n_launched() -> int:
    """How many processes torchrun started, 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_available() and dist.is_torchelastic_launched() else 1


def launch_index() -> int:
    """Which of the processes that torchrun started this one is, counted from 0, joined or not."""
    return int(os.environ["RANK"]) if dist.is_available() and dist.is_torchelastic_launched() else 0


def n_processes() -> int:
    """How many processes are joined and at the same work, 1 if none are."""
    return 1 if _connection is None or _connection.alone else dist.get_world_size()


def process_index() -> int:
    """Which of these this one is, counted from 0."""
    return 0 if _connection is None or _connection.alone else dist.get_rank()


def is_main_process() -> bool:
    """Whether this process is the first of all, which says what all have to say."""
    return _connection is None or dist.get_rank() == 0


def finish(exchange: Callable[..., Any], tensor: Any, *arguments: Any) -> None:
    """Returns when the exchange is done. Raises ConnectionError if another process is lost before."""
    with naming_the_cause():
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
def naming_the_cause() -> Iterator[None]:
    """Turns the many errors of a broken connection into ConnectionError with one line."""
    try:
        yield
    except RuntimeError as error:
        if is_shortage(error):
            raise
        raise ConnectionError(_cause(_first_words(str(error)))) from error


def _cause(reason: str) -> str:
    return f"another process of this run has ended or cannot be reached ({reason}); an error that it printed says why"


def _first_words(error: str) -> str:
    """Without file, line and good wishes."""
    return (error.splitlines() or [""])[0].split("] ", 1)[-1].split(". ")[0]
