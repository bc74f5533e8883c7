import json

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer

from bae_lens import BAE, BAEConfig, BinaryTranscoder, BinaryTranscoderConfig, edit, logit_effects
from bae_lens.activations.demo_model import load_hooked
from bae_lens.evaluation.steering import LogitEffects

HOOK = "blocks.0.hook_resid_post"
MLP = {"hook_name": "blocks.0.mlp.hook_in", "hook_name_out": "blocks.0.hook_mlp_out"}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tokens():
    return torch.randint(4, 64, (3, 10))


def random_weights(sae):
    for weights in sae.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    return sae


def dictionary(kind, **config):
    hook = {"metadata": SAEMetadata(**config.pop("hook", {"hook_name": HOOK}))}
    shape = {"d_in": 16, "d_sae": 40, **config, **hook}
    match kind:
        case "bae":
            return random_weights(BAE(BAEConfig(**shape)))
        case "relu":
            return random_weights(StandardSAE(StandardSAEConfig(**shape)))
        case "topk":
            return random_weights(TopKSAE(TopKSAEConfig(**shape, k=5)))
        case _:
            shape["metadata"] = SAEMetadata(**MLP)
            return random_weights(BinaryTranscoder(BinaryTranscoderConfig(**shape, d_out=16)))


KINDS = ["bae", "relu", "topk", "transcoder"]


def stream(model, tokens, hook=HOOK):
    return model.run_with_cache(tokens, prepend_bos=False)[1][hook]


def code_in(model, sae, tokens):
    hook_name = sae.cfg.metadata.hook_name
    return sae.encode(stream(model, tokens, hook_name))


@pytest.mark.parametrize("kind", KINDS)
def test_edit_that_changes_nothing_is_exact(tiny_model, tokens, kind):
    sae = dictionary(kind)
    before = tiny_model(tokens)
    with edit(tiny_model, sae, {}):
        assert torch.equal(tiny_model(tokens), before)
    token = tokens[:1, :1]
    before, code = tiny_model(token), code_in(tiny_model, sae, token)
    with edit(tiny_model, sae, {7: code[0, 0, 7].item()}):
        assert torch.equal(tiny_model(token), before)


@pytest.mark.parametrize("kind", KINDS)
def test_stream_changes_by_decoder_rows_alone(tiny_model, tokens, kind):
    sae = dictionary(kind)
    hook_name_out = sae.cfg.metadata.hook_name_out or HOOK
    code, before = code_in(tiny_model, sae, tokens), stream(tiny_model, tokens, hook_name_out)
    with edit(tiny_model, sae, {3: 1, 9: 0}):
        after = stream(tiny_model, tokens, hook_name_out)
    change = (1 - code[..., 3, None]) * sae.W_dec[3] - code[..., 9, None] * sae.W_dec[9]
    torch.testing.assert_close(after, before + change, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stream(tiny_model, tokens, hook_name_out), before, rtol=0, atol=0)
    assert tiny_model(tokens).isfinite().all()


def test_flip(tiny_model, tokens):
    sae = dictionary("bae")
    code, before = code_in(tiny_model, sae, tokens), stream(tiny_model, tokens)
    assert 0 < code[..., 5].mean() < 1
    with edit(tiny_model, sae, {5: "flip"}):
        after = stream(tiny_model, tokens)
    torch.testing.assert_close(after, before + (1 - 2 * code[..., 5, None]) * sae.W_dec[5], rtol=1e-4, atol=1e-5)


def test_without_the_error_the_dictionarys_output_stands_there(tiny_model, tokens):
    sae = dictionary("bae")
    before = stream(tiny_model, tokens)
    with edit(tiny_model, sae, {}, slice(2, 5), keep_error=False):
        after = stream(tiny_model, tokens)
    torch.testing.assert_close(after[:, 2:5], sae(before)[:, 2:5])
    torch.testing.assert_close(after[:, 5:], before[:, 5:], rtol=0, atol=0)


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_run_time_norms(tiny_model, tokens, normalization):
    sae = dictionary("bae", normalize_activations=normalization)
    before = stream(tiny_model, tokens)
    with edit(tiny_model, sae, {}):
        torch.testing.assert_close(stream(tiny_model, tokens), before, rtol=0, atol=0)
    with edit(tiny_model, sae, {3: "flip"}):
        assert (stream(tiny_model, tokens) - before).abs().max() > 1e-3


