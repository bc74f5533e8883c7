"""The benchmark of known entropies (section 3.1, appendix A): estimated against true bits."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bae_lens.entropy.estimate import EntropyEstimate, estimate_entropy, fit_tree
from bae_lens.entropy.fit import FitSettings, fit_baes
from bae_lens.entropy.synthetic import KnownEntropy, random_directions
from bae_lens.saes.bae import BAE
from bae_lens.storage import validated

D = 64
N_VECTORS, N_TRAIN = 65_536, 52_428
RANKS, WIDTHS = (2, 4, 8, 16, 32, 48), (64, 128, 256, 512)


@dataclass(frozen=True)
class Recovery:
    """One BAE on vectors of known entropy, measured on held-out ones."""

    rank: int
    """Coins."""
    d_sae: int
    """Features of the BAE."""
    seed: int
    """Of the vectors and of the training."""
    true_bits: float
    """Joint entropy of the coins."""
    bits: float
    """Marginal entropy of the code."""
    joint_bits_bound: float
    """What is left of it if each feature is coded given one other."""
    fvu: float
    """Fraction of variance unexplained."""
    varying_features: int
    """Features that are neither always 0 nor always 1."""
    agreement: float
    """See `agreement`."""
    seconds: float
    """Training and measuring, its share of the batch."""

    @property
    def relative_error(self) -> float:
        """How far the bits are from the true ones, as a share of these."""
        return abs(self.bits / self.true_bits - 1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recovery":
        """Raises ValueError for what is no recovery of this version."""
        return validated(cls, values, "this recovery")


def recover(
    ranks: Sequence[int],
    d_sae: int,
    seed: int = 0,
    entropy_coefficient: float = 0.3,
    settings: FitSettings | None = None,
    n_vectors: int = N_VECTORS,
) -> list[Recovery]:
    """Fair coins on random orthonormal directions in 64 dimensions, a set for each rank; four fifths for training."""
    start = time.perf_counter()
    n_train = n_vectors * 4 // 5
    data = [random_directions(n_vectors, rank, D, torch.Generator().manual_seed(seed)) for rank in ranks]
    vectors = torch.stack([known.vectors for known in data])
    baes = fit_baes(vectors[:, :n_train], d_sae, seed, [entropy_coefficient], settings)
    estimates = [
        estimate_entropy(bae, x[n_train:], tree=fit_tree(bae, x[:n_train]))
        for bae, x in zip(baes, vectors, strict=True)
    ]
    seconds = (time.perf_counter() - start) / len(ranks)
    return [
        score(known, n_train, bae, estimate, seed, seconds)
        for known, bae, estimate in zip(data, baes, estimates, strict=True)
    ]


def score(
    known: KnownEntropy, n_train: int, bae: BAE, estimate: EntropyEstimate, seed: int, seconds: float
) -> Recovery:
    """An estimate over all vectors after the first `n_train`, beside the truth."""
    with torch.no_grad():
        code = bae.encode(known.vectors[n_train:])
    return Recovery(
        rank=known.coefficients.shape[1],
        d_sae=estimate.d_sae,
        seed=seed,
        true_bits=known.joint_bits,
        bits=estimate.bits,
        joint_bits_bound=estimate.joint_bits_bound,
        fvu=estimate.fvu,
        varying_features=estimate.varying_features,
        agreement=agreement(code, known.coefficients[n_train:]),
        seconds=seconds,
    )


def agreement(code: Float[Tensor, "n d_sae"], coins: Float[Tensor, "n rank"]) -> float:
    """Share of vectors in which the feature that follows a coin best, or its negation, equals it; mean over coins.

    1 if every coin is a feature; for fair coins 1/2 if features know nothing of them.
    """
    both = code.T @ coins
    neither = len(code) - code.sum(0)[:, None] - coins.sum(0)[None] + both
    equal = (both + neither) / len(code)
    return torch.maximum(equal, 1 - equal).amax(0).mean().item()
