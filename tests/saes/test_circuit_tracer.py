from typing import Any

import pytest
import torch
import yaml
from sae_lens import (
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file

from bae_lens import (
    BinaryTranscoder,
    BinaryTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
    export_to_circuit_tracer,
)
from bae_lens.cli.export import Export

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: dict[str, Any] = {
    "relu": (Transcoder, TranscoderConfig, {}),
    "skip": (SkipTranscoder, SkipTranscoderConfig, {}),
    "jumprelu": (JumpReLUTranscoder, JumpReLUTranscoderConfig, {}),
    "topk": (TopKTranscoder, TopKTranscoderConfig, {"k": 3}),
    "binary": (BinaryTranscoder, BinaryTranscoderConfig, {}),
}


def transcoder(
    kind: str, layer: int = 0, hook_in: str = "mlp.hook_in", hook_out: str = "hook_mlp_out", **overrides: Any
) -> Any:
    sae_class, config_class, defaults = KINDS[kind]
    metadata = SAEMetadata(
        hook_name=f"blocks.{layer}.{hook_in}", hook_name_out=f"blocks.{layer}.{hook_out}", model_name="tiny"
    )
    sizes = {"d_in": 8, "d_out": 8, "d_sae": 24, "apply_b_dec_to_input": False, "metadata": metadata}
    sae = sae_class(config_class(**{**sizes, **defaults, **overrides}))
    for parameter in sae.parameters():
        parameter.data.normal_()
    return sae


def read_as_circuit_tracer_does(weights: dict[str, torch.Tensor], x: torch.Tensor, k: int | None) -> torch.Tensor:
    pre = x @ weights["W_enc"].T + weights["b_enc"]
    if "activation_function.threshold" in weights:
        acts = pre * (pre > weights["activation_function.threshold"])
    elif k is not None:
        acts = torch.zeros_like(pre).scatter(-1, pre.topk(k).indices, pre.topk(k).values)
    else:
        acts = pre.relu()
    out = acts @ weights["W_dec"] + weights["b_dec"]
    return out + x @ weights["W_skip"].T if "W_skip" in weights else out


@pytest.mark.parametrize("kind", ["relu", "skip", "jumprelu", "topk"])
def test_files_hold_the_same_functions(kind, tmp_path):
    transcoders = [transcoder(kind, layer) for layer in (1, 0, 2)]
    folder = export_to_circuit_tracer(transcoders, tmp_path / "traced")

    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config.get("k") == (3 if kind == "topk" else None)
    assert (config["feature_input_hook"], config["feature_output_hook"]) == ("mlp.hook_in", "hook_mlp_out")
    assert (config["model_name"], config["model_kind"], config["scan"]) == ("tiny", "transcoder_set", "traced")
    x = torch.randn(50, 8)
    for layer, sae in zip((1, 0, 2), transcoders, strict=True):
        weights = load_file(config["transcoders"][layer])
        torch.testing.assert_close(read_as_circuit_tracer_does(weights, x, config.get("k")), sae(x))
    assert {file.name for file in folder.iterdir()} == {
        "config.yaml",
        *(f"layer_{layer}.safetensors" for layer in range(3)),
    }


@pytest.mark.parametrize(
    ("transcoders", "message"),
    [
        ([], "one transcoder for each layer from 0 on, got layers"),
        ([("relu", 1)], r"from 0 on, got layers \[1\]"),
        ([("relu", 0), ("relu", 2)], r"got layers \[0, 2\]"),
        ([("relu", 0), ("skip", 0)], "got two for layer 0"),
        ([("binary", 0)], "a binary_transcoder cannot be traced through: its bits have no size"),
        ([("topk", 0), ("relu", 1)], "all transcoders must have the same k"),
        ([("topk", 0), ("topk", 1, {"k": 4})], "all transcoders must have the same k"),
        ([("relu", 0), ("relu", 1, {"d_sae": 16})], "with as many features"),
        ([("relu", 0, {"d_out": 4})], "must write as wide as they read"),
        ([("relu", 0), ("relu", 1, {"hook_in": "hook_resid_mid"})], "same hooks of their layers"),
    ],
)
def test_what_cannot_be_traced_is_refused(transcoders, message, tmp_path):
    made = [transcoder(kind, layer, **(rest[0] if rest else {})) for kind, layer, *rest in transcoders]
    with pytest.raises(ValueError, match=message):
        export_to_circuit_tracer(made, tmp_path / "traced")
    assert not list(tmp_path.iterdir())


def test_hooks_of_two_layers_and_other_dictionaries_are_refused(tmp_path):
    across = transcoder("relu")
    across.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    with pytest.raises(
        ValueError, match=r"must read and write in one layer, got blocks\.0\.mlp\.hook_in and blocks\.1"
    ):
        export_to_circuit_tracer([across], tmp_path)
    with pytest.raises(ValueError, match="takes transcoders, and a standard is none"):
        export_to_circuit_tracer([StandardSAE(StandardSAEConfig(d_in=8, d_sae=24))], tmp_path)


def test_command(tmp_path):
    for layer in range(2):
        transcoder("topk", layer).save_model(tmp_path / str(layer))
    said = Export((tmp_path / "1", tmp_path / "0"), tmp_path / "traced").run()
    assert f"2 transcoders: {tmp_path / 'traced'}" in said
    assert "set activation_function = TopK(3)" in said
    transcoder("relu", 0).save_model(tmp_path / "0")
    assert "TopK" not in Export((tmp_path / "0",), tmp_path / "traced").run()
    assert not (tmp_path / "traced" / "layer_1.safetensors").exists()
