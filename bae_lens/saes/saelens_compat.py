"""Dictionaries at hook_z, where the activations of an attention layer's heads lie on an axis of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def heads_concatenated(sae: Any) -> Iterator[None]:
    """A dictionary that takes and gives heads side by side, (..., heads * d_head), for as long as the block runs.

    Makes no difference to a dictionary that does so anyway, or that is none of SAELens'.
    """
    if not getattr(sae, "hook_z_reshaping_mode", False):
        yield
        return
    d_head = getattr(sae, "d_head", None)  # which SAELens forgets, and learns from the next activations only
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        sae.turn_on_forward_pass_hook_z_reshaping()
        sae.d_head = d_head
