"""Where commands compute, and how much room there is."""

import shutil
from pathlib import Path

import psutil
import torch

from bae_lens.planning import Resources
from bae_lens.storage import existing_folder

DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU_MEMORY = 80.0  # GB, where none is at hand


def check_device(device: str) -> None:
    """Raises ValueError for a device that does not exist, or holds no numbers, as meta does."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error


def resources(folder: Path, device: str, disk: float | None, gpu_memory: float | None) -> Resources:
    """What flags say of the disk and of a GPU's memory, in GB, or else what this machine has."""
    free = shutil.disk_usage(existing_folder(folder)).free if disk is None else int(disk * 1e9)
    on_gpu = device.startswith("cuda") or gpu_memory is not None
    return Resources(free, _gpu_bytes(gpu_memory) if on_gpu else psutil.virtual_memory().total, on_gpu)


def _gpu_bytes(gpu_memory: float | None) -> int:
    if gpu_memory is None and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return int((gpu_memory or GPU_MEMORY) * 1e9)
