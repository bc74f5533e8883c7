"""Arrays on disk: shared by processes, larger than memory, and checked against what was written."""

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock
from jaxtyping import Int
from torch import Tensor


def open_array(path: Path, shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> np.memmap:
    """The array for writing, which the process that comes first makes, of zeros."""
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            partial = path.with_suffix(".partial.npy")
            np.lib.format.open_memmap(partial, mode="w+", dtype=np.dtype(dtype), shape=shape)
            os.replace(partial, path)
    return np.lib.format.open_memmap(path, mode="r+")


def save_array(path: Path, values: Int[Tensor, "..."]) -> None:
    """Writes a file that is at any moment either there whole or as it was before."""
    partial = path.with_suffix(".partial.npy")
    np.save(partial, values.numpy())
    os.replace(partial, path)


def load_array(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Raises ValueError if the file cannot be read."""
    try:
        return np.load(path, mmap_mode=mmap_mode)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove its folder to start over") from error


def checksum(arrays: Iterable[np.ndarray]) -> int:
    """1 plus the CRC-32 of the arrays' bytes, one array after another, so that it is never 0."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc + 1
