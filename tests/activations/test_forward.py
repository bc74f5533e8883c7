import pytest
import torch
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig

from bae_lens.activations.forward import hook_widths, run_at_hooks, stop_layer

TOKENS = torch.tensor([[0, 4, 5], [0, 6, 7]])


def test_activations_are_what_the_model_computes_in_the_order_of_the_pass(tiny_model):
    hooks = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z", "blocks.0.hook_resid_pre"]
    _, cache = tiny_model.run_with_cache(TOKENS, prepend_bos=False)

    found = run_at_hooks(tiny_model, TOKENS, hooks)

    assert list(found) == hooks[::-1]
    assert torch.equal(found[hooks[0]], cache[hooks[0]])
    assert torch.equal(found[hooks[1]], torch.cat([cache[hooks[1]][:, :, head] for head in range(2)], dim=-1))


def test_pass_stops_where_it_can_or_is_told(tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model.blocks[1], "forward", lambda *_, **__: pytest.fail("went further"))

    assert run_at_hooks(tiny_model, TOKENS, ["blocks.0.mlp.hook_post"])["blocks.0.mlp.hook_post"].shape == (2, 3, 32)
    assert run_at_hooks(tiny_model, TOKENS, ["hook_embed"], stop_at_layer=1)["hook_embed"].shape == (2, 3, 16)
    assert stop_layer(["blocks.0.hook_resid_post", "blocks.4.mlp.hook_in"]) == 5
    assert stop_layer(["blocks.0.hook_resid_post", "ln_final.hook_normalized"]) is None


def test_activations_are_float32_and_finite(tiny_model):
    hook = "blocks.0.hook_resid_post"
    assert run_at_hooks(tiny_model.to(torch.bfloat16), TOKENS, [hook])[hook].dtype == torch.float32
    tiny_model.W_E.data[7, 3] = torch.inf
    with pytest.raises(ValueError, match=f"activations at {hook} are not finite; check its dtype"):
        run_at_hooks(tiny_model, TOKENS, [hook])


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.0.attn.hook_pattern", r"one vector a token, got shape \(2, 2, 3, 3\); choose another hook"),
        ("blocks.0.hook_mlp_in", "but did not reach it; choose another one"),
    ],
)
def test_hook_without_a_vector_a_token_is_refused(tiny_model, hook, message):
    with pytest.raises(ValueError, match=message):
        run_at_hooks(tiny_model, TOKENS, [hook])


def test_widths_are_asked_once_a_hook_and_model(tiny_model, monkeypatch):
    run, calls = tiny_model.run_with_cache, []
    monkeypatch.setattr(tiny_model, "run_with_cache", lambda *a, **k: calls.append(k["names_filter"]) or run(*a, **k))

    for hooks in (["blocks.0.mlp.hook_post"], ["blocks.1.mlp.hook_post", "blocks.0.attn.hook_z"]) * 2:
        widths = hook_widths(tiny_model, hooks)

    assert list(widths.items()) == [("blocks.0.attn.hook_z", 16), ("blocks.1.mlp.hook_post", 32)]
    assert len(calls) == 2
    wider = HookedTransformerConfig(
        n_layers=1, d_model=24, n_ctx=32, d_head=8, d_mlp=40, d_vocab=64, act_fn="gelu", device="cpu"
    )
    assert hook_widths(HookedSAETransformer(wider), ["blocks.0.mlp.hook_post"]) == {"blocks.0.mlp.hook_post": 40}
