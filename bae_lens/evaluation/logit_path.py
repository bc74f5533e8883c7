"""From directions of the residual stream to the logits, without detour through later layers."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bae_lens.evaluation.hooking import is_bridge

RESIDUAL_HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
PROBE = 64.0  # size of what is sent through the normalization: large beside its epsilon
FAINT = 0.1  # logits of what is sent through the unembedding: small beside any cap that the model puts on them


def writes_to_residual_stream(model: Any, hook_name: str) -> bool:
    """Whether what stands at a hook is added to the residual stream, or is the stream itself.

    At a bridge's `hook_resid_mid` only the normalization before the MLP sees it.
    """
    layer, _, hook = hook_name.partition(".hook_")
    if not is_bridge(model):
        return f"hook_{hook}" in RESIDUAL_HOOKS
    block = ".".join(layer.split(".")[:2])
    here = [model._resolve_hook_name(f"{block}.{name}") for name in RESIDUAL_HOOKS if name != "hook_resid_mid"]
    return model._resolve_hook_name(hook_name) in here


@torch.no_grad()
def direct_logits(model: Any, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    """What directions of the residual stream add to the logits on the direct path to them, in float32.

    They go through the weights of the final normalization, which takes the mean off first where it is a LayerNorm, the
    unembedding, and the model's scale of logits; activations of root mean square s divide the effects by s. Weights
    and scale are what the model does with a probe, as models keep them in different ways (Gemma's weights are those
    less 1, Granite divides its logits, Cohere multiplies them). A cap on the logits is left out.
    """
    W_U = model.W_U.float()
    return _logit_scale(model) * (_normalized(model, directions.to(W_U)) @ W_U)


def _normalized(model: Any, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    norm = getattr(model, "ln_final", None)
    if norm is None or model.cfg.normalization_type is None:
        return directions
    x = directions.new_full((1, 1, directions.shape[1]), PROBE)
    x[..., ::2] = -PROBE
    x = x.to(model.W_U.dtype)
    if torch.allclose(norm(x + PROBE), norm(x), rtol=1e-2):  # it takes the mean off
        x, directions = x - x.mean(), directions - directions.mean(-1, keepdim=True)
    size = x.float().square().mean().sqrt()
    return directions * (norm(x) - norm(-x))[0].float() / 2 * size / x[0].float()


def _logit_scale(model: Any) -> float:
    """By what a bridge multiplies the products of its unembedding; hooked models have none."""
    if not is_bridge(model):
        return 1.0
    W_U = model.W_U
    probe = torch.randn(W_U.shape[0], generator=torch.Generator().manual_seed(0)).to(W_U)
    probe = probe * FAINT / (probe @ W_U).abs().max()
    expected = (probe @ W_U).float()

    def send(activations: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return torch.stack([probe, torch.zeros_like(probe)])[:, None].to(activations)

    tokens = torch.zeros(2, 1, dtype=torch.long, device=model.cfg.device)
    seen = model.run_with_hooks(
        tokens, return_type="logits", prepend_bos=False, fwd_hooks=[("unembed.hook_in", send)]
    ).float()[:, -1]
    return ((seen[0] - seen[1]).to(expected) @ expected / (expected @ expected)).item()
