"""Where the parts of a model lie that is too large for one device, as transformers' `device_map` says it."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from bae_lens.distributed.connection import n_launched

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # over all GPUs

DeviceMap = str | Mapping[str, int | str]


def read_device_map(text: str | None) -> DeviceMap | None:
    """One of `SPREADS`, or a JSON object from the names of a model's parts, "" for all of it, to devices of one kind.

    None stays None. Raises ValueError for anything else, for fewer than two GPUs to spread a model over, and for
    several processes, each of which would spread a model of its own.
    """
    if text is None:
        return None
    if n_launched() > 1:
        raise ValueError(
            f"a device map spreads the model of one process, and torchrun started {n_launched()}; run it without "
            "torchrun, or leave out --device-map"
        )
    if text in SPREADS:
        if torch.accelerator.device_count() < 2:
            raise ValueError(
                f"a device map of {text} spreads a model over several GPUs, and {torch.accelerator.device_count()} are "
                "here; leave out --device-map"
            )
        return text
    try:
        places = json.loads(text)
    except ValueError:
        places = None
    if not (isinstance(places, dict) and places and all(map(_is_place, places.values()))):
        raise ValueError(
            f"a device map must be one of {', '.join(SPREADS)}, or a JSON object from parts of the model to devices, "
            f'such as {{"": "cuda:1"}}, got {text!r}'
        )
    kinds = {"cuda" if isinstance(place, int) else place.partition(":")[0] for place in places.values()}
    if len(kinds) > 1 or not kinds.isdisjoint(("disk", "meta")):
        raise ValueError(
            "TransformerBridge runs a model on devices of one kind that hold all of it, got a device map to "
            f"{' and '.join(sorted(kinds))}; map to GPUs alone, or to the CPU"
        )
    return places


def check_plan(device_map: str | None) -> None:
    """Raises ValueError for a plan of a model on several devices: what each of them holds is not counted."""
    if device_map is not None:
        raise ValueError(f"--plan counts on one device, got the device map {device_map}; leave out one of the two")


def _is_place(place: Any) -> bool:
    return isinstance(place, str) or (isinstance(place, int) and not isinstance(place, bool))


def first_device(device_map: DeviceMap) -> str:
    """Where a model with this map begins; `cuda` where that is decided as it is loaded."""
    if isinstance(device_map, str):
        return "cuda"
    place = next(iter(device_map.values()))
    return f"cuda:{place}" if isinstance(place, int) else place
