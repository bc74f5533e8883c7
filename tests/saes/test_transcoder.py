from typing import Any

import pytest
import torch
from sae_lens import SAE, Transcoder, TranscoderConfig
from sae_lens.saes.sae import SAEMetadata

from bae_lens import BAE, BAEConfig, BinaryTranscoder, BinaryTranscoderConfig, TopKTranscoder, TopKTranscoderConfig
from bae_lens.saes.transcoder import hooks_of, output_width

pytestmark = pytest.mark.usefixtures("one_thread")

SAME_LAYER = ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out", 16)
ACROSS_LAYERS = ("blocks.0.mlp.hook_in", "blocks.1.hook_mlp_out", 16)
WIDER = ("blocks.0.hook_resid_pre", "blocks.1.mlp.hook_post", 32)


def make(kind: str, hook_name: str = "a", hook_name_out: str | None = "b", d_out: int = 32, **overrides: Any) -> Any:
    """A transcoder from 16 to `d_out` dimensions whose every weight is drawn."""
    sae_class, config_class = {
        "relu": (Transcoder, TranscoderConfig),
        "topk": (TopKTranscoder, TopKTranscoderConfig),
        "binary": (BinaryTranscoder, BinaryTranscoderConfig),
    }[kind]
    metadata = SAEMetadata(hook_name=hook_name, hook_name_out=hook_name_out)
    values = {"d_in": 16, "d_sae": 64, "d_out": d_out, "apply_b_dec_to_input": False, "metadata": metadata}
    sae: Any = sae_class(config_class(**{**values, **overrides}))
    for parameter in sae.parameters():
        parameter.data.normal_()
    return sae


class TestForward:
    def test_topk_keeps_the_k_largest_as_far_as_they_are_positive(self):
        sae, x = make("topk", k=5, dtype="float64"), torch.randn(40, 16, dtype=torch.float64)
        sae.b_enc.data -= 8  # so that some tokens have fewer than five

        acts = sae.encode(x).detach()

        hidden_pre = (x @ sae.W_enc + sae.b_enc).detach()
        for row, pre in zip(acts, hidden_pre, strict=True):
            largest = sorted(range(64), key=lambda j, pre=pre: -pre[j])[:5]
            assert row.equal(torch.tensor([pre[j] if j in largest and pre[j] > 0 else 0.0 for j in range(64)]).double())
        fired = (acts > 0).sum(-1)
        assert fired.max() == 5
        assert fired.min() < 5
        torch.testing.assert_close(sae(x), acts @ sae.W_dec + sae.b_dec)

    @pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
    def test_binary_one_encodes_and_decodes_by_the_equations(self, shape):
        sae, x = make("binary", dtype="float64"), torch.randn(*shape, 16, dtype=torch.float64)
        code = sae.encode(x)
        assert code.equal((x @ sae.W_enc + sae.b_enc >= 0).double())
        torch.testing.assert_close(sae(x), code @ sae.W_dec + sae.b_dec)
        assert sae(x).shape == (*shape, 32)

    def test_binary_one_refuses_another_width(self):
        with pytest.raises(ValueError, match=r"takes activations 16 wide \(d_in\), got 32; check the hook"):
            make("binary").encode(torch.zeros(2, 32))


class TestBinary:
    def test_folding_polarity_makes_every_feature_rare_and_keeps_the_output(self):
        sae, x = make("binary", dtype="float64"), torch.randn(200, 16, dtype=torch.float64)
        sae.estimate_prior(x)
        prior, code, output = sae.prior.clone(), sae.encode(x), sae(x)

        flipped = sae.fold_polarity()

        assert flipped.equal((prior > 0.5).float())
        assert 0 < flipped.sum() < 64
        torch.testing.assert_close(sae(x), output, rtol=0, atol=1e-12)
        assert sae.encode(x).equal(torch.where(flipped.bool(), 1 - code, code))
        assert sae.prior.max() <= 0.5

    def test_graded_view_is_a_relu_transcoder_with_the_same_firing(self):
        sae, x = make("binary", dtype="float64"), torch.randn(50, 16, dtype=torch.float64)

        graded = sae.to_graded_sae()

        assert type(graded) is Transcoder
        assert graded.cfg.metadata == sae.cfg.metadata
        assert graded.cfg.metadata is not sae.cfg.metadata
        assert (graded.encode(x) > 0).equal(sae.encode(x).bool())
        torch.testing.assert_close(graded.encode(x), (x @ sae.W_enc + sae.b_enc).relu())
        assert graded(x).shape == (50, 32)
        graded.W_enc.data.zero_()
        assert sae.W_enc.any()

    def test_folding_decoder_norms_is_refused(self):
        with pytest.raises(NotImplementedError, match="a binary code cannot absorb a scale"):
            make("binary").fold_W_dec_norm()


