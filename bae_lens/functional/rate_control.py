"""Steering the entropy coefficient so that a code has the rate that was asked for: a controller in its logarithm.

With e the relative excess of the batch's rate over the target, clipped to [-1, 1], the coefficient in force is

    c_t = c_0 * m_t * exp(PROPORTIONAL * e_t),    m_{t+1} = m_t * exp(INTEGRAL * e_t)

The integral part finds the coefficient and follows it while the dictionary improves; the proportional part answers at
once, so that the integral part overshoots less while the features are still on their way.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bae_lens.functional.losses import marginal_entropy

PROPORTIONAL = 1.0
INTEGRAL = 0.05
RANGE = (1e-6, 1e6)  # of the multiplier, should the target be out of reach


def excess_l0(rate: Float[Tensor, " d_sae"], target: float) -> Float[Tensor, ""]:
    """By what share the features per token, of a batch with these firing rates, exceed the target; in [-1, 1]."""
    return (rate.sum() / target - 1).clamp(-1, 1)


def excess_bits(rate: Float[Tensor, " d_sae"], prior: Float[Tensor, " d_sae"], target: float) -> Float[Tensor, ""]:
    """By what share the bits per token (Eq. 4) exceed the target; in [-1, 1].

    A batch's own entropy is too low, because rare features are silent in it. So its features per token are counted,
    each with as many bits as a feature that fires has in the mean by the running firing rates `prior`.
    """
    bits_per_feature = marginal_entropy(prior) / prior.sum().clamp(min=1e-9)
    return excess_l0(rate * bits_per_feature, target)


def excess(
    rate: Float[Tensor, " d_sae"], prior: Float[Tensor, " d_sae"], target_l0: float | None, target_bits: float | None
) -> Float[Tensor, ""]:
    """The excess over the one target that is set; 0 without a target."""
    if target_bits is not None:
        return excess_bits(rate, prior, target_bits)
    return rate.new_zeros(()) if target_l0 is None else excess_l0(rate, target_l0)


def controlled_coefficient(multiplier: Float[Tensor, ""], excess: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The factor on the entropy coefficient that answers an excess."""
    return multiplier * torch.exp(PROPORTIONAL * excess)


def updated_multiplier(multiplier: Float[Tensor, ""], excess: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The multiplier for the next step."""
    return (multiplier * torch.exp(INTEGRAL * excess)).clamp(*RANGE)
