"""Vectors to a file of entropy-coded bits and back (section 5 of the paper): about `H(p)` bits a vector.

What is lossy is the dictionary: the file holds the code exactly, and what comes back is the code's decoding.
"""

import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bae_lens.code_file import CodeFile
from bae_lens.code_writer import CodeWriter
from bae_lens.losses import marginal_entropy
from bae_lens.packed import pack_code, unpack_code
from bae_lens.vector_files import VectorFile

ROWS = 4096  # encoded or decoded at once
CONFIG_FIELDS = ("architecture", "normalize_activations")  # what code and decoding depend on, beside the weights
RUN_TIME_NORMS = ("layer_norm", "constant_norm_rescale")

Vectors: TypeAlias = Tensor | np.ndarray | str | Path | Iterable[Tensor]


@runtime_checkable
class Dictionary(Protocol):
    """A `BAE`, or anything with weights that encodes vectors in bits and decodes them."""

    def encode(self, x: Tensor, /) -> Tensor:
        """The code (n, d_sae), 0 or 1, of vectors (n, d_in)."""
        ...

    def decode(self, feature_acts: Tensor, /) -> Tensor:
        """Vectors (n, d_in) from their code."""
        ...

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """The weights."""
        ...


@dataclass(frozen=True)
class CompressionReport:
    """What the vectors of one call of `compress` became. Bits are per vector, the file's own headers included."""

    n_vectors: int
    d_in: int
    d_sae: int
    n_bytes: int
    """Added to the file."""
    entropy_bits: float
    """Marginal entropy (Eq. 4) of the mean code of these vectors: `H(p)`."""
    explained_variance: float | None
    """1 minus squared error over squared distance to the mean, of what `decompress` gives; None where the vectors are
    all the same."""
    relative_error: float | None
    """Norm of the error over norm of the vectors, each the root of the sum of squares; None where all vectors are 0."""

    @property
    def bits(self) -> float:
        """Bits per vector in the file."""
        return 8 * self.n_bytes / self.n_vectors

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CompressionReport":
        return cls(**values)


@torch.no_grad()
def compress(sae: Dictionary, vectors: Vectors, path: str | Path, *, append: bool = False) -> CompressionReport:
    """Writes the code of `vectors` to the `.bae` file `path`, or adds it to what is there with `append`.

    `vectors` are a tensor or array (..., d_in), a .npy or .safetensors file, or an iterable of batches, such as
    `HiddenStates.batches`, gone through once; memory does not grow with their number. A new file appears under its name
    when it is whole, and an append counts when it is whole.
    Raises ValueError if there are no vectors, for values that are not finite, for a code that is not binary, for a
    dictionary that writes another width than it reads or scales each vector by its norm at run time, and as
    `CodeWriter` does for an append; OSError as it does.
    """
    normalisation = getattr(getattr(sae, "cfg", None), "normalize_activations", "none")
    if normalisation in RUN_TIME_NORMS:
        raise ValueError(
            f"a code does not hold the norms that normalize_activations={normalisation!r} needs to decode it"
        )
    encoded = ((x, _encode(sae, x)) for x in _batches(vectors))
    first = next(encoded, None)
    if first is None:
        raise ValueError("there are no vectors to compress")
    tally = _Tally(*first)
    with CodeWriter(path, first[1].shape[1], fingerprint(sae), append) as writer:
        for x, feature_acts in chain([first], encoded):
            writer.write(pack_code(feature_acts).numpy())
            tally.add(x, feature_acts, sae.decode(feature_acts).flatten(1))
    return tally.report(writer.n_bytes)


def decompress(
    path: str | Path, sae: Dictionary, rows: slice | None = None, *, skip_damaged: bool = False
) -> Float[Tensor, "n d_in"]:
    """The vectors in a `.bae` file as the dictionary that made it reconstructs them, or those of the slice `rows`.

    Reads only what it has to. With `skip_damaged` vectors in damaged chunks are left out, with a warning that says
    which. Raises ValueError if the file was made by another dictionary (naming both), for a slice that is not within
    the file, and as `CodeFile` does.
    """
    with CodeFile(path, skip_damaged) as file:
        parts = [part for _, part in reconstructions(file, sae, rows)]
        _warn_of_damage(file)
    return torch.cat(parts) if parts else _decode(sae, torch.zeros(0, file.d_sae))


