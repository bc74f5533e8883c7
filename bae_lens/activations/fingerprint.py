"""What tells one model, or one choice of text, from another: its content, whatever its name and wherever it lies."""

import hashlib
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

SAMPLED_VALUES = 2**14  # of each tensor of a model: one of every row at least, in a matrix of as many rows
FILE_PIECES, PIECE_BYTES = 256, 2**14  # of a file that are looked at


def model_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that depend on the weights and buffers of a model, not on its name or device.

    Of each tensor up to `SAMPLED_VALUES` values are looked at, evenly spaced, so that it takes a fraction of a second
    for any size: another training or fine-tuning is noticed, a change of single values need not be.
    """
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = tensor.detach().reshape(-1)
        sample = values[:: max(1, -(-len(values) // SAMPLED_VALUES))].cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """16 hexadecimal digits that depend on what is in a file, not on its name.

    Its size and up to `FILE_PIECES` pieces of it are looked at, evenly spaced: all of a file of up to 4 MiB.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    n = min(FILE_PIECES, -(-size // PIECE_BYTES))
    with path.open("rb") as file:
        for piece in range(n):
            file.seek(piece * max(0, size - PIECE_BYTES) // max(1, n - 1))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()[:16]


def tensor_fingerprint(*tensors: Shaped[Tensor, "..."]) -> str:
    """16 hexadecimal digits that depend on all values of these tensors, their types and shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]
