"""Metrics of a training that is under way, sent to Weights & Biases or trackio under SAELens' names."""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from sae_lens import SAETrainer

from bae_lens.distributed.connection import process_index
from bae_lens.extras import missing
from bae_lens.saes.saelens_compat import TrainStepOutput
from bae_lens.storage import read_json, write_json

TrackerName = Literal["wandb", "trackio"]
TRACKED_FILE = "tracked.json"  # beside checkpoints: the run that an interrupted training goes on with

Trainer = SAETrainer[Any, Any]


@dataclass(frozen=True)
class Tracking:
    """Where the metrics of trainings go, under SAELens' names, every tenth step."""

    tracker: TrackerName | None = None
    """Weights & Biases (with WANDB_MODE=offline on this machine), or trackio, which keeps them on this machine. By
    default nowhere: curves are in the results in any case."""
    tracker_project: str = "bae_lens"
    """Project of the tracker, in which every dictionary is a run."""

    def __post_init__(self) -> None:
        """Raises ImportError for a tracker that is not installed."""
        if self.tracker is not None and find_spec(self.tracker) is None:
            raise missing(self.tracker)


UNTRACKED = Tracking()


class TrackedRun:
    """What a training tells its tracker; nothing if there is none, or if another process of the same training does."""

    def __init__(self, send: Callable[[Mapping[str, Any], int], None] | None, active: bool) -> None:
        self._send, self._active = send, active

    def before_step(self, trainer: Trainer, counted: Callable[[], Trainer]) -> None:
        """Firing rates of a full window, as SAELens logs them; `counted` gives a trainer that knows of all features."""
        n_training_steps = trainer.n_training_steps
        if self._active and n_training_steps and n_training_steps % trainer.cfg.feature_sampling_window == 0:
            self._log(counted().full_sparsity_window_log(), n_training_steps)

    def after_step(self, trainer: Trainer, output: TrainStepOutput, counted: Callable[[], Trainer]) -> None:
        """What SAELens logs of a step, as often as it does."""
        done = trainer.n_training_steps + 1
        if self._active and done % trainer.cfg.logger.wandb_log_frequency == 0:
            n_training_samples = done * trainer.cfg.train_batch_size_samples
            self._log(counted().build_train_step_log_dict(output, n_training_samples), trainer.n_training_steps)

    def _log(self, metrics: Mapping[str, Any], step: int) -> None:
        if self._send is not None:
            self._send(metrics, step)


@contextmanager
def tracked(tracking: Tracking, name: str, config: dict[str, Any], folder: Path) -> Iterator[TrackedRun]:
    """A run of the tracker for the training of this name, which lasts as long as the block.

    Its id is kept in `folder`, where a training that goes on finds it. The first of several processes writes.
    """
    if tracking.tracker is None or process_index() > 0:
        yield TrackedRun(None, tracking.tracker is not None)
        return
    path = folder / TRACKED_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"run": uuid.uuid4().hex[:8]})
    run_id = read_json(path)["run"]
    tracker: Any = import_module(tracking.tracker)
    own = {"id": run_id} if tracking.tracker == "wandb" else {}  # trackio knows runs by their names
    tracker.init(project=tracking.tracker_project, name=f"{name} {run_id}", config=config, resume="allow", **own)

    def send(metrics: Mapping[str, Any], step: int) -> None:
        of_tracker = {
            key: tracker.Histogram(np_histogram=(value.histogram, value.bins)) if hasattr(value, "bins") else value
            for key, value in metrics.items()
        }
        tracker.log(of_tracker, step=step)

    try:
        yield TrackedRun(send, True)
    finally:
        tracker.finish()
