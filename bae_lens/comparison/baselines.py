"""What takes no dictionary, beside which dictionaries stand: PCA with quantization, its bound, and signs."""

from dataclasses import dataclass

import torch

from bae_lens.activations.cache import CachedActivations
from bae_lens.functional.rate_distortion import RatePoint, covariance, gaussian_bound, pca_quantization, sign_coding

BASELINE_ROWS = 65_536  # training tokens on which PCA is fitted, at most


@dataclass(frozen=True)
class Baselines:
    """Explained variance against bits per token; see `Comparison`."""

    pca: list[RatePoint]
    """Of PCA with scalar quantization."""
    gaussian_bound: list[RatePoint]
    """Of Gaussian activations with the same covariance."""
    sign_coding: list[RatePoint]
    """Of signs of the activations' own dimensions."""

    @classmethod
    def of(cls, train: CachedActivations, test: CachedActivations) -> "Baselines":
        """Fitted on tokens spread evenly over the training ones, measured on the test ones."""
        known = train.rows(train.content[:: -(-len(train.content) // BASELINE_ROWS)])
        new = test.rows(test.content)
        pca = pca_quantization(known, new)
        bits = torch.tensor([point.bits for point in pca], dtype=torch.float64)
        bound = gaussian_bound(torch.linalg.eigvalsh(covariance(known)).clamp(min=0), bits)
        gaussian = [RatePoint(*point) for point in zip(bits.tolist(), bound.tolist(), strict=True)]
        return cls(pca, gaussian, sign_coding(known, new))
