"""Vectors in files that are larger than memory, and what else such files say of each."""

import pickle
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from jaxtyping import Float, Shaped
from pyarrow import compute, parquet
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bae_lens.activations.fingerprint import file_fingerprint
from bae_lens.saes.foreign_files import load_tensors

ROWS = 1024  # read at once
DAMAGE = (ValueError, RuntimeError, EOFError, SafetensorError, pyarrow.ArrowException)


class VectorFile:
    """The array (..., d) in a .npy, .pt or .safetensors file, or a column of lists of length d in a .parquet file.

    Goes through its vectors in batches, memory-mapped or streamed. `array` names the array of a .safetensors or the
    column of a .parquet file, of which without it there must be one only (of a .parquet file, one of lists).
    Nothing in the file is executed. Raises FileNotFoundError, and ValueError for other kinds of file, damaged ones, and
    anything but an array of real numbers with at least two axes, of which all but the last count vectors.
    """

    def __init__(self, path: str | Path, array: str | None = None) -> None:
        self.path, self.array = Path(path), array
        readers = {".npy": _open_npy, ".pt": _open_pt, ".safetensors": _open_safetensors, ".parquet": _Column}
        if self.path.suffix not in readers:
            raise ValueError(f"vectors must be in a file that ends in {', '.join(readers)}, got {self.path}")
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        try:
            self._array = readers[self.path.suffix](self.path, array)
            self.shape = tuple(self._array.shape)
            dtype = as_tensor(self._array[:0] if self.shape else self._array).dtype
            if not dtype.is_complex:
                torch.zeros(1).to(dtype).float()  # raises for a type that torch stores and cannot read
        except DAMAGE as error:
            reason = (str(error) or "it is empty or breaks off").splitlines()[0]
            raise ValueError(f"{self.path} cannot be read: {reason}") from error
        if len(self.shape) < 2 or self.shape[-1] == 0 or dtype.is_complex or dtype == torch.bool:
            raise ValueError(
                f"{self.path} must hold vectors (..., d) of real numbers, got {dtype} of shape {self.shape}"
            )

    def __len__(self) -> int:
        """How many vectors there are."""
        return prod(self.shape[:-1])

    @property
    def name(self) -> str:
        """That of the file, without folders."""
        return self.path.name

    def fingerprint(self) -> str:
        """That of the file, and of which part of it is read; see `file_fingerprint`."""
        return f"{file_fingerprint(self.path)} {self.array or ''}".rstrip()

    def __iter__(self) -> Iterator[Float[Tensor, "n d"]]:
        """Batches in order, in float32. Raises ValueError for rows of a .parquet file that are no vectors."""
        column = isinstance(self._array, _Column)
        for rows in self._array.batches() if column else batches_of_rows(self._array, ROWS):
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


def values_in(path: Path, name: str | None = None) -> list[Any]:
    """One value for each vector: the lines of a .txt file, the array of a .npy file, or what has this name in others.

    That is a column of a .parquet file, or an array of a .safetensors file. Raises FileNotFoundError, and ValueError
    for other kinds of file, damaged ones, names that are not there, more than one axis, and values that are missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        match path.suffix:
            case ".txt":
                values: Any = path.read_text(encoding="utf-8").splitlines()
            case ".npy":
                values = _open_npy(path, name).tolist()
            case ".parquet":
                values = _checked_column(path, name).to_pylist()
            case ".safetensors":
                values = _open_safetensors(path, name).tolist()
            case _:
                raise ValueError("values by name are in .parquet and .safetensors files, others in .npy and .txt files")
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(values, list) or (values and isinstance(values[0], list | dict)):
        raise ValueError(f"{name or 'the array'} in {path} must hold one value for each vector")
    if None in values:
        raise ValueError(f"row {values.index(None)} of {name} in {path} has no value; fill it, or leave the row out")
    return values


class _Column:
    """A column of lists of numbers, all of one length, in a .parquet file; streamed."""

    def __init__(self, path: Path, name: str | None) -> None:
        schema = parquet.read_schema(path)
        lists = [field.name for field in schema if _lists_numbers(field.type)]
        self.name = _only(lists, name, "columns of lists of numbers")
        with parquet.ParquetFile(path) as file:
            first = next(file.iter_batches(1, columns=[self.name]), None)
            n_rows = file.metadata.num_rows
        self.path, self._first = path, self._values(first, 0) if first is not None else torch.zeros(0, 0)
        self.shape = (n_rows, self._first.shape[-1])

    def __getitem__(self, rows: slice) -> Tensor:
        return self._first[rows]

    def batches(self) -> Iterator[Shaped[Tensor, "_ d"]]:
        with parquet.ParquetFile(self.path) as file:
            n = 0
            for batch in file.iter_batches(ROWS, columns=[self.name]):
                yield self._values(batch, n)
                n += len(batch)

    def _values(self, batch: pyarrow.RecordBatch, n: int) -> Tensor:
        column = batch.column(0)
        lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)  # pyright: ignore[reportAttributeAccessIssue]
        width = self.shape[-1] if n else int(lengths[0]) if len(lengths) and lengths[0] == lengths[0] else 0
        flat = column.flatten()
        wrong = (lengths != width).nonzero()[0]
        if len(wrong) or flat.null_count:
            where = f"row {n + int(wrong[0])}" if len(wrong) else f"a row from {n} on"
            raise ValueError(f"{where} of {self.name} holds no {width} numbers, as the first row does")
        return as_tensor(flat.to_numpy(zero_copy_only=False)).view(len(batch), width)


def _lists_numbers(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_list and (types.is_floating(kind.value_type) or types.is_integer(kind.value_type))


def _checked_column(path: Path, name: str | None) -> pyarrow.ChunkedArray:
    name = _only(list(parquet.read_schema(path).names), name, "columns")
    return parquet.read_table(path, columns=[name]).column(0)


def _only(names: list[str], name: str | None, kind: str) -> str:
    """The name that was asked for or, without one, the only one there is."""
    listed = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" or "none"
    if name is None and len(names) != 1:
        raise ValueError(f"it holds {len(names)} {kind} instead of one, and none was named: {listed}")
    if name is not None and name not in names:
        raise ValueError(f"it has no {name!r} among its {kind}: {listed}")
    return name or names[0]


def _open_npy(path: Path, name: str | None = None) -> np.ndarray:
    if name is not None:
        raise ValueError(f"a .npy file holds one array without a name, got {name!r}")
    with path.open("rb") as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise ValueError("numpy.save did not write it")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _open_pt(path: Path, name: str | None) -> Tensor:
    if name is not None:
        raise ValueError(f"a .pt file holds one tensor without a name, got {name!r}")
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


def _open_safetensors(path: Path, name: str | None) -> Tensor:
    file = safe_open(path, "pt")
    return file.get_tensor(_only(list(file.keys()), name, "arrays"))
