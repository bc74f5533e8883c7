"""Every model that is loaded is the one that transformers has by that name."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bae_lens.activations import models
from bae_lens.activations.models import load_model, resolve_hook

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LENGTH = {"max_position_embeddings": 64}
HEADS = {"num_key_value_heads": 2}
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
OPT = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **LENGTH}
GPT2 = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
SCALED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# What TransformerLens converted with parts dropped, or stumbled over, when this was written.
MISTAKEN = {
    "Llama": ("LlamaConfig", {**SIZE, **HEADS, **LENGTH}),
    "Llama with attention_bias": ("LlamaConfig", {**SIZE, **HEADS, **LENGTH, "attention_bias": True}),
    "Llama with mlp_bias": ("LlamaConfig", {**SIZE, **HEADS, **LENGTH, "mlp_bias": True}),
    "Llama with linear RoPE scaling": (
        "LlamaConfig",
        {**SIZE, **HEADS, **LENGTH, "rope_parameters": {**ROPE, "rope_type": "linear"}},
    ),
    "Llama with explicit head_dim": ("LlamaConfig", {**SIZE, **HEADS, **LENGTH, "head_dim": 16}),
    "Phi-3 with partial_rotary_factor": ("Phi3Config", {**SIZE, **HEADS, **LENGTH, "partial_rotary_factor": 0.5}),
    "GPT-2 without n_ctx": ("GPT2Config", GPT2),
}
OTHERS = {
    "Llama with YaRN": (
        "LlamaConfig",
        {
            **SIZE,
            **HEADS,
            **LENGTH,
            "rope_parameters": {**ROPE, "rope_type": "yarn", "original_max_position_embeddings": 16},
        },
    ),
    "Llama with Llama 3's RoPE scaling": (
        "LlamaConfig",
        {
            **SIZE,
            **HEADS,
            **LENGTH,
            "rope_parameters": {**ROPE, **SCALED, "original_max_position_embeddings": 16},
        },
    ),
    "Llama with another rope_theta": (
        "LlamaConfig",
        {**SIZE, **HEADS, **LENGTH, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    ),
    "Llama with grouped heads": ("LlamaConfig", {**SIZE, **LENGTH, "num_key_value_heads": 1}),
    "Llama with tied embeddings": ("LlamaConfig", {**SIZE, **HEADS, **LENGTH, "tie_word_embeddings": True}),
    "GPT-2 with a wide MLP": ("GPT2Config", {**GPT2, "n_inner": 48}),
    "GPT-Neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "intermediate_size": 32,
            "window_size": 8,
            **LENGTH,
        },
    ),
    "Pythia": ("GPTNeoXConfig", {**SIZE, **LENGTH}),
    "Mistral": ("MistralConfig", {**SIZE, **HEADS, **LENGTH}),
    "Mistral with a short window": ("MistralConfig", {**SIZE, **HEADS, **LENGTH, "sliding_window": 8}),
    "Mixtral": ("MixtralConfig", {**SIZE, **HEADS, **LENGTH, "num_local_experts": 2}),
    "Qwen2": ("Qwen2Config", {**SIZE, **HEADS, **LENGTH}),
    "Qwen3": ("Qwen3Config", {**SIZE, **HEADS, **LENGTH, "head_dim": 8}),
    "Phi": ("PhiConfig", {**SIZE, **HEADS, **LENGTH}),
    "Gemma": ("GemmaConfig", {**SIZE, **HEADS, **LENGTH, "head_dim": 8}),
    "Gemma 2": ("Gemma2Config", {**SIZE, **HEADS, **LENGTH, "head_dim": 8}),
    "Gemma 3": ("Gemma3TextConfig", {**SIZE, **HEADS, **LENGTH, "head_dim": 8}),
    "OPT": (
        "OPTConfig",
        {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **LENGTH},
    ),
    "OPT with projections": (
        "OPTConfig",
        {**OPT, "word_embed_proj_dim": 8},
    ),
    "BLOOM": ("BloomConfig", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "StableLM": ("StableLmConfig", {**SIZE, **HEADS, **LENGTH}),
    "OLMo": ("OlmoConfig", {**SIZE, **HEADS, **LENGTH}),
    "OLMo 2": ("Olmo2Config", {**SIZE, **HEADS, **LENGTH}),
    "Granite": ("GraniteConfig", {**SIZE, **HEADS, **LENGTH, "logits_scaling": 4.0, "embedding_multiplier": 2.0}),
    "Cohere": ("CohereConfig", {**SIZE, **HEADS, **LENGTH, "logit_scale": 0.25}),
    "Falcon": ("FalconConfig", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
}

REFUSED = {"CohereConfig"}  # the bridge of TransformerLens 3.9 leaves out its logit scale


@pytest.fixture
def save(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., Path]:
    """Saves a random model in which every weight matters, in a folder of the name given."""

    def make(config: str, fields: dict[str, Any], folder: str = "model") -> Path:
        special = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
        cfg = getattr(transformers, config)(vocab_size=len(tiny_tokenizer), **special, **fields)
        model = AutoModelForCausalLM.from_config(cfg)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(tmp_path / folder)
        tiny_tokenizer.save_pretrained(tmp_path / folder)
        return tmp_path / folder

    return make


@torch.no_grad()
def difference(model: Any, folder: Path) -> float:
    """Largest, of the log-probabilities from transformers'."""
    tokens = torch.randint(4, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits.log_softmax(-1)
    return (model(tokens, prepend_bos=False).log_softmax(-1) - expected).abs().max().item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "fields"), MISTAKEN.values(), ids=MISTAKEN)
