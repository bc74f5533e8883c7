"""A dictionary of which each process trains its own features, and the whole that is saved of it and goes on from there.

What is on disk is what a single process would have written. So any number of processes goes on with it, and a finished
dictionary is a file like any other. The whole passes through the memory of the host, not of a GPU.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE, TrainingSAEConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Adam

from bae_lens.distributed.connection import is_main_process
from bae_lens.distributed.exchange import gather_on_first, gather_rows
from bae_lens.saes.saelens_compat import (
    ACTIVATION_SCALER_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
    get_sae_training_class,
)
from bae_lens.saes.sharing import FEATURE_AXIS, SharedFeatures
from bae_lens.saes.training_bae import TrainingBAE

COUNTS = ("act_freq_scores", "n_forward_passes_since_fired")  # of a trainer, one for each feature

OfFeatures = Callable[[Tensor, int], Any]  # what becomes of a tensor that has features along this axis


def own_share(whole: TrainingSAE[Any]) -> TrainingBAE:
    """The features of this process, of a dictionary that `check_features_can_be_shared` lets pass."""
    sharing = SharedFeatures(whole.cfg.d_sae)
    weights = {
        name: _cut(tensor, FEATURE_AXIS[name], sharing).clone() if name in FEATURE_AXIS else tensor
        for name, tensor in whole.state_dict().items()
    }
    cfg = copy(whole.cfg)
    cfg.d_sae = len(sharing.own)
    share = _with_weights(cfg, weights)
    share.sharing = sharing
    return share


def gathered(trainer: SAETrainer[Any, Any], cfg: TrainingSAEConfig) -> SAETrainer[Any, Any] | None:
    """In the first process a trainer of the whole, of this config, on the CPU, to be saved; None in the others."""
    state = dict(trainer.sae.state_dict())
    trainer.sae.process_state_dict_for_saving(state)
    weights = {
        name: gather_on_first(tensor, FEATURE_AXIS[name]) if name in FEATURE_AXIS else tensor.cpu()
        for name, tensor in state.items()
    }
    optimizer = _of_moments(trainer, trainer.optimizer.state_dict(), gather_on_first)
    counts = {name: gather_on_first(getattr(trainer, name), 0) for name in COUNTS}
    if not is_main_process():
        return None
    whole = copy(trainer)
    whole.sae = _with_weights(cfg, weights)
    whole.optimizer = Adam(whole.sae.parameters())
    whole.optimizer.load_state_dict(optimizer)
    for name, count in counts.items():
        setattr(whole, name, count)
    return whole


def with_all_counts(trainer: SAETrainer[Any, Any]) -> SAETrainer[Any, Any]:
    """A trainer that knows how often all features fired, for its metrics; all processes ask for it together."""
    counting = copy(trainer)
    for name in COUNTS:
        setattr(counting, name, gather_rows(getattr(trainer, name)))
    return counting


@contextmanager
def own_checkpoint(trainer: SAETrainer[Any, Any], checkpoint: Path) -> Iterator[Path]:
    """A checkpoint of this process' features alone, cut out of that of the whole, for as long as the block runs."""
    sharing = trainer.sae.sharing
    with tempfile.TemporaryDirectory(prefix=".part-", dir=checkpoint.parent) as folder:
        part = Path(folder)
        with safe_open(checkpoint / SAE_WEIGHTS_FILENAME, "pt") as whole:
            weights = {name: _read(whole, name, sharing) for name in whole.keys()}  # noqa: SIM118
        save_file(weights, part / SAE_WEIGHTS_FILENAME)
        state = torch.load(checkpoint / TRAINER_STATE_FILENAME, map_location="cpu", mmap=True)

        def cut(tensor: Tensor, axis: int) -> Tensor:
            return _cut(tensor, axis, sharing).clone()

        state["optimizer"] = _of_moments(trainer, state["optimizer"], cut)
        state.update({name: cut(state[name], 0) for name in COUNTS})
        torch.save(state, part / TRAINER_STATE_FILENAME)
        shutil.copy(checkpoint / ACTIVATION_SCALER_CFG_FILENAME, part)
        yield part


def _with_weights(cfg: TrainingSAEConfig, weights: Mapping[str, Any]) -> TrainingBAE:
    """As SAELens loads a dictionary: made without memory, and given the weights."""
    cfg = copy(cfg)
    device, cfg.device = cfg.device, "meta"
    sae = get_sae_training_class(cfg.architecture())[0](cfg)
    assert isinstance(sae, TrainingBAE)
    sae.load_state_dict(weights, assign=True)
    cfg.device = device
    return sae.to("cpu")


def _of_moments(trainer: SAETrainer[Any, Any], optimizer: dict[str, Any], change: OfFeatures) -> dict[str, Any]:
    """The state of Adam, in which a tensor for each parameter that has features is changed."""
    names = [name for name, _ in trainer.sae.named_parameters()]
    state = {
        index: {
            key: change(value, FEATURE_AXIS[names[index]]) if names[index] in FEATURE_AXIS and value.ndim else value
            for key, value in moments.items()
        }
        for index, moments in optimizer["state"].items()
    }
    return {**optimizer, "state": state}


def _cut(whole: Tensor, axis: int, sharing: SharedFeatures) -> Tensor:
    return whole.narrow(axis, sharing.own.start, len(sharing.own))


def _read(file: Any, name: str, sharing: SharedFeatures) -> Tensor:
    """Of a tensor with features those of this process, without reading the others."""
    if name not in FEATURE_AXIS:
        return file.get_tensor(name)
    own = slice(sharing.own.start, sharing.own.stop)
    part = file.get_slice(name)[own] if FEATURE_AXIS[name] == 0 else file.get_slice(name)[:, own]
    return part.contiguous()
