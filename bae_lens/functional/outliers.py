"""Outlier tokens: attention sinks such as BOS, whose norm is many times everyone else's and says nothing of content."""

from jaxtyping import Bool, Float
from torch import Tensor

OUTLIER_NORM = 5.0  # times the median norm: such tokens are attention sinks, not content


def is_outlier(norms: Float[Tensor, "*shape"], median: Float[Tensor, ""] | float) -> Bool[Tensor, "*shape"]:
    """Whether each norm is over `OUTLIER_NORM` times the median norm of the tokens that it is compared with."""
    return norms > OUTLIER_NORM * median
