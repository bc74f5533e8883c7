"""Dictionaries from folders that others may have written: whole and finite, or refused in one sentence."""

import json
import reprlib
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from bae_lens.saes.bae import BAE
from bae_lens.saes.saelens_compat import SAE_CLASS_REGISTRY, get_pretrained_saes_directory

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
LFS_POINTER = b"version https://git-lfs"


def load_dictionary(folder: str | Path, device: str = "cpu") -> SAE[Any]:
    """A dictionary as SAELens saves it, of any architecture that is registered.

    Raises FileNotFoundError if there is none, and ValueError for a config or weights that cannot be read, that do not
    fit one another, or that are not finite.
    """
    folder = Path(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"there is no saved dictionary in {folder}, which has no {file}")
    _check_config(folder / CONFIG_FILE)
    with (folder / WEIGHTS_FILE).open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{folder / WEIGHTS_FILE} is a pointer of Git LFS; fetch the weights with git lfs pull")
    try:
        sae = SAE.load_from_disk(folder, device)
    except Exception as error:  # damaged files fail in many ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{folder} holds no dictionary that can be loaded ({reason})") from error
    _check_values(sae, f"the dictionary in {folder}")
    return sae


def load_pretrained(source: str, device: str = "cpu") -> SAE[Any]:
    """A dictionary by its folder or, as `RELEASE/SAE_ID`, from the hub.

    A release is one of SAELens' directory, `gpt2-small-res-jb`, or a repository on the hub, `you/baes`.

    Raises as `load_dictionary`, and ValueError for what is neither, or is not to be had from the hub.
    """
    folder = Path(source)
    if folder.is_dir():
        return load_dictionary(folder, device)
    if "/" not in source or folder.is_absolute():
        raise ValueError(f"a dictionary is a folder or RELEASE/SAE_ID on the hub, got {source!r}, which is neither")
    release, sae_id = _release_and_id(source)
    try:
        sae = SAE.from_pretrained(release, sae_id, device)
    except Exception as error:  # unknown names, no network and damaged files fail in many ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{source} is no folder, and not to be had from the hub ({reason})") from error
    _check_values(sae, f"the dictionary {source}")
    return sae


def _release_and_id(source: str) -> tuple[str, str]:
    release, _, sae_id = source.partition("/")
    if release in get_pretrained_saes_directory() or "/" not in sae_id:
        return release, sae_id
    name, _, sae_id = sae_id.partition("/")
    return f"{release}/{name}", sae_id


def _check_values(sae: SAE[Any], name: str) -> None:
    for part, values in sae.state_dict().items():
        if part != "bit_price" and not torch.isfinite(values).all():  # which is NaN where it is unknown
            raise ValueError(f"{name} cannot be used: {part} holds NaN or infinity")
        if part == "prior" and not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name} cannot be used: its prior holds other than shares of 0 to 1")


def load_bae(folder: str | Path, device: str = "cpu") -> BAE:
    """A saved BAE or binary transcoder, at hook_z one that takes heads side by side.

    Raises as `load_dictionary`, and ValueError if the folder holds another kind of dictionary.
    """
    sae = load_dictionary(folder, device)
    if not isinstance(sae, BAE):
        raise ValueError(f"{folder} holds a {sae.cfg.architecture()}, and this needs a bae or a binary_transcoder")
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae


def _check_config(path: Path) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON that can be read ({error})") from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or architecture not in SAE_CLASS_REGISTRY:
        known = ", ".join(sorted(SAE_CLASS_REGISTRY))
        raise ValueError(f"{path} must name an architecture, one of {known}, got {architecture!r}")
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} must hold metadata by name, got {metadata!r}")
    for name in ("hook_name", "hook_name_out"):
        if not isinstance(metadata.get(name, ""), str | None):
            raise ValueError(f"{path} must name a hook as its {name}, got {reprlib.repr(metadata[name])}")