@pytest.mark.parametrize("positions", [slice(0, 3), slice(4, None), slice(-2, None), slice(None, None, 2)])
def test_positions(tiny_model, tokens, positions):
    sae = dictionary("bae")
    before = stream(tiny_model, tokens)
    with edit(tiny_model, sae, {5: "flip"}, positions):
        changed = (stream(tiny_model, tokens) != before).any(-1).all(0)
    expected = torch.zeros(10, dtype=torch.bool)
    expected[positions] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("positions", [None, slice(3, None), slice(12, 14), slice(0, 4)])
def test_generation_with_a_cache_is_that_without(tiny_model, tokens, positions):
    sae = dictionary("bae")
    options = {"max_new_tokens": 8, "do_sample": False, "stop_at_eos": False, "verbose": False, "prepend_bos": False}
    plain = tiny_model.generate(tokens, **options)
    scaled = dictionary("bae")
    scaled.load_state_dict(sae.state_dict())
    scaled.W_dec.data *= 30
    with edit(tiny_model, scaled, {5: "flip", 6: "flip"}, positions):
        cached = tiny_model.generate(tokens, **options)
        uncached = tiny_model.generate(tokens, **options, use_past_kv_cache=False)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, plain)
    assert torch.equal(tiny_model.generate(tokens, **options), plain)


def test_hook_z(tiny_model, tokens):
    sae = dictionary("bae", hook={"hook_name": "blocks.0.attn.hook_z"}, reshape_activations="hook_z")
    before = stream(tiny_model, tokens, "blocks.0.attn.hook_z")
    code = sae.encode(before)
    with edit(tiny_model, sae, {3: 1}):
        after = stream(tiny_model, tokens, "blocks.0.attn.hook_z")
    change = (1 - code[..., 3, None]) * sae.W_dec[3]
    torch.testing.assert_close((after - before).flatten(2), change, rtol=1e-3, atol=1e-5)


def test_plain_hooked_transformer(tiny_model, tokens):
    model = HookedTransformer(tiny_model.cfg, tokenizer=tiny_model.tokenizer)
    sae = dictionary("bae")
    before = stream(model, tokens)
    with edit(model, sae, {5: "flip"}):
        assert (stream(model, tokens) != before).any()
    with (
        pytest.raises(ValueError, match=r"no hook 'blocks\.0\.mlp\.hook_in'"),
        edit(model, dictionary("transcoder"), {}),
    ):
        pass


@pytest.fixture
def bridge(tiny_model_folder):
    return SAETransformerBridge.boot_transformers(str(tiny_model_folder), device="cpu")


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_out", HOOK])
def test_bridge(bridge, tokens, hook_name):
    sae = dictionary("bae", hook={"hook_name": hook_name})
    sae.W_dec.data *= 30
    before = bridge.run_with_cache(tokens)[1]["blocks.0.hook_out"]
    code = sae.encode(before)
    options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
    plain = bridge.generate(tokens, **options)
    with edit(bridge, sae, {5: "flip"}, slice(3, None)):
        after = bridge.run_with_cache(tokens)[1]["blocks.0.hook_out"]
        cached = bridge.generate(tokens, **options)
        uncached = bridge.generate(tokens, **options, use_past_kv_cache=False)
    change = (1 - 2 * code[..., 5, None]) * sae.W_dec[5]
    change[:, :3] = 0
    torch.testing.assert_close(after, before + change, rtol=1e-4, atol=1e-4)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, plain)
    assert torch.equal(bridge.generate(tokens, **options), plain)


def test_nothing_stays_behind(tiny_model, tokens):
    sae, hook_point = dictionary("bae"), tiny_model.hook_dict[HOOK]
    seen = []
    hook_point.add_hook(lambda activations, hook: seen.append(activations))  # noqa: ARG005
    with edit(tiny_model, sae, {5: 1}), edit(tiny_model, sae, {6: 0}, slice(1, 2)):
        tiny_model(tokens)
        assert len(hook_point.fwd_hooks) == 5
    with pytest.raises(RuntimeError), edit(tiny_model, sae, {5: 1}):
        raise RuntimeError
    assert len(hook_point.fwd_hooks) == 1
    assert "forward" not in vars(tiny_model)
    tiny_model(tokens)
    assert len(seen) == 2


