"""Vectors to a file of entropy-coded bits and back (section 5 of the paper): `H(p)` bits a vector, or fewer.

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

from bae_lens.activations.vector_files import VectorFile, as_tensor, batches_of_rows
from bae_lens.compression.code_file import CodeFile
from bae_lens.compression.code_writer import CodeWriter
from bae_lens.compression.geometry_coder import MOST_FEATURES, Geometry
from bae_lens.functional.explained_variance import ExplainedVariance
from bae_lens.functional.losses import marginal_entropy
from bae_lens.functional.packing import pack_code, unpack_code
from bae_lens.saes.saelens_compat import heads_concatenated
from bae_lens.storage import validated

ROWS = 1024  # encoded or decoded at once: so few that what lies between stays in the cache
CONFIG_FIELDS = ("architecture", "normalize_activations")  # what code and decoding depend on, beside the weights
RUN_TIME_NORMS = ("layer_norm", "constant_norm_rescale")

Vectors: TypeAlias = Tensor | np.ndarray | str | Path | Iterable[Tensor | np.ndarray]


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
    """Of this call, not of the whole file."""
    d_in: int
    """Width of the vectors."""
    d_sae: int
    """Features of the code."""
    n_bytes: int
    """Added to the file."""
    entropy_bits: float
    """Marginal entropy (Eq. 4) of the mean code of these vectors: `H(p)`."""
    explained_variance: float | None
    """1 minus squared error over squared distance to the mean, of what `decompress` gives; None where the vectors are
    all the same."""
    relative_error: float | None
    """Norm of the error over norm of the vectors, each the root of the sum of squares; None where all vectors are 0."""
    joint_bits: float | None = None
    """What is left of `entropy_bits` as the file is coded, bits given one another; what describes the trees or priors
    of its chunks is in `bits` alone. None for reports of versions without."""
    codings: dict[str, int] | None = None
    """How many chunks are coded in each way: as columns, pairs or geometry. None for reports of versions without."""

    @property
    def bits(self) -> float:
        """Bits per vector in the file."""
        return 8 * self.n_bytes / self.n_vectors

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CompressionReport":
        return validated(cls, values, "this report")


@torch.no_grad()
def compress(
    sae: Dictionary, vectors: Vectors, path: str | Path, *, append: bool = False, joint: bool = True
) -> CompressionReport:
    """Writes the code of `vectors` to the `.bae` file `path`, or adds it to what is there with `append`.

    `vectors` are a tensor or array (..., d_in), at hook_z also (..., heads, d_head), or an iterable of such batches,
    such as `CachedActivations.batches`, gone through once, or a .npy, .pt or .safetensors file of one array
    (..., d_in); memory does not grow with their number. A new file appears under its name when it is whole, and an
    append counts when it is whole. With `joint`, every some thousand vectors are coded as is shortest, description
    included: given what the features before decode to along a feature's encoder, for dictionaries with parameters
    `W_enc` and `W_dec` and at most 8192 features; along a tree of pairs of features, a bit given another; or each
    feature by itself. Without, writing and reading are faster, and `read_code` needs no dictionary.

    Raises ValueError if there are no vectors, for values that are not real numbers, or not finite in the dictionary's
    dtype, for vectors of another width, for a code that is not binary, for a transcoder, and for a dictionary that
    writes another width than it reads or scales each vector by its norm at run time, and as `VectorFile` and
    `CodeWriter` do; OSError as they do.
    """
    cfg: Any = getattr(sae, "cfg", None)
    if hasattr(cfg, "d_out"):
        raise ValueError("a transcoder's code does not stand for its input, so compress with a BAE")
    normalization = getattr(cfg, "normalize_activations", "none")
    if normalization in RUN_TIME_NORMS:
        raise ValueError(
            f"a code does not hold the norms that normalize_activations={normalization!r} needs to decode it"
        )
    with heads_concatenated(sae):
        encoded = ((x, _encode(sae, x)) for x in _batches(vectors, sae))
        first = next(encoded, None)
        if first is None:
            raise ValueError("there are no vectors to compress")
        tally = _Tally(first[0].shape[1])
        with CodeWriter(path, first[1].shape[1], fingerprint(sae), append, joint, _geometry(sae)) as writer:
            for x, feature_acts in chain([first], encoded):
                writer.write(pack_code(feature_acts).numpy())
                tally.add(x, sae.decode(feature_acts))
    return tally.report(writer)


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
    path: str | Path,
    rows: slice | None = None,
    *,
    sae: Dictionary | None = None,
    packed: bool = False,
    skip_damaged: bool = False,
) -> Float[Tensor, "n d_sae"] | UInt8[Tensor, "n n_bytes"]:
    """The exact code in a `.bae` file, or that of the slice `rows`: 0 or 1, or with `packed` as `pack_code` packs it.

    Needs the dictionary where vectors are coded by its geometry, and raises ValueError without. Raises ValueError and
    warns as `decompress`.
    """
    with CodeFile(path, skip_damaged) as file:
        if sae is not None:
            _open_with(file, sae)
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
    _open_with(file, sae)
    for part, code in file.codes(rows):
        for first in range(0, len(part), ROWS):
            feature_acts = unpack_code(torch.from_numpy(code[first : first + ROWS]), file.d_sae)
            yield part[first : first + ROWS], _decode(sae, feature_acts)


def _open_with(file: CodeFile, sae: Dictionary) -> None:
    file.check_fingerprint(fingerprint(sae))
    file.geometry = _geometry(sae)


def _geometry(sae: Dictionary) -> Geometry | None:
    """That of a dictionary whose parameters have one, unless it is too wide."""
    weights = dict(sae.named_parameters())
    W_enc, W_dec = weights.get("W_enc"), weights.get("W_dec")
    if W_enc is None or W_dec is None or W_enc.T.shape != W_dec.shape or len(W_dec) > MOST_FEATURES:
        return None
    finite = torch.isfinite(W_enc).all() and torch.isfinite(W_dec).all()
    return Geometry(W_enc, W_dec) if finite else None


def fingerprint(sae: Dictionary) -> bytes:
    """16 bytes that differ between dictionaries of different weights, architecture or normalization.

    The prior, and where and for what it was trained, make no difference.
    """
    config = sae.cfg.to_dict() if hasattr(sae, "cfg") else {}  # pyright: ignore[reportAttributeAccessIssue]
    content = blake2b(json.dumps({name: config.get(name) for name in CONFIG_FIELDS}).encode(), digest_size=16)
    for name, weights in sorted(sae.named_parameters(), key=lambda item: item[0]):
        content.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
        content.update(weights.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.digest()


class _Tally:
    """What the report needs to know of the vectors, in one pass."""

    def __init__(self, d_in: int) -> None:
        self.d_in, self.variance = d_in, ExplainedVariance()

    def add(self, x: Float[Tensor, "n d_in"], sae_out: Float[Tensor, "n d_out"]) -> None:
        if sae_out.shape != x.shape:
            raise ValueError(
                f"this dictionary reads vectors {x.shape[1]} wide and writes {sae_out.shape[1]}, so its code "
                "does not stand for its input; compress with a BAE"
            )
        self.variance.add(x, sae_out.cpu())

    def report(self, writer: CodeWriter) -> CompressionReport:
        v = self.variance
        return CompressionReport(
            n_vectors=v.n,
            d_in=self.d_in,
            d_sae=writer.d_sae,
            n_bytes=writer.n_bytes,
            entropy_bits=marginal_entropy(torch.from_numpy(writer.fired / v.n)).item(),
            explained_variance=v.explained if v.varies else None,
            relative_error=(v.error / v.squares) ** 0.5 if v.squares else None,
            joint_bits=writer.joint_bits / v.n,
            codings={coding.name.lower(): n for coding, n in writer.codings.items()},
        )


def _encode(sae: Dictionary, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    like = next(iter(sae.named_parameters()))[1]
    x = x.to(like.device, like.dtype)
    if not torch.isfinite(x).all():
        raise ValueError(f"vectors must be finite, but there are some with NaN, infinity or too much for {like.dtype}")
    feature_acts = sae.encode(x)
    return feature_acts.to_dense() if feature_acts.is_sparse else feature_acts


@torch.no_grad()
def _decode(sae: Dictionary, feature_acts: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
    like = next(iter(sae.named_parameters()))[1]
    with heads_concatenated(sae):
        return sae.decode(feature_acts.to(like.device, like.dtype)).cpu()


def _batches(vectors: Vectors, sae: Dictionary) -> Iterator[Float[Tensor, "n d_in"]]:
    """On the CPU, some thousand at a time."""
    if isinstance(vectors, str | Path):
        parts: Iterable[Any] = VectorFile(vectors)
    else:
        parts = [vectors] if isinstance(vectors, Tensor | np.ndarray) else vectors
    for batch in parts:
        if not isinstance(batch, Tensor | np.ndarray):
            raise ValueError(f"vectors must be tensors or arrays, or batches of them, got a {type(batch).__name__}")
        if batch.ndim < 2:
            raise ValueError(f"vectors have at least 2 axes, got shape {tuple(batch.shape)}")
        dtype = as_tensor(batch[:0]).dtype
        if dtype.is_complex or dtype == torch.bool:
            raise ValueError(f"vectors must be real numbers, got {dtype}")
        for x in batches_of_rows(_heads_side_by_side(batch, sae), ROWS):
            yield (x if dtype.is_floating_point else x.double()).cpu()


def _heads_side_by_side(batch: Any, sae: Dictionary) -> Any:
    """Activations (..., heads, d_head) as (..., d_in), if that is what a dictionary at hook_z was given."""
    cfg: Any = getattr(sae, "cfg", None)
    at_hook_z = getattr(cfg, "reshape_activations", "none") == "hook_z"
    if at_hook_z and batch.ndim > 2 and batch.shape[-1] != cfg.d_in == batch.shape[-2] * batch.shape[-1]:
        return batch.reshape(*batch.shape[:-2], cfg.d_in)
    return batch


def _warn_of_damage(file: CodeFile) -> None:
    if file.damaged:
        rows = ", ".join(f"{part.start} to {part.stop - 1}" for part in file.damaged)
        warnings.warn(f"{file.path}: {len(file.damaged)} damaged chunks are left out, vectors {rows}", stacklevel=3)
