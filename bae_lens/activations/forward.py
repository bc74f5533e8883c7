"""Running a model for what it holds at some of its hooks."""

from collections.abc import Sequence
from typing import Any

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bae_lens.activations.models import resolve_hook
from bae_lens.saes.saelens_compat import extract_stop_at_layer_from_tlens_hook_name


@torch.no_grad()
def hook_widths(model: Any, hook_names: Sequence[str]) -> dict[str, int]:
    """Widths of the activations at some hooks, in the order in which a pass reaches them; heads are concatenated."""
    resolved = {hook_name: resolve_hook(model, hook_name) for hook_name in hook_names}
    states = _hidden_states(model, torch.zeros(1, 1, dtype=torch.long), list(dict.fromkeys(resolved.values())))
    reached = sorted(resolved, key=lambda hook_name: list(states).index(resolved[hook_name]))
    return {hook_name: states[resolved[hook_name]].shape[-1] for hook_name in reached}


def _hidden_states(
    model: Any, tokens: Int[Tensor, "n context_size"], hook_names: Sequence[str]
) -> dict[str, Float[Tensor, "n context_size _"]]:
    """In the order in which the pass reached them."""
    _, cache = model.run_with_cache(
        tokens.to(model.cfg.device),
        names_filter=list(hook_names),
        stop_at_layer=stop_layer(hook_names),
        prepend_bos=False,
    )
    for hook_name in hook_names:
        if hook_name not in cache:
            raise ValueError(f"the model has a hook {hook_name!r}, but did not reach it; choose another one")
    states = {}
    for hook_name in sorted(hook_names, key=list(cache.keys()).index):
        states[hook_name] = cache[hook_name].float().cpu()
        if states[hook_name].ndim == 4:
            states[hook_name] = einops.rearrange(
                states[hook_name], "n position head d_head -> n position (head d_head)"
            )
        shape = tuple(states[hook_name].shape)
        if len(shape) != 3 or shape[:2] != tokens.shape:
            raise ValueError(f"{hook_name} must give one vector a token, got shape {shape}; choose another hook")
    return states


def stop_layer(hook_names: Sequence[str]) -> int | None:
    """The layer before which a pass that reaches all these hooks may stop; None if one lies outside the layers."""
    layers = [extract_stop_at_layer_from_tlens_hook_name(hook_name) for hook_name in hook_names]
    return None if None in layers else max(layer for layer in layers if layer is not None)
