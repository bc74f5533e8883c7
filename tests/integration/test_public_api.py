import importlib
import subprocess
import sys

import pytest
from sae_lens import Transcoder, TranscoderConfig
from sae_lens.registry import get_sae_class, get_sae_training_class

import bae_lens

IMPORT_WITHOUT_NETWORK = """
import socket

def refuse(*args):
    raise OSError("no network here")

socket.socket.connect = socket.getaddrinfo = refuse
import bae_lens
print(bae_lens.__version__)
"""


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


def test_importing_again_is_harmless():
    before = {name: getattr(bae_lens, name) for name in bae_lens.__all__}

    importlib.reload(bae_lens)

    assert {name: getattr(bae_lens, name) for name in bae_lens.__all__} == before
    assert get_sae_class("bae") == (bae_lens.BAE, bae_lens.BAEConfig)


def test_import_needs_no_network():
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_NETWORK], capture_output=True, text=True, timeout=120, check=False
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == bae_lens.__version__
