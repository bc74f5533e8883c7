"""The number formats of models and of activations on disk."""

from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
STORED = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}  # numpy has no bfloat16: its bits


def torch_dtype(name: str) -> torch.dtype:
    """Raises ValueError for other than the three."""
    if name not in STORED:
        raise ValueError(f"a dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return getattr(torch, name)


def check_dtype(name: str, device: str) -> None:
    """Raises ValueError for a dtype in which a device cannot multiply matrices."""
    try:
        ones = torch.ones(2, 2, dtype=torch_dtype(name), device=device)
        torch.isfinite(ones @ ones).all().item()
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the device {device} cannot compute in {name}: {reason}; choose another dtype") from error


def stored(activations: Float[Tensor, "*shape"], name: str) -> Shaped[np.ndarray, "*shape"]:
    """Activations as they are written. Raises ValueError for a number that is too large for the dtype."""
    narrow = activations.to(torch_dtype(name))
    if not torch.isfinite(narrow).all():
        largest = activations.abs().max().item()
        most = torch.finfo(narrow.dtype).max
        raise ValueError(
            f"activations of up to {largest:.4g} do not fit in {name}, which ends at {most:.4g}; "
            "cache them in bfloat16 or float32"
        )
    return (narrow.view(torch.uint16) if name == "bfloat16" else narrow).numpy()


def as_tensor(array: Shaped[np.ndarray, "*shape"], name: str) -> Float[Tensor, "*shape"]:
    """What `stored` wrote, in its dtype and the same memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if name == "bfloat16" else tensor