def test_nested_edits_add_up(tiny_model, tokens):
    sae = dictionary("relu")
    code, before = code_in(tiny_model, sae, tokens), stream(tiny_model, tokens)
    other = dictionary("transcoder")
    with edit(tiny_model, other, {4: "flip"}), edit(tiny_model, sae, {3: 2.5}):
        both = stream(tiny_model, tokens)
    with edit(tiny_model, other, {4: "flip"}):
        one = stream(tiny_model, tokens)
    assert code[..., 3].std() > 0
    encoded = sae.encode(one)[..., 3, None]
    torch.testing.assert_close(both, one + (2.5 - encoded) * sae.W_dec[3], rtol=1e-4, atol=1e-4)
    assert (one != before).any()


def test_what_cannot_be_edited(tiny_model):
    elsewhere = dictionary("bae", hook={"hook_name": "blocks.9.hook_resid_post"})
    refused = [
        ("bae", {40: 1}, "numbered from 0 to 39, got 40"),
        ("bae", {-1: 1}, "numbered from 0 to 39, got -1"),
        ("bae", {3: 0.5}, '0, 1 or "flip", got 0.5 for 3'),
        ("relu", {3: "flip"}, "finite activation, got 'flip' for 3"),
        ("relu", {3: float("nan")}, "finite activation, got nan for 3"),
    ]
    for kind, features, message in refused:
        with pytest.raises(ValueError, match=message), edit(tiny_model, dictionary(kind), features):
            pass
    with (
        pytest.raises(ValueError, match=r"no hook 'blocks\.9\.hook_resid_post'; near ones"),
        edit(tiny_model, elsewhere, {}),
    ):
        pass
    with (
        pytest.raises(ValueError, match="16 wide"),
        edit(tiny_model, dictionary("bae", d_in=16, hook={"hook_name": "blocks.0.mlp.hook_post"}), {3: 1}),
    ):
        tiny_model(torch.tensor([[5]]))


@pytest.mark.parametrize("kind", ["bae", "transcoder"])
@pytest.mark.parametrize("on", ["hooked", "bridge"])
def test_dictionary_attached_where_the_edit_acts(tiny_model, bridge, kind, on):
    model = tiny_model if on == "hooked" else bridge
    hook = {"hook": {"hook_name": "blocks.0.hook_out"}} if on == "bridge" and kind == "bae" else {}
    sae, other = dictionary(kind, **hook), dictionary(kind, **hook)
    if on == "bridge" and kind == "transcoder":
        for each in (sae, other):
            each.cfg.metadata.hook_name = "blocks.0.mlp.hook_in"
            each.cfg.metadata.hook_name_out = "blocks.0.mlp.hook_out"
    model.add_sae(other)
    with pytest.raises(ValueError, match=r"where a dictionary is attached"), edit(model, sae, {3: 1}):
        pass
    model.reset_saes()
    tokens = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match=r"or was while"), edit(model, sae, {3: 1}):
        model.run_with_saes(tokens, saes=[other])
    with edit(model, sae, {3: 1}):
        with model.saes([other]):
            pass
        with pytest.raises(ValueError, match=r"model\.reset_saes\(\)"):
            model(tokens)
    before = model(tokens)
    with edit(model, sae, {3: 1, 4: 1, 5: 1}, keep_error=False):
        assert (model(tokens) != before).any()
    assert torch.equal(model(tokens), before)


def test_transcoder_that_takes_the_edit_away_when_it_is_detached(tiny_model, tokens):
    with edit(tiny_model, dictionary("bae", hook={"hook_name": MLP["hook_name"]}), {3: 1}):
        tiny_model.run_with_saes(tokens, saes=[dictionary("transcoder")])
        with pytest.raises(ValueError, match=r"or was while"):
            tiny_model(tokens)


