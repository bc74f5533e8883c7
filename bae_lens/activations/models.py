"""Language models with hooks, by name, and proof that they are the models that transformers knows by that name."""

import difflib
import gc
import hashlib
import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor

from bae_lens.activations.demo_model import cache_folder, load_demo_model, load_hooked
from bae_lens.activations.device_map import DeviceMap
from bae_lens.activations.hook_names import layer_hook
from bae_lens.activations.precision import Dtype, torch_dtype
from bae_lens.memory import is_shortage
from bae_lens.storage import read_json, write_json

DEMO_MODEL = "smollm2"
CHECKED_TOKENS = (2, 48)  # sequences and their length, long enough for positions to matter
TOLERANCE = 1e-3  # of log-probabilities in float32; faithful conversions differ by 1e-4 at most
CHECKED_FILE = "checked_models.json"
SPREAD = "bridge on several devices"


def load_model(
    name: str,
    device: str = "cpu",
    context_size: int = 1,
    dtype: Dtype = "float32",
    device_map: DeviceMap | None = None,
) -> Any:
    """A model with hooks: `"smollm2"` (embedded), a local folder, or a name on the hub, weights unprocessed.

    Models that TransformerLens converts become a `HookedSAETransformer`, all others a `SAETransformerBridge`. So
    do those that TransformerLens would cut to fewer tokens than `context_size` and their own config. The first
    time that a model is loaded, its log-probabilities of random tokens are compared with those of transformers, in
    float32, and on the CPU if it is to run in another dtype. A conversion that fails or differs is warned of, and the
    bridge takes its place. Which one agreed is remembered in the cache folder, for this name (of a local folder, its
    files) and these versions of the libraries.
    With a `device_map`, as transformers takes it, a model becomes a bridge on several devices, and is compared with
    that of transformers on the same devices, in the dtype in which it is to run.
    Raises ValueError if neither agrees with transformers, saying by how much each is off, and for a device map of the
    embedded model, ImportError if that is not installed, and OSError for a name that the hub does not know. Too little
    memory is raised as it is told by torch.
    """
    if name == DEMO_MODEL:
        if device_map is not None:
            raise ValueError(f"the embedded model {DEMO_MODEL} runs on one device, got a device map; leave it out")
        return load_demo_model(device, dtype=dtype)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ValueError(f"a local model folder needs a config.json, and {folder} has none")
    if device_map is not None:
        return _load_spread(name, dtype, device_map)
    loaders = _loaders(name, device, dtype)
    identity = _identity(name, list(loaders))
    known = _checked().get(identity)
    if known in loaders:
        model = loaders[known]()
        if known == "bridge" or not _is_cut(model, name, context_size):
            return model
    expected = _expected(name)
    faults, cut_short = [], False
    checked = loaders if dtype == "float32" else _loaders(name, "cpu", "float32")
    for kind, load in checked.items():
        model, fault = _faithful(load, *expected)
        if model is not None and kind != "bridge" and _is_cut(model, name, context_size):
            model, fault, cut_short = None, f"takes {model.cfg.n_ctx} tokens at most", True
        if model is not None:
            for other in faults:
                warnings.warn(f"{name} becomes a TransformerLens bridge: {other}", stacklevel=2)
            if not cut_short:
                with suppress(OSError):  # a cache that cannot be written costs the next run a comparison
                    _remember(identity, kind)
            if dtype == "float32":
                return model
            del model
            return loaders[kind]()
        faults.append(f"as a {kind} it {fault}")
        gc.collect()
    raise ValueError(f"{name} cannot be had with hooks as it is in transformers: {'; '.join(faults)}")


def _load_spread(name: str, dtype: Dtype, device_map: DeviceMap) -> Any:
    from sae_lens import SAETransformerBridge

    placed: dict[str, Any] = {"dtype": torch_dtype(dtype), "device_map": device_map}
    load = partial(SAETransformerBridge.boot_transformers, name, **placed)
    identity = _identity(name, [SPREAD, dtype])
    if _checked().get(identity) == SPREAD:
        return load()
    model, fault = _faithful(load, *_expected(name, **placed, attn_implementation="eager"))  # as in a bridge
    if model is None:
        raise ValueError(f"{name} cannot be had with hooks as it is in transformers: as a {SPREAD} it {fault}")
    with suppress(OSError):
        _remember(identity, SPREAD)
    return model


