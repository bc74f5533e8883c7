"""What a dictionary does to activations it has not seen: reconstruction, rate in bits, and which features fire.

A dictionary is measured twice: as trained, by the code that its encoder gives, and with every help, by one that is
chosen for its decoder.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from bae_lens.evaluation.best_code import BestCode
from bae_lens.evaluation.joint_bits import JointBits
from bae_lens.evaluation.value_bits import cheapest_values, value_coding_curve
from bae_lens.functional.explained_variance import ExplainedVariance
from bae_lens.functional.losses import marginal_entropy
from bae_lens.functional.rate_distortion import RatePoint
from bae_lens.functional.strength import INSTANCES_TO_COUNT, activation_strength, count_instances, strongest_features
from bae_lens.saes.binary_code import is_binary
from bae_lens.saes.skip import skip_output

RATE_BINS = np.linspace(-5, 0, 21)  # of a histogram: log10 of the firing rate
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
    joint_bits: float
    """What is needed to say so in bits per token if features are coded given others, with all side information, as
    `JointBits` counts them."""
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


class _Coded:
    """A code that is measured: what it costs, and what it explains."""

    code: CodeMetrics
    explained_variance: float
    value_bits: float
    value_curve: list[RatePoint]

    @property
    def bits(self) -> float:
        """Bits per token: support bits and value bits."""
        return self.code.support_bits + self.value_bits

    @property
    def coded(self) -> RatePoint:
        """Bits and explained variance with the values quantized as `value_bits` counts them."""
        point = RatePoint(self.bits, self.explained_variance)
        return min(self.value_curve, key=lambda quantized: abs(quantized.bits - self.bits), default=point)

    @property
    def jointly_coded(self) -> RatePoint:
        """`coded` with joint bits in place of support bits."""
        return RatePoint(self.code.joint_bits + self.value_bits, self.coded.explained_variance)

    @property
    def joint_value_curve(self) -> list[RatePoint]:
        """`value_curve` with joint bits in place of support bits."""
        less = self.code.support_bits - self.code.joint_bits
        return [RatePoint(bits - less, explained) for bits, explained in self.value_curve]


@dataclass(frozen=True)
class OptimizedCode(_Coded):
    """The code that is chosen for a dictionary's decoder, with every help; see `BestCode`."""

    code: CodeMetrics
    """Which features fire, and how often, which says whether they mean what they did."""
    explained_variance: float
    """1 minus squared error over squared distance to the mean."""
    value_bits: float
    """Bits per token for the values of the features that fire; see `DictionaryMetrics`."""
    value_curve: list[RatePoint]
    """Explained variance against support bits plus value bits, by quantization step."""


@dataclass(frozen=True)
class DictionaryMetrics(_Coded):
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
    quantization that costs at most `QUANTIZATION_LOSS` of explained variance; see `value_coding_curve`."""
    value_curve: list[RatePoint]
    """Explained variance against support bits plus value bits, by quantization step; empty for a binary code, and for
    one that never fires."""
    is_binary: bool
    """Whether the features are bits."""
    optimized: OptimizedCode | None
    """The dictionary with every help; None where it was not asked for, and for dictionaries that have none."""
    refitted: OptimizedCode | None
    """The encoder's own features with the values that are best for the decoder: worse than `optimized`, but features
    that an encoder chose may take fewer joint bits. None for a binary code, and where `optimized` is."""


class CodeCounter:
    """Counts firing features over batches, in float64, for `CodeMetrics`."""

    def __init__(self, sae: SAE[Any]) -> None:
        self.n = 0
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
        self.instances = torch.zeros(sae.cfg.d_sae, dtype=torch.int64)
        self.joint = JointBits(sae)

    def add(self, feature_acts: Float[Tensor, "n d_sae"], activated: Int[Tensor, "n k"]) -> None:
        """Counts a batch, of which `activated` are the strongest features of each token."""
        self.n += len(feature_acts)
        self.fired += fires(feature_acts).sum(0).cpu()
        self.instances += count_instances(activated, len(self.fired)).cpu()
        self.joint.add(feature_acts)

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
            joint_bits=self.joint.bits / self.n,
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
    optimize: bool = True,
) -> DictionaryMetrics:
    """Measures a dictionary on raw activations, accumulating in float64; `targets` are what a transcoder should give.

    Strength in a binary code is relative to its firing rates on these activations; the prior of `sae` stays as it is.
    With `optimize`, the code that is chosen for the decoder is measured too, which takes most of the time. Bits leave
    out the norms of vectors that a dictionary with a normalization of each vector needs; it has no other code.
    Raises ValueError if there are no activations, and for some that are not finite.
    """
    if len(activations) == 0:
        raise ValueError("there are no activations to evaluate on")
    targets = activations if targets is None else targets
    for vectors in (activations, targets):
        if not torch.isfinite(vectors).all():
            bad = int((~torch.isfinite(vectors)).flatten(1).any(1).sum())
            raise ValueError(
                f"vectors must be finite, but {bad} of {len(vectors)} hold NaN or infinity; leave them out"
            )
    parts = list(zip(activations.split(batch_size), targets.split(batch_size), strict=True))

    def encoded() -> Iterator[Coded]:
        for x, y in parts:
            x = x.to(sae.device, sae.dtype)
            skipped = torch.as_tensor(skip_output(sae, x)).to(y.device, y.dtype)
            yield Coded(sae.encode(x), y - skipped, skipped)

    measured = _Measured(sae, encoded)
    if not (optimize and BestCode.exists(sae)):
        return measured.metrics(None, None)
    best = BestCode(sae)
    refitted = None if is_binary(sae) else _optimized_code(sae, best.refit, encoded)
    return measured.metrics(_optimized_code(sae, best, encoded), refitted)


class Coded(NamedTuple):
    """A batch, encoded."""

    code: Float[Tensor, "n d_sae"]
    target: Float[Tensor, "n d_out"]
    """What the code should be decoded to."""
    skipped: Float[Tensor, "n d_out"] | Float[Tensor, ""]
    """What is written beside it, by a skip connection; 0 without one."""


def _optimized_code(
    sae: SAE[Any],
    chosen: Callable[[Tensor, Tensor], Tensor],
    encoded: Callable[[], Iterable[Coded]],
) -> OptimizedCode:
    """The measures of what `chosen` makes of the encoder's codes and their targets."""
    kept = [part._replace(code=chosen(part.code, part.target).to_sparse()) for part in encoded()]
    measured = _Measured(sae, lambda: (part._replace(code=part.code.to_dense()) for part in kept))
    return OptimizedCode(measured.code, measured.variance.explained, measured.value_bits, measured.curve)


