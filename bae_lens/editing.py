"""Steering and ablation: features set, cleared or flipped while a model runs, and what features say about logits."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from math import isfinite
from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from bae_lens.evals import is_binary
from bae_lens.features import RESIDUAL_HOOKS, TOP_TOKENS
from bae_lens.sources import resolve_hook
from bae_lens.transcoder import hooks_of

FLIP = "flip"


@contextmanager
def edit(
    model: Any,
    sae: SAE[Any],
    features: Mapping[int, int | float | Literal["flip"]],
    positions: slice | None = None,
    *,
    keep_error: bool = True,
) -> Iterator[None]:
    """While the block runs, features of `sae` have other values in every pass of `model`, generation included.

    `features` maps indices to values: of a binary code 0, 1 or `"flip"`, of others any activation. `positions` are
    those of the tokens in the whole sequence, all by default; with a batch that is padded, those of its columns. What
    the model computes at the dictionary's output hook changes by the difference that the edit makes to the dictionary's
    output, so that its error stays and an edit that changes no feature changes nothing; without `keep_error` the edited
    output itself stands there.

    Several edits may be nested; one at the same hook sees what the one before it left.
    Raises ValueError for a feature that the dictionary does not have, a value that its code cannot take, and a hook
    that the model does not have.
    """
    _check(sae, features)
    hook_in, hook_out = (resolve_hook(model, name) for name in hooks_of(sae))
    editor = _Editor(sae, features, positions, keep_error)
    handles = []
    with _counting_positions(model, editor):
        try:
            for name, hook in ((hook_in, editor.capture), (hook_out, editor.replace)):
                hook_point = model.hook_dict[name]
                hook_point.add_hook(hook, is_permanent=True)
                handles.append((hook_point, hook_point.fwd_hooks[-1]))
            yield
        finally:
            for hook_point, handle in handles:
                handle.hook.remove()
                if handle in hook_point.fwd_hooks:
                    hook_point.fwd_hooks.remove(handle)


@dataclass(frozen=True)
class LogitEffects:
    """What a feature's decoder row adds to the logits on the direct path to them, less the mean over all tokens.

    The row goes through the weights of the final normalisation (and its centring) and the unembedding; a hidden state
    of root mean square s divides the effects by s.
    """

    feature: int
    up: list[tuple[str, float]]
    """The tokens whose logits rise most, first the one that rises most, and by how much."""
    down: list[tuple[str, float]]
    """The tokens whose logits fall most, first the one that falls most."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LogitEffects":
        pairs = {name: [(token, effect) for token, effect in values[name]] for name in ("up", "down")}
        return cls(values["feature"], **pairs)


@torch.no_grad()
def logit_effects(model: Any, sae: SAE[Any], features: Sequence[int], k: int = TOP_TOKENS) -> list[LogitEffects]:
    """What `features` make the model say: the k tokens whose logits each raises most, and lowers most.

    Raises ValueError for a feature that the dictionary does not have, and for one whose decoder does not write to the
    residual stream.
    """
    _check_indices(sae, features)
    hook_out = hooks_of(sae)[1]
    if hook_out.rsplit(".", 1)[-1] not in RESIDUAL_HOOKS:
        raise ValueError(f"logit effects need a dictionary that writes to the residual stream, got one at {hook_out}")
    effects = _to_logits(sae.W_dec[list(features)].detach(), model)
    effects = effects - effects.mean(-1, keepdim=True)

    def named(row: Tensor, indices: Tensor) -> list[tuple[str, float]]:
        return [(model.tokenizer.decode([index]), row[index].item()) for index in indices.tolist()]

    return [
        LogitEffects(feature, named(row, row.topk(k).indices), named(row, (-row).topk(k).indices))
        for feature, row in zip(features, effects, strict=True)
    ]


