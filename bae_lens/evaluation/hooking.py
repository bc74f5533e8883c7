"""Where a dictionary stands in a running model: what it reads, and what takes the place of what it writes."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor

from bae_lens.activations.forward import stop_layer
from bae_lens.activations.models import resolve_hook
from bae_lens.saes.transcoder import hooks_of


class Captured:
    """What a dictionary reads in the pass that is running."""

    def __init__(self, sae: SAE[Any]) -> None:
        self._sae = sae
        self._x: Tensor | None = None

    def clear(self) -> None:
        """Forgets what a pass left that ended before its time."""
        self._x = None

    def capture(self, activations: Tensor, hook: Any) -> None:  # noqa: ARG002
        """The hook for where the dictionary reads."""
        heads_apart = getattr(self._sae, "hook_z_reshaping_mode", False) and activations.ndim > 3
        x = activations if heads_apart else activations.flatten(2)
        self._x = x.to(self._sae.device, self._sae.dtype)

    def take(self) -> Float[Tensor, "*input"]:
        """What was captured, as the dictionary takes it. Raises ValueError if there is nothing yet."""
        if self._x is None:
            hook_name, hook_name_out = hooks_of(self._sae)
            raise ValueError(
                f"the transcoder reads after it writes: the model reaches {hook_name_out} before {hook_name}"
            )
        x, self._x = self._x, None
        return x


def replaced(
    activations: Float[Tensor, "n position *width"], new: Tensor, where: Bool[Tensor, "#n position"]
) -> Float[Tensor, "n position *width"]:
    """The activations with `new` ones, heads apart or concatenated, in their place at some tokens."""
    where = where.to(activations.device).view(*where.shape, *[1] * (activations.ndim - 2))
    return torch.where(where, new.to(activations).view_as(activations), activations)


def resolved_hooks(model: Any, sae: SAE[Any]) -> tuple[str, str]:
    """The names under which the model has the hooks that a dictionary reads and writes; see `resolve_hook`."""
    hook_name, hook_name_out = (resolve_hook(model, hook_name) for hook_name in hooks_of(sae))
    return hook_name, hook_name_out


def is_bridge(model: Any) -> bool:
    """Whether a model is a TransformerBridge, whose hooks have aliases."""
    return hasattr(model, "_resolve_hook_name")


@torch.no_grad()
def check_attachable(model: Any, hook_names: Sequence[str]) -> None:
    """Raises ValueError for hooks, by their names in the model, at which no dictionary can be attached to it.

    One is for an SAE, two are for a transcoder. Where attention heads lie apart, SAELens attaches an SAE at hook_z of a
    hooked model, taking apart what it writes, and to a bridge where that holds the heads concatenated, which is where
    the hook point converts what hooks see; no transcoder.
    """
    tokens = torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device)
    _, cache = model.run_with_cache(
        tokens, names_filter=list(hook_names), stop_at_layer=stop_layer(hook_names), prepend_bos=False
    )
    for hook_name in hook_names:
        if hook_name not in cache or cache[hook_name].ndim < 4:
            continue
        if len(hook_names) > 1:
            raise ValueError(f"a transcoder reads and writes one vector a token, but {hook_name} has one for each head")
        bridge = is_bridge(model)
        if model.hook_dict[hook_name].hook_conversion is None if bridge else not hook_name.endswith("hook_z"):
            raise ValueError(f"the heads lie apart at {hook_name}, where no dictionary can be attached; choose another")
