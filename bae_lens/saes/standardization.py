"""Centering and scaling of activations, and how weights absorb them."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from bae_lens.functional.outliers import is_outlier
from bae_lens.saes.binary_code import is_binary

FOLDED = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")


@dataclass(frozen=True)
class Standardization:
    """Centering and scaling to mean squared norm d_in, so that hyperparameters carry over between layers and models."""

    mean: Float[Tensor, " d_in"]
    """What is subtracted."""
    scale: float
    """By which the centered activations are multiplied."""

    def __call__(self, activations: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return (activations - self.mean.to(activations)) * self.scale

    @property
    def inverse(self) -> "Standardization":
        """Takes standardized activations to what they were; folded in, it undoes what this does."""
        return Standardization(-self.mean.double() * self.scale, 1 / self.scale)

    def fold_into(self, sae: SAE[Any]) -> None:
        """Makes a dictionary trained on standardized activations take and give raw ones, exactly and in place.

        By SAELens' own fold, whose architectures each know the biases that they have besides `folded`'s.
        """
        identity = torch.eye(len(self.mean), dtype=torch.float64)
        sae.fold_activation_whitening(self.mean.double(), identity * self.scale, identity / self.scale)


def standardization_of(activations: Float[Tensor, "n d_in"]) -> Standardization:
    """That of a sample, in float64, without the rows further than 5 times the median from the coordinates' medians.

    Activations that are all the same have scale 1.
    """
    x = activations.cpu().double()
    distance = torch.linalg.vector_norm(x - x.median(0).values, dim=-1)
    if distance.median() > 0:
        x = x[~is_outlier(distance, distance.median())]
    square = (x - x.mean(0)).square().sum(-1).mean()
    return Standardization(x.mean(0), (x.shape[-1] / square).sqrt().item() if square > 0 else 1.0)


def foldable_weights(sae: SAE[Any]) -> dict[str, Tensor]:
    """The weights that standardizations change: of most dictionaries all, `W_skip` if there is a skip connection."""
    return {name: getattr(sae, name).data for name in FOLDED if hasattr(sae, name)}


def folded(weights: dict[str, Tensor], source: Standardization, target: Standardization) -> dict[str, Tensor]:
    """The `foldable_weights` of a dictionary for raw activations, computed in float64.

    The given ones are for inputs standardized by `source`, and outputs that are standardized by `target`.
    """
    given = {name: weight.double() for name, weight in weights.items()}
    mean = source.mean.to(given["W_enc"])
    raw = {
        "W_enc": given["W_enc"] * source.scale,
        "W_dec": given["W_dec"] / target.scale,
        "b_dec": given["b_dec"] / target.scale + target.mean.to(mean),
    }
    raw["b_enc"] = given["b_enc"] - mean @ raw["W_enc"]
    if "W_skip" in given:
        raw["W_skip"] = given["W_skip"] * (source.scale / target.scale)
        raw["b_dec"] -= raw["W_skip"] @ mean
    return {name: value.to(weights[name].dtype) for name, value in raw.items()}


def raw_price(bit_price: Tensor, scale: float) -> Tensor:
    """Squared error that a bit is worth, of activations as they are, from that of activations multiplied by `scale`."""
    return bit_price / scale**2


@dataclass(frozen=True)
class PairStandardization:
    """The standardizations of a transcoder's input and of its output."""

    source: Standardization
    """Of the input."""
    target: Standardization
    """Of the output."""

    @property
    def inverse(self) -> "PairStandardization":
        """That of both sides."""
        return PairStandardization(self.source.inverse, self.target.inverse)

    @torch.no_grad()
    def fold_into(self, sae: SAE[Any]) -> None:
        """Makes a transcoder trained on standardized activations take and give raw ones, exactly and in place."""
        fold_own: Any = getattr(sae, "fold_standardization", None)
        if fold_own is not None:
            fold_own()
        raw = folded(foldable_weights(sae), self.source, self.target)
        for name, weights in raw.items():
            getattr(sae, name).copy_(weights)
        if is_binary(sae):
            sae.bit_price.copy_(raw_price(sae.bit_price, self.target.scale))
