"""What a bit says: the prior, the strength of a bit, a token's activated features, and polarity (section 4.1)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

FEATURES_PER_TOKEN = 10  # "activated" means among this many strongest (section 4.1)
INSTANCES_TO_COUNT = 8  # a feature activated by at least this many instances is "Feature Activated" (Table 1)
MORE_SURPRISING_THAN_NOT = -1.0  # bits: log2 |h - p| above this means that the bit differs from the prior's mode


def firing_rate(feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " d_sae"]:
    """Mean code of a batch, in at least float32."""
    return feature_acts.mean(0, dtype=torch.promote_types(feature_acts.dtype, torch.float32))


def running_mean_weight(n_steps: int, decay: float) -> float:
    """Weight of the newest batch in a running mean without initial bias: 1 at step 0, falling to `1 - decay`."""
    return (1 - decay) / (1 - decay ** (n_steps + 1))


def activation_strength(
    feature_acts: Float[Tensor, "*batch d_sae"], prior: Float[Tensor, " d_sae"]
) -> Float[Tensor, "*batch d_sae"]:
    """Activation strength `log2 |h - p|` of each bit, in bits, at most 0 (the burstiness of section 4.1).

    Near 0 for a bit the prior did not expect: set for a rare feature, or unset for one that is almost always on.
    Minus infinity for a bit that the prior was certain of.
    """
    return (feature_acts - prior).abs().log2()


def rescaled_activations(
    feature_acts: Float[Tensor, "*batch d_sae"], mean: Float[Tensor, " d_sae"], deviation: Float[Tensor, " d_sae"]
) -> Float[Tensor, "*batch d_sae"]:
    """How far real activations are above their mean over the analyzed set, in standard deviations of this set.

    The strength of the paper's rescaled SAE and transcoder (`--SAE_rescale` of its authors' code, which adds the 1e-6).
    """
    return (feature_acts - mean) / (deviation + 1e-6)


def strongest_features(
    strength: Float[Tensor, "*batch d_sae"], k: int = FEATURES_PER_TOKEN, floor: float = MORE_SURPRISING_THAN_NOT
) -> Int[Tensor, "*batch k"]:
    """Indices of the k (at most d_sae) strongest features, strongest first; -1 where fewer than k are above `floor`.

    Without the floor a token with fewer than k features of its own would be filled up by index with features that say
    nothing about it. The default floor is for `activation_strength`; for real activations use 0.
    Raises ValueError if k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    top = strength.topk(min(k, strength.shape[-1]), dim=-1)
    return torch.where(top.values > floor, top.indices, -1)


def count_instances(activated: Int[Tensor, "*batch k"], d_sae: int) -> Int[Tensor, " d_sae"]:
    """How many tokens activate each feature, from `strongest_features` of those tokens."""
    return torch.bincount(activated[activated >= 0], minlength=d_sae)


def flip_polarity(
    flip: Float[Tensor, " d_sae"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
    prior: Float[Tensor, " d_sae"],
) -> None:
    """Exchange 0 and 1 in place for the features where `flip` is 1 (0 elsewhere), leaving the reconstruction as it is.

    `h W = (1 - h)(-W) + W`: the encoder is negated, the decoder row moves to `b_dec` and is negated. Exact wherever the
    pre-activation is not exactly 0, if `b_dec` is not subtracted from the input.
    """
    sign = 1 - 2 * flip
    b_dec += flip.to(W_dec.dtype) @ W_dec
    W_dec *= sign[:, None].to(W_dec.dtype)
    W_enc *= sign.to(W_enc.dtype)
    b_enc *= sign.to(b_enc.dtype)
    prior.copy_(flip + sign * prior)