def resolve_hook(model: Any, hook_name: str) -> str:
    """The name under which the model caches a hook, resolving a TransformerBridge's aliases.

    Raises ValueError for a hook that the model does not have, naming the layers that it has, or near ones.
    """
    if hasattr(model, "_resolve_hook_name"):
        hook_name = model._resolve_hook_name(hook_name)
    if hook_name not in model.hook_dict:
        near = difflib.get_close_matches(hook_name, model.hook_dict, n=4, cutoff=0.5)
        place = layer_hook(hook_name)
        beyond = place is not None and place.layer >= model.cfg.n_layers
        layers = f" (its layers are 0 to {model.cfg.n_layers - 1})" if beyond else ""
        raise ValueError(f"the model has no hook {hook_name!r}; near ones: {', '.join(near) or 'none'}{layers}")
    return hook_name


def _loaders(name: str, device: str, dtype: Dtype) -> dict[str, Callable[[], Any]]:
    """Ways to load a model, by what it becomes, in the order in which they are tried."""
    from sae_lens import HookedSAETransformer, SAETransformerBridge

    from bae_lens.saes.saelens_compat import convert_hf_model_config, get_official_model_name

    hooked: dict[str, Callable[[], Any]] = {}
    try:
        if Path(name).is_dir():
            convert_hf_model_config(name)
            hooked["hooked model"] = lambda: load_hooked(Path(name), device, dtype)
        else:
            get_official_model_name(name)
            hooked["hooked model"] = lambda: HookedSAETransformer.from_pretrained_no_processing(
                name, device=device, dtype=torch_dtype(dtype)
            )
    except (NotImplementedError, ValueError):
        pass  # TransformerLens does not claim to convert it
    except Exception as error:  # it claims to, and stumbles over the config
        warnings.warn(f"{name} becomes a TransformerLens bridge: as a hooked model it {_raised(error)}", stacklevel=3)
    bridge = partial(SAETransformerBridge.boot_transformers, name, device=device, dtype=torch_dtype(dtype))
    return {**hooked, "bridge": bridge}


def _faithful(
    load: Callable[[], Any], tokens: Int[Tensor, "n position"], expected: Float[Tensor, "n position d_vocab"]
) -> tuple[Any, str]:
    """The model, or None and what is wrong with it."""
    try:
        model = load()
        difference = (_log_probabilities(model, tokens, prepend_bos=False) - expected).abs().max().item()
    except Exception as error:
        if is_shortage(error):
            raise
        return None, _raised(error)
    if not difference <= TOLERANCE:
        return None, f"gives log-probabilities that differ from transformers' by up to {difference:.2g}"
    return model, ""


def _is_cut(model: Any, name: str, context_size: int) -> bool:
    """Whether the model takes fewer tokens than `context_size`, though its own config allows as many, or more."""
    if model.cfg.n_ctx >= context_size:
        return False
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(known_to_transformers(name)).get_text_config()
    own = getattr(config, "max_position_embeddings", None)
    return own is None or model.cfg.n_ctx < own


def known_to_transformers(name: str) -> str:
    """A local folder, or the hub's name for what TransformerLens may abbreviate."""
    from bae_lens.saes.saelens_compat import get_official_model_name

    if not Path(name).is_dir():
        with suppress(ValueError):  # of a name that only the hub knows
            return get_official_model_name(name)
    return name


def _raised(error: Exception) -> str:
    reason = str(error).strip().splitlines() or [""]
    return f"cannot be loaded ({type(error).__name__}: {reason[0][:200]})"


def _expected(name: str, **options: Any) -> tuple[Int[Tensor, "n position"], Float[Tensor, "n position d_vocab"]]:
    """Random tokens, and the log-probabilities that transformers gives after each of them."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, **options}
    model = AutoModelForCausalLM.from_pretrained(known_to_transformers(name), **options).eval()
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, CHECKED_TOKENS, generator=torch.Generator().manual_seed(0))
    return tokens, _log_probabilities(model, tokens)


@torch.no_grad()
def _log_probabilities(
    model: Any, tokens: Int[Tensor, "n position"], **options: Any
) -> Float[Tensor, "n position d_vocab"]:
    device = next(model.parameters()).device
    output = model(tokens.to(device), **options)
    return getattr(output, "logits", output).float().log_softmax(-1).cpu()


def _identity(name: str, kinds: list[str]) -> str:
    """What a model, the libraries that load it and what it can become are known by.

    A folder is known by its files' names, sizes and times.
    """
    libraries = [f"{library} {version(library)}" for library in ("sae-lens", "transformer-lens", "transformers")]
    folder = Path(name)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        stats = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        name = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    return ", ".join([name, *libraries, *kinds])


def _checked() -> dict[str, str]:
    """What each known model became; of a damaged file, nothing is known."""
    with suppress(OSError, TypeError, ValueError):
        return dict(read_json(cache_folder() / CHECKED_FILE))
    return {}


def _remember(identity: str, kind: str) -> None:
    cache_folder().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_folder() / f"{CHECKED_FILE}.lock"):
        write_json(cache_folder() / CHECKED_FILE, {**_checked(), identity: kind})