class TestHooks:
    @pytest.mark.parametrize(
        ("hook_name", "hook_name_out", "expected"),
        [("a", "b", ("a", "b")), ("a", None, ("a", "a")), ("a=>b", None, ("a", "b"))],
    )
    def test_hooks_are_read_from_the_metadata(self, hook_name, hook_name_out, expected):
        assert hooks_of(make("topk", hook_name, hook_name_out)) == expected

    def test_width_of_the_output(self):
        assert output_width(make("binary").cfg) == 32
        assert output_width(BAEConfig(d_in=16, d_sae=64)) == 16

    @pytest.mark.parametrize("kind", ["topk", "binary"])
    def test_saving_and_loading_keeps_everything(self, kind, tmp_path):
        overrides: dict[str, Any] = {"k": 7} if kind == "topk" else {}
        sae, x = make(kind, **overrides), torch.randn(9, 16)
        sae.save_model(tmp_path)
        loaded = SAE.load_from_disk(tmp_path)
        assert type(loaded) is type(sae)
        assert loaded.cfg == sae.cfg
        assert loaded(x).equal(sae(x))


class TestModel:
    @pytest.mark.parametrize("hooks", [SAME_LAYER, ACROSS_LAYERS, WIDER], ids=["same layer", "across layers", "wider"])
    @pytest.mark.parametrize("kind", ["relu", "topk", "binary"])
    def test_model_with_a_transcoder_equals_a_manual_replacement(self, kind, hooks, tiny_model):
        hook_name, hook_name_out, d_out = hooks
        sae = make(kind, hook_name, hook_name_out, d_out)
        tokens = torch.randint(4, 64, (3, 12))
        plain, cache = tiny_model.run_with_cache(tokens)
        expected = tiny_model.run_with_hooks(
            tokens,
            fwd_hooks=[(hook_name_out, lambda x, hook: sae(cache[hook_name]))],  # noqa: ARG005
        )

        with_sae = tiny_model.run_with_saes(tokens, saes=[sae])
        same, sae_cache = tiny_model.run_with_cache_with_saes(tokens, saes=[sae])

        torch.testing.assert_close(with_sae, expected)
        torch.testing.assert_close(same, expected)
        assert not torch.allclose(expected, plain, atol=1e-3)
        (code,) = [value for name, value in sae_cache.items() if name.endswith("hook_sae_acts_post")]
        torch.testing.assert_close(code, sae.encode(cache[hook_name]))
        assert tiny_model(tokens).equal(plain)

    def test_a_transcoder_and_a_bae_work_together(self, tiny_model):
        hook_name, hook_name_out, _ = ACROSS_LAYERS
        transcoder = make("binary", hook_name, hook_name_out, 16)
        bae = BAE(BAEConfig(d_in=16, d_sae=64, metadata=SAEMetadata(hook_name="blocks.0.hook_resid_post")))
        tokens = torch.randint(4, 64, (2, 8))
        captured = []
        expected = tiny_model.run_with_hooks(
            tokens,
            fwd_hooks=[
                (hook_name, lambda x, hook: captured.append(x)),  # noqa: ARG005
                ("blocks.0.hook_resid_post", lambda x, hook: bae(x)),  # noqa: ARG005
                (hook_name_out, lambda x, hook: transcoder(captured[0])),  # noqa: ARG005
            ],
        )
        torch.testing.assert_close(tiny_model.run_with_saes(tokens, saes=[transcoder, bae]), expected)
