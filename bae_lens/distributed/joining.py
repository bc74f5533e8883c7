"""A run that torchrun started in several processes: they join, and make sure that they were started alike."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bae_lens.distributed.connection import check_connected, connect, disconnect, n_launched
from bae_lens.distributed.exchange import gather
from bae_lens.distributed.homes import find_homes, made_if_used


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
    with made_if_used(folder):
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
