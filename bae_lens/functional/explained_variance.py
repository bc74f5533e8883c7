"""How much of the variance of some vectors their reconstructions explain, accumulated in one pass."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

ROUNDING = 1e-24  # of the squares of vectors that are all the same, a variance is nothing else


class ExplainedVariance:
    """Squared error and squared distance to the mean of vectors that come in batches, in float64."""

    def __init__(self) -> None:
        self.n, self.error = 0, 0.0
        """Vectors so far, and the sum of their squared errors."""

    def add(self, target: Float[Tensor, "n d_out"], sae_out: Float[Tensor, "n d_out"]) -> None:
        """A batch of vectors and what stands for them."""
        target = target.double()
        if self.n == 0:
            self._origin = target.mean(0)  # near the mean, so that the sums below do not cancel
            self._total, self._squares = torch.zeros_like(self._origin), 0.0
        centered = target - self._origin
        self.n += len(target)
        self.error += _sum_of_squares(sae_out.to(target) - target)
        self._total += centered.sum(0)
        self._squares += _sum_of_squares(centered)

    @property
    def variance(self) -> float:
        """Sum of the vectors' squared distances to their mean."""
        return max(0.0, self._squares - _sum_of_squares(self._total) / self.n) if self.n else 0.0

    @property
    def squares(self) -> float:
        """Sum of the vectors' squares."""
        return self.variance + self.n * _sum_of_squares(self._origin + self._total / self.n) if self.n else 0.0

    @property
    def varies(self) -> bool:
        """Whether the vectors differ by more than rounding."""
        return self.variance > ROUNDING * self.squares

    @property
    def explained(self) -> float:
        """1 minus `error` over `variance`: 1 is perfect, 0 no better than the mean; NaN if nothing varies."""
        return 1 - self.error / self.variance if self.varies else math.nan


def _sum_of_squares(values: Float[Tensor, "*shape"]) -> float:
    return torch.dot(values.flatten(), values.flatten()).item()
