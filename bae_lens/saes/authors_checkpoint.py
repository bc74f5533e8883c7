"""Checkpoints of the paper's authors, read without running any code they might carry."""

import io
import pickle
import reprlib
from pathlib import Path
from typing import Any

import torch

from bae_lens.saes.bae import BAE, BAEConfig
from bae_lens.saes.foreign_files import PICKLE_BYTES, check_pickle, load_tensors

STEPS = ("sign", "sign_s")  # their binarizations with the same forward pass as ours


def load_authors_checkpoint(
    weights_path: str | Path, config_path: str | Path | None = None, device: str = "cpu", dtype: str = "float32"
) -> BAE:
    """The authors' `.pt` state dict as a `BAE`; its prior is unknown (0) until `estimate_prior` measures it.

    `config_path` is their `.config.pkl`, by default the one beside the weights, if there is one; it only says whether
    the model is one that a BAE can represent. The codes agree except where a pre-activation is exactly 0 (theirs: off).

    Raises FileNotFoundError for missing files, and ValueError for weights of another model, a variant other than the
    plain step with linear output, or a config that holds anything but plain values.
    """
    weights_path = Path(weights_path)
    if not weights_path.is_file():
        raise FileNotFoundError(f"no checkpoint at {weights_path}")
    try:
        state = load_tensors(weights_path)
    except Exception as error:  # damaged archives fail in many ways
        raise ValueError(f"{weights_path} is not a readable state dict: {error}") from error
    _check_weights(state, weights_path)

    if config_path is None and weights_path.with_suffix(".config.pkl").exists():
        config_path = weights_path.with_suffix(".config.pkl")
    if config_path is not None:
        _check_variant(read_plain_pickle(config_path), config_path)

    d_sae, d_in = state["encoder.weight"].shape
    bae = BAE(BAEConfig(d_in=d_in, d_sae=d_sae, device=device, dtype=dtype))
    bae.load_state_dict(
        {
            "W_enc": state["encoder.weight"].T,
            "b_enc": state["encoder.bias"],
            "W_dec": state["decoder.weight"].T,
            "b_dec": state["decoder.bias"],
            "prior": torch.zeros(d_sae),
            "bit_price": torch.tensor(torch.nan),
        }
    )
    return bae


def read_plain_pickle(path: str | Path) -> Any:
    """Unpickles numbers, strings and containers only, in a time and memory bounded by the size of the file.

    Raises ValueError as `check_pickle`, and before anything named in the file is called.
    """
    with Path(path).open("rb") as file:
        content = file.read(PICKLE_BYTES + 1)
    try:
        check_pickle(content)
        return _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # damaged pickles fail in many ways
        raise ValueError(f"{path} is refused as a config: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, and a config holds plain values only")


def _check_weights(state: Any, path: Path) -> None:
    state = state if isinstance(state, dict) else {}
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    d_sae, d_in = (*shapes.get("encoder.weight", ()), 0, 0)[:2]
    expected = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "decoder.weight": (d_in, d_sae),
        "decoder.bias": (d_in,),
    }
    if shapes != expected:
        raise ValueError(
            f"{path} must hold exactly {', '.join(expected)} of matching shapes, got {reprlib.repr(shapes)}"
        )


def _check_variant(config: Any, path: str | Path) -> None:
    params = config.get("params") if isinstance(config, dict) else None
    params = params if isinstance(params, dict) else {}
    step, output = params.get("binarization_type"), params.get("output_activation")
    if step not in STEPS or output != "none":
        raise ValueError(
            f"only {' and '.join(STEPS)} with output_activation 'none' can be read as a BAE, "
            f"but {path} says binarization_type {reprlib.repr(step)} and output_activation {reprlib.repr(output)}"
        )
