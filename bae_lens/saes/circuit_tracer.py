"""Transcoders as files of circuit-tracer 0.5, which traces what a model computes through those of its layers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from sae_lens import SAE, JumpReLUTranscoder, Transcoder
from safetensors.torch import save_file
from torch import Tensor

from bae_lens.saes.binary_code import is_binary
from bae_lens.saes.transcoder import TopKTranscoder, hooks_of
from bae_lens.storage import written_whole

CONFIG_NAME = "config.yaml"
AT_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")


def export_to_circuit_tracer(transcoders: Sequence[SAE[Any]], folder: str | Path) -> Path:
    """Writes transcoders, one for each layer from the first on, as circuit-tracer's `load_transcoders` takes them.

    `config.yaml` names the files `layer_0.safetensors` and so on, in this folder, the hooks and the model. ReLU and
    JumpReLU transcoders, those with skip connections too, come out as they are. For Top-k ones circuit-tracer has an
    activation function, but its files cannot name it: `config.yaml` holds `k`, and who loads them has to set
    `activation_function = TopK(k)` of each, or else all positive features fire.

    Raises ValueError if there are none, for dictionaries that are no transcoders, bits, which have no size to trace
    through, layers that are missing or come twice, and transcoders that differ in hooks, k or width, or whose input and
    output differ in width; OSError if `folder` cannot be written.
    """
    folder = Path(folder).absolute()
    for sae in transcoders:
        _check_kind(sae)
    ordered, hooks = _by_layer(transcoders)
    widths = {(sae.cfg.d_in, sae.cfg.d_out, sae.cfg.d_sae) for sae in ordered}
    (d_in, d_out, _), *others = widths
    if others or d_in != d_out:
        raise ValueError(
            f"all transcoders must write as wide as they read, with as many features, got (d_in, d_out, d_sae) {widths}"
        )
    top_k = {sae.cfg.k if isinstance(sae, TopKTranscoder) else None for sae in ordered}
    if len(top_k) > 1:
        raise ValueError(f"all transcoders must have the same k, or none, got {top_k}")
    (k,) = top_k
    with written_whole(folder) as partial:
        partial.mkdir(parents=True)
        for layer, sae in enumerate(ordered):
            save_file(_weights(sae), partial / f"layer_{layer}.safetensors")
        config = {
            "model_name": ordered[0].cfg.metadata.model_name,
            "model_kind": "transcoder_set",
            "feature_input_hook": hooks[0],
            "feature_output_hook": hooks[1],
            "scan": folder.name,
            "transcoders": [str(folder / f"layer_{layer}.safetensors") for layer in range(len(ordered))],
            **({} if k is None else {"activation_function": "topk", "k": k}),
        }
        (partial / CONFIG_NAME).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return folder


def _check_kind(sae: SAE[Any]) -> None:
    architecture = sae.cfg.architecture()
    if is_binary(sae):
        raise ValueError(
            f"a {architecture} cannot be traced through: its bits have no size by which an effect is shared"
        )
    if not isinstance(sae, Transcoder):
        raise ValueError(f"circuit-tracer takes transcoders, and a {architecture} is none")


def _by_layer(transcoders: Sequence[SAE[Any]]) -> tuple[list[Any], tuple[str, str]]:
    """Transcoders in the order of their layers, and the hooks within a layer that all of them read and write."""
    placed: dict[int, SAE[Any]] = {}
    sites = set()
    for sae in transcoders:
        matches = [AT_LAYER.fullmatch(hook_name) for hook_name in hooks_of(sae)]
        if None in matches or len(layers := {int(match[1]) for match in matches if match}) > 1:
            raise ValueError(f"a transcoder must read and write in one layer, got {' and '.join(hooks_of(sae))}")
        (layer,) = layers
        if layer in placed:
            raise ValueError(f"there must be one transcoder for each layer, got two for layer {layer}")
        placed[layer] = sae
        sites.add(tuple(match[2] for match in matches if match))
    if sorted(placed) != list(range(len(placed))) or not placed:
        raise ValueError(f"there must be one transcoder for each layer from 0 on, got layers {sorted(placed)}")
    if len(sites) > 1:
        raise ValueError(f"all transcoders must read and write at the same hooks of their layers, got {sites}")
    (site,) = sites
    return [placed[layer] for layer in sorted(placed)], site


def _weights(sae: Any) -> dict[str, Tensor]:
    """The parameters as circuit-tracer names and turns them."""
    weights = {
        "W_enc": sae.W_enc.T,
        **{name: getattr(sae, name) for name in ("W_dec", "b_enc", "b_dec", "W_skip") if hasattr(sae, name)},
    }
    if isinstance(sae, JumpReLUTranscoder):
        weights["activation_function.threshold"] = sae.threshold.clamp(min=0)  # which a ReLU before it amounts to
    return {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()}
