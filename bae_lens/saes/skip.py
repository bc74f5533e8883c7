"""The skip connection of a transcoder: what it writes beside its code, linear in what it reads (arXiv 2501.18823).

`sae_out = feature_acts @ W_dec + b_dec + x @ W_skip.T`. SAELens has one for ReLU and JumpReLU transcoders, whose names
and shapes these are: `W_skip` is (d_out, d_in), and 0 at the start.

Where SAELens 6.54 attaches a transcoder to a model (`run_with_saes`), it leaves the skip connection out, that of
its own ones too. `forward`, `edit`, and all that is measured here have it.
"""

from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor, nn


def add_skip(sae: SAE[Any]) -> None:
    """Gives a transcoder under construction its `W_skip`, if its config asks for one."""
    if sae.cfg.skip:
        shape = (sae.cfg.d_out, sae.cfg.d_in)
        sae.W_skip = nn.Parameter(torch.zeros(shape, dtype=sae.dtype, device=sae.device))


def skip_output(sae: SAE[Any], x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"] | float:
    """What a dictionary writes beside what it decodes; 0 for one without a skip connection."""
    in_training: Any = getattr(sae, "beside_code", None)
    if in_training is not None:
        return in_training(x)
    W_skip = getattr(sae, "W_skip", None)
    return 0.0 if W_skip is None else x.to(W_skip) @ W_skip.T