def test_model_is_that_of_its_folder(save, config, fields):
    folder = save(config, fields)
    assert difference(load_model(str(folder)), folder) < 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "fields"), OTHERS.values(), ids=OTHERS)
def test_model_of_many_architectures_is_that_of_its_folder_or_refused(save, config, fields):
    folder = save(config, fields)
    if config in REFUSED:
        with pytest.raises(ValueError, match="cannot be had with hooks as it is in transformers"):
            load_model(str(folder))
    else:
        assert difference(load_model(str(folder)), folder) < 1e-3


def test_conversion_that_differs_is_told_and_a_bridge_takes_its_place(save):
    folder = save(*MISTAKEN["Llama with attention_bias"])
    with pytest.warns(UserWarning, match=r"becomes a TransformerLens bridge: as a hooked model it gives log-prob"):
        assert isinstance(load_model(str(folder)), SAETransformerBridge)


@pytest.mark.filterwarnings("ignore")
def test_name_of_a_folder_above_says_nothing_about_the_model(save):
    folder = save(*OTHERS["Pythia"], folder="llama-project")
    assert difference(load_model(str(folder)), folder) < 1e-3


def test_model_that_no_loader_gets_right_is_refused_with_the_differences(tiny_model_folder, monkeypatch):
    def skewed(load):
        def changed(*args, **options):
            model = load(*args, **options)
            next(model.parameters()).data.mul_(3)
            return model

        return changed

    monkeypatch.setattr(models, "load_hooked", skewed(models.load_hooked))
    monkeypatch.setattr(SAETransformerBridge, "boot_transformers", skewed(SAETransformerBridge.boot_transformers))
    with pytest.raises(ValueError, match=r"as a hooked model it gives .* by up to .*; as a bridge it gives"):
        load_model(str(tiny_model_folder))


@pytest.mark.parametrize(
    "shortage",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError("no memory"),
    ],
)
def test_a_model_that_does_not_fit_in_memory_is_not_taken_for_one_that_cannot_be_converted(
    tiny_model_folder, monkeypatch, shortage
):
    def load(*_):
        raise shortage

    monkeypatch.setattr("bae_lens.activations.models.load_hooked", load)
    with pytest.raises(type(shortage), match="memory"):
        load_model(str(tiny_model_folder))


def test_comparison_is_remembered_until_the_files_change(tiny_model_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "copy")
    compared = []
    expected = models._expected
    monkeypatch.setattr(models, "_expected", lambda name: compared.append(name) or expected(name))
    for _ in range(2):
        assert isinstance(load_model(str(folder)), HookedSAETransformer)
    assert len(compared) == 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.embed_tokens.weight.data.mul_(2)
    model.save_pretrained(folder)
    assert difference(load_model(str(folder)), folder) < 1e-3
    assert len(compared) == 2


def test_architecture_that_transformer_lens_does_not_convert_becomes_a_bridge(tiny_model_folder, monkeypatch):
    def refuse(folder):
        raise NotImplementedError(folder)

    monkeypatch.setattr("bae_lens.saes.saelens_compat.convert_hf_model_config", refuse)
    model = load_model(str(tiny_model_folder))
    assert isinstance(model, SAETransformerBridge)
    assert resolve_hook(model, "blocks.1.hook_resid_post") == "blocks.1.hook_out"


