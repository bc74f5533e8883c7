from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    NemotronConfig,
    Olmo2Config,
    PhiConfig,
)

from bae_lens.activations.models import resolve_hook
from bae_lens.evaluation.logit_path import direct_logits, writes_to_residual_stream

pytestmark = pytest.mark.usefixtures("one_thread")
D = 16
SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": D,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
SPECIAL: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZE, **SPECIAL),
    "gemma": GemmaConfig(**SIZE, **SPECIAL, head_dim=8, num_key_value_heads=1),
    "gemma2": Gemma2Config(**SIZE, **SPECIAL, head_dim=8, num_key_value_heads=1, sliding_window=32),
    "gemma3": Gemma3TextConfig(**SIZE, **SPECIAL, head_dim=8, num_key_value_heads=1, sliding_window=32),
    "granite": GraniteConfig(**SIZE, **SPECIAL, logits_scaling=8.0),
    "cohere": CohereConfig(**SIZE, **SPECIAL, logit_scale=0.25),
    "nemotron": NemotronConfig(**SIZE, **SPECIAL, head_dim=8, num_key_value_heads=2),
    "olmo2": Olmo2Config(**SIZE, **SPECIAL),
    "phi": PhiConfig(**SIZE, **SPECIAL),
    "gpt2": GPT2Config(vocab_size=64, n_embd=D, n_layer=2, n_head=2, n_positions=64),
}


@pytest.fixture
def bridge(tiny_tokenizer, tmp_path):
    """Makes a random model on a bridge, none of whose weights is 0 or 1."""

    def make(name):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
        with torch.no_grad():
            for weights in model.parameters():
                weights.mul_(10) if weights.ndim > 1 else weights.add_(torch.randn_like(weights) * 0.3)
        model.save_pretrained(tmp_path / "m")
        tiny_tokenizer.save_pretrained(tmp_path / "m")
        return SAETransformerBridge.boot_transformers(str(tmp_path / "m"), device="cpu")

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_effects_are_those_that_the_model_shows(bridge, name):
    """A small step at the last layer that changes no norm, against what it does to the last token's logits."""
    model = bridge(name)
    tokens = torch.randint(4, 64, (1, 8))
    hook_name = resolve_hook(model, "blocks.1.hook_resid_post")
    _, cache = model.run_with_cache(tokens, names_filter=[hook_name], prepend_bos=False)
    x = cache[hook_name][0, -1].double()
    if model.cfg.normalization_type == "LN":
        x = x - x.mean()
    step = torch.randn(D).double()
    step -= step.mean()
    step -= x * (x @ step) / (x @ x)

    def logits(sign):
        def add(activations, hook):  # noqa: ARG001
            activations = activations.clone()
            activations[0, -1] += (sign * 1e-2 * step).to(activations)
            return activations

        return model.run_with_hooks(tokens, fwd_hooks=[(hook_name, add)], prepend_bos=False)[0, -1].double()

    measured = (logits(1) - logits(-1)) / 2e-2 * x.square().mean().sqrt()
    claimed = direct_logits(model, step[None].float())[0].double()
    if name == "gemma2":  # the slope of its cap on logits
        measured = measured / (1 - (logits(0) / model.cfg.output_logits_soft_cap) ** 2)
    assert (measured - claimed).norm() < 1e-2 * claimed.norm()


@pytest.mark.parametrize("width", [6, 7])
@pytest.mark.parametrize("kind", ["LN", "RMS", None])
def test_effects_by_hand(width, kind):
    norms = {"LN": torch.nn.LayerNorm(width), "RMS": torch.nn.RMSNorm(width), None: torch.nn.Identity()}
    norm, W_U, directions = norms[kind], torch.randn(width, 20), torch.randn(3, width)
    for weights in norm.parameters():
        weights.data = torch.rand(width) + 0.5
    model = SimpleNamespace(ln_final=norm, W_U=W_U, cfg=SimpleNamespace(normalization_type=kind))
    seen = directions - directions.mean(1, keepdim=True) if kind == "LN" else directions
    expected = (seen * getattr(norm, "weight", 1.0)) @ W_U
    assert torch.allclose(direct_logits(model, directions), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("hook", "writes"),
    [
        ("hook_resid_pre", True),
        ("hook_resid_post", True),
        ("hook_attn_out", True),
        ("hook_mlp_out", True),
        ("attn.hook_z", False),
        ("attn.hook_k", False),
        ("mlp.hook_pre", False),
        ("mlp.hook_post", False),
    ],
)
def test_which_hooks_write_to_the_residual_stream(bridge, tiny_model, hook, writes):
    model, name = bridge("llama"), f"blocks.1.{hook}"
    assert writes_to_residual_stream(model, name) == writes
    assert writes_to_residual_stream(model, resolve_hook(model, name)) == writes
    assert writes_to_residual_stream(tiny_model, name) == writes


def test_what_stands_before_the_mlp_of_a_bridge_is_not_the_stream(bridge, tiny_model):
    model, name = bridge("llama"), "blocks.0.hook_resid_mid"
    assert writes_to_residual_stream(tiny_model, name)
    assert not writes_to_residual_stream(model, name)
    assert not writes_to_residual_stream(model, resolve_hook(model, name))


def test_no_directions_have_no_logits(tiny_model):
    assert direct_logits(tiny_model, torch.zeros(0, 16)).shape == (0, tiny_model.cfg.d_vocab)
