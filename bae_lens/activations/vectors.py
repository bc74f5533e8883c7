"""Vectors that come without a language model: of which files or arrays, of which documents, and how they are split."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bae_lens.activations.contexts import HELD_OUT_EVERY, Contexts, ContextSettings, split_of
from bae_lens.activations.fingerprint import tensor_fingerprint
from bae_lens.activations.vector_files import ROWS, VectorFile, batches_of_rows, values_in

VECTORS_HOOK = "vectors"  # stands where activations of a model have their hook
N_BLOCKS, LARGEST_BLOCK = 100, 1024  # vectors without documents are split by so many blocks or, of so many rows, more
LEAST_HELD_OUT = 64  # vectors, of which shares and rates still say something
OWN_FILE = (".npy", ".txt")  # what ends so is a file of values, and no name in the files of vectors


@dataclass(frozen=True)
class VectorFiles:
    """Vectors in files, by name."""

    files: tuple[str, ...]
    """.npy, .pt, .safetensors or .parquet files, whose vectors come one after another."""
    array: str | None = None
    """The array of .safetensors or the column of .parquet files that holds them, where there are several."""
    documents: str | None = None
    """Says of which document, video, protein or other whole each vector is: a .npy or .txt file with a value for each,
    or the array or column of this name beside them. Documents are not divided between training and measuring."""
    labels: str | None = None
    """Says likewise what each vector is of, to be shown."""

    def open(self) -> "Vectors":
        """Raises as `Vectors` does."""
        return Vectors(
            self.files,
            self.array,
            None if self.documents is None else self._values(self.documents),
            None if self.labels is None else self._values(self.labels),
        )

    def _values(self, name: str) -> list[Any]:
        if name.endswith(OWN_FILE):
            return values_in(Path(name))
        return [value for file in self.files for value in values_in(Path(file), name)]


class Vectors:
    """Vectors of files or arrays, one after another, and of which document each is.

    Rows are numbered through. Files are gone through in order and never held whole.
    """

    def __init__(
        self,
        sources: Sequence[str | Path | Tensor | np.ndarray],
        array: str | None = None,
        documents: Sequence[Any] | None = None,
        labels: Sequence[Any] | None = None,
    ) -> None:
        """`documents` and `labels` have a value for each row; rows with the same one are of one document.

        Raises ValueError for no vectors, for vectors of different widths, and if there are more or fewer values than
        rows; and as `VectorFile` does.
        """
        self._parts = [_InMemory(part) if isinstance(part, Tensor | np.ndarray) else VectorFile(part, array)
                       for part in sources]  # fmt: skip
        widths = {part.name: part.shape[-1] for part in self._parts}
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{name}: {width}" for name, width in widths.items())
            raise ValueError(f"all vectors must be as wide as one another, got {listed}")
        self._ends = np.cumsum([len(part) for part in self._parts])
        if not self._parts or self._ends[-1] == 0:
            raise ValueError("there are no vectors; name files, or give arrays, that hold some")
        self.d = self._parts[0].shape[-1]
        """Width of each vector."""
        self._documents, self._labels = documents, labels
        for kind, values in {"documents": documents, "labels": labels}.items():
            if values is not None and len(values) != len(self):
                raise ValueError(f"there must be one value for each of {len(self)} vectors, got {len(values)} {kind}")

    def __len__(self) -> int:
        """How many vectors there are."""
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[Float[Tensor, "n d"]]:
        """Batches in order, in float32."""
        for part in self._parts:
            yield from part

    @property
    def name(self) -> str:
        """The files, by the last part of their paths."""
        names = [part.name for part in self._parts]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

    @property
    def has_documents(self) -> bool:
        """Whether it was said of which document each vector is."""
        return self._documents is not None

    @property
    def block_rows(self) -> int:
        """How many rows stand for a document where none are named."""
        return max(1, min(LARGEST_BLOCK, len(self) // N_BLOCKS))

    @cached_property
    def document(self) -> Int[Tensor, " n"]:
        """The number of each row's document or, where none are named, of its block of neighboring rows."""
        if self._documents is None:
            return torch.arange(len(self)) // self.block_rows
        _, numbers = np.unique(np.asarray(self._documents), return_inverse=True)
        return torch.from_numpy(numbers.astype(np.int64))

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that depend on the vectors; see `file_fingerprint`."""
        digest = hashlib.sha256(" ".join(part.fingerprint() for part in self._parts).encode())
        return digest.hexdigest()[:16]

    @property
    def labels_fingerprint(self) -> str | None:
        """16 hexadecimal digits that depend on what the rows are of; None where that is not known."""
        if self._labels is None:
            return None
        return hashlib.sha256(json.dumps([str(label) for label in self._labels]).encode()).hexdigest()[:16]

    def row_name(self, row: int) -> str:
        """The number of a row in its file and, of several, the file."""
        index = int(np.searchsorted(self._ends, row, side="right"))
        own = row - (int(self._ends[index - 1]) if index else 0)
        return f"row {own}" + (f" of {self._parts[index].name}" if len(self._parts) > 1 else "")

    def label(self, row: int) -> str | None:
        """What a row is of; None where that is not known."""
        return None if self._labels is None else str(self._labels[row])

    def split_by(self) -> "VectorSplit":
        """How `choose_vectors` splits them."""
        n_documents = int(self.document.max()) + 1
        return VectorSplit(len(self), self.d, n_documents, None if self.has_documents else self.block_rows)


@dataclass(frozen=True)
class VectorSplit:
    """How vectors were split into those to train on and those to measure on."""

    n_vectors: int
    """All that there are."""
    d: int
    """How wide they are."""
    n_documents: int
    """By which they were split: documents, or blocks of rows."""
    block_rows: int | None
    """Rows of a block; None where documents were named."""

    def __str__(self) -> str:
        """A sentence."""
        parts = (
            f"{self.n_documents:,} documents"
            if self.block_rows is None
            else f"{self.n_documents:,} blocks of {self.block_rows:,} neighboring rows, since no documents were named"
        )
        return (
            f"{self.n_vectors:,} vectors of width {self.d:,} were split by {parts}: "
            f"one in {HELD_OUT_EVERY} is for measuring, one for tuning, and the others are for training."
        )


def choose_vectors(
    vectors: Vectors, settings: ContextSettings, seed: int = 0, *, tune: bool = False
) -> dict[str, Contexts]:
    """Rows for `"train"`, and, from documents of their own, `"test"` and with `tune` `"tune"`, in order.

    Documents, or blocks of neighboring rows, are shuffled and then split as `choose_contexts` splits those of a text,
    each split up to as many vectors as the settings say tokens. A context is one row, its token the row's number.
    Raises ValueError for fewer documents than the split needs, and for fewer than `LEAST_HELD_OUT` vectors in a split.
    """
    n_documents = vectors.split_by().n_documents
    if n_documents < HELD_OUT_EVERY:
        kind = "documents" if vectors.has_documents else "vectors"
        raise ValueError(f"{n_documents} {kind} are too few to split: one in {HELD_OUT_EVERY} is measured on; add some")
    order = torch.randperm(n_documents, generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(order)
    place[order] = torch.arange(n_documents)
    splits = [split_of(number) for number in range(n_documents)]
    wanted = {"train": settings.cached_tokens, "test": settings.held_out_tokens}
    if tune:
        wanted["tune"] = settings.tuning_tokens
    place_of_row, chosen = place[vectors.document], {}
    for split, most in wanted.items():
        own = torch.tensor([own == split for own in splits])[place_of_row].nonzero().flatten()
        rows = own[place_of_row[own].argsort(stable=True)][:most].sort().values
        if len(rows) < min(LEAST_HELD_OUT, most):
            raise ValueError(
                f"of {len(vectors)} vectors {len(rows)} are for {split}, where at least {LEAST_HELD_OUT} are needed; "
                "add vectors"
            )
        chosen[split] = Contexts(rows[:, None], vectors.document[rows])
    return chosen


class _InMemory:
    """An array (..., d) as a `VectorFile` would be."""

    name = "an array"

    def __init__(self, array: Tensor | np.ndarray) -> None:
        self._array, self.shape = array, tuple(array.shape)
        if len(self.shape) < 2 or self.shape[-1] == 0:
            raise ValueError(f"an array must hold vectors (..., d), got one of shape {self.shape}")

    def __len__(self) -> int:
        return int(np.prod(self.shape[:-1]))

    def __iter__(self) -> Iterator[Float[Tensor, "n d"]]:
        for rows in batches_of_rows(self._array, ROWS):
            yield rows.float().cpu()

    def fingerprint(self) -> str:
        return tensor_fingerprint(torch.as_tensor(self._array))
