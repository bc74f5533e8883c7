"""Training dictionaries on cached activations with SAELens' trainer: the same batches for each, resumable."""

import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from sae_lens import SAE, SAEConfig, SAETrainer, TrainingSAE, TrainingSAEConfig
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.paired import PairedActivations
from bae_lens.activations.streaming import StreamedActivations
from bae_lens.distributed.connection import is_main_process, n_processes
from bae_lens.distributed.exchange import any_process, barrier, gather_rows
from bae_lens.distributed.gradients import clip_gradients_together, sum_gradients
from bae_lens.distributed.homes import is_first_at_home
from bae_lens.file_exchange import bring_together
from bae_lens.functional.sparse_matmul import SparseProducts
from bae_lens.saes.binary_code import is_binary
from bae_lens.saes.loading import load_dictionary
from bae_lens.saes.saelens_compat import SAETrainerConfig, TrainStepOutput, get_sae_training_class
from bae_lens.saes.sharing import check_features_can_be_shared
from bae_lens.saes.starting import start_at
from bae_lens.saes.training_config import TrainingBAEConfig
from bae_lens.storage import check_same, read_json, validated, write_json, written_whole
from bae_lens.training.checkpoints import TRAINING_FILE, last_checkpoint, load_checkpoint, reading, save_checkpoint
from bae_lens.training.compiler import check_compiler
from bae_lens.training.feature_shards import gathered, own_checkpoint, own_share, with_all_counts
from bae_lens.training.recipe import Recipe, TrainingSettings
from bae_lens.training.tracking import UNTRACKED, TrackedRun, Tracking, tracked

Activations = CachedActivations | PairedActivations | StreamedActivations  # what a dictionary can be trained on

CHECKPOINT_SECONDS = 60.0  # between checkpoints; what a killed process loses at most
CURVE_POINTS = 200  # of a loss curve, at most
DEAD_WINDOW_SHARE = 8  # silent for an eighth of a short run is dead, so that Top-k has something to revive


@dataclass(frozen=True)
class TrainingReport:
    """How a training went so far, as it is kept beside its checkpoints and in the end beside the dictionary."""

    source: dict[str, Any]
    """What tells this training from another: recipe, length and seed."""
    seconds: float
    """Time spent in optimizer steps."""
    memory_gib: float
    """Largest memory so far; see `TrainedDictionary`."""
    curve: list[dict[str, int | float]]
    """Losses and metrics by step; see `TrainedDictionary`."""


@dataclass(frozen=True)
class TrainedDictionary:
    """A finished dictionary, for raw activations, and how its training went."""

    sae: SAE[Any]
    """For inference."""
    seconds: float
    """Time spent in optimizer steps."""
    memory_gib: float
    """Largest memory while it trained, with the model and all else that the process holds: allocated on a GPU, or else
    resident, looked at where the curve has its points."""
    curve: list[dict[str, int | float]]
    """Of up to `CURVE_POINTS` steps: `step`, `l0`, the losses on standardized activations, the SAE's own metrics."""


