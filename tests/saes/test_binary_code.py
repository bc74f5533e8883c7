from copy import deepcopy
from math import log2
from typing import Any
from unittest import mock

import jaxtyping
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig, Transcoder, TranscoderConfig

import bae_lens.saes.binary_code
from bae_lens import (
    BAE,
    BAEConfig,
    BinaryTopK,
    BinaryTopKConfig,
    BinaryTranscoder,
    BinaryTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
    TrainingBAE,
    TrainingBAEConfig,
    TrainingBinaryTopK,
    TrainingBinaryTopKConfig,
    TrainingBinaryTranscoder,
    TrainingBinaryTranscoderConfig,
    TrainingTopKTranscoder,
    TrainingTopKTranscoderConfig,
    TrainingTranscoder,
    TrainingTranscoderConfig,
)
from bae_lens.functional.strength import activation_strength
from bae_lens.saes.binary_code import is_binary

WIDTHS: dict[str, Any] = {"d_in": 4, "d_sae": 8}
BINARY = [
    BAE(BAEConfig(**WIDTHS)),
    TrainingBAE(TrainingBAEConfig(**WIDTHS)),
    BinaryTranscoder(BinaryTranscoderConfig(**WIDTHS, d_out=3)),
    TrainingBinaryTranscoder(TrainingBinaryTranscoderConfig(**WIDTHS, d_out=3)),
    BinaryTopK(BinaryTopKConfig(**WIDTHS, k=2)),
    TrainingBinaryTopK(TrainingBinaryTopKConfig(**WIDTHS, k=2)),
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


class TestStrengthHook:
    def test_by_hand(self):
        bae = BAE(BAEConfig(d_in=1, d_sae=3))
        bae.W_enc.data = torch.tensor([[1.0, 1.0, -1.0]])
        bae.prior.copy_(torch.tensor([0.25, 0.875, 0.75]))

        _, cache = bae.run_with_cache(torch.tensor([[1.0]]))

        assert cache["hook_sae_acts_post"].tolist() == [[1, 1, 0]]
        expected = torch.tensor([[log2(0.75), -3.0, log2(0.75)]])
        torch.testing.assert_close(cache["hook_sae_acts_strength"], expected)

    @pytest.mark.parametrize("sae", BINARY, ids=name)
    def test_all_binary_codes_have_it(self, sae):
        sae, x = deepcopy(sae), torch.randn(2, 5, sae.cfg.d_in)
        sae.prior.uniform_()

        sae_out, cache = sae.run_with_cache(x)

        code = sae.encode(x)
        assert cache["hook_sae_acts_post"].equal(code)
        assert cache["hook_sae_acts_strength"].equal((code - sae.prior).abs().log2())
        assert sae_out.equal(sae(x))

    def test_is_of_the_code_with_its_flips_and_of_what_hooks_make_of_it(self):
        bae, x = BAE(BAEConfig(**WIDTHS, max_flips=3)), torch.randn(20, 4)
        bae.prior.uniform_()
        bae.bit_price.fill_(0.01)

        cache = bae.run_with_cache(x)[1]
        assert not cache["hook_sae_acts_post"].equal(bae.code_of(bae.pre_activation(x)))
        assert cache["hook_sae_acts_strength"].equal(bae.activation_strength(cache["hook_sae_acts_post"]))

        with bae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda code, hook: torch.ones_like(code))]):  # noqa: ARG005
            cache = bae.run_with_cache(x)[1]
        assert cache["hook_sae_acts_strength"].equal((1 - bae.prior).log2().expand(20, 8))

    def test_is_unknown_while_the_prior_is(self):
        _, cache = BAE(BAEConfig(**WIDTHS)).run_with_cache(torch.randn(3, 4))

        assert cache["hook_sae_acts_strength"].shape == (3, 8)
        assert cache["hook_sae_acts_strength"].isnan().all()

    def test_costs_nothing_where_nobody_listens(self, monkeypatch):
        computed = mock.Mock(side_effect=activation_strength)
        monkeypatch.setattr(bae_lens.saes.binary_code, "activation_strength", computed)
        bae, x = BAE(BAEConfig(**WIDTHS)), torch.randn(3, 4)

        bae(x)
        bae.run_with_cache(x, names_filter="hook_sae_acts_post")
        with pytest.warns(DeprecationWarning, match="use_error_term"):
            bae.use_error_term = True
        bae(x)
        assert computed.call_count == 0

        bae.run_with_cache(x)  # for the error term the code is computed again, without hooks
        assert computed.call_count == 1

    def test_is_in_float32_for_a_code_in_bfloat16(self):
        bae = BAE(BAEConfig(**WIDTHS, dtype="bfloat16"))
        bae.prior.fill_(2**-12)

        strength = bae.run_with_cache(torch.randn(9, 4))[1]["hook_sae_acts_strength"]

        assert strength.dtype == torch.float32
        assert strength.unique().tolist() == pytest.approx([-12, log2(1 - 2**-12)])

    def test_survives_copies_and_files(self, tmp_path):
        bae, x = BAE(BAEConfig(**WIDTHS)), torch.randn(9, 4)
        bae.prior.uniform_()
        bae.save_model(tmp_path)
        expected = bae.run_with_cache(x)[1]["hook_sae_acts_strength"]

        for other in (deepcopy(bae), SAE.load_from_disk(tmp_path)):
            assert other.run_with_cache(x)[1]["hook_sae_acts_strength"].equal(expected)

    @pytest.mark.filterwarnings("ignore:::torch")  # the compiler warns of its own ways
    def test_can_be_compiled(self, monkeypatch):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks cannot be compiled
        bae, x, heard = BAE(BAEConfig(**WIDTHS)), torch.randn(9, 4), []
        bae.prior.uniform_()

        assert torch.compile(bae, backend="aot_eager")(x).equal(bae(x))

        bae.add_hook("hook_sae_acts_strength", lambda tensor, hook: heard.append(tensor))  # noqa: ARG005
        assert torch.compile(bae, backend="aot_eager")(x).equal(bae(x))
        compiled, eager = heard
        assert compiled.equal(eager)
