"""Where commands compute, and how much room there is."""

import shutil
from pathlib import Path

import psutil
import torch

from bae_lens.planning import Resources
from bae_lens.storage import existing_folder

DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_MEMORY_ON_CPU = "DefaultCPUAllocator: can't allocate memory"  # in torch's RuntimeError, which has no kind of its own
GPU_MEMORY = 80.0  # GB, where none is at hand


def check_device(device: str) -> None:
    """Raises ValueError for a device that does not exist, or holds no numbers, as meta does."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error


def shortage(error: MemoryError | RuntimeError) -> str | None:
    """What to do where memory of a device or the host did not suffice; None for an error of another kind."""
    if isinstance(error, RuntimeError) and not (
        isinstance(error, torch.OutOfMemoryError) or NO_MEMORY_ON_CPU in str(error)
    ):
        return None
    told = ". ".join((str(error) or type(error).__name__).split(". ")[:3])  # torch goes on to advise of its allocator
    return (
        f"what is at work must fit in memory, got {told}; choose a smaller batch, dictionary or model, a narrower "
        "dtype, or several devices with --shard-features or --device-map"
    )


def resources(folder: Path, device: str, disk: float | None, gpu_memory: float | None) -> Resources:
    """What flags say of the disk and of a GPU's memory, in GB, or else what this machine has."""
    free = shutil.disk_usage(existing_folder(folder)).free if disk is None else int(disk * 1e9)
    on_gpu = device.startswith("cuda") or gpu_memory is not None
    return Resources(free, _gpu_bytes(gpu_memory) if on_gpu else psutil.virtual_memory().total, on_gpu)


def _gpu_bytes(gpu_memory: float | None) -> int:
    if gpu_memory is None and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return int((gpu_memory or GPU_MEMORY) * 1e9)