@contextmanager
def _counting_positions(model: Any, editor: "_Editor") -> Iterator[None]:
    """Tells the editor where in the sequence each pass begins, which cached generation gives the newest token alone."""
    forward = model.forward

    @wraps(forward)
    def counting(*args: Any, **kwargs: Any) -> Any:
        editor.n_before = _cached_positions(kwargs)
        return forward(*args, **kwargs)

    nested = "forward" in vars(model)
    model.forward = counting
    try:
        yield
    finally:
        if nested:
            model.forward = forward
        else:
            del model.forward


def _cached_positions(kwargs: Mapping[str, Any]) -> int:
    """Of TransformerLens' cache of keys and values, or of transformers'."""
    if (cache := kwargs.get("past_kv_cache")) is not None:
        return cache[0].past_keys.shape[1]
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _check(sae: SAE[Any], features: Mapping[int, Any]) -> None:
    _check_indices(sae, features)
    allowed = (0, 1, FLIP)
    for feature, value in features.items():
        if is_binary(sae) and value not in allowed:
            raise ValueError(f'a feature of a binary code can be set to 0, 1 or "flip", got {value!r} for {feature}')
        if not is_binary(sae) and (isinstance(value, str) or not isfinite(value)):
            kind = sae.cfg.architecture()
            raise ValueError(f"a feature of a {kind} can be set to a finite activation, got {value!r} for {feature}")


def _check_indices(sae: SAE[Any], features: Iterable[int]) -> None:
    for feature in features:
        if not 0 <= feature < sae.cfg.d_sae:
            raise ValueError(f"features of this dictionary are numbered from 0 to {sae.cfg.d_sae - 1}, got {feature}")


def _to_logits(directions: Float[Tensor, "n d_model"], model: Any) -> Float[Tensor, "n d_vocab"]:
    W_U = model.W_U
    directions = directions.to(W_U)
    if model.cfg.normalization_type in ("LN", "LNPre"):
        directions = directions - directions.mean(-1, keepdim=True)
    weight = getattr(getattr(model, "ln_final", None), "w", 1.0)  # absent once it is folded into the unembedding
    return (directions * weight) @ W_U


class _Editor:
    """The hooks of one edit."""

    def __init__(
        self, sae: SAE[Any], features: Mapping[int, int | float | str], positions: slice | None, keep_error: bool
    ) -> None:
        self.sae, self.features, self.positions, self.keep_error = sae, features, positions, keep_error
        self.n_before = 0
        """Positions of the sequence that earlier passes have dealt with, in generation."""
        self._input: Tensor | None = None

    def capture(self, activations: Tensor, hook: Any) -> None:  # noqa: ARG002
        x = activations if self.sae.hook_z_reshaping_mode else activations.flatten(2)
        self._input = x.to(self.sae.device, self.sae.dtype)

    def replace(self, activations: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        if self._input is None:
            hook_in, hook_out = hooks_of(self.sae)
            raise ValueError(f"the transcoder reads after it writes: the model reaches {hook_out} before {hook_in}")
        x, self._input = self._input, None
        edited = self.sae.decode(self._edited(self._code(x)))
        if self.keep_error:
            change = edited - self.sae.decode(self._code(x))  # encoded anew: a run-time norm is good for one decoding
            new = activations + change.to(activations).view_as(activations)
        else:
            new = edited.to(activations).view_as(activations)
        where = self._where(activations)
        return torch.where(where.view(1, -1, *[1] * (activations.ndim - 2)), new, activations)

    def _code(self, x: Tensor) -> Tensor:
        feature_acts = self.sae.encode(x)
        return feature_acts.to_dense() if feature_acts.is_sparse else feature_acts

    def _edited(self, feature_acts: Tensor) -> Tensor:
        feature_acts = feature_acts.clone()
        for feature, value in self.features.items():
            old = feature_acts[..., feature]
            feature_acts[..., feature] = 1 - old if isinstance(value, str) else value
        return feature_acts

    def _where(self, activations: Tensor) -> Tensor:
        """Which of the positions in this pass are edited."""
        n = activations.shape[1]
        where = torch.zeros(self.n_before + n, dtype=torch.bool, device=activations.device)
        where[self.positions or slice(None)] = True
        return where[self.n_before :]
