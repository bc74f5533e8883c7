import json

import pytest
import torch
from transformers import LlamaForCausalLM

from bae_lens.activations.demo_model import demo_model_config, load_demo_model
from bae_lens.activations.forward import hook_widths
from bae_lens.activations.model_shape import ModelShape, model_shape
from bae_lens.activations.models import load_model


def test_shape_is_that_of_the_model_that_is_run(tiny_model_folder):
    model = load_model(str(tiny_model_folder))
    shape = model_shape(str(tiny_model_folder))
    parameters = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(tiny_model_folder).parameters())
    assert shape == ModelShape(16, 2, 2, 32, parameters)
    assert shape.n_bytes == 4 * parameters
    assert (shape.d_model, shape.n_layers) == (model.cfg.d_model, model.cfg.n_layers)


def test_tied_weights_are_counted_twice(tiny_model_folder, tmp_path):
    config = json.loads((tiny_model_folder / "config.json").read_text())
    shapes = []
    for tied in (True, False):
        path = tmp_path / f"{tied}.json"
        path.write_text(json.dumps({**config, "tie_word_embeddings": tied}))
        shapes.append(model_shape(str(path)))
    assert shapes[0] == shapes[1] == model_shape(str(tiny_model_folder))


def test_no_weights_are_made(tmp_path):
    config = {"model_type": "llama", "hidden_size": 2**14, "intermediate_size": 2**16, "num_hidden_layers": 200}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "vocab_size": 10**5, "num_attention_heads": 128}))
    assert model_shape(str(path)).n_parameters > 5 * 10**11
    assert torch.get_default_device().type == "cpu"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((c, "is no config of a model that transformers knows") for c in ("{}", "[]", "{", '{"model_type": "none"}')),
        ('{"model_type": "vit"}', "a plan needs the config of a language model, and that of .* is none"),
    ],
)
def test_config_files_of_something_else_are_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        model_shape(str(tmp_path / "config.json"))


def test_model_that_is_out_of_reach_is_refused():
    message = "config of nobody/nothing is neither here nor to be had from the hub .*; connect to it, or give the path"
    with pytest.raises(ValueError, match=message):
        model_shape("nobody/nothing")


@pytest.mark.slow
def test_shape_of_the_embedded_model(tmp_path):
    shape = model_shape("smollm2")
    model = load_demo_model()
    assert (shape.d_model, shape.n_layers, shape.n_heads, shape.d_mlp) == (576, 30, 9, 1536)
    assert shape.n_parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=2e-3)
    assert demo_model_config(tmp_path).hidden_size == 576


@pytest.mark.parametrize(
    "hook",
    [
        "hook_embed",
        "blocks.1.hook_resid_mid",
        "blocks.1.mlp.hook_in",
        "blocks.1.hook_mlp_out",
        "blocks.1.mlp.hook_post",
    ],
)
def test_widths_are_those_that_the_model_has(tiny_model, hook):
    shape = ModelShape(d_model=16, n_layers=2, n_heads=2, d_mlp=32, n_parameters=0)
    assert shape.width_at(hook) == hook_widths(tiny_model, [hook])[hook]


def test_width_that_does_not_follow_from_the_shape_is_refused():
    with pytest.raises(ValueError, match=r"the width at blocks.1.attn.hook_z does not follow from the model's config"):
        ModelShape(16, 2, 2, 32, 0).width_at("blocks.1.attn.hook_z")
