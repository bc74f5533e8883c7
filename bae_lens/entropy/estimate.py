"""The entropy of a set of vectors through a binary code, in one pass and constant memory (section 3)."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bae_lens.functional.explained_variance import ExplainedVariance
from bae_lens.functional.losses import marginal_entropy
from bae_lens.functional.tree_entropy import PairCounts, PairTree, learn_tree
from bae_lens.storage import validated

ROWS = 4096  # encoded at once
CONFIDENCE = 0.95
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
    joint_bits_bound: float
    """Cross entropy of the code along a tree of pairs, each feature given at most one other (`PairTree`): an upper
    bound on the joint entropy that does not count twice what pairs of features share. Trees and their rates are learnt
    from other vectors, because one finds bits even in independent features where it is measured as well. Of more than
    8192 features, pairs are looked for among the 8192 that vary most (`PairCounts`)."""
    joint_interval: tuple[float, float] | None
    """95 % interval of `joint_bits_bound`, as that of `corrected_bits`. None if each half of the vectors is measured by
    the tree of the other, because no other vectors were given."""
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
    tree: PairTree | None = None,
) -> EntropyEstimate:
    """Entropy of the code that `sae` gives to `vectors`, a tensor or an iterable of batches that is gone through once.

    `tree` is one of `fit_tree`; without it the halves of these vectors learn one for each other. `seed` fixes the
    resampling and the halves; how the vectors are cut into batches makes no difference. `clusters` says which vectors
    belong together, such as those from one document, by any numbers: those are then resampled and halved whole, so that
    the interval is not that of as many independent vectors. The correction of the bits is that for independent ones.

    Raises ValueError for fewer than 2 vectors, values that are not finite, vectors that are all the same, a code that
    is not binary, vectors of another width than the code's, and another number of clusters than of vectors.
    """
    resampling = _Resampling(seed, clusters)
    counts: _Counts | None = None
    for x, code in _encoded(sae, vectors):
        counts = counts or _Counts(code, tree)
        counts.add(code, x, sae.decode(code), *resampling.draw(len(x), counts.device))
    n = counts.variance.n if counts else 0
    if clusters is not None and len(clusters) != n:
        raise ValueError(f"clusters must name one for each of the {n} vectors, got {len(clusters)}")
    if counts is None or n < 2:
        raise ValueError(f"an entropy needs at least 2 vectors, got {n}")
    return counts.estimate()


@torch.no_grad()
def fit_tree(sae: Encoder, vectors: Float[Tensor, "n d_in"] | Iterable[Float[Tensor, "..."]]) -> PairTree:
    """The tree of pairs of the code that `sae` gives to `vectors`, such as those that it was trained on.

    Raises ValueError as `estimate_entropy` does.
    """
    counts: PairCounts | None = None
    for _, code in _encoded(sae, vectors):
        code = code.to(_exact_device(code))
        counts = counts or PairCounts(code)
        counts.add(code)
    if counts is None or counts.n < 2:
        raise ValueError(f"a tree of pairs needs at least 2 vectors, got {counts.n if counts else 0}")
    return learn_tree(counts)


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

    def draw(self, n: int, device: torch.device) -> tuple[Float[Tensor, "n resamplings"], Bool[Tensor, " n"]]:
        """For the next n vectors, on a device. Raises ValueError if there are fewer clusters."""
        if self.cluster is None:
            copies, half = self._draw_independent(n)
            return copies.to(device), half.to(device)
        mine = self.cluster[self.drawn : self.drawn + n]
        if len(mine) < n:
            raise ValueError(f"clusters must name one for each vector, but there are more than {len(self.cluster)}")
        self.drawn += n
        copies, half = (of_clusters[mine].to(device) for of_clusters in self.of_clusters)
        return copies, half

    def _draw_independent(self, n: int) -> tuple[Float[Tensor, "n resamplings"], Bool[Tensor, " n"]]:
        # Poisson(1) copies of each: a bootstrap that needs not know how many there will be.
        copies = torch.poisson(torch.ones(n, RESAMPLINGS), self.copies)
        return copies, torch.rand(n, generator=self.coins) < 0.5


class _Counts:
    """All that one pass keeps, on the code's device."""

    def __init__(self, code: Tensor, tree: PairTree | None) -> None:
        self.device, d_sae = _exact_device(code), code.shape[1]
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
        self.tree = tree
        self.variance = ExplainedVariance()
        self.fired = zeros(d_sae)
        self.halves = [PairCounts(code.to(self.device)) for _ in range(2 if tree is None else 0)]
        self.joint_bits = zeros(())
        self.resampled = zeros(RESAMPLINGS, d_sae)
        self.resampled_joint_bits = zeros(RESAMPLINGS)
        self.resampled_n = zeros(RESAMPLINGS, 1)

    def add(self, code: Tensor, x: Tensor, reconstruction: Tensor, copies: Tensor, half: Tensor) -> None:
        code = code.to(self.device).float()
        self.variance.add(x.to(self.device), reconstruction.to(self.device))
        self.fired += code.sum(0, dtype=torch.float64)
        self.resampled += copies.T @ code
        self.resampled_n += copies.sum(0, dtype=torch.float64)[:, None]
        if self.tree is None:
            for counts, rows in zip(self.halves, (half, ~half), strict=True):
                counts.add(code[rows])
        else:
            bits = self.tree.bits(code)
            self.joint_bits += bits.sum()
            self.resampled_joint_bits += copies.T.double() @ bits

    def estimate(self) -> EntropyEstimate:
        if not self.variance.varies:
            raise ValueError("the vectors are all the same, so they have no entropy to estimate")
        n, most = torch.tensor([float(self.variance.n)]).to(self.fired), float(len(self.fired))
        bits = marginal_entropy(self.fired / n).item()
        corrected = min(most, jackknife_entropy(self.fired, n).item())
        enough = self.resampled_n[:, 0] > 1
        resampled_n = self.resampled_n[enough]
        # Resampled vectors are drawn from these, whose entropy is `bits`: how far they stray from it is the error.
        low, high = _interval(corrected, bits, jackknife_entropy(self.resampled[enough], resampled_n))
        joint = self.joint_bits.item() / self.variance.n
        resampled_joint = self.resampled_joint_bits[enough] / resampled_n[:, 0]
        return EntropyEstimate(
            bits=bits,
            corrected_bits=corrected,
            interval=(low, min(most, high)),
            joint_bits_bound=self._of_halves(bits) if self.tree is None else joint,
            joint_interval=None if self.tree is None else _interval(joint, joint, resampled_joint),
            explained_variance=self.variance.explained,
            n_vectors=self.variance.n,
            d_sae=len(self.fired),
            varying_features=int(((self.fired > 0) & (self.fired < self.variance.n)).sum()),
        )

    def _of_halves(self, bits: float) -> float:
        """Either half by the other's tree; of halves too small to learn from, the bits of the features one by one."""
        if min(half.n for half in self.halves) < 2:
            return bits
        pairs = (self.halves, self.halves[::-1])
        return sum(of.n * learn_tree(other).mean_bits(of) for of, other in pairs) / sum(half.n for half in self.halves)


def _interval(estimate: float, of_all: float, resampled: Float[Tensor, " resamplings"]) -> tuple[float, float]:
    """Around the estimate, as resampled values lie around `of_all`, that of the vectors they are drawn from.

    From 0 on: no entropy is less.
    """
    tails = torch.tensor([1 - CONFIDENCE, 1 + CONFIDENCE]).to(resampled) / 2
    low, high = (torch.quantile(resampled, tails) - of_all).tolist()
    return max(0.0, estimate - max(0.0, high)), estimate - min(0.0, low)


def _exact_device(code: Tensor) -> torch.device:
    """Where the counts are kept: Apple's GPU has no float64."""
    return torch.device("cpu") if code.device.type == "mps" else code.device


def _encoded(sae: Encoder, vectors: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Vectors, `ROWS` at a time, and their codes."""
    weights = getattr(sae, "W_enc", None)
    for x in _blocks(_batches(vectors)):
        code = sae.encode(x if weights is None else _converted(x, weights))
        _check_code(code, x, sae)
        yield x, code


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
