"""What tells one model, or one choice of text, from another: its content, whatever its name and wherever it lies."""

import hashlib

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

SAMPLED_VALUES = 2**14  # of each tensor of a model: one of every row at least, in a matrix of as many rows


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


def tensor_fingerprint(*tensors: Shaped[Tensor, "..."]) -> str:
    """16 hexadecimal digits that depend on all values of these tensors, their types and shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]
