"""The standardization that a BAE finds and follows in training, and that its weights absorb when they are saved."""

from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bae_lens.distributed.exchange import gather_rows
from bae_lens.functional.outliers import is_outlier
from bae_lens.saes.binary_code import StatisticsInFloat32
from bae_lens.saes.standardization import PairStandardization, Standardization, standardization_of


class State(IntEnum):
    """What is known of the activations. Held on the host, so that no step waits for the device to read it."""

    UNKNOWN = 0
    """Nothing yet: mean 0 and scale 1."""
    FOUND = 1
    """Mean and scale were found, and the mean is followed."""
    FOLDED = 2
    """The weights are for activations as they are, and stay so: mean 0 and scale 1."""


class RunningStandardization(nn.Module):
    """Centering and scaling of what is encoded, `source`, and of what is reconstructed, `target`.

    `state` is part of the state dict, as the tensors are.
    """

    def __init__(self, d_in: int, d_out: int, device: torch.device) -> None:
        super().__init__()
        self.source, self.target = RunningSide(d_in, device), RunningSide(d_out, device)
        self.state = State.UNKNOWN

    def find(self, source: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"]) -> None:
        """Finds mean and scale of both sides on a first batch; one of fewer than 2 rows says nothing."""
        rows = gather_rows(source), gather_rows(target)
        if len(rows[0]) < 2:
            return
        self.source.become(standardization_of(rows[0]))
        self.target.become(standardization_of(rows[1]))
        self.state = State.FOUND

    def fold(self) -> PairStandardization:
        """What is known so far, to be absorbed by the weights; from here on they take activations as they are."""
        known = self.known()
        self.source.forget()
        self.target.forget()
        self.state = State.FOLDED
        return known

    def known(self) -> PairStandardization:
        """What is known so far."""
        return PairStandardization(self.source.known(), self.target.known())

    def get_extra_state(self) -> Tensor:
        """The state as a tensor, which is all that safetensors can hold."""
        return torch.tensor(self.state, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Of `get_extra_state`."""
        self.state = State(int(state))


class RunningSide(StatisticsInFloat32):
    """Mean and scale of the activations on one side."""

    mean: Tensor
    """What is subtracted, (d,)."""
    scale: Tensor
    """By which the centered activations are multiplied, to mean squared norm d; ()."""

    def __init__(self, d: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(d, device=device))
        self.register_buffer("scale", torch.ones((), device=device))

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Standardized."""
        return (x - self.mean.to(x)) * self.scale.to(x)

    def raw(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Undoes `forward`."""
        return x / self.scale.to(x) + self.mean.to(x)

    def follow(self, x: Float[Tensor, "n d"], weight: float) -> Float[Tensor, " d"]:
        """Moves the mean towards that of a batch, and returns by how much, in standardized units."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, scale = self.mean, self.scale.to(x)
        deviation = (x - mean.to(x)) * scale
        ordinary = ~is_outlier(torch.linalg.vector_norm(deviation, dim=-1), x.shape[-1] ** 0.5)
        sums = torch.cat([(deviation * ordinary[:, None]).sum(0), ordinary.sum()[None]])
        total, n = gather_rows(sums[None]).sum(0).split([x.shape[-1], 1])
        # Replaced, not changed in place: a compiled backward pass may still read the old value.
        self.mean = (mean.to(x) + weight * total / n.clamp(min=1) / scale).to(mean)
        return (self.mean.to(x) - mean.to(x)) * scale

    def become(self, found: Standardization) -> None:
        """Takes over what was found."""
        self.mean, self.scale = found.mean.to(self.mean), torch.full_like(self.scale, found.scale)

    def forget(self) -> None:
        """Back to mean 0 and scale 1."""
        self.mean, self.scale = torch.zeros_like(self.mean), torch.ones_like(self.scale)

    def known(self) -> Standardization:
        """Mean and scale."""
        return Standardization(self.mean, self.scale.item())


def add_missing_state(state_dict: dict[str, Any], prefix: str) -> None:
    """Gives a state dict the entries of the `RunningStandardization` called `prefix` that it lacks.

    Weights saved for inference have none, and are for activations as they are. Earlier checkpoints name them otherwise,
    and say by a scale of 0 that nothing is known, by one of -1 that it was folded.
    """
    if f"{prefix}.source.scale" in state_dict:
        return
    W_enc, b_dec = state_dict["W_enc"], state_dict["b_dec"]
    state = State.FOLDED
    for side, earlier, width in (("source", "input", W_enc.shape[0]), ("target", "output", b_dec.shape[0])):
        mean = state_dict.pop(f"{earlier}_mean", torch.zeros(width, device=W_enc.device))
        scale = state_dict.pop(f"{earlier}_scale", torch.full((), -1.0, device=W_enc.device))
        if side == "source" and scale >= 0:
            state = State.FOUND if scale > 0 else State.UNKNOWN
        state_dict[f"{prefix}.{side}.mean"] = mean
        state_dict[f"{prefix}.{side}.scale"] = torch.where(scale > 0, scale, 1.0)
    state_dict[f"{prefix}._extra_state"] = torch.tensor(state, dtype=torch.uint8)
