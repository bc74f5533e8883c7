"""How several processes share a training step of a binary code: the rows of its batch, or its features.

With a share of the features each process encodes the whole batch by its own columns of the encoder, and adds up its own
rows of the decoder. Only these sums are exchanged, the firing rates, and, for the covariance penalty, the codes. Then
all have the same reconstruction, and its gradient goes back into each process' own weights.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from bae_lens.distributed.connection import n_processes, process_index
from bae_lens.distributed.exchange import all_reduce_sum, gather_rows, in_turn, shard, sum_parts
from bae_lens.functional.covariance import (
    absolute_covariance,
    code_times_signs,
    covariance_penalty,
    drawn_features,
    others_times_signs,
)
from bae_lens.saes.training_config import TrainingBAEConfig

FEATURE_AXIS = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "prior": 0}  # of what a binary code has for each of its features


class SharedRows:
    """Each process has all features, and its own rows of a batch. A single process has everything."""

    def whole_batch(
        self, own: Shaped[Tensor, "own ..."], sent_as: torch.dtype | None = None
    ) -> Shaped[Tensor, "n ..."]:
        """What all processes have of their rows; see `gather_rows`."""
        return gather_rows(own, sent_as)

    def all_features(self, own: Float[Tensor, " own"]) -> Float[Tensor, " all_features"]:
        """What all processes have of their features."""
        return own

    def own_features(self, everyones: Float[Tensor, " all_features"]) -> Float[Tensor, " own"]:
        """What this process has of all features."""
        return everyones

    def sum_over_features(self, own: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The sum over all features of what this process has summed over its own."""
        return own

    def covariance_penalty(
        self, code: Float[Tensor, "batch own"], sample: int | None, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """Of all features, see `covariance_penalty`; the processes share the work."""
        return covariance_penalty(code, sample, generator, lambda code: all_reduce_sum(code_times_signs, code))


class SharedFeatures:
    """Each process has all rows of a batch, and its own features: as many as the others, or one more or less."""

    def __init__(self, d_sae: int) -> None:
        """Of a dictionary of so many features."""
        self.d_sae = d_sae
        own = shard(torch.arange(d_sae))
        self.own = range(int(own[0]), int(own[-1]) + 1)

    def whole_batch(
        self,
        own: Shaped[Tensor, "n ..."],
        sent_as: torch.dtype | None = None,  # noqa: ARG002
    ) -> Shaped[Tensor, "n ..."]:
        """As it is."""
        return own

    def all_features(self, own: Float[Tensor, " own"]) -> Float[Tensor, " all_features"]:
        """What all processes have of their features, differentiable with respect to this one's."""
        return gather_rows(own)

    def own_features(self, everyones: Float[Tensor, " all_features"]) -> Float[Tensor, " own"]:
        """What this process has of all features."""
        return shard(everyones)

    def sum_over_features(self, own: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The sum over all features of what this process has summed over its own, in at least float32."""
        return sum_parts(own.to(torch.promote_types(own.dtype, torch.float32)))

    def covariance_penalty(
        self, code: Float[Tensor, "batch own"], sample: int | None, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """Of all features, see `covariance_penalty`; each process takes the pairs of its own features with all."""
        factor = 1.0
        if sample is not None:
            drawn, factor = drawn_features(self.d_sae, sample, generator)
            own = drawn[(drawn >= self.own.start) & (drawn < self.own.stop)] - self.own.start
            code = code[:, own.to(code.device)]
        return sum_parts(absolute_covariance(code, _times_all_signs)) * factor


def _times_all_signs(own: Float[Tensor, "batch own"]) -> Float[Tensor, "batch own"]:
    """All features' codes times the signs of their covariances with these: one process' features after another's."""
    product = code_times_signs(own)
    for index, others in enumerate(in_turn(own.to(torch.uint8))):
        if index != process_index():
            product += others_times_signs(others.to(own.dtype), own)
    return product


def check_features_can_be_shared(name: str, cfg: TrainingBAEConfig) -> None:
    """Raises ValueError for fewer features than processes, and for codes that are chosen among all features."""
    if cfg.d_sae < n_processes():
        raise ValueError(
            f"{n_processes()} processes cannot share the {cfg.d_sae} features of {name}, of which each needs one; "
            f"start at most {cfg.d_sae}"
        )
    if hasattr(cfg, "k"):
        raise ValueError(
            f"{name} is a {cfg.architecture()} dictionary, of whose features the k largest fire, for which a process "
            "needs all; leave out --shard-features"
        )
    if cfg.optimized_start_step is not None:
        raise ValueError(
            f"{name} is trained on optimized codes from step {cfg.optimized_start_step} on, for which a process needs "
            "all features; leave out --shard-features, or optimized_start_step"
        )
