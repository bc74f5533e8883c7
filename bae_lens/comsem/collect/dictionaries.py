"""Dictionaries by object, folder or name on the hub, and which of their features say something about a token."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from bae_lens.functional.strength import FEATURES_PER_TOKEN, MORE_SURPRISING_THAN_NOT, activation_strength
from bae_lens.saes.binary_code import is_binary
from bae_lens.saes.loading import load_pretrained

Dictionary = SAE[Any] | str | Path


def load_dictionary(source: Dictionary, device: str = "cpu") -> SAE[Any]:
    """An SAE object as it is, a folder as SAELens saves it, or `RELEASE/SAE_ID` on the hub.

    Raises as `load_pretrained`, and ValueError for a dictionary that does not say where it reads.
    """
    sae = source if isinstance(source, SAE) else load_pretrained(str(source), device)
    if not sae.cfg.metadata.hook_name:
        raise ValueError("this dictionary does not say which hook it reads; set sae.cfg.metadata.hook_name")
    return sae


def load_dictionaries(sources: Dictionary | Mapping[str, Dictionary], device: str = "cpu") -> dict[str, SAE[Any]]:
    """Dictionaries by name; a single one is named after its folder, id or architecture."""
    if not isinstance(sources, Mapping):
        name = sources.cfg.architecture() if isinstance(sources, SAE) else Path(sources).name
        sources = {name: sources}
    if not sources:
        raise ValueError("there are no dictionaries to score")
    return {name: load_dictionary(source, device) for name, source in sources.items()}


def informative(
    sae: SAE[Any], feature_acts: Float[Tensor, "n d_sae"], prior: Float[Tensor, " d_sae"] | None = None
) -> Bool[Tensor, "n d_sae"]:
    """Which features say something about each token: activations over 0, or bits that differ from the prior's mode.

    `prior` takes the place of the BAE's own.
    """
    if is_binary(sae):
        known: Any = sae.prior if prior is None else prior
        return activation_strength(feature_acts, known) > MORE_SURPRISING_THAN_NOT
    return feature_acts > 0


def ten_strongest(
    sae: SAE[Any], feature_acts: Float[Tensor, "n d_sae"], prior: Float[Tensor, " d_sae"] | None = None
) -> Int[Tensor, "n k"]:
    """The features that each token activates by the authors' rule: ten however weak, of equal ones the first.

    `prior` takes the place of the BAE's own.
    """
    strength = feature_acts
    if is_binary(sae):
        known: Any = sae.prior if prior is None else prior
        strength = activation_strength(feature_acts, known)
    return strength.sort(dim=-1, descending=True, stable=True).indices[:, :FEATURES_PER_TOKEN]
