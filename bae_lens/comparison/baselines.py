"""What takes no training, beside which dictionaries stand: PCA with quantization, its bound, signs, random features."""

from dataclasses import dataclass, field

import torch

from bae_lens.activations.cache import CachedActivations
from bae_lens.functional.rate_distortion import (
    RANDOM_L0,
    RatePoint,
    covariance,
    gaussian_bound,
    pca_quantization,
    random_coding,
    sign_coding,
)

BASELINE_ROWS = 65_536  # training tokens on which PCA is fitted, at most
RANDOM_ROWS = 32_768  # on which random features are, at most
ROWS_PER_FEATURE = 8  # of random features, at least, so that least squares does not fit what is only in these rows


@dataclass(frozen=True)
class Baselines:
    """Explained variance against bits per token; see `Comparison`."""

    pca: list[RatePoint]
    """Of PCA with scalar quantization."""
    gaussian_bound: list[RatePoint]
    """Of Gaussian activations with the same covariance."""
    sign_coding: list[RatePoint]
    """Of signs of the activations' own dimensions."""
    random_coding: list[RatePoint] = field(default_factory=list)
    """Of random features that all fire equally often."""

    @classmethod
    def of(cls, train: CachedActivations, test: CachedActivations, d_sae: int) -> "Baselines":
        """Fitted on tokens spread evenly over the training ones, measured on the test ones.

        There are `d_sae` random features, or one for each `ROWS_PER_FEATURE` tokens if that is less.
        """
        known = train.rows(train.content[:: -(-len(train.content) // BASELINE_ROWS)])
        new = test.rows(test.content)
        pca = pca_quantization(known, new)
        bits = torch.tensor([point.bits for point in pca], dtype=torch.float64)
        bound = gaussian_bound(torch.linalg.eigvalsh(covariance(known)).clamp(min=0), bits)
        gaussian = [RatePoint(*point) for point in zip(bits.tolist(), bound.tolist(), strict=True)]
        some = known[:: -(-len(known) // RANDOM_ROWS)]
        n_features = min(d_sae, len(some) // ROWS_PER_FEATURE)
        random = random_coding(some, new, n_features, [l0 for l0 in RANDOM_L0 if l0 <= n_features / 2])
        return cls(pca, gaussian, sign_coding(known, new), random)
