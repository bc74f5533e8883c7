"""Outlier tokens: attention sinks such as BOS, whose norm is many times everyone else's and says nothing of content."""

from jaxtyping import Bool, Float
from torch import Tensor

OUTLIER_NORM = 5.0  # times the median norm: such tokens are attention sinks, not content
SINK_NORM = 10.0  # where content itself differs in norm, as at one position of a text: a sink has far more still


def is_outlier(
    norms: Float[Tensor, "*shape"], median: Float[Tensor, ""] | float, times: float = OUTLIER_NORM
) -> Bool[Tensor, "*shape"]:
    """Whether each norm is over so many times the median norm of the tokens that it is compared with."""
    return norms > times * median
