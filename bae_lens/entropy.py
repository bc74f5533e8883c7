"""The entropy of a set of vectors through a binary code, in one pass and constant memory (section 3)."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor

from bae_lens.losses import marginal_entropy

ROWS = 4096  # of a tensor, encoded at once
CONFIDENCE = 0.95
SAMPLED_FEATURES = 256  # whose pairs are looked at
RESAMPLINGS = 200


@runtime_checkable
class Encoder(Protocol):
    """A `BAE`, or anything that encodes vectors in bits and decodes them."""

    def encode(self, x: Tensor, /) -> Tensor:
        """The code (n, d_sae), 0 or 1, of vectors (n, d_in)."""
        ...

    def decode(self, feature_acts: Tensor, /) -> Tensor:
        """Vectors (n, d_in) from their code."""
        ...


@dataclass(frozen=True)
class EntropyEstimate:
    """Entropy of a code over a set of vectors, in bits per vector, and how much of the vectors it stands for.

    Two sets are comparable where their explained variance is the same: see `rate_distortion.bits_at`.
    """

    bits: float
    """Marginal entropy (Eq. 4) of the mean code: an upper bound on the joint entropy of the code over this set, tight
    if the features are independent."""
    corrected_bits: float
    """The same for the distribution the vectors were drawn from: `bits` is too small for few vectors, by about 0.72/n
    for each feature that varies. By jackknife."""
    interval: tuple[float, float]
    """95 % interval of `corrected_bits`, by bootstrap over vectors."""
    shared_bits: float
    """What at least is counted twice: the information that pairs among `sampled_features` share, summed over the tree
    of pairs that share most (Chow-Liu). The joint entropy is at most `bits - shared_bits`. A pair has to share more
    than the `log2(n) / 2n` bits that describing it would cost."""
    sampled_features: int
    """Features whose pairs were looked at, drawn from those that vary in the first vectors."""
    explained_variance: float
    """1 minus squared error over squared distance to the mean, of the reconstructions."""
    n_vectors: int
    d_sae: int
    varying_features: int
    """Features that are neither always 0 nor always 1; the others have no entropy."""

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained."""
        return 1 - self.explained_variance

    @property
    def joint_bits_bound(self) -> float:
        """The tighter upper bound on the joint entropy of the code, `bits - shared_bits`."""
        return self.bits - self.shared_bits

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EntropyEstimate":
        return cls(**{**values, "interval": tuple(values["interval"])})


@torch.no_grad()
def estimate_entropy(
    sae: Encoder, vectors: Float[Tensor, "n d_in"] | Iterable[Float[Tensor, "..."]], seed: int = 0
) -> EntropyEstimate:
    """Entropy of the code that `sae` gives to `vectors`, a tensor or an iterable of batches that is gone through once.

    `seed` fixes the resampling and which features' pairs are looked at.
    Raises ValueError for fewer than 2 vectors, values that are not finite, vectors that are all the same, a code that
    is not binary, and vectors of another width than the code's.
    """
    counts: _Counts | None = None
    for x in _batches(sae, vectors):
        code = sae.encode(x)
        _check_code(code, x, sae)
        counts = counts or _Counts(code, x, seed)
        counts.add(code.float().cpu(), x.double().cpu(), sae.decode(code).double().cpu())
    if counts is None or counts.n < 2:
        raise ValueError(f"an entropy needs at least 2 vectors, got {counts.n if counts else 0}")
    return counts.estimate()


def jackknife_entropy(fired: Float[Tensor, "*batch d_sae"], n: Float[Tensor, "*batch 1"]) -> Float[Tensor, "*batch"]:
    """Sum over features of the jackknife estimate of a bit's entropy, in bits, if it was 1 in `fired` of `n` vectors.

    `n h(c/n) - (n-1)/n [c h((c-1)/(n-1)) + (n-c) h(c/(n-1))]` for count c. Unbiased to order 1/n, like the Miller-Madow
    correction, but with a third to a sixth of what that leaves for features that fired a few times, as most do in the
    codes of a language model.
    """
    left_out = fired * _bit((fired - 1) / (n - 1)) + (n - fired) * _bit(fired / (n - 1))
    return (n * _bit(fired / n) - (n - 1) / n * left_out).sum(-1)