def train_dictionary(
    name: str,
    recipe: Recipe,
    activations: Activations,
    settings: TrainingSettings,
    folder: Path,
    seed: int = 0,
    device: str = "cpu",
    metadata: dict[str, Any] | None = None,
    shard_features: bool = False,
    tracking: Tracking = UNTRACKED,
) -> TrainedDictionary:
    """Trains one dictionary on standardized activations, folds the standardization into it and saves it.

    SAEs take `CachedActivations`, transcoders `PairedActivations`, either of them `StreamedActivations`.
    `folder/dictionaries/NAME` holds the result as SAELens saves any SAE, `folder/checkpoints/NAME` the state of a run
    that was interrupted, by Ctrl-C (saved at once) or a kill (at most a minute lost, and the pass for a window that is
    streamed). A finished dictionary is loaded, an interrupted one goes on with the batches it has not seen, and ends
    with the same weights.

    Several processes share every step, see `distributed`, and end with the dictionary of a single one, up to rounding;
    an interrupted run may go on with another number of them. If one ends before, the others raise ConnectionError.
    Each has its own rows of a batch or, with `shard_features`, its own features, and their share of what weights,
    gradients, the optimizer and the code take in memory; the two can take turns.

    `tracking` says where metrics go meanwhile.
    `seed` fixes the initial weights and the order of the tokens; `metadata` goes into the SAE's metadata. At hook_z the
    dictionary is saved to take heads apart, and returned to take them concatenated.
    Raises ValueError for a width other than the activations', an architecture whose input cannot be standardized or
    that several processes cannot share, a folder that holds this name for another recipe or other activations, and a
    checkpoint that cannot be read.
    """
    check_widths(name, recipe.cfg, activations.widths)
    finished, checkpoints = folder / "dictionaries" / name, folder / "checkpoints" / name
    source = {
        "recipe": recipe.to_dict(),
        # An option that is off tells no training from those of before there was the option.
        "training": {name: value for name, value in asdict(settings).items() if value is not False},
        "seed": seed,
        "hooks": list(activations.widths),
        "activations": activations.identity,
        **({} if activations.order is None else {"order": activations.order}),
    }
    if not finished.exists():
        check_processes(name, recipe.cfg, shard_features)
        cfg = _at_hooks(recipe.cfg, activations, metadata or {})
        shards = shard_features and n_processes() > 1
        run = _Run(name, cfg, recipe, activations, settings, checkpoints, source, device, shards)
        with tracked(tracking, f"{name} at {activations.hook_name}", source, checkpoints) as tracked_run:
            run.finish(finished, tracked_run)
    report = _read_report(finished)
    check_same(report.source, source, finished)
    if is_first_at_home():
        shutil.rmtree(checkpoints, ignore_errors=True)  # also those that a kill after the end had left
    sae = load_dictionary(finished, device)
    sae.turn_off_forward_pass_hook_z_reshaping()
    return TrainedDictionary(sae, report.seconds, report.memory_gib, report.curve)


def check_widths(name: str, cfg: SAEConfig, widths: Mapping[str, int]) -> None:
    """Raises ValueError unless a dictionary fits the hooks that it reads and writes, given with their widths.

    An SAE has one hook, a transcoder two.
    """
    if hasattr(cfg, "d_out") != (len(widths) == 2):
        kind, hooks = ("a transcoder", "two hooks") if hasattr(cfg, "d_out") else ("no transcoder", "one hook")
        raise ValueError(f"{name} is {kind} and is trained on {hooks}, got {', '.join(widths)}")
    for field, (hook_name, width) in zip(("d_in", "d_out"), widths.items(), strict=False):
        if getattr(cfg, field) != width:
            configured = getattr(cfg, field)
            raise ValueError(f"{name} has {field} {configured}, but the activations at {hook_name} are {width} wide")


def can_share_steps(cfg: TrainingSAEConfig) -> bool:
    """Whether several processes can train such a dictionary together.

    They share what a BAE's loss needs of the whole batch; other architectures have statistics of their own.
    """
    return isinstance(cfg, TrainingBAEConfig)


def check_processes(name: str, cfg: TrainingSAEConfig, shard_features: bool = False) -> None:
    """Raises ValueError if there are several processes and they cannot share the steps of this training."""
    if n_processes() > 1 and not can_share_steps(cfg):
        raise ValueError(
            f"{n_processes()} processes cannot share the steps of {name}, a {cfg.architecture()} dictionary, but only "
            "those of a bae or a binary_transcoder; train it in one of them, as `distributed.work.share` does"
        )
    if shard_features and isinstance(cfg, TrainingBAEConfig):
        check_features_can_be_shared(name, cfg)


def _read_report(folder: Path) -> TrainingReport:
    path = folder / TRAINING_FILE
    return validated(TrainingReport, read_json(path), str(path))


def _at_hooks(cfg: TrainingSAEConfig, activations: Activations, metadata: dict[str, Any]) -> TrainingSAEConfig:
    """A copy that knows where it is trained."""
    cfg, hooks = deepcopy(cfg), dict(zip(("hook_name", "hook_name_out"), activations.widths, strict=False))
    for key, value in {**metadata, **hooks}.items():
        setattr(cfg.metadata, key, value)
    if len(hooks) == 1 and activations.hook_name.endswith("hook_z"):
        cfg.reshape_activations = "hook_z"
    return cfg


