"""The states of a training that is under way, on disk: whole at any moment, and good for any number of processes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer

from bae_lens.distributed.exchange import gather_rows
from bae_lens.storage import write_json, written_whole

TRAINING_FILE = "training.json"


def save_checkpoint(trainer: SAETrainer[Any, Any], folder: Path, report: Any) -> None:
    """Writes a complete checkpoint beside the last one before that is removed, so that one is always whole.

    `report`, JSON values or a dataclass of them, is kept with it in `TRAINING_FILE`.
    """
    checkpoint = folder / f"{trainer.n_training_steps:08d}"
    with written_whole(checkpoint) as partial:
        trainer.save_checkpoint(partial.name, base_path=folder)
        write_json(partial / TRAINING_FILE, report)
    for other in folder.iterdir():
        if other != checkpoint and other.is_dir():
            shutil.rmtree(other)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint. Raises ValueError if not all processes see the same one."""
    last = max((path for path in folder.glob("*") if path.name.isdigit()), default=None)
    steps = gather_rows(torch.tensor([int(last.name) if last else 0]))
    if len(steps.unique()) > 1:
        found = ", ".join(map(str, steps.tolist()))
        raise ValueError(
            f"the processes see different checkpoints in {folder}, at steps {found}; use a "
            "shared folder, or remove those of the others"
        )
    return last


def load_checkpoint(trainer: SAETrainer[Any, Any], checkpoint: Path) -> None:
    """Brings the trainer and its dictionary to the state that was saved; for within `reading`."""
    trainer.sae.load_weights_from_checkpoint(checkpoint)
    trainer.load_trainer_state(checkpoint)


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Raises ValueError if the checkpoint that is read in the block cannot be read."""
    try:
        yield
    except Exception as error:
        reason = repr(error).splitlines()[0]
        raise ValueError(f"checkpoint {checkpoint} cannot be read ({reason}); remove it to start over") from error