def read_code(
    path: str | Path, rows: slice | None = None, *, packed: bool = False, skip_damaged: bool = False
) -> Float[Tensor, "n d_sae"] | UInt8[Tensor, "n n_bytes"]:
    """The exact code in a `.bae` file, or that of the slice `rows`: 0 or 1, or with `packed` as `pack_code` packs it.

    Needs no dictionary. Raises ValueError and warns as `decompress`.
    """
    with CodeFile(path, skip_damaged) as file:
        parts = [np.zeros((0, -(-file.d_sae // 8)), np.uint8), *(part for _, part in file.codes(rows))]
        _warn_of_damage(file)
    code = torch.from_numpy(np.concatenate(parts))
    return code if packed else unpack_code(code, file.d_sae)


def reconstructions(
    file: CodeFile, sae: Dictionary, rows: slice | None = None
) -> Iterator[tuple[range, Float[Tensor, "n d_in"]]]:
    """What `decompress` gives, some thousand vectors at a time, and which rows they are.

    Raises ValueError as `decompress`.
    """
    file.check_fingerprint(fingerprint(sae))
    for part, code in file.codes(rows):
        for first in range(0, len(part), ROWS):
            feature_acts = unpack_code(torch.from_numpy(code[first : first + ROWS]), file.d_sae)
            yield part[first : first + ROWS], _decode(sae, feature_acts)


def fingerprint(sae: Dictionary) -> bytes:
    """16 bytes that differ between dictionaries of different weights, architecture or normalisation.

    The prior, and where and for what it was trained, make no difference.
    """
    config = sae.cfg.to_dict() if hasattr(sae, "cfg") else {}  # pyright: ignore[reportAttributeAccessIssue]
    content = blake2b(json.dumps({name: config.get(name) for name in CONFIG_FIELDS}).encode(), digest_size=16)
    for name, weights in sorted(sae.named_parameters(), key=lambda item: item[0]):
        content.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
        content.update(weights.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.digest()


class _Tally:
    """What the report needs, in one pass."""

    def __init__(self, x: Tensor, feature_acts: Tensor) -> None:
        self.n, self.error, self.squares = 0, 0.0, 0.0
        self.origin = x.double().mean(0)  # near the mean, so that the sums below do not cancel
        self.total, self.centred_squares = torch.zeros_like(self.origin), 0.0
        self.fired = torch.zeros(feature_acts.shape[1], dtype=torch.float64)

    def add(self, x: Tensor, feature_acts: Tensor, sae_out: Tensor) -> None:
        if sae_out.shape != x.shape:
            raise ValueError(
                f"this dictionary reads vectors {x.shape[1]} wide and writes {sae_out.shape[1]}; a transcoder's code "
                "does not stand for its input, so compress with a BAE"
            )
        x, centred = x.double(), x.double() - self.origin
        self.n += len(x)
        self.error += (sae_out.double().cpu() - x).square().sum().item()
        self.squares += x.square().sum().item()
        self.total += centred.sum(0)
        self.centred_squares += centred.square().sum().item()
        self.fired += feature_acts.sum(0, dtype=torch.float64).cpu()

    def report(self, n_bytes: int) -> CompressionReport:
        variance = self.centred_squares - self.total.square().sum().item() / self.n
        return CompressionReport(
            n_vectors=self.n,
            d_in=len(self.total),
            d_sae=len(self.fired),
            n_bytes=n_bytes,
            entropy_bits=marginal_entropy(self.fired / self.n).item(),
            explained_variance=1 - self.error / variance if variance > 1e-24 * self.squares else None,
            relative_error=(self.error / self.squares) ** 0.5 if self.squares else None,
        )


def _encode(sae: Dictionary, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    like = next(iter(sae.named_parameters()))[1]
    return sae.encode(x.to(like.device, like.dtype))


@torch.no_grad()
def _decode(sae: Dictionary, feature_acts: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
    like = next(iter(sae.named_parameters()))[1]
    return sae.decode(feature_acts.to(like.device, like.dtype)).flatten(1).cpu()


def _batches(vectors: Vectors) -> Iterator[Float[Tensor, "n d_in"]]:
    """On the CPU, some thousand at a time."""
    if isinstance(vectors, str | Path):
        parts: Iterable[Any] = VectorFile(vectors)
    else:
        parts = [vectors] if isinstance(vectors, Tensor | np.ndarray) else vectors
    for batch in parts:
        if batch.ndim < 2:
            raise ValueError(f"vectors have at least 2 axes, got shape {tuple(batch.shape)}")
        size = max(1, ROWS // int(np.prod(batch.shape[1:-1])))
        for first in range(0, len(batch), size):
            part = batch[first : first + size]
            x = (torch.from_numpy(np.array(part)) if isinstance(part, np.ndarray) else part).flatten(0, -2).cpu()
            if not torch.isfinite(x).all():
                raise ValueError("vectors must be finite, but there are some with NaN or infinity")
            yield x


def _warn_of_damage(file: CodeFile) -> None:
    if file.damaged:
        rows = ", ".join(f"{part.start} to {part.stop - 1}" for part in file.damaged)
        warnings.warn(f"{file.path}: {len(file.damaged)} damaged chunks are left out, vectors {rows}", stacklevel=3)
