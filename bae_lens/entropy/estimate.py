"""The entropy of a set of vectors through a binary code, in one pass and constant memory (section 3)."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bae_lens.functional.explained_variance import ExplainedVariance
from bae_lens.functional.losses import marginal_entropy
from bae_lens.functional.pair_tree import spanning_forest
from bae_lens.storage import validated

ROWS = 4096  # encoded at once
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
    for each feature that varies. By jackknife over vectors; at most `d_sae`."""
    interval: tuple[float, float]
    """95 % interval of `corrected_bits`, by bootstrap over vectors, or over the clusters they come in."""
    shared_bits: float
    """What at least is counted twice: the information that pairs among `sampled_features` share, summed over a tree of
    pairs (Chow-Liu). The tree, of pairs that share more than they cost to describe, and the frequencies of its pairs
    are taken from a random half of the vectors, and their worth from the other half, both ways round: measured where it
    was chosen, a tree finds bits even in independent features."""
    sampled_features: int
    """Features whose pairs were looked at, drawn from those that vary in the first 4096 vectors."""
    explained_variance: float
    """1 minus squared error over squared distance to the mean, of the reconstructions."""
    n_vectors: int
    """That were encoded."""
    d_sae: int
    """Features of the code."""
    varying_features: int
    """Features that are neither always 0 nor always 1; the others have no entropy."""

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained."""
        return 1 - self.explained_variance

    @property
    def joint_bits_bound(self) -> float:
        """The tighter upper bound on the joint entropy of the code, `corrected_bits - shared_bits`."""
        return self.corrected_bits - self.shared_bits

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EntropyEstimate":
        """Raises ValueError for what is no estimate of this version."""
        return validated(cls, values, "this estimate")


@torch.no_grad()
def estimate_entropy(
    sae: Encoder,
    vectors: Float[Tensor, "n d_in"] | Iterable[Float[Tensor, "..."]],
    seed: int = 0,
    clusters: Int[Tensor, " n_vectors"] | None = None,
) -> EntropyEstimate:
    """Entropy of the code that `sae` gives to `vectors`, a tensor or an iterable of batches that is gone through once.

    `seed` fixes the resampling and which features' pairs are looked at; how the vectors are cut into batches makes no
    difference. `clusters` says which vectors belong together, such as those from one document, by any numbers: those
    are then resampled and halved whole, so that the interval is not that of as many independent vectors. The correction
    of the bits is that for independent ones.

    Raises ValueError for fewer than 2 vectors, values that are not finite, vectors that are all the same, a code that
    is not binary, vectors of another width than the code's, and another number of clusters than of vectors.
    """
    resampling = _Resampling(seed, clusters)
    counts: _Counts | None = None
    weights = getattr(sae, "W_enc", None)
    for x in _blocks(_batches(vectors)):
        code = sae.encode(x if weights is None else _converted(x, weights))
        _check_code(code, x, sae)
        counts = counts or _Counts(code, seed)
        counts.add(code.float().cpu(), x.double().cpu(), sae.decode(code).double().cpu(), *resampling.draw(len(x)))
    n = counts.variance.n if counts else 0
    if clusters is not None and len(clusters) != n:
        raise ValueError(f"clusters must name one for each of the {n} vectors, got {len(clusters)}")
    if counts is None or n < 2:
        raise ValueError(f"an entropy needs at least 2 vectors, got {n}")
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


class _Resampling:
    """How often every vector is taken in each resampling, and which half it is in."""

    def __init__(self, seed: int, clusters: Int[Tensor, " n"] | None) -> None:
        # Two generators, so that blocks of any size draw the same.
        # Not the seed itself, which may have made the vectors.
        seeds = np.random.SeedSequence(seed).generate_state(2)
        self.copies, self.coins = (torch.Generator().manual_seed(int(own)) for own in seeds)
        self.drawn = 0
        self.cluster = None if clusters is None else clusters.cpu().unique(return_inverse=True)[1]
        if self.cluster is not None:
            n_clusters = len(self.cluster.unique())
            if n_clusters < 2:
                raise ValueError(f"an interval over clusters needs at least 2 of them, got {n_clusters}")
            self.of_clusters = self._draw_independent(n_clusters)

    def draw(self, n: int) -> tuple[Float[Tensor, "n resamplings"], Bool[Tensor, " n"]]:
        """For the next n vectors. Raises ValueError if there are fewer clusters."""
        if self.cluster is None:
            return self._draw_independent(n)
        mine = self.cluster[self.drawn : self.drawn + n]
        if len(mine) < n:
            raise ValueError(f"clusters must name one for each vector, but there are more than {len(self.cluster)}")
        self.drawn += n
        copies, half = self.of_clusters
        return copies[mine], half[mine]

    def _draw_independent(self, n: int) -> tuple[Float[Tensor, "n resamplings"], Bool[Tensor, " n"]]:
        # Poisson(1) copies of each: a bootstrap that needs not know how many there will be.
        copies = torch.poisson(torch.ones(n, RESAMPLINGS), self.copies)
        return copies, torch.rand(n, generator=self.coins) < 0.5


class _Counts:
    """All that one pass keeps."""

    def __init__(self, code: Tensor, seed: int) -> None:
        varies = (code != code[0]).any(0).nonzero().flatten().cpu()
        order = torch.randperm(len(varies), generator=torch.Generator().manual_seed(seed))
        self.sampled = varies[order[:SAMPLED_FEATURES]]
        zeros = torch.zeros
        self.variance = ExplainedVariance()
        self.fired = zeros(code.shape[1], dtype=torch.float64)
        self.pairs = zeros(2, len(self.sampled), len(self.sampled), dtype=torch.float64)
        self.in_half = zeros(2, dtype=torch.float64)
        self.resampled = zeros(RESAMPLINGS, code.shape[1], dtype=torch.float64)
        self.resampled_n = zeros(RESAMPLINGS, 1, dtype=torch.float64)

    def add(self, code: Tensor, x: Tensor, reconstruction: Tensor, copies: Tensor, half: Tensor) -> None:
        self.variance.add(x, reconstruction)
        self.fired += code.sum(0, dtype=torch.float64)
        self.resampled += copies.T @ code
        self.resampled_n += copies.sum(0, dtype=torch.float64)[:, None]
        for i, rows in enumerate((half, ~half)):
            sampled = code[rows][:, self.sampled]
            self.pairs[i] += sampled.T @ sampled
            self.in_half[i] += len(sampled)

    def estimate(self) -> EntropyEstimate:
        if not self.variance.varies:
            raise ValueError("the vectors are all the same, so they have no entropy to estimate")
        n, most = torch.tensor([float(self.variance.n)], dtype=torch.float64), float(len(self.fired))
        bits = marginal_entropy(self.fired / n).item()
        corrected = min(most, jackknife_entropy(self.fired, n).item())
        enough = self.resampled_n[:, 0] > 1
        resampled = jackknife_entropy(self.resampled[enough], self.resampled_n[enough])
        # Resampled vectors are drawn from these, whose entropy is `bits`: how far they stray from it is the error.
        spread = torch.quantile(resampled, torch.tensor([1 - CONFIDENCE, 1 + CONFIDENCE]).double() / 2) - bits
        low, high = corrected - max(0.0, spread[1].item()), corrected - min(0.0, spread[0].item())
        return EntropyEstimate(
            bits=bits,
            corrected_bits=corrected,
            interval=(low, min(most, high)),
            shared_bits=_shared_bits(self.pairs, self.in_half),
            sampled_features=len(self.sampled),
            explained_variance=self.variance.explained,
            n_vectors=self.variance.n,
            d_sae=len(self.fired),
            varying_features=int(((self.fired > 0) & (self.fired < self.variance.n)).sum()),
        )


def _shared_bits(together: Float[Tensor, "2 k k"], n: Float[Tensor, " 2"]) -> float:
    """Information shared along trees of pairs, from how often two of k features fired together in either half.

    A tree fitted on one half saves `sum over its pairs of log2 q(x, y) / (q(x) q(y))` bits on the other, less what the
    features cost there by the rates of the wrong half, `sum over its features of KL(p || q)`. What is left is no more
    than the features share, up to chance, whichever tree it is.
    """
    k = together.shape[1]
    if k < 2 or n.min() < 2:
        return 0.0
    shares = [_cells(pairs, size) / size for pairs, size in zip(together, n, strict=True)]
    saved = 0.0
    for fitted, other in ((0, 1), (1, 0)):
        gain = _log_lift(shares[fitted], n[fitted])
        # A pair is worth naming if it shares more than its name and its frequency cost.
        cost = (np.log2(k) + n[fitted].log2() / 2) / n[fitted]
        worth = ((shares[fitted] * gain).sum(0) - cost).numpy()
        parents = spanning_forest(worth.__getitem__, k)
        second = np.flatnonzero(parents >= 0)
        first = parents[second]
        features = np.union1d(first, second)
        p, q = (shares[half][0].diagonal()[features] for half in (other, fitted))
        drift = (torch.xlogy(p, p / q) + torch.xlogy(1 - p, (1 - p) / (1 - q))).sum() / np.log(2)
        saved += ((shares[other] * gain).sum(0)[first, second].sum() - drift).item() / 2
    return max(0.0, saved)


def _cells(together: Float[Tensor, "k k"], n: Float[Tensor, ""]) -> Float[Tensor, "4 k k"]:
    """How often both, the first alone, the second alone and none of every two features fired."""
    fired = together.diagonal()
    first, second = fired[:, None] - together, fired[None] - together
    return torch.stack([together, first, second, n - together - first - second])


def _log_lift(shares: Float[Tensor, "4 k k"], n: Float[Tensor, ""]) -> Float[Tensor, "4 k k"]:
    """`log2 q(x, y) / (q(x) q(y))` of every two features, for each of the cells.

    One imagined vector in which they are independent is added to the n that were seen, so that what was not seen is not
    impossible.
    """
    both, first, second, _ = shares
    x, y = both + first, both + second
    independent = torch.stack([x * y, x * (1 - y), (1 - x) * y, (1 - x) * (1 - y)])
    lift = torch.where(independent > 0, shares / independent, 1.0)
    return ((n * lift + 1) / (n + 1)).log2()


def _batches(vectors: Any) -> Iterator[Tensor]:
    width = None
    for batch in vectors.split(ROWS) if isinstance(vectors, Tensor) else vectors:
        if batch.ndim < 2:
            raise ValueError(f"batches of vectors have at least 2 axes, got shape {tuple(batch.shape)}")
        x = batch.flatten(0, -2)
        if x.shape[1] != (width := width or x.shape[1]):
            raise ValueError(
                f"all vectors must be equally wide, but one batch is {width} wide and another {x.shape[1]}"
            )
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).any(-1).sum())
            raise ValueError(f"vectors must be finite, but {bad} of {len(x)} in a batch hold NaN or infinity")
        yield x


def _converted(x: Tensor, weights: Tensor) -> Tensor:
    converted = x.to(weights.device, weights.dtype)
    if not torch.isfinite(converted).all():
        raise ValueError(f"vectors must be finite in the dictionary's {weights.dtype}, but some are too large for it")
    return converted


def _blocks(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same rows, `ROWS` at a time, so that no result depends on how they came."""
    held: list[Tensor] = []
    for batch in batches:
        for part in batch.split(ROWS):
            room = ROWS - sum(map(len, held))
            held.append(part[:room])
            if len(part) >= room:
                yield torch.cat(held)
                held = [part[room:]]
    if sum(map(len, held)):
        yield torch.cat(held)


def _check_code(code: Tensor, x: Tensor, sae: Encoder) -> None:
    if not ((code == 0) | (code == 1)).all():
        raise ValueError("the entropy of a binary code needs one of 0 and 1; this encoder gives other values")
    width = sae.decode(code[:1]).shape[-1]
    if width != x.shape[-1]:
        raise ValueError(f"this dictionary takes vectors {width} wide, got {x.shape[-1]}")
