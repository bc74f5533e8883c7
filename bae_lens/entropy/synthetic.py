"""Vectors whose entropy is known (section 3.1, appendix A): sums of directions, each there by the toss of a coin.

Vectors made of real numbers have no entropy of their own; that of the coins is what a binary code of them has to find.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bae_lens.functional.losses import marginal_entropy


@dataclass(frozen=True)
class KnownEntropy:
    """Vectors with the coins they were made of. Unpacks as `vectors, coefficients`."""

    vectors: Float[Tensor, "n d"]
    coefficients: Float[Tensor, "n rank"]
    """0 or 1."""
    directions: Float[Tensor, "rank d"]
    """Vectors are `coefficients @ directions`, and noise where it was added."""
    joint_bits: float
    """Entropy of all coins together: what there is to know about a vector."""
    marginal_bits: float
    """Sum of the entropies of the single coins; more than `joint_bits` if they depend on one another."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.vectors, self.coefficients))


def random_directions(n: int, rank: int, d: int, generator: torch.Generator) -> KnownEntropy:
    """Fair coins on orthonormal directions: `rank` bits, the benchmark of section 3.1.

    Raises ValueError for more directions than dimensions; see `oblique_directions`.
    """
    return biased_coins(n, [0.5] * rank, d, generator)


def biased_coins(n: int, rates: Sequence[float], d: int, generator: torch.Generator) -> KnownEntropy:
    """Independent coins, each with its rate of ones, on orthonormal directions: the sum of h(rate) bits.

    Raises ValueError for more coins than dimensions or a rate outside [0, 1].
    """
    p = torch.tensor(rates, dtype=torch.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"rates must lie in [0, 1], got {list(rates)}")
    coins = (torch.rand(n, len(p), generator=generator, dtype=torch.float64) < p).float()
    bits = marginal_entropy(p).item()
    return _known(coins, _orthonormal(len(p), d, generator), bits, bits)


def correlated_coins(n: int, rank: int, d: int, generator: torch.Generator, flip: float = 0.1) -> KnownEntropy:
    """Fair coins of which each is the one before, turned over with probability `flip`, on orthonormal directions.

    They have `1 + (rank - 1) h(flip)` bits together and `rank` bits one by one; a code can only count the latter.
    Raises ValueError for more coins than dimensions or a probability outside [0, 1].
    """
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must lie in [0, 1], got {flip}")
    turns = torch.rand(n, rank, generator=generator) < torch.tensor([0.5, *[flip] * (rank - 1)])
    coins = (turns.cumsum(1) % 2).float()
    joint = 1 + (rank - 1) * marginal_entropy(torch.tensor([flip], dtype=torch.float64)).item()
    return _known(coins, _orthonormal(rank, d, generator), joint, float(rank))


def oblique_directions(
    n: int, rank: int, d: int, generator: torch.Generator, cosine: float | None = None
) -> KnownEntropy:
    """Fair coins on unit vectors that are not orthogonal: `rank` bits.

    Any two directions have the given cosine (in [0, 1), and there must be room for all); without one they are random,
    and may be more than the dimensions. Then all 2^rank sums still differ, so the entropy is still `rank` bits, but no
    hyperplane tells the two sides of every coin apart, and a linear encoder cannot find them all.
    Raises ValueError for a cosine out of range, or one with more directions than dimensions.
    """
    coins = _fair(n, rank, generator)
    if cosine is None:
        directions = torch.nn.functional.normalize(torch.randn(rank, d, generator=generator), dim=1)
    else:
        if not 0 <= cosine < 1:
            raise ValueError(f"cosine must lie in [0, 1), got {cosine}")
        gram = torch.full((rank, rank), cosine).fill_diagonal_(1.0)
        directions = torch.linalg.cholesky(gram) @ _orthonormal(rank, d, generator)
    return _known(coins, directions, float(rank), float(rank))


def with_noise(data: KnownEntropy, snr: float, generator: torch.Generator) -> KnownEntropy:
    """The same with Gaussian noise; `snr` is the variance of the vectors over that of the noise, all dimensions summed.

    The entropies stay those of the coins: noise is what a code should leave out. Raises ValueError unless snr > 0.
    """
    if not snr > 0:
        raise ValueError(f"snr must be positive, got {snr}")
    noise = torch.randn(data.vectors.shape, generator=generator)
    return replace(data, vectors=data.vectors + noise * (data.vectors.var(0).mean() / snr).sqrt())


def _fair(n: int, rank: int, generator: torch.Generator) -> Float[Tensor, "n rank"]:
    return (torch.rand(n, rank, generator=generator) < 0.5).float()


def _orthonormal(rank: int, d: int, generator: torch.Generator) -> Float[Tensor, "rank d"]:
    if not 1 <= rank <= d:
        raise ValueError(f"orthonormal directions must be between 1 and the {d} dimensions, got {rank}")
    return torch.linalg.qr(torch.randn(d, rank, generator=generator))[0].T


def _known(coins: Tensor, directions: Tensor, joint_bits: float, marginal_bits: float) -> KnownEntropy:
    return KnownEntropy(coins @ directions, coins, directions, joint_bits, marginal_bits)
