"""Which features of each dictionary are scored: those that were named, or a sample, if wanted at equal firing rates."""

from collections.abc import Mapping, Sequence

from bae_lens.comsem.collect.sampling import SamplingSettings
from bae_lens.comsem.firing_rates import common_bins, frequency_bin


def check_features(d_sae: Mapping[str, int], settings: SamplingSettings) -> None:
    """Raises ValueError for named features that one of the dictionaries does not have."""
    for name, n in d_sae.items():
        unknown = [feature for feature in settings.features if not 0 <= feature < n]
        if unknown:
            raise ValueError(f"{name} has features 0 to {n - 1}, got {', '.join(map(str, unknown))}")


def choose_features(
    scoreable: Mapping[str, list[int]], firing_rates: Mapping[str, Sequence[float]], settings: SamplingSettings
) -> dict[str, list[int]]:
    """Features by dictionary: the first of the scoreable ones, which come in seeded order, or those that were named.

    `firing_rates` are of all features of each dictionary. With `match_firing_rates` all dictionaries give as many of
    each half decade of the firing rate. Raises ValueError if they have none in common.
    """
    wanted = {name: _named(features, settings) for name, features in scoreable.items()}
    if not settings.match_firing_rates:
        return {name: features[: settings.max_features] for name, features in wanted.items()}
    rates = {name: [firing_rates[name][feature] for feature in features] for name, features in wanted.items()}
    room = common_bins(rates, settings.max_features, settings.seed)
    chosen: dict[str, list[int]] = {}
    for name, features in wanted.items():
        left, chosen[name] = room.copy(), []
        for feature, rate in zip(features, rates[name], strict=True):
            if left[frequency_bin(rate)] > 0:
                left[frequency_bin(rate)] -= 1
                chosen[name].append(feature)
    return chosen


def _named(scoreable: list[int], settings: SamplingSettings) -> list[int]:
    return [feature for feature in scoreable if feature in settings.features] if settings.features else scoreable
