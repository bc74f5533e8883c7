"""A saved dictionary as the beginning of a training.

What is saved takes activations as they are; what is trained takes standardized ones. So the weights are expressed in
standardized activations first, the inverse of what is done when they are saved.
"""

from copy import deepcopy
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE, TrainingSAEConfig

from bae_lens.saes.binary_code import is_binary
from bae_lens.saes.standardization import PairStandardization, Standardization

# What each architecture is trained as. SAELens saves BatchTopK and Matryoshka as JumpReLU, and as that they go on.
TRAINED_AS = {
    "bae": "bae",
    "binary_topk": "binary_topk",
    "binary_transcoder": "binary_transcoder",
    "binary_topk_transcoder": "binary_topk_transcoder",
    "standard": "standard",
    "topk": "topk",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "transcoder": "transcoder",
    "skip_transcoder": "transcoder",
    "topk_transcoder": "topk_transcoder",
}
ALIKE = ("d_in", "d_out", "d_sae", "apply_b_dec_to_input")  # what a config and the dictionary must agree on
ENCODER = ("W_enc", "b_enc", "b_gate", "b_mag", "threshold")  # weights in proportion to which features activate


def inherited(saved: SAE[Any]) -> dict[str, Any]:
    """The fields of a training config that go on from a saved dictionary. Raises ValueError for one that cannot."""
    _check_trainable(saved)
    values = {name: getattr(saved.cfg, name) for name in (*ALIKE, "k") if hasattr(saved.cfg, name)}
    architecture = saved.cfg.architecture()
    if architecture.endswith("transcoder"):
        values["skip"] = hasattr(saved, "W_skip")
    if architecture.startswith("topk"):
        values["rescale_acts_by_decoder_norm"] = _selects_by_norm(saved)
    return values


def check_start(cfg: TrainingSAEConfig, saved: SAE[Any]) -> None:
    """Raises ValueError for a dictionary that cannot be trained, or not with this config."""
    values = inherited(saved)
    check_architecture(cfg.architecture(), saved)
    values.pop("k", None)  # which may change
    if values.get("rescale_acts_by_decoder_norm"):
        del values["rescale_acts_by_decoder_norm"]  # where norms are equal, either will do
    for name, value in values.items():
        if getattr(cfg, name, value) != value:
            raise ValueError(f"the dictionary to start from has {name} {value}, and asked for is {getattr(cfg, name)}")


def check_architecture(architecture: str, saved: SAE[Any]) -> None:
    """Raises ValueError unless a saved dictionary is trained as this architecture."""
    _check_trainable(saved)
    own = saved.cfg.architecture()
    if architecture != TRAINED_AS[own]:
        raise ValueError(
            f"the dictionary to start from is a {own}, which is trained as {TRAINED_AS[own]}, and the architecture "
            f"asked for is {architecture}"
        )


@torch.no_grad()
def start_at(sae: TrainingSAE[Any], saved: SAE[Any], standardization: Standardization | PairStandardization) -> None:
    """Gives a dictionary in training the weights of a saved one, in standardized activations.

    Its output is that of the saved one, standardized. Decoder rows of real-valued features are scaled to norm 1 in the
    mean, all by one factor, and the encoder inversely, which changes no output: by their own scale, that of raw
    activations, the optimizer's steps would be too large or too small for them.
    """
    start: Any = deepcopy(saved).to("cpu").to(dtype=torch.float64)
    start.turn_off_forward_pass_hook_z_reshaping()
    standardization.inverse.fold_into(start)
    if not is_binary(start):
        norm = start.W_dec.norm(dim=-1).mean()
        start.W_dec /= norm
        for name in ENCODER:
            if (weights := getattr(start, name, None)) is not None:
                weights.mul_(norm)
    for name, parameter in sae.named_parameters():
        parameter.copy_(getattr(start, name))
    if is_binary(sae):
        _go_on_at_price(sae, start)


def _go_on_at_price(sae: Any, start: Any) -> None:
    """Firing rates are known; a coefficient that a target controls goes on from what a bit was worth, if that is."""
    sae.prior.copy_(start.prior)
    sae.bit_price.copy_(start.bit_price)
    cfg = sae.cfg
    controlled = cfg.target_l0 is not None or cfg.target_bits is not None
    if controlled and cfg.reconstruction == "sum" and sae.bit_price > 0:
        sae.entropy_multiplier.copy_(sae.bit_price / cfg.entropy_coefficient)


def _check_trainable(saved: Any) -> None:
    architecture, normalization = saved.cfg.architecture(), saved.cfg.normalize_activations
    if architecture not in TRAINED_AS:
        raise ValueError(f"no training starts from a {architecture}, but from one of {', '.join(TRAINED_AS)}")
    if normalization != "none":
        raise ValueError(
            f"the dictionary to start from normalizes its input ({normalization}), which training does otherwise; "
            "choose one that takes activations as they are"
        )
    if architecture == "jumprelu" and not (saved.threshold >= 0).all():
        raise ValueError("the dictionary to start from has thresholds below 0, which training does not allow")


def _selects_by_norm(saved: SAE[Any]) -> bool:
    """Whether the k largest are the same by activations and by what they write, as they are where norms are equal."""
    norms = saved.W_dec.norm(dim=-1)
    return bool(getattr(saved.cfg, "rescale_acts_by_decoder_norm", False) or torch.allclose(norms, norms.mean(), 1e-4))
