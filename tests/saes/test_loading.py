import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file

from bae_lens import BAE, BAEConfig, BinaryTranscoder, BinaryTranscoderConfig
from bae_lens.cli import main as cli
from bae_lens.saes.loading import load_bae, load_dictionary, load_pretrained

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bae = BAE(BAEConfig(d_in=16, d_sae=32))
    bae.b_enc.data.normal_()
    bae.save_model(tmp_path / "bae")
    return tmp_path / "bae"


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        change(content)
        (folder / CONFIG).write_text(json.dumps(content))

    return apply


def written(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


DAMAGES = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "which has no cfg.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "which has no sae_weights.safetensors"),
    "an empty config file": (written(CONFIG, b""), "cfg.json is not JSON that can be read"),
    "a config in another encoding": (written(CONFIG, b"\xff\xfe{}"), "cfg.json is not JSON that can be read"),
    "a deep config": (written(CONFIG, b"[" * 100_000), "cfg.json is not JSON that can be read"),
    "a list for a config": (written(CONFIG, b"[]"), "must name an architecture, one of .*bae.*, got None"),
    "an empty config": (config(lambda content: content.clear()), "must name an architecture"),
    "an unknown architecture": (config(lambda c: c.update(architecture="bae2")), "one of .*, got 'bae2'"),
    "an architecture that is no name": (config(lambda c: c.update(architecture=["bae"])), r"got \['bae'\]"),
    "metadata null": (config(lambda c: c.update(metadata=None)), "must hold metadata by name, got None"),
    "a hook that is no name": (
        config(lambda c: c["metadata"].update(hook_name=[1])),
        r"must name a hook as its hook_name, got \[1\]",
    ),
    "a prior over 1": (weights(lambda tensors: tensors["prior"][2:3].fill_(1.5)), "prior holds other than shares of 0"),
    "a prior under 0": (weights(lambda tensors: tensors["prior"][2:3].fill_(-0.1)), "prior holds other than shares"),
    "another d_sae": (config(lambda c: c.update(d_sae=8)), "no dictionary that can be loaded .*size mismatch"),
    "no d_in": (config(lambda c: c.pop("d_in")), "no dictionary that can be loaded"),
    "a d_in that is no number": (config(lambda c: c.update(d_in="x")), "no dictionary that can be loaded"),
    "an unknown dtype": (config(lambda c: c.update(dtype="float33")), "no dictionary that can be loaded"),
    "weights cut off": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100]),
        "no dictionary that can be loaded",
    ),
    "empty weights": (written(WEIGHTS, b""), "no dictionary that can be loaded"),
    "a pointer of Git LFS": (
        written(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "is a pointer of Git LFS; fetch the weights with git lfs pull",
    ),
    "weights without prior": (weights(lambda tensors: tensors.pop("prior")), 'Missing key.*"prior"'),
    "weights without decoder": (weights(lambda tensors: tensors.pop("W_dec")), "no dictionary that can be loaded"),
    "one more array": (
        weights(lambda tensors: tensors.update(threshold=tensors["b_enc"].clone())),
        'Unexpected key.*"threshold"',
    ),
    "NaN": (weights(lambda tensors: tensors["W_dec"][3].fill_(torch.nan)), "W_dec holds NaN or infinity"),
    "infinity": (weights(lambda tensors: tensors["b_enc"][3:4].fill_(torch.inf)), "b_enc holds NaN or infinity"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_dictionary_is_refused_in_one_line_by_name(folder, name):
    change, message = DAMAGES[name]
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
        load_dictionary(folder)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("command", ["compress", "decompress", "entropy"])
@pytest.mark.parametrize("name", ["an unknown architecture", "weights cut off", "NaN", "no config"])
def test_commands_refuse_a_damaged_dictionary(folder, tmp_path, monkeypatch, capsys, command, name):
    DAMAGES[name][0](folder)
    np.save(tmp_path / "x.npy", np.zeros((9, 16), "f4"))
    arguments = {
        "compress": ["--vectors", tmp_path / "x.npy", "--output", tmp_path / "x.bae"],
        "decompress": ["--file", tmp_path / "x.bae", "--output", tmp_path / "y.npy"],
        "entropy": ["--vectors", tmp_path / "x.npy"],
    }[command]
    monkeypatch.setattr(sys, "argv", ["bae-lens", command, "--dictionary", str(folder), *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert str(folder) in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x.bae").exists()


@pytest.mark.parametrize("device", ["meta", "nowhere"])
def test_commands_refuse_a_device_that_holds_nothing(folder, tmp_path, monkeypatch, capsys, device):
    where = ["--vectors", "x.npy", "--output", str(tmp_path / "x.bae"), "--device", device]
    monkeypatch.setattr(sys, "argv", ["bae-lens", "compress", "--dictionary", str(folder), *where])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: device '{device}' is not available: ")


@pytest.mark.parametrize(
    "sae",
    [
        BAE(BAEConfig(d_in=4, d_sae=8)),
        BinaryTranscoder(BinaryTranscoderConfig(d_in=4, d_sae=8, d_out=5)),
        StandardSAE(StandardSAEConfig(d_in=4, d_sae=8)),
        TopKSAE(TopKSAEConfig(d_in=4, d_sae=8, k=2)),
    ],
    ids=lambda sae: sae.cfg.architecture(),
)
def test_what_was_saved_is_loaded(sae, tmp_path):
    sae.save_model(tmp_path)
    loaded = load_dictionary(tmp_path)
    assert type(loaded) is type(sae)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(sae.state_dict()), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", ["cuda:7", "meta", "x"])
def test_device_in_the_config_makes_no_difference(folder, device):
    config(lambda content: content.update(device=device))(folder)
    assert load_dictionary(folder).W_enc.device.type == "cpu"


@pytest.mark.parametrize(
    ("source", "release", "sae_id"),
    [
        ("gpt2-small-res-jb/blocks.8.hook_resid_pre", "gpt2-small-res-jb", "blocks.8.hook_resid_pre"),
        ("gemma-scope-2b-pt-res/layer_0/width_16k", "gemma-scope-2b-pt-res", "layer_0/width_16k"),
        ("you/baes/blocks.0.hook_resid_post", "you/baes", "blocks.0.hook_resid_post"),
        ("you/baes/hooks/bae", "you/baes", "hooks/bae"),
    ],
)
def test_a_release_is_a_name_of_saelens_or_a_repository(folder, monkeypatch, source, release, sae_id):
    asked, bae = [], load_bae(folder)
    monkeypatch.setattr(SAE, "from_pretrained", lambda *names: (asked.append(names), bae)[1])
    assert load_pretrained(source) is bae
    assert asked == [(release, sae_id, "cpu")]


def test_a_bae_is_asked_for(tmp_path):
    StandardSAE(StandardSAEConfig(d_in=4, d_sae=8)).save_model(tmp_path)
    with pytest.raises(ValueError, match="holds a standard, and this needs a bae or a binary_transcoder"):
        load_bae(tmp_path)
