"""Harvested hidden states at two hooks, row by row, as a transcoder is trained on them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from bae_lens.harvest import HiddenStates
from bae_lens.standardisation import FOLDED, Standardisation, folded
from bae_lens.training_bae import TrainingBAE


class PairedStates:
    """Hidden states at two hooks of one harvest: what a transcoder reads, and what it should write for that token."""

    def __init__(self, source: HiddenStates, target: HiddenStates) -> None:
        """Raises ValueError for hidden states of two harvests, whose rows are not the same tokens."""
        if source.folder != target.folder:
            raise ValueError(
                f"a transcoder needs both hooks from one harvest, got {source.folder} and {target.folder}; "
                "harvest them together"
            )
        self.source, self.target = source, target
        self.hook_name, self.hook_name_out = source.hook_name, target.hook_name
        self.widths = {**source.widths, **target.widths}

    @property
    def standardisation(self) -> "PairStandardisation":
        """That of both sides."""
        return PairStandardisation(self.source.standardisation, self.target.standardisation)

    def shuffled(self, batch_size: int, seed: int, start_step: int = 0) -> Iterator[Float[Tensor, "batch _"]]:
        """The batches of `HiddenStates.shuffled`, the same tokens in the same order, (batch, d_in + d_out)."""
        sides = (states.shuffled(batch_size, seed, start_step) for states in (self.source, self.target))
        for source, target in zip(*sides, strict=True):
            yield torch.cat([source, target], dim=-1)


@dataclass(frozen=True)
class PairStandardisation:
    """The standardisations of a transcoder's input and of its output."""

    source: Standardisation
    """Of the input."""
    target: Standardisation
    """Of the output."""

    @torch.no_grad()
    def fold_into(self, sae: SAE[Any]) -> None:
        """Makes a transcoder trained on standardised activations take and give raw ones, exactly and in place."""
        if isinstance(sae, TrainingBAE):
            sae.fold_standardisation()
        raw = folded({name: getattr(sae, name).data for name in FOLDED}, self.source, self.target)
        for name, weights in raw.items():
            getattr(sae, name).copy_(weights)
