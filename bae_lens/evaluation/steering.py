"""Steering and ablation: features set, cleared or flipped while a model runs, and what features say about logits."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from math import isfinite
from operator import attrgetter
from typing import Any, Literal

import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from bae_lens.activations.models import resolve_hook
from bae_lens.evaluation.features import TOP_TOKENS
from bae_lens.evaluation.hooking import Captured, replaced
from bae_lens.evaluation.logit_path import direct_logits, writes_to_residual_stream
from bae_lens.saes.binary_code import is_binary
from bae_lens.saes.saelens_compat import HookPoint
from bae_lens.saes.skip import skip_output
from bae_lens.saes.transcoder import hooks_of
from bae_lens.storage import validated

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
    output itself stands there. Negative positions count from the end of what there is of the sequence at a pass.

    Several edits may be nested; one at the same hook sees what the one before it left.
    Raises ValueError for a feature that the dictionary does not have, a value that its code cannot take, a hook that
    the model does not have, and, in the pass, for a dictionary that was attached at the hook (`model.add_sae`,
    `model.run_with_saes`), a model of another width, and a transcoder that reads after it writes.
    """
    _check(sae, features)
    hook_points = [_hook_point(model, name) for name in hooks_of(sae)]
    editor = _Editor(sae, features, positions, keep_error)
    hooks: tuple[Any, Any] = (editor.read.capture, editor.replace)
    acting = []
    for (name, hook_point), hook in zip(hook_points, hooks, strict=True):
        hook_point.add_hook(hook, is_permanent=True)
        acting.append((name, hook_point, hook_point.fwd_hooks[-1]))

    def begin(n_before: int) -> None:
        for name, hook_point, handle in acting:
            if attrgetter(name)(model) is not hook_point or handle not in hook_point.fwd_hooks:
                raise _no_longer_there(name)
        editor.begin(n_before)

    try:
        with _before_each_pass(model, begin):
            yield
    finally:
        for _, hook_point, handle in acting:
            handle.hook.remove()
            if handle in hook_point.fwd_hooks:
                hook_point.fwd_hooks.remove(handle)


@dataclass(frozen=True)
class LogitEffects:
    """What a feature's decoder row adds to the logits (`direct_logits`), less the mean over all tokens."""

    feature: int
    up: list[tuple[str, float]]
    """The tokens whose logits rise most, first the one that rises most, and by how much."""
    down: list[tuple[str, float]]
    """The tokens whose logits fall most, first the one that falls most."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LogitEffects":
        return validated(cls, values, "these effects")


@torch.no_grad()
def logit_effects(
    model: Any, sae: SAE[Any], features: Sequence[int] | Int[Tensor, " n"], k: int = TOP_TOKENS
) -> list[LogitEffects]:
    """What `features` make the model say: the k tokens whose logits each raises most, and lowers most.

    Raises ValueError for a feature that the dictionary does not have, a dictionary that does not write to the residual
    stream, and a k that is not between 1 and the size of the vocabulary.
    """
    features = features.tolist() if isinstance(features, Tensor) else list(features)
    _check_indices(sae, features)
    hook_name_out = hooks_of(sae)[1]
    if not writes_to_residual_stream(model, hook_name_out):
        raise ValueError(
            f"logit effects need a dictionary that writes to the residual stream, got one at {hook_name_out}"
        )
    effects = direct_logits(model, sae.W_dec[features])
    if not 1 <= k <= effects.shape[1]:
        raise ValueError(f"k must be between 1 and the {effects.shape[1]} tokens of the vocabulary, got {k}")
    effects = effects - effects.mean(-1, keepdim=True)

    def named(row: Tensor, indices: Tensor) -> list[tuple[str, float]]:
        return [(model.tokenizer.decode([index]), row[index].item()) for index in indices.tolist()]

    return [
        LogitEffects(feature, named(row, row.topk(k).indices), named(row, (-row).topk(k).indices))
        for feature, row in zip(features, effects, strict=True)
    ]


def _hook_point(model: Any, hook_name: str) -> tuple[str, HookPoint]:
    """Where a hook is in the model, and the hook itself."""
    attached = f"{hook_name}.hook_sae_output" in model.hook_dict  # to a HookedSAETransformer, which forgets the hook
    name = hook_name if attached else resolve_hook(model, hook_name)
    hook_point = attrgetter(name)(model)
    if not isinstance(hook_point, HookPoint):
        raise _no_longer_there(name)
    return name, hook_point


def _no_longer_there(hook_name: str) -> ValueError:
    return ValueError(
        f"the edit cannot act at {hook_name}, where a dictionary is attached, or was while the edit was in force: "
        "that takes the hook's place; call model.reset_saes() and edit without (keep_error=False puts the edited "
        "dictionary's output there)"
    )


@contextmanager
def _before_each_pass(model: Any, begin: Callable[[int], None]) -> Iterator[None]:
    """Says when a pass begins, and where in the sequence, since cached generation gives the newest token alone."""
    forward = model.forward

    @wraps(forward)
    def edited(*args: Any, **kwargs: Any) -> Any:
        begin(_cached_positions(kwargs))
        return forward(*args, **kwargs)

    nested = "forward" in vars(model)
    model.forward = edited
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


class _Editor:
    """The hooks of one edit."""

    def __init__(
        self, sae: SAE[Any], features: Mapping[int, int | float | str], positions: slice | None, keep_error: bool
    ) -> None:
        self.sae, self.features, self.positions, self.keep_error = sae, features, positions, keep_error
        self.read = Captured(sae)
        self.begin(0)

    def begin(self, n_before: int) -> None:
        """A pass begins; in generation, earlier ones have dealt with `n_before` positions of the sequence."""
        self.n_before = n_before
        self.read.clear()

    def replace(self, activations: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        x = self.read.take()
        new = self.sae.decode(self._edited(self._code(x)))
        if self.keep_error:
            change = new - self.sae.decode(self._code(x))  # encoded anew: a run-time norm is good for one decoding
            new = activations + change.to(activations).view_as(activations)
        else:
            new = new + skip_output(self.sae, x)
        return replaced(activations, new, self._where(activations)[None])

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