def _bit(rate: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Entropy of a single bit; outside [0, 1], where a count was left out that is not there, it does not matter."""
    return marginal_entropy(rate.clamp(0, 1)[..., None])


class _Counts:
    """All that one pass keeps."""

    def __init__(self, code: Tensor, x: Tensor, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        varies = (code != code[0]).any(0).nonzero().flatten().cpu()
        self.sampled = varies[torch.randperm(len(varies), generator=self.generator)[:SAMPLED_FEATURES]]
        zeros = torch.zeros
        self.n, self.error = 0, 0.0
        self.fired = zeros(code.shape[1], dtype=torch.float64)
        self.pairs = zeros(len(self.sampled), len(self.sampled), dtype=torch.float64)
        self.resampled = zeros(RESAMPLINGS, code.shape[1], dtype=torch.float64)
        self.resampled_n = zeros(RESAMPLINGS, 1, dtype=torch.float64)
        self.origin = x.double().mean(0).cpu()  # near the mean, so that the sums below do not cancel
        self.total, self.squares = zeros(x.shape[1], dtype=torch.float64), 0.0

    def add(self, code: Tensor, x: Tensor, reconstruction: Tensor) -> None:
        # Poisson(1) copies of every vector: a bootstrap that needs not know how many vectors there will be.
        copies = torch.poisson(torch.ones(RESAMPLINGS, len(x)), self.generator)
        self.n += len(x)
        self.fired += code.sum(0, dtype=torch.float64)
        self.resampled += copies @ code
        self.resampled_n += copies.sum(1, keepdim=True, dtype=torch.float64)
        sampled = code[:, self.sampled]
        self.pairs += sampled.T @ sampled
        self.error += (reconstruction - x).square().sum().item()
        self.total += (x - self.origin).sum(0)
        self.squares += (x - self.origin).square().sum().item()

    def estimate(self) -> EntropyEstimate:
        variance = self.squares - self.total.square().sum().item() / self.n
        if not variance > 1e-24 * (self.n * self.origin.square().sum().item()):
            raise ValueError("the vectors are all the same, so they have no entropy to estimate")
        n = torch.tensor([float(self.n)], dtype=torch.float64)
        bits = marginal_entropy(self.fired / n).item()
        corrected = jackknife_entropy(self.fired, n).item()
        enough = self.resampled_n[:, 0] > 1
        resampled = jackknife_entropy(self.resampled[enough], self.resampled_n[enough])
        # Resampled vectors are drawn from these, whose entropy is `bits`: how far they stray from it is the error.
        spread = torch.quantile(resampled, torch.tensor([1 - CONFIDENCE, 1 + CONFIDENCE]).double() / 2) - bits
        return EntropyEstimate(
            bits=bits,
            corrected_bits=corrected,
            interval=(corrected - max(0.0, spread[1].item()), corrected - min(0.0, spread[0].item())),
            shared_bits=_shared_bits(self.pairs, self.n),
            sampled_features=len(self.sampled),
            explained_variance=1 - self.error / variance,
            n_vectors=self.n,
            d_sae=len(self.fired),
            varying_features=int(((self.fired > 0) & (self.fired < self.n)).sum()),
        )


def _shared_bits(together: Float[Tensor, "k k"], n: int) -> float:
    """Mutual information summed over the maximum spanning tree of k features, from how often two fired together."""
    if len(together) < 2:
        return 0.0
    fired = together.diagonal()
    both, first, second = together, fired[:, None] - together, fired[None] - together
    cells = torch.stack([both, first, second, n - both - first - second]) / n
    joint = -torch.xlogy(cells, cells).sum(0) / np.log(2)
    single = _bit(fired / n)
    gain = single[:, None] + single[None] - joint - np.log2(n) / (2 * n)
    gain = gain.clamp(min=0).triu(1)
    return max(0.0, -float(minimum_spanning_tree(-gain.numpy()).sum()))


def _batches(sae: Encoder, vectors: Any) -> Iterator[Tensor]:
    like = getattr(sae, "W_enc", None)
    for batch in vectors.split(ROWS) if isinstance(vectors, Tensor) else vectors:
        if batch.ndim < 2:
            raise ValueError(f"batches of vectors have at least 2 axes, got shape {tuple(batch.shape)}")
        x = batch.flatten(0, -2)
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).any(-1).sum())
            raise ValueError(f"vectors must be finite, but {bad} of {len(x)} in a batch hold NaN or infinity")
        if len(x):
            yield x if like is None else x.to(like.device, like.dtype)


def _check_code(code: Tensor, x: Tensor, sae: Encoder) -> None:
    if not ((code == 0) | (code == 1)).all():
        raise ValueError("the entropy of a binary code needs one of 0 and 1; this encoder gives other values")
    width = sae.decode(code[:1]).shape[-1]
    if width != x.shape[-1]:
        raise ValueError(f"this dictionary takes vectors {width} wide, got {x.shape[-1]}")