class _Measured:
    """The measures of one code of a dictionary; `coded` gives batches of it and of their targets, as often as asked."""

    def __init__(self, sae: SAE[Any], coded: Callable[[], Iterable[Coded]]) -> None:
        self.is_binary = is_binary(sae)
        prior = firing_rates(part.code for part in coded()) if self.is_binary else None
        counter, self.variance = CodeCounter(sae), ExplainedVariance()
        self.cosine = self.ratio = 0.0
        for feature_acts, target, skipped in coded():
            counter.add(feature_acts, activated_features(sae, feature_acts, prior))
            decoded = sae.decode(feature_acts).double().to(target.device)
            y, sae_out = target.double() + skipped, decoded + skipped
            self.variance.add(y, sae_out)
            self.cosine += torch.cosine_similarity(sae_out, y, dim=-1).sum().item()
            self.ratio += (sae_out.norm(dim=-1) / y.norm(dim=-1)).sum().item()
        self.code = counter.metrics()
        bits, explained = self.code.support_bits, self.variance.explained
        self.curve = (
            []
            if self.is_binary
            else value_coding_curve(
                sae, lambda: ((part.code, part.target) for part in coded()), bits, self.variance.variance
            )
        )
        self.value_bits = cheapest_values(self.curve, explained).bits - bits if self.curve else 0.0

    def metrics(self, optimized: OptimizedCode | None, refitted: OptimizedCode | None) -> DictionaryMetrics:
        n = self.variance.n
        return DictionaryMetrics(
            code=self.code,
            explained_variance=self.variance.explained,
            mean_squared_error=self.variance.error / n,
            cosine_similarity=self.cosine / n,
            l2_ratio=self.ratio / n,
            value_bits=self.value_bits,
            value_curve=self.curve,
            is_binary=self.is_binary,
            optimized=optimized,
            refitted=refitted,
        )


def firing_rates(codes: Iterable[Float[Tensor, "n d_sae"]]) -> Float[Tensor, " d_sae"]:
    """Share of all rows in which each feature fires: the prior of a binary code over what was encoded.

    Raises ValueError if there are no rows.
    """
    fired, n = torch.zeros((), dtype=torch.int64), 0
    for feature_acts in codes:
        fired, n = fires(feature_acts).sum(0) + fired.to(feature_acts.device), n + len(feature_acts)
    if n == 0:
        raise ValueError("there are no activations to evaluate on")
    return (fired.double() / n).float()


def rate_histogram(rates: list[float]) -> list[int]:
    """Features by log10 of their firing rate, in the bins `RATE_BINS`: rarer ones in the first, dead ones in none."""
    fired = np.array(rates)[np.array(rates) > 0]
    return np.histogram(np.log10(fired).clip(RATE_BINS[0], 0), RATE_BINS)[0].tolist()


def fires(feature_acts: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Which features are active: bits that are set, values other than 0."""
    return feature_acts != 0


def activated_features(
    sae: SAE[Any], feature_acts: Float[Tensor, "*batch d_sae"], prior: Float[Tensor, " d_sae"] | None = None
) -> Int[Tensor, "*batch k"]:
    """Indices of the 10 strongest features of each token, by activation strength for a BAE, else by activation.

    `prior` takes the place of the BAE's own.
    """
    if is_binary(sae):
        return strongest_features(activation_strength(feature_acts, sae.prior if prior is None else prior))
    return strongest_features(feature_acts, floor=0.0)
