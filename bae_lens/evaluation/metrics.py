"""What a dictionary does to activations it has not seen: reconstruction, rate in bits, and which features fire."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from bae_lens.evaluation.value_bits import cheapest_values, value_coding_curve
from bae_lens.functional.losses import marginal_entropy
from bae_lens.functional.rate_distortion import RatePoint
from bae_lens.functional.strength import INSTANCES_TO_COUNT, activation_strength, count_instances, strongest_features
from bae_lens.saes.bae import BAE
from bae_lens.saes.binary_code import is_binary

DENSE_RATE = 0.1  # a feature on, and off, for more than this share of the tokens is dense


@dataclass(frozen=True)
class CodeMetrics:
    """Which features fire, on how many tokens, and what it takes to say so; see each field."""

    n_tokens: int
    """Tokens measured."""
    l0: float
    """Features that fire per token, in the mean."""
    informative_l0: float
    """Features per token that differ from what they do most of the time; equals L0 if all features are rare."""
    support_bits: float
    """Sum of the Bernoulli entropies of the firing rates: an upper bound, in bits per token, on what is needed to say
    which features fire. All there is to say for a binary code."""
    dead: int
    """Features that fired for no token."""
    always_on: int
    """Features that fired for every token."""
    dense: int
    """Features that fire on over 10 % of the tokens and stay off on over 10 %."""
    feature_activated: int
    """Features among the 10 strongest of at least 8 tokens (Table 1), not counting strengths that say nothing."""
    firing_rates: list[float]
    """Share of the tokens on which each feature fires, (d_sae,)."""


@dataclass(frozen=True)
class DictionaryMetrics:
    """A dictionary on held-out activations; for a transcoder, "activations" are those at its output hook."""

    code: CodeMetrics
    """Which features fire, and how often."""
    explained_variance: float
    """1 minus squared error over squared distance to the mean; 1 is perfect, 0 is no better than the mean."""
    mean_squared_error: float
    """Squared error per token, summed over dimensions."""
    cosine_similarity: float
    """Between output and target, in the mean."""
    l2_ratio: float
    """Norm of the output over norm of the target, in the mean."""
    value_bits: float
    """Bits per token for the values of the features that fire, 0 for a binary code: the cheapest entropy-coded uniform
    quantization that costs at most `QUANTISATION_LOSS` of explained variance; see `value_coding_curve`."""
    value_curve: list[RatePoint]
    """Explained variance against support bits plus value bits, by quantization step; empty for a binary code."""

    @property
    def bits(self) -> float:
        """Bits per token: support bits and value bits."""
        return self.code.support_bits + self.value_bits


class CodeCounter:
    """Counts firing features over batches, in float64, for `CodeMetrics`."""

    def __init__(self, d_sae: int) -> None:
        self.n = 0
        self.fired = torch.zeros(d_sae, dtype=torch.float64)
        self.instances = torch.zeros(d_sae, dtype=torch.int64)

    def add(self, feature_acts: Float[Tensor, "n d_sae"], activated: Int[Tensor, "n k"]) -> None:
        """Counts a batch, of which `activated` are the strongest features of each token."""
        self.n += len(feature_acts)
        self.fired += (feature_acts != 0).sum(0).cpu()
        self.instances += count_instances(activated, len(self.fired)).cpu()

    def metrics(self) -> CodeMetrics:
        """Raises ValueError if nothing was counted."""
        if self.n == 0:
            raise ValueError("there are no activations to evaluate on")
        rate = self.fired / self.n
        rare_side = torch.minimum(rate, 1 - rate)
        return CodeMetrics(
            n_tokens=self.n,
            l0=rate.sum().item(),
            informative_l0=rare_side.sum().item(),
            support_bits=marginal_entropy(rate).item(),
            dead=int((rate == 0).sum()),
            always_on=int((rate == 1).sum()),
            dense=int((rare_side > DENSE_RATE).sum()),
            feature_activated=int((self.instances >= INSTANCES_TO_COUNT).sum()),
            firing_rates=rate.tolist(),
        )


@torch.no_grad()
def evaluate_dictionary(
    sae: SAE[Any],
    activations: Float[Tensor, "n d_in"],
    targets: Float[Tensor, "n d_out"] | None = None,
    *,
    batch_size: int = 2048,
) -> DictionaryMetrics:
    """Measures a dictionary on raw activations, accumulating in float64; `targets` are what a transcoder should give.

    A BAE's prior is set to its firing rates on them first, because strength is relative to the analyzed set.
    Raises ValueError if there are no activations.
    """
    n = len(activations)
    if n == 0:
        raise ValueError("there are no activations to evaluate on")
    targets = activations if targets is None else targets
    batches = list(zip(activations.split(batch_size), targets.split(batch_size), strict=True))
    if isinstance(sae, BAE):
        sae.estimate_prior(activations.split(batch_size))
    counter = CodeCounter(sae.cfg.d_sae)
    error = squares = cosine = ratio = torch.zeros((), dtype=torch.float64)
    total = torch.zeros(targets.shape[-1], dtype=torch.float64)
    for x, y in batches:
        y = y.double()
        feature_acts = sae.encode(x.to(sae.device, sae.dtype))
        counter.add(feature_acts, activated_features(sae, feature_acts))
        sae_out = sae.decode(feature_acts).double().cpu()
        error = error + (sae_out - y).square().sum()
        squares = squares + y.square().sum()
        cosine = cosine + torch.cosine_similarity(sae_out, y, dim=-1).sum()
        ratio = ratio + (sae_out.norm(dim=-1) / y.norm(dim=-1)).sum()
        total += y.sum(0)
    code, variance = counter.metrics(), squares - total.square().sum() / n
    explained_variance = (1 - error / variance).item()
    curve = []
    if not is_binary(sae):
        curve = value_coding_curve(sae, batches, code.support_bits, variance.item())
    return DictionaryMetrics(
        code=code,
        explained_variance=explained_variance,
        mean_squared_error=error.item() / n,
        cosine_similarity=cosine.item() / n,
        l2_ratio=ratio.item() / n,
        value_bits=cheapest_values(curve, explained_variance).bits - code.support_bits if curve else 0.0,
        value_curve=curve,
    )


def activated_features(
    sae: SAE[Any], feature_acts: Float[Tensor, "*batch d_sae"], prior: Float[Tensor, " d_sae"] | None = None
) -> Int[Tensor, "*batch k"]:
    """Indices of the 10 strongest features of each token, by activation strength for a BAE, else by activation.

    `prior` takes the place of the BAE's own.
    """
    if is_binary(sae):
        return strongest_features(activation_strength(feature_acts, sae.prior if prior is None else prior))
    return strongest_features(feature_acts, floor=0.0)
