"""Running a model for what it holds at some of its hooks."""

import re
from collections.abc import Mapping, Sequence
from inspect import signature
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bae_lens.activations.models import resolve_hook
from bae_lens.saes.saelens_compat import extract_stop_at_layer_from_tlens_hook_name

_known_shapes: WeakKeyDictionary[Any, dict[str, tuple[int, ...]]] = WeakKeyDictionary()  # in the order of a pass


@torch.no_grad()
def run_at_hooks(
    model: Any,
    tokens: Int[Tensor, "n position"],
    hook_names: Sequence[str],
    stop_at_layer: int | None = None,
    columns: Int[Tensor, "n columns"] | None = None,
) -> dict[str, Float[Tensor, "n columns d_in"]]:
    """Activations at the hooks in float32 on the CPU, heads concatenated, in the order in which the pass reached them.

    `hook_names` are those that `resolve_hook` gives. The pass ends before `stop_at_layer`, by default as early as it
    can. With `columns` only the activations of these tokens of each row are given, and leave the model's device; by
    default those of all. Raises ValueError for a hook that the pass does not reach, for one that is not one vector a
    token, and for activations that are not finite.
    """
    activations = _heads_as_they_are(model, tokens, hook_names, stop_at_layer, columns)
    return {hook_name: at_hook.flatten(2) for hook_name, at_hook in activations.items()}


def _heads_as_they_are(
    model: Any,
    tokens: Int[Tensor, "n position"],
    hook_names: Sequence[str],
    stop_at_layer: int | None,
    columns: Int[Tensor, "n columns"] | None = None,
) -> dict[str, Tensor]:
    _, cache = model.run_with_cache(
        tokens.to(model.cfg.device),
        names_filter=list(hook_names),
        stop_at_layer=stop_layer(hook_names) if stop_at_layer is None else stop_at_layer,
        prepend_bos=False,
        **_without_keys_and_values(model),
    )
    activations = {}
    for hook_name in hook_names:
        if hook_name not in cache:
            raise ValueError(f"the model has a hook {hook_name!r}, but did not reach it; choose another one")
    for hook_name in [name for name in cache.keys() if name in hook_names]:  # noqa: SIM118
        at_hook = cache[hook_name]
        if at_hook.ndim not in (3, 4) or at_hook.shape[:2] != tokens.shape:
            shape = tuple(at_hook.shape)
            raise ValueError(f"{hook_name} must give one vector a token, got shape {shape}; choose another hook")
        if columns is not None:
            row = torch.arange(len(tokens), device=at_hook.device)[:, None]
            at_hook = at_hook[row, columns.to(at_hook.device)]
        activations[hook_name] = at_hook.float().cpu()
        if not torch.isfinite(activations[hook_name]).all():
            raise ValueError(f"the model's activations at {hook_name} are not finite; check its dtype")
    return activations


def _without_keys_and_values(model: Any) -> dict[str, bool]:
    """What tells a model of transformers, as a bridge runs it, not to keep what only generating tokens needs."""
    inner = getattr(model, "original_model", None)
    return {"use_cache": False} if inner and "use_cache" in signature(inner.forward).parameters else {}


def norms_at(
    activations: Mapping[str, Float[Tensor, "n columns _"]], hook_names: Sequence[str]
) -> Float[Tensor, "n columns hooks"]:
    """Norms of what `run_at_hooks` gave, computed in float64."""
    at_hooks = [torch.linalg.vector_norm(activations[name], dim=-1, dtype=torch.float64) for name in hook_names]
    return torch.stack(at_hooks, dim=-1).float()


def hook_widths(model: Any, hook_names: Sequence[str]) -> dict[str, int]:
    """Widths of the activations at some hooks, in the order in which a pass reaches them; heads are concatenated.

    Raises ValueError as `hook_shapes`.
    """
    return {hook_name: prod(shape) for hook_name, shape in hook_shapes(model, hook_names).items()}


@torch.no_grad()
def hook_shapes(model: Any, hook_names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """(width,) or (heads, d_head) of a token's activations at some hooks, in the order in which a pass reaches them.

    A model is asked once for each hook. Raises ValueError as `resolve_hook` and `run_at_hooks` do.
    """
    resolved = {hook_name: resolve_hook(model, hook_name) for hook_name in hook_names}
    shapes = _known_shapes.get(model, {})
    if not shapes.keys() >= set(resolved.values()):
        token = torch.zeros(1, 1, dtype=torch.long)
        activations = _heads_as_they_are(model, token, [*shapes, *resolved.values()], None)
        shapes = _known_shapes[model] = {name: tuple(at_hook.shape[2:]) for name, at_hook in activations.items()}
    reached = sorted(resolved, key=lambda hook_name: list(shapes).index(resolved[hook_name]))
    return {hook_name: shapes[resolved[hook_name]] for hook_name in reached}


def stop_layer(hook_names: Sequence[str]) -> int | None:
    """The layer before which a pass that reaches all these hooks may stop; None if one lies outside the layers."""
    layers = [extract_stop_at_layer_from_tlens_hook_name(hook_name) for hook_name in hook_names]
    return None if None in layers else max(layer for layer in layers if layer is not None)


def start_layer(model: Any, hook_names: Sequence[str]) -> int | None:
    """The layer whose input is enough to go on from for a pass that matters at these hooks only, or later.

    None if one of them lies outside the layers, or if the model cannot begin there: a bridge, and a model that needs
    the tokens' positions or padding in every layer.
    """
    layers = [re.match(r"blocks\.(\d+)\.", hook_name) for hook_name in hook_names]
    whole = hasattr(model, "_resolve_hook_name") or model.cfg.positional_embedding_type == "shortformer"
    if whole or getattr(model.tokenizer, "padding_side", "right") == "left" or None in layers:
        return None
    return min(int(layer[1]) for layer in layers if layer is not None)
