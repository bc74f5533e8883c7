"""Names of hooks, several at once: patterns in braces, and the layer that a name speaks of."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import bracex

MOST_HOOKS = 512  # of a run; three in each layer of the deepest models


class LayerHook(NamedTuple):
    """Where in which layer a hook is."""

    layer: int
    """Counted from 0."""
    kind: str
    """Its name within the layer, such as hook_resid_post or mlp.hook_out."""


def expand_hooks(patterns: str | Sequence[str]) -> list[str]:
    """The names that patterns in braces stand for, as bash expands them, in their order.

    >>> expand_hooks("blocks.{0,5}.hook_resid_post")
    ['blocks.0.hook_resid_post', 'blocks.5.hook_resid_post']
    >>> expand_hooks(["blocks.{0..8..4}.hook_mlp_out", "blocks.2.hook_attn_out"])
    ['blocks.0.hook_mlp_out', 'blocks.4.hook_mlp_out', 'blocks.8.hook_mlp_out', 'blocks.2.hook_attn_out']

    Raises ValueError for none, for a pattern that cannot be expanded, for more than `MOST_HOOKS`, and as
    `check_different`.
    """
    names = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            expanded = bracex.expand(pattern, limit=MOST_HOOKS)
        except bracex.ExpansionLimitException:
            raise _too_many(pattern) from None
        for name in expanded or [pattern]:
            if not name.strip() or re.search(r"[{},\s]", name):
                raise ValueError(
                    "hook_name must be the name of a hook or a pattern such as blocks.{0,5,10}.hook_resid_post, got "
                    f"{pattern!r}; close its braces, and put no space in it"
                )
        names += expanded
    if not names:
        raise ValueError("hook_name needs at least one hook, got none; name one, such as blocks.10.hook_resid_post")
    if len(names) > MOST_HOOKS:
        raise _too_many(", ".join(patterns))
    check_different(names)
    return names


def _too_many(pattern: str) -> ValueError:
    return ValueError(f"a run takes {MOST_HOOKS} hooks at most, got more from {pattern}; name fewer layers")


def check_different(hook_names: Sequence[str]) -> None:
    """Raises ValueError for a hook that comes twice."""
    twice = [name for name, count in Counter(hook_names).items() if count > 1]
    if twice:
        raise ValueError(f"hooks must be different, got {', '.join(twice)} twice; leave one out")


def layer_hook(hook_name: str) -> LayerHook | None:
    """The layer and the place in it; None for a hook that is in no layer."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    return None if found is None else LayerHook(int(found[1]), found[2])
