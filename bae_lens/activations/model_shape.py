"""How large a language model is, from its config alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bae_lens.activations.demo_model import demo_model_config
from bae_lens.activations.hook_names import layer_hook
from bae_lens.activations.models import DEMO_MODEL, known_to_transformers

RESIDUAL = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_in",
    "hook_mlp_out",
    "hook_normalized",
    "hook_embed",
)
INSIDE_MLP = ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post")


@dataclass(frozen=True)
class ModelShape:
    """What the memory and the data of a pass depend on."""

    d_model: int
    """Width of the residual stream."""
    n_layers: int
    """Blocks."""
    n_heads: int
    """Of attention."""
    d_mlp: int
    """Width inside an MLP."""
    n_parameters: int
    """As the model is run: with an unembedding of its own, where weights are tied."""

    @property
    def n_bytes(self) -> int:
        """Of its weights in float32, in which models are run."""
        return 4 * self.n_parameters

    def width_at(self, hook_name: str) -> int:
        """Of the activations at a hook.

        Raises ValueError for one in a layer that is not there, and for one whose width does not follow from the shape.
        """
        place = layer_hook(hook_name)
        if place is not None and place.layer >= self.n_layers:
            raise ValueError(f"the model has no hook {hook_name!r}: its layers are 0 to {self.n_layers - 1}")
        kind = hook_name.rsplit(".", 1)[-1]
        if kind in RESIDUAL or hook_name.endswith(("mlp.hook_in", "mlp.hook_out", "attn.hook_in", "attn.hook_out")):
            return self.d_model
        if hook_name.endswith(INSIDE_MLP):
            return self.d_mlp
        raise ValueError(
            f"the width at {hook_name} does not follow from the model's config; a plan is for the residual stream, and "
            "for what MLPs read, hold and write"
        )


def model_shape(name: str) -> ModelShape:
    """Of a model as `load_model` takes it, or of the path of a config.json; no weights are read.

    Raises ValueError for a name whose config neither is here nor can be had from the hub, and for a config without one
    of these numbers; ImportError if the embedded model is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = model_config(name)
    try:
        text = config.get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        sizes = (text.hidden_size, text.num_hidden_layers, text.num_attention_heads)
        d_mlp = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    except (AttributeError, ValueError) as error:
        raise ValueError(f"a plan needs the config of a language model, and that of {name} is none: {error}") from error
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    if text.tie_word_embeddings:
        n_parameters += text.vocab_size * text.hidden_size
    return ModelShape(*sizes, d_mlp, n_parameters)


def model_config(name: str) -> Any:
    """The config that transformers knows of a model, by name, or of the path of a config.json.

    Raises ValueError for a name whose config neither is here nor can be had from the hub; ImportError if the embedded
    model is not installed.
    """
    from transformers import AutoConfig

    path = Path(name)
    if name == DEMO_MODEL:
        return demo_model_config()
    if path.is_file():
        try:
            return AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no config of a model that transformers knows: {error}") from error
    try:
        return AutoConfig.from_pretrained(known_to_transformers(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the config of {name} is neither here nor to be had from the hub ({type(error).__name__}); connect to it, "
            "or give the path of the model's config.json"
        ) from error