def test_context_is_what_the_models_own_config_says(tiny_model_folder, monkeypatch):
    """TransformerLens gives many models 2048 tokens, whatever they take; here it is 32 of 64."""
    load = models.load_hooked

    def cut_short(*given):
        model = load(*given)
        model.cfg.n_ctx = 32
        return model

    monkeypatch.setattr(models, "load_hooked", cut_short)
    for _ in ("compared", "remembered"):
        assert isinstance(load_model(str(tiny_model_folder), context_size=32), HookedSAETransformer)
        with pytest.warns(UserWarning, match="becomes a TransformerLens bridge: as a hooked model it takes 32"):
            model = load_model(str(tiny_model_folder), context_size=33)
        assert isinstance(model, SAETransformerBridge)
        assert model.cfg.n_ctx == 64
    assert isinstance(load_model(str(tiny_model_folder)), HookedSAETransformer)


@pytest.mark.parametrize(
    ("name", "loader"), [("gpt2", HookedSAETransformer), ("someone/unlisted-model", SAETransformerBridge)]
)
def test_hub_names_go_to_the_loader_that_knows_them(name, loader, tiny_model_folder, monkeypatch):
    folder = str(tiny_model_folder)
    boot, load = SAETransformerBridge.boot_transformers, AutoModelForCausalLM.from_pretrained
    hooked = models.load_hooked(tiny_model_folder)
    monkeypatch.setattr(HookedSAETransformer, "from_pretrained_no_processing", lambda *_, **__: hooked)
    monkeypatch.setattr(SAETransformerBridge, "boot_transformers", lambda *_, **__: boot(folder))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _, **options: load(folder, **options))
    assert isinstance(load_model(name), loader)


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"needs a config.json"):
        load_model(str(tmp_path))


def test_unknown_hook_names_near_ones(tiny_model):
    assert resolve_hook(tiny_model, "blocks.0.hook_resid_post") == "blocks.0.hook_resid_post"
    with pytest.raises(ValueError, match=r"no hook 'blocks.0.hook_resid_pots'; near ones: blocks.0.hook_resid_post"):
        resolve_hook(tiny_model, "blocks.0.hook_resid_pots")
    with pytest.raises(ValueError, match="near ones: none"):
        resolve_hook(tiny_model, "?")


def test_damaged_memory_of_comparisons_is_as_good_as_none(tiny_model_folder):
    models.cache_folder().mkdir()
    (models.cache_folder() / models.CHECKED_FILE).write_text('["half')
    assert isinstance(load_model(str(tiny_model_folder)), HookedSAETransformer)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision_is_checked_in_float32(tiny_model_folder, dtype, monkeypatch):
    compared = []
    expected = models._expected
    monkeypatch.setattr(models, "_expected", lambda name: (compared.append(name), expected(name))[1])
    model, known, exact = (models.load_model(str(tiny_model_folder), dtype=each) for each in (dtype, dtype, "float32"))
    assert len(compared) == 1
    tokens = torch.tensor([[4, 5, 6]])
    for half in (model, known):
        assert {weights.dtype for weights in half.parameters()} == {getattr(torch, dtype)}
        difference = (half(tokens).float() - exact(tokens)).abs().max()
        assert 0 < difference < 0.05


def test_a_spread_model_is_a_bridge_that_is_compared_once_in_its_own_dtype(tiny_model_folder, monkeypatch):
    asked = []

    def noted(kind, function):
        return lambda name, **how: (asked.append((kind, how)), function(name, **how))[1]

    monkeypatch.setattr(models, "_expected", noted("compared", models._expected))
    monkeypatch.setattr(
        SAETransformerBridge, "boot_transformers", noted("loaded", SAETransformerBridge.boot_transformers)
    )
    folder, placed = str(tiny_model_folder), {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    for _ in range(2):
        model = load_model(folder, dtype="bfloat16", device_map={"": "cpu"})
    assert [kind for kind, _ in asked] == ["compared", "loaded", "loaded"]
    assert all(how.items() >= placed.items() for _, how in asked)
    assert isinstance(model, SAETransformerBridge)
    assert {weights.dtype for weights in model.parameters()} == {torch.bfloat16}
    assert isinstance(load_model(folder), HookedSAETransformer)


def test_a_spread_model_that_differs_from_transformers_is_refused(tiny_model_folder, monkeypatch):
    expected = models._expected
    monkeypatch.setattr(models, "_expected", lambda name, **_: (expected(name)[0], expected(name)[1] + 1))
    with pytest.raises(ValueError, match="as a bridge on several devices it gives log-probabilities that differ"):
        load_model(str(tiny_model_folder), device_map={"": "cpu"})


def test_the_embedded_model_is_not_spread():
    with pytest.raises(
        ValueError, match="the embedded model smollm2 runs on one device, got a device map; leave it out"
    ):
        load_model("smollm2", device_map="auto")
