"""The first layers of a language model with random weights, from its config alone, to see how long they take."""

import tempfile
from typing import Any

from bae_lens.activations.precision import Dtype, torch_dtype


def shallow_model(config: Any, n_layers: int, context_size: int, device: str, dtype: Dtype) -> Any:
    """A `HookedSAETransformer` of so many layers, by a config of transformers, without a tokenizer.

    Raises ValueError for an architecture that TransformerLens does not convert.
    """
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformers import AutoConfig

    from bae_lens.saes.saelens_compat import convert_hf_model_config

    values = {**config.to_dict(), "num_hidden_layers": n_layers}
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:n_layers]
    try:
        with tempfile.TemporaryDirectory() as folder:
            AutoConfig.for_model(**values).save_pretrained(folder)
            converted = convert_hf_model_config(folder)
    except Exception as error:  # of many kinds, for what it was not made for
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"TransformerLens does not convert the config of this model: {reason}") from error
    own = {"n_ctx": context_size, "tokenizer_name": None, "device": device, "dtype": torch_dtype(dtype)}
    return HookedSAETransformer(HookedTransformerConfig.from_dict({**converted, **own, "model_name": "shallow"})).eval()
