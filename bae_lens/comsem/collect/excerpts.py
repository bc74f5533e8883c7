"""How strongly features fire on the tokens near their instances: a second look at the contexts that hold these."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from bae_lens.comsem.collect.corpus import ContextStore, TextContext
from bae_lens.comsem.collect.instances import Excerpt
from bae_lens.comsem.collect.reservoirs import SampledToken
from bae_lens.comsem.collect.sampling import REACH, nearby_positions

Encode = Callable[[list[TextContext]], Mapping[str, Float[Tensor, "n position d_sae"]]]
"""Activations of each dictionary's features on each token of some contexts."""


def read_excerpts(
    items: Mapping[str, Mapping[int, list[SampledToken]]], store: ContextStore, encode: Encode, batch_size: int
) -> dict[str, dict[int, list[Excerpt]]]:
    """An excerpt around each item, which are by dictionary and feature, with the feature's activations.

    What did not fire when the item was sampled counts as 0, outlier tokens with it. Each context is encoded once.
    """
    wanted: defaultdict[int, list[tuple[str, int, int]]] = defaultdict(list)
    for name, features in items.items():
        for feature, of_feature in features.items():
            for number, item in enumerate(of_feature):
                wanted[item.place].append((name, feature, number))
    found: dict[str, dict[int, list[Any]]] = {
        name: {feature: [None] * len(of_feature) for feature, of_feature in features.items()}
        for name, features in items.items()
    }
    places = sorted(wanted)
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        contexts = [store.read(place) for place in batch]
        encoded = encode(contexts)
        for row, (place, context) in enumerate(zip(batch, contexts, strict=True)):
            for name, feature, number in wanted[place]:
                item = items[name][feature][number]
                fired = nearby_positions(item)
                activations = dict(zip(fired, encoded[name][row, fired, feature].tolist(), strict=True))
                found[name][feature][number] = context.excerpt(item.position, REACH, activations)
    return found
