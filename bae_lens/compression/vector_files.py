"""Vectors in files that are larger than memory."""

import pickle
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bae_lens.saes.foreign_files import load_tensors

ROWS = 1024  # read at once


class VectorFile:
    """The one array (..., d) in a .npy, .pt or .safetensors file; goes through its vectors in batches, memory-mapped.

    Nothing in the file is executed. Raises FileNotFoundError, and ValueError for other kinds of file, damaged ones, and
    anything but one array of real numbers with at least two axes, of which all but the last count vectors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        readers = {".npy": _open_npy, ".pt": _open_pt, ".safetensors": _open_safetensors}
        if self.path.suffix not in readers:
            raise ValueError(f"vectors must be in a file that ends in {', '.join(readers)}, got {self.path}")
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        try:
            self._array = readers[self.path.suffix](self.path)
            self.shape = tuple(self._array.shape)
            dtype = as_tensor(self._array[:0] if self.shape else self._array).dtype
            if not dtype.is_complex:
                torch.zeros(1).to(dtype).float()  # raises for a type that torch stores and cannot read
        except (ValueError, RuntimeError, EOFError, SafetensorError) as error:
            reason = (str(error) or "it is empty or breaks off").splitlines()[0]
            raise ValueError(f"{self.path} cannot be read: {reason}") from error
        if len(self.shape) < 2 or self.shape[-1] == 0 or dtype.is_complex or dtype == torch.bool:
            raise ValueError(
                f"{self.path} must hold vectors (..., d) of real numbers, got {dtype} of shape {self.shape}"
            )

    def __iter__(self) -> Iterator[Float[Tensor, "n d"]]:
        """Batches in order, in float32."""
        for rows in batches_of_rows(self._array, ROWS):
            yield rows.float()

    def read(self) -> Float[Tensor, "n d"]:
        """All vectors, in float32."""
        return torch.cat([torch.zeros(0, self.shape[-1]), *self])


def batches_of_rows(array: Tensor | np.ndarray, n: int) -> Iterator[Shaped[Tensor, "_ d"]]:
    """The vectors of an array (..., d), at most n at a time, so that no more than that is read of a memory map."""
    entries = max(1, n // max(1, prod(array.shape[1:-1])))
    for first in range(0, len(array), entries):
        rows = array[first : first + entries].reshape(-1, array.shape[-1])
        for row in range(0, len(rows), n):
            yield as_tensor(rows[row : row + n])


def as_tensor(array: Tensor | np.ndarray) -> Tensor:
    """A tensor as it is; a copy of an array of any byte order. Raises ValueError for what is not numbers."""
    if isinstance(array, Tensor):
        return array.detach()
    try:
        return torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")))
    except TypeError as error:
        raise ValueError(f"values of type {array.dtype} are no numbers that torch knows") from error


def _open_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise ValueError("numpy.save did not write it")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _open_pt(path: Path) -> Tensor:
    try:
        tensor = load_tensors(path)
    except pickle.UnpicklingError as error:
        raise ValueError("it holds code or objects, which are not executed, instead of one tensor") from error
    except (RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"it is damaged ({error!r})") from error
    if not isinstance(tensor, Tensor):
        raise ValueError(f"it holds a {type(tensor).__name__} instead of one tensor")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError(f"its tensor is {tensor.layout}, on the device {tensor.device}, instead of plain numbers")
    return tensor


def _open_safetensors(path: Path) -> Tensor:
    file = safe_open(path, "pt")
    if len(names := list(file.keys())) != 1:
        raise ValueError(f"it holds {len(names)} arrays instead of one")
    return file.get_tensor(names[0])
