"""What it takes to say which features of a code fire if each is coded given others, side information included."""

from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from bae_lens.functional.geometric_prior import geometric_bits
from bae_lens.functional.losses import marginal_entropy
from bae_lens.functional.packing import pack_code
from bae_lens.functional.pair_tree import pair_bits

CHUNK_ROWS, CHUNK_NUMBERS = 16_384, 2**28  # vectors as in a `.bae` file, fewer of a code that would be over a GiB
COUNT_BITS = 16  # of a feature's rate where it is coded by itself


class JointBits:
    """Counts the joint bits of a support that comes in batches, alike for bits and for values.

    Cut in chunks and coded as a `.bae` file does it: each feature by itself, along a tree of pairs, or given what the
    features before decode to, whichever takes least with what describes it. Chunks' headers are left out.
    """

    def __init__(self, sae: SAE[Any]) -> None:
        self._d_sae = sae.cfg.d_sae
        W_enc, W_dec = getattr(sae, "W_enc", None), sae.W_dec
        self._geometry = None if W_enc is None or W_enc.shape != W_dec.mT.shape else (W_enc, W_dec)
        self._pending: list[Tensor] = []
        self._n, self._bits = 0, 0.0

    def add(self, feature_acts: Float[Tensor, "n d_sae"]) -> None:
        """A batch of codes."""
        self._pending.append(feature_acts.to_sparse())
        self._n += len(feature_acts)
        size = max(1, min(CHUNK_ROWS, CHUNK_NUMBERS // self._d_sae))
        while self._n >= 2 * size:
            codes = self._codes()
            self._bits += self._chunk_bits(codes[:size])
            self._pending, self._n = [codes[size:].to_sparse()], len(codes) - size

    @property
    def bits(self) -> float:
        """Of all codes so far."""
        return self._bits + (self._chunk_bits(self._codes()) if self._n else 0.0)

    def _codes(self) -> Float[Tensor, "n d_sae"]:
        return torch.cat(self._pending).to_dense()

    @torch.no_grad()
    def _chunk_bits(self, feature_acts: Float[Tensor, "n d_sae"]) -> float:
        fires, n = (feature_acts != 0).double(), len(feature_acts)
        alone = n * marginal_entropy(fires.mean(0)).item() + COUNT_BITS * self._d_sae
        ways = [alone, pair_bits(pack_code(fires).numpy(), self._d_sae)]
        if self._geometry is not None:
            ways.append(n * geometric_bits(feature_acts, *self._geometry).total)
        return min(ways)
