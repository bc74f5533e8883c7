"""Random features that all fire equally often: what a dictionary of bits must beat."""

import torch
from jaxtyping import Float
from torch import Tensor

L0 = 32  # of them, for a vector in the mean


def random_features(x: Float[Tensor, "n d"], d_sae: int) -> tuple[Float[Tensor, "d d_sae"], Float[Tensor, " d_sae"]]:
    """Directions, the same ones every time, and how far a centered vector must lie in each for its bit to be 1: as far
    as the same share of `x`.
    """
    directions = torch.randn(x.shape[1], d_sae, generator=torch.Generator().manual_seed(0))
    return directions, ((x - x.mean(0)) @ directions).topk(round(L0 / d_sae * len(x)), dim=0).values[-1]
