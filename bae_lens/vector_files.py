"""Vectors in files that are larger than memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

ROWS = 4096  # read at once


class VectorFile:
    """The one array (..., d) in a .npy or .safetensors file; goes through its vectors in batches, memory-mapped.

    Nothing in the file is executed. Raises ValueError for other kinds of file, damaged ones, and anything but one array
    of real numbers with at least two axes, of which all but the last count vectors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        readers = {".npy": self._open_npy, ".safetensors": self._open_safetensors}
        if self.path.suffix not in readers:
            raise ValueError(f"vectors must be in a file that ends in {' or '.join(readers)}, got {self.path}")
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        try:
            self._array, self.shape = readers[self.path.suffix]()
            dtype = self._rows(0, 0).dtype
        except (ValueError, TypeError, EOFError, SafetensorError) as error:
            raise ValueError(f"{self.path} cannot be read: {str(error).splitlines()[0]}") from error
        if len(self.shape) < 2 or dtype.is_complex or dtype == torch.bool:
            raise ValueError(f"{self.path} must hold vectors (..., d), got {dtype} of shape {self.shape}")

    def __iter__(self) -> Iterator[Float[Tensor, "n d"]]:
        size = max(1, ROWS // int(np.prod(self.shape[1:-1])))
        for first in range(0, self.shape[0], size):
            yield self._rows(first, first + size).flatten(0, -2).float()

    def _rows(self, start: int, stop: int) -> Tensor:
        part = self._array[start:stop]
        return part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))

    def _open_npy(self) -> tuple:
        array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return array, array.shape

    def _open_safetensors(self) -> tuple:
        file = safe_open(self.path, "pt")
        if len(names := list(file.keys())) != 1:
            raise ValueError(f"it holds {len(names)} arrays instead of one")
        array = file.get_slice(names[0])
        return array, tuple(array.get_shape())