def trainer_of(
    sae: TrainingSAE[Any], lr: float, settings: TrainingSettings, device: str
) -> SAETrainer[TrainingSAE[Any], Any]:
    """SAELens' trainer, to be driven step by step."""
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=settings.steps * settings.batch_size,
            train_batch_size_samples=settings.batch_size,
            lr=lr,
            lr_end=lr,
            lr_decay_steps=round(settings.lr_decay * settings.steps),
            device=device,
            autocast=settings.autocast,
            dead_feature_window=max(1, min(1000, settings.steps // DEAD_WINDOW_SHARE)),
        ),
        sae,
        data_provider=iter(()),
    )
    for group in trainer.optimizer.param_groups:
        group["fused"] = True
    if settings.compile:
        check_compiler(device)
        torch.compiler.reset()  # what other trainings have compiled counts toward a limit
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    return trainer


def take_step(trainer: SAETrainer[Any, Any], batch: Tensor) -> TrainStepOutput:
    """A step on a batch of standardized activations, with sums of rows where a code is sparse."""
    on_cpu = trainer.sae.device.type == "cpu"
    with SparseProducts() if on_cpu and not is_binary(trainer.sae) else nullcontext():
        return trainer.step(batch)


class _Run:
    """One training, driving SAELens' `SAETrainer` through the seams it has for coordinators."""

    def __init__(
        self,
        name: str,
        cfg: TrainingSAEConfig,
        recipe: Recipe,
        activations: Activations,
        settings: TrainingSettings,
        checkpoints: Path,
        source: dict[str, Any],
        device: str,
        shards: bool,
    ) -> None:
        self.name, self.cfg, self.activations, self.settings = name, cfg, activations, settings
        self.checkpoints, self.source, self.shards = checkpoints, source, shards
        torch.manual_seed(source["seed"])
        sae = get_sae_training_class(cfg.architecture())[0](cfg)
        if recipe.start is not None:
            start_at(sae, recipe.start, activations.standardization)
        sae = (own_share(sae) if shards else sae).to(device)
        _check_foldable(sae, activations)
        self.trainer = trainer_of(sae, recipe.lr, settings, device)
        if shards:
            clip_gradients_together(sae, alike=("b_dec", "W_skip"))
        else:
            sum_gradients(sae)
        self.on_cpu = sae.device.type == "cpu"
        self.curve: list[dict[str, int | float]] = []
        self.seconds, self.memory_gib, self.saved_step = 0.0, 0.0, 0
        self._resume()

    def finish(self, folder: Path, tracked_run: TrackedRun) -> None:
        try:
            self._train(tracked_run)
        except ConnectionError as error:
            raise ConnectionError(
                f"the training of {self.name} stopped at step {self.trainer.n_training_steps}: {error}; the same "
                f"command, with any number of processes, goes on from step {self.saved_step}, where it was last saved"
            ) from error
        if (whole := self._whole()) is not None:
            self._save(whole, folder)
        barrier()
        if self.shards:
            bring_together(folder.parent)

    def _whole(self) -> SAETrainer[Any, Any] | None:
        """The trainer of all features, in the process that writes."""
        if self.shards:
            return gathered(self.trainer, self.cfg)
        return self.trainer if is_first_at_home() else None

    def _save(self, whole: SAETrainer[Any, Any], folder: Path) -> None:
        sae = whole.sae.to(dtype=torch.promote_types(whole.sae.dtype, torch.float32))
        self.activations.standardization.fold_into(sae)
        whole.set_final_sae_metadata()
        with written_whole(folder) as partial:
            sae.save_inference_model(partial)
            write_json(partial / TRAINING_FILE, self._report())

    def _train(self, tracked_run: TrackedRun) -> None:
        trainer, settings = self.trainer, self.settings
        where = (trainer.n_training_steps, trainer.cfg.device)
        batches = self.activations.shuffled(settings.batch_size, self.source["seed"], *where)
        saved = time.monotonic()
        progress = tqdm(
            total=settings.steps, initial=trainer.n_training_steps, unit="step", disable=not is_main_process()
        )
        progress.set_description(f"training {self.name} at {self.activations.hook_name}")
        if trainer.cfg.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(trainer.cfg.device)
        with progress, closing(batches), _interruption() as interrupted:
            while trainer.n_training_steps < settings.steps:
                self._step(next(batches), tracked_run)
                progress.update()
                stop, due = any_process(interrupted.is_set(), time.monotonic() - saved > CHECKPOINT_SECONDS)
                if stop or due:
                    self._check_loss()
                    if (whole := self._whole()) is not None:
                        save_checkpoint(whole, self.checkpoints, self._report())
                    barrier()
                    self.saved_step = trainer.n_training_steps
                    saved = time.monotonic()
                if stop:
                    raise KeyboardInterrupt

    def _step(self, batch: Tensor, tracked_run: TrackedRun) -> None:
        trainer, settings = self.trainer, self.settings
        start = time.perf_counter()
        tracked_run.before_step(trainer, self._counted)
        trainer.maybe_reset_sparsity()
        output = take_step(trainer, gather_rows(batch) if self.shards else batch)
        self.loss = output.loss.detach()
        charted = trainer.n_training_steps % math.ceil(settings.steps / CURVE_POINTS) == 0
        if self.on_cpu or charted or trainer.n_training_steps + 1 == settings.steps:
            self._check_loss()
        if charted:
            self.curve.append({"step": trainer.n_training_steps, **_scalars(output)})
            self.memory_gib = max(self.memory_gib, memory_gib(trainer.cfg.device))
        tracked_run.after_step(trainer, output, self._counted)
        trainer.n_training_steps += 1
        trainer.n_training_samples = trainer.n_training_steps * settings.batch_size  # of all processes
        self.seconds += time.perf_counter() - start

    def _counted(self) -> SAETrainer[Any, Any]:
        """A trainer that knows how often all features fired."""
        return with_all_counts(self.trainer) if self.shards else self.trainer

    def _check_loss(self) -> None:
        """Raises ValueError unless the last loss is finite, for which it waits for the device."""
        if not torch.isfinite(self.loss):
            raise ValueError(
                f"the loss of {self.name} at {self.activations.hook_name} is {self.loss.item()} at step "
                f"{self.trainer.n_training_steps}; lower its learning rate or its coefficients"
            )

    def _report(self) -> TrainingReport:
        return TrainingReport(self.source, self.seconds, self.memory_gib, self.curve)

    def _resume(self) -> None:
        last = last_checkpoint(self.checkpoints)
        if last is None:
            return
        report = _read_report(last)
        check_same(report.source, self.source, last)
        part = own_checkpoint(self.trainer, last) if self.shards else nullcontext(last)
        with reading(last), part as checkpoint:
            load_checkpoint(self.trainer, checkpoint)
        self.seconds, self.memory_gib, self.curve = report.seconds, report.memory_gib, report.curve
        self.saved_step = self.trainer.n_training_steps


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that a step is finished before its state is saved.

    Outside the main thread, where no signal arrives, it is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    handlers = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def memory_gib(device: str) -> float:
    """Memory of the process: the most that was allocated on a GPU since the last reset, or else resident now."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def _check_foldable(sae: TrainingSAE[Any], activations: Activations) -> None:
    try:
        activations.standardization.fold_into(deepcopy(sae))
    except NotImplementedError as error:
        architecture = sae.cfg.architecture()
        raise ValueError(f"a {architecture} dictionary cannot absorb the standardization of its input") from error


@torch.no_grad()
def _scalars(output: TrainStepOutput) -> dict[str, int | float]:
    l0 = (output.feature_acts != 0).sum() / len(output.feature_acts)
    metrics = {name: float(value() if callable(value) else value) for name, value in output.metrics.items()}
    return {"l0": l0.item(), "loss": output.loss.item(), **metrics} | {
        name: loss.item() for name, loss in output.losses.items()
    }