def test_dictionary_attached_elsewhere(tiny_model, tokens):
    sae, other = dictionary("bae"), dictionary("bae", hook={"hook_name": "blocks.1.hook_resid_pre"})
    expected = tiny_model.run_with_saes(tokens, saes=[other])
    with edit(tiny_model, sae, {3: "flip"}):
        edited = tiny_model.run_with_saes(tokens, saes=[other])
    assert (edited != expected).any()
    assert torch.equal(tiny_model.run_with_saes(tokens, saes=[other]), expected)


def test_transcoder_that_reads_after_it_writes(tiny_model, tokens):
    sae = dictionary("transcoder")
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = "blocks.1.mlp.hook_in", "blocks.0.hook_mlp_out"
    with pytest.raises(ValueError, match="reads after it writes"), edit(tiny_model, sae, {3: 1}):
        tiny_model(tokens)


def direct_effect(model, sae, feature):
    """What adding a little of the decoder row to the last hidden state does to the logits, over its scale."""
    x = torch.zeros(1, 1, 16, dtype=torch.float64)
    x[..., ::2], x[..., 1::2] = 1, -1  # mean 0 and mean square 1, so that the normalization only scales by 1

    def logits(x):
        return model.unembed(model.ln_final(x.float()))[0, 0].double()

    row = sae.W_dec[feature].double()
    step = 1e-3
    effect = (logits(x + step * row) - logits(x - step * row)) / (2 * step)
    radial = (x.flatten() @ row) / 16 * (logits(x) - logits(0 * x))
    effect = effect + radial  # what growing the norm takes back, which the direct path leaves out
    return effect - effect.mean()


def test_logit_effects_are_the_direct_path(tiny_model, tiny_tokenizer):
    sae = dictionary("bae")
    tiny_model.ln_final.w.data = 1 + torch.rand(16)
    (effects,) = logit_effects(tiny_model, sae, [7], k=3)
    expected = direct_effect(tiny_model, sae, 7)
    order = expected.argsort(descending=True)
    assert [token for token, _ in effects.up] == [tiny_tokenizer.decode([i]) for i in order[:3].tolist()]
    assert [token for token, _ in effects.down] == [tiny_tokenizer.decode([i]) for i in order.flip(0)[:3].tolist()]
    torch.testing.assert_close(
        torch.tensor([value for _, value in effects.up + effects.down]).double(),
        torch.cat([expected[order[:3]], expected[order.flip(0)[:3]]]),
        rtol=1e-2,
        atol=1e-3,
    )
    assert LogitEffects.from_dict(json.loads(json.dumps(effects.to_dict()))) == effects


def test_logit_effects_of_a_bridge_are_those_of_the_hooked_model(bridge, tiny_model_folder):
    hooked = load_hooked(tiny_model_folder)
    for model in (bridge, hooked):
        model.ln_final.get_parameter("weight" if model is bridge else "w").data += torch.linspace(0, 2, 16)
    sae = dictionary("bae")
    (on_hooked,) = logit_effects(hooked, sae, [1], k=64)
    sae.cfg.metadata.hook_name = "blocks.0.hook_out"
    (on_bridge,) = logit_effects(bridge, sae, [1], k=64)
    assert dict(on_bridge.up) == pytest.approx(dict(on_hooked.up), abs=1e-5)
    by_hand = (sae.W_dec[1] * hooked.ln_final.get_parameter("w")) @ hooked.W_U
    assert on_hooked.up[0][1] == pytest.approx((by_hand - by_hand.mean()).max().item(), abs=1e-5)


def test_logit_effects_need_the_residual_stream(tiny_model):
    with pytest.raises(ValueError, match="numbered from 0 to 39, got 40"):
        logit_effects(tiny_model, dictionary("bae"), [40])
    with pytest.raises(ValueError, match=r"residual stream, got one at blocks\.0\.mlp\.hook_post"):
        logit_effects(tiny_model, dictionary("bae", hook={"hook_name": "blocks.0.mlp.hook_post"}), [4])
    for k in (0, 65):
        with pytest.raises(ValueError, match=f"between 1 and the 64 tokens of the vocabulary, got {k}"):
            logit_effects(tiny_model, dictionary("bae"), [4], k)
