"""Binary codes as packed bits: an eighth of a byte a feature."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def pack_code(feature_acts: Float[Tensor, "*batch d_sae"]) -> UInt8[Tensor, "*batch n_bytes"]:
    """The bits of a code, eight features a byte, the first in the highest bit, on the CPU.

    Raises ValueError for values other than 0 and 1.
    """
    bits = feature_acts.bool()
    if not bits.to(feature_acts.dtype).equal(feature_acts):
        raise ValueError("only a binary code can be packed, got values other than 0 and 1; use the code of a BAE")
    return torch.from_numpy(np.packbits(bits.cpu().numpy(), axis=-1))


def unpack_code(
    packed: UInt8[Tensor, "*batch n_bytes"], d_sae: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*batch d_sae"]:
    """The code of `d_sae` features that `pack_code` packed. Raises ValueError if the bytes are of another width."""
    if packed.shape[-1] != -(-d_sae // 8):
        raise ValueError(f"{d_sae} features are packed into {-(-d_sae // 8)} bytes, got {packed.shape[-1]}")
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), axis=-1, count=d_sae)).to(dtype)
