"""A prior from the dictionary's own geometry: each feature predicted from what those before it decode to.

A feature whose direction the earlier ones have decoded already is likely to fire too. With `h` the code, feature j
fires at the rate

    sigmoid(weight_j * (score_j - mean score_j) + bias_j),    score_j = (sum_{k<j} h_k W_dec_k) . W_enc_j,

so the dictionary itself says how any two features relate, and two numbers a feature are all that is learned. The mean
is over all vectors, of which whoever decodes them feature by feature knows the earlier ones; less it, scores are small.
The sum of the bits that each feature needs given those before it is a bound on the joint entropy.
"""

from collections.abc import Iterator
from math import log
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

FEATURES_AT_ONCE = 256
ROWS_OF_FIT = 8192  # at most, evenly spaced, from which weights and biases are learned
NEWTON_STEPS = 10
LONGEST_STEP = 2.0  # of a Newton step, in nats a standard deviation of the score
PRIOR_DEVIATION = 8.0  # of weights, in nats a standard deviation of the score, so that they stay finite
LARGEST_BIAS = 16.0  # nats, either way
BIASES_PER_NAT = 4
WEIGHTS_PER_OCTAVE = 8
BITS_PER_NUMBER = 8  # of a weight or a bias, more than what 16 octaves of weights or 32 nats need


class GeometricBits(NamedTuple):
    """What the support of a code needs given the geometry of its dictionary, in bits per vector."""

    joint: float
    """For the bits, each given those before it."""
    side: float
    """For the weights and biases."""

    @property
    def total(self) -> float:
        """With what describes the prior."""
        return self.joint + self.side


@torch.no_grad()
def geometric_bits(
    feature_acts: Float[Tensor, "n d_sae"], W_enc: Float[Tensor, "d_in d_sae"], W_dec: Float[Tensor, "d_sae d_in"]
) -> GeometricBits:
    """Bits per vector for which features are not 0, predicted in their order from the values of those before.

    For any dictionary: of a binary code the values are its bits, of others the decoder is taken to know the earlier
    features' values. Weights and biases are learned from these vectors and counted as they are used, rounded to
    `BITS_PER_NUMBER` bits. Memory beyond the code is that of n vectors and of `FEATURES_AT_ONCE` features.

    Raises ValueError if there are no vectors.
    """
    n, d_sae = feature_acts.shape
    if n < 1:
        raise ValueError("a prior needs at least 1 vector, got none")
    nats, step = 0.0, -(-n // ROWS_OF_FIT)
    for scores, on in _scores(feature_acts, W_enc, W_dec):
        weight, bias = fit_prior(scores[::step], on[::step])
        logits = rounded_weight(weight) * (scores - scores.mean(0)) + rounded_bias(bias)
        nats += binary_cross_entropy_with_logits(logits, on.float(), reduction="none").sum(dtype=torch.float64).item()
    return GeometricBits(nats / log(2) / n, 2 * BITS_PER_NUMBER * d_sae / n)


def fit_prior(scores: Float[Tensor, "n k"], on: Bool[Tensor, "n k"]) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Weight and bias of k features' logits: logistic regression on their scores less the means, by Newton's method.

    A weight is at least 0, with a weak Gaussian prior around it, so that it is finite where the score tells without
    fail. A score that does not vary has weight 0.
    """
    y, n = on.to(scores), len(scores)
    mean, deviation = scores.mean(0), scores.std(0, correction=0)
    varies = deviation > 1e-6 * scores.abs().amax(0)
    x = torch.where(varies, (scores - mean) / deviation.where(varies, torch.ones_like(mean)), 0)
    fired = y.sum(0)
    bias = ((fired + 0.5) / (n - fired + 0.5)).log()
    weight = torch.zeros_like(bias)
    for _ in range(NEWTON_STEPS):
        error = torch.sigmoid(weight * x + bias)
        curvature = error * (1 - error)
        error -= y
        of_weight = (error * x).sum(0) + weight / PRIOR_DEVIATION**2
        of_bias = error.sum(0)
        weighted = curvature * x
        both, bias_bias = weighted.sum(0), curvature.sum(0) + 1e-3
        weight_weight = (weighted * x).sum(0) + 1 / PRIOR_DEVIATION**2
        determinant = weight_weight * bias_bias - both.square()
        step = torch.stack([bias_bias * of_weight - both * of_bias, weight_weight * of_bias - both * of_weight])
        step /= determinant
        step *= (LONGEST_STEP / step.abs().amax(0)).clamp(max=1)
        weight, bias = (weight - step[0]).clamp(min=0), bias - step[1]
    return torch.where(varies, weight / deviation.where(varies, torch.ones_like(mean)), 0), bias


def rounded_weight(weight: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """The nearest with so few digits that there are `WEIGHTS_PER_OCTAVE` between a power of two and the next."""
    mantissa, exponent = torch.frexp(weight)  # of the mantissa, from 1/2 to 1, as many parts
    return torch.ldexp((2 * WEIGHTS_PER_OCTAVE * mantissa).round() / (2 * WEIGHTS_PER_OCTAVE), exponent)


def rounded_bias(bias: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """The nearest of `BIASES_PER_NAT` numbers a nat, within `LARGEST_BIAS`."""
    return (BIASES_PER_NAT * bias.clamp(-LARGEST_BIAS, LARGEST_BIAS)).round() / BIASES_PER_NAT


def _scores(
    feature_acts: Float[Tensor, "n d_sae"], W_enc: Float[Tensor, "d_in d_sae"], W_dec: Float[Tensor, "d_sae d_in"]
) -> Iterator[tuple[Float[Tensor, "n k"], Bool[Tensor, "n k"]]]:
    """Of some features at a time, in order: what those before decode to, along W_enc; and where they are not 0."""
    decoded = torch.zeros(len(feature_acts), W_enc.shape[0], device=feature_acts.device)
    for first in range(0, feature_acts.shape[1], FEATURES_AT_ONCE):
        part = slice(first, first + FEATURES_AT_ONCE)
        values, encoder, decoder = feature_acts[:, part].float(), W_enc[:, part].float(), W_dec[part].float()
        yield decoded @ encoder + values @ (decoder @ encoder).triu(1), feature_acts[:, part] != 0
        decoded += values @ decoder
