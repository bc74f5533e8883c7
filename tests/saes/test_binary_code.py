from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, Transcoder, TranscoderConfig

from bae_lens import (
    BAE,
    BAEConfig,
    BinaryTranscoder,
    BinaryTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
    TrainingBAE,
    TrainingBAEConfig,
    TrainingBinaryTranscoder,
    TrainingBinaryTranscoderConfig,
    TrainingTopKTranscoder,
    TrainingTopKTranscoderConfig,
    TrainingTranscoder,
    TrainingTranscoderConfig,
)
from bae_lens.saes.binary_code import is_binary

WIDTHS: dict[str, Any] = {"d_in": 4, "d_sae": 8}
BINARY = [
    BAE(BAEConfig(**WIDTHS)),
    TrainingBAE(TrainingBAEConfig(**WIDTHS)),
    BinaryTranscoder(BinaryTranscoderConfig(**WIDTHS, d_out=3)),
    TrainingBinaryTranscoder(TrainingBinaryTranscoderConfig(**WIDTHS, d_out=3)),
]
REAL = [
    TopKTranscoder(TopKTranscoderConfig(**WIDTHS, d_out=3, k=2)),
    TrainingTopKTranscoder(TrainingTopKTranscoderConfig(**WIDTHS, d_out=3, k=2, decoder_init_norm=1.0)),
    TrainingTranscoder(TrainingTranscoderConfig(**WIDTHS, d_out=3)),
]


def name(sae):
    return type(sae).__name__


@pytest.mark.parametrize("sae", BINARY, ids=name)
def test_binary_codes_say_so_and_are(sae):
    code = sae.encode(torch.randn(50, 4))

    assert sae.is_binary
    assert is_binary(sae)
    assert set(code.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("sae", REAL, ids=name)
def test_other_dictionaries_of_ours_say_so(sae):
    assert not is_binary(sae)


def test_dictionaries_of_saelens_are_not():
    assert not is_binary(StandardSAE(StandardSAEConfig(**WIDTHS)))
    assert not is_binary(Transcoder(TranscoderConfig(**WIDTHS, d_out=3, apply_b_dec_to_input=False)))


@pytest.mark.parametrize("sae", BINARY, ids=name)
def test_a_scale_is_not_folded_into_a_binary_code(sae):
    with pytest.raises(NotImplementedError, match="cannot absorb a scale"):
        sae.fold_W_dec_norm()


@pytest.mark.parametrize("sae", BINARY, ids=name)
def test_statistics_stay_in_float32(sae):
    narrow = sae.to(torch.bfloat16)

    assert {weights.dtype for weights in narrow.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in narrow.buffers()} == {torch.float32}
