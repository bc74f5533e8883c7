"""The three terms of the training loss (Eq. 3-5), each a function of tensors."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Reconstruction = Literal["sum", "mean", "l2_norm"]
RECONSTRUCTIONS: tuple[str, ...] = get_args(Reconstruction)
EntropyForm = Literal["bernoulli", "printed"]
ENTROPY_FORMS: tuple[str, ...] = get_args(EntropyForm)


def reconstruction_error(
    sae_out: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_in"],
    convention: Reconstruction = "sum",
) -> Float[Tensor, "batch _"]:
    """Each sample's reconstruction error, split over the last axis; its sum over that axis and mean over the batch is
    the loss (Eq. 3).

    - `"sum"`: squared error summed over dimensions, as everywhere in SAELens. Shape (batch, d_in).
    - `"mean"`: squared error averaged over dimensions, the authors' code; a penalty weight there is worth `d_in` times
      as much here. Shape (batch, d_in).
    - `"l2_norm"`: the norm of the error, not squared, as the paper prints it. Shape (batch, 1).

    Raises ValueError for any other convention.
    """
    if convention == "sum":
        return (sae_out - target).square()
    if convention == "mean":
        return (sae_out - target).square() / target.shape[-1]
    if convention == "l2_norm":
        return torch.linalg.vector_norm(sae_out - target, dim=-1, keepdim=True)
    raise ValueError(f"reconstruction must be one of {', '.join(RECONSTRUCTIONS)}, got {convention!r}")


def bit_price(
    entropy_coefficient: Float[Tensor, ""],
    reconstruction_loss: Float[Tensor, ""],
    d_out: int,
    convention: Reconstruction = "sum",
) -> Float[Tensor, ""]:
    """Squared error, summed over dimensions, for which the loss would give a bit: where the two balance in training.

    For `"l2_norm"` it depends on the loss, since a norm r shrinks by `1 / (2 r)` per squared error.
    Raises ValueError for any other convention.
    """
    if convention == "sum":
        return entropy_coefficient
    if convention == "mean":
        return entropy_coefficient * d_out
    if convention == "l2_norm":
        return entropy_coefficient * 2 * reconstruction_loss
    raise ValueError(f"reconstruction must be one of {', '.join(RECONSTRUCTIONS)}, got {convention!r}")


def marginal_entropy(rate: Float[Tensor, "*batch d_sae"], form: EntropyForm = "bernoulli") -> Float[Tensor, "*batch"]:
    """Sum over features of the entropy of the firing rate, in bits (Eq. 4); each rate must lie in [0, 1].

    - `"bernoulli"`: `-p log2 p - (1 - p) log2(1 - p)`, between 0 (all features constant) and d_sae (all fire half the
      time). An upper bound on the joint entropy of the code, tight when the features are independent.
    - `"printed"`: `-p log2 p` alone, as the paper prints it. With it r fair coins have r/2 bits instead of r, so the
      paper's own benchmark only comes out with the Bernoulli form, which is what its authors' code computes.

    A feature with rate 0 or 1 carries no information and has gradient exactly 0. The derivative of the formula is
    infinite there, and any clamp of it pushes features that are merely silent in one batch away for good.
    Raises ValueError for any other form.
    """
    if form not in ENTROPY_FORMS:
        raise ValueError(f"entropy must be one of {', '.join(ENTROPY_FORMS)}, got {form!r}")
    varies = (rate > 0) & (rate < 1)
    p = torch.where(varies, rate, 0.5)
    bits = -p * p.log2()
    if form == "bernoulli":
        bits = bits - (1 - p) * (1 - p).log2()
    return torch.where(varies, bits, 0.0).sum(-1)


def tangent_entropy(
    rate: Float[Tensor, "*batch d_sae"], tangent_rate: float, form: EntropyForm = "bernoulli"
) -> Float[Tensor, "*batch"]:
    """`marginal_entropy`, from `tangent_rate` on continued by its tangent: firing never costs less than at that rate.

    The entropy itself makes each further firing of a frequent feature cheaper, and pays those that fire most of the
    time for firing always. In bits, at least `marginal_entropy`, which it is for a tangent at 1.
    Raises ValueError as `check_tangent`.
    """
    check_tangent(tangent_rate)
    if tangent_rate == 1:
        return marginal_entropy(rate, form)
    slope = -math.log2(tangent_rate) - (1 / math.log(2) if form == "printed" else -math.log2(1 - tangent_rate))
    below = rate.clamp(max=tangent_rate)
    return marginal_entropy(below, form) + slope * (rate - below).sum(-1)


def check_tangent(tangent_rate: float) -> None:
    """Raises ValueError where the entropy does not rise in both forms, but for 1, which means no tangent."""
    if not (0 < tangent_rate < 1 / math.e or tangent_rate == 1):
        raise ValueError(f"tangent_rate must lie between 0 and 1/e, or be 1 for no tangent, got {tangent_rate}")
