"""How long the parts of a comparison take on this machine, from a few seconds of each on random activations."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE
from torch import Tensor

from bae_lens.activations.cache import cache_activations
from bae_lens.activations.contexts import Contexts
from bae_lens.activations.precision import Dtype
from bae_lens.activations.shallow_model import VOCABULARY, shallow_model
from bae_lens.evaluation.metrics import evaluate_dictionary
from bae_lens.saes.loading import load_dictionary
from bae_lens.saes.saelens_compat import get_sae_training_class
from bae_lens.training.recipe import Recipe, TrainingSettings
from bae_lens.training.trainer import take_step, trainer_of

LAYERS = 2  # of the model that is timed
CONTEXTS = 16  # in a batch, as `cache_activations` takes them
WARM_UP, STEPS = 2, 7
MEASURED_ROWS = 128


@dataclass(frozen=True)
class Timing:
    """Of a dictionary, in seconds."""

    step: float
    """An optimizer step."""
    measured_token: float
    """Measuring it on a token, without every help."""


def seconds_per_layer_and_token(
    config: Any, n_hooks: int, context_size: int, folder: Path, device: str, dtype: Dtype, cache_dtype: Dtype
) -> float:
    """Of a pass whose activations at some hooks go to disk, in `folder`. Raises ValueError as `shallow_model`."""
    model = shallow_model(config, LAYERS, context_size, device, dtype)
    kinds = ("hook_resid_post", "hook_resid_mid", "hook_resid_pre")[:n_hooks]
    hooks = [f"blocks.{LAYERS - 1}.{kind}" for kind in kinds]

    def of(n_contexts: int) -> float:
        tokens = torch.randint(VOCABULARY, (n_contexts, context_size))
        with tempfile.TemporaryDirectory(dir=folder) as part:
            start = time.perf_counter()
            cache_activations(model, Contexts(tokens, torch.arange(n_contexts)), hooks, Path(part), dtype=cache_dtype)
            return time.perf_counter() - start

    of(CONTEXTS)
    once, thrice = of(CONTEXTS), of(3 * CONTEXTS)
    return (thrice - once) / (2 * CONTEXTS * context_size * LAYERS)


def time_dictionary(recipe: Recipe, settings: TrainingSettings, l0: float | None, device: str) -> Timing:
    """Of a new dictionary whose biases are moved until about `l0` features fire, as they do after some training."""
    cfg: Any = recipe.cfg
    if hasattr(cfg, "entropy_start_step"):
        cfg = replace(cfg, entropy_start_step=0)
    torch.manual_seed(0)
    sae = get_sae_training_class(cfg.architecture())[0](cfg).to(device)
    x = torch.randn(settings.batch_size, cfg.d_in + getattr(cfg, "d_out", 0), device=device)
    _let_fire(sae, x[:, : cfg.d_in], l0)
    trainer = trainer_of(sae, recipe.lr, settings, device)

    def step() -> None:
        take_step(trainer, x).loss.item()
        trainer.n_training_steps += 1

    for _ in range(WARM_UP):
        step()
    seconds = statistics.median(_timed(step) for _ in range(STEPS))
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        finished = load_dictionary(Path(folder), device)
    x = torch.randn(4 * MEASURED_ROWS, x.shape[1])

    def measure(n: int) -> float:
        sides = (side[:n] for side in x.split([cfg.d_in, x.shape[1] - cfg.d_in], dim=1) if side.shape[1])
        return _timed(lambda: evaluate_dictionary(finished, *sides, optimize=False))

    measure(MEASURED_ROWS)
    once, all_rows = measure(MEASURED_ROWS), measure(len(x))
    return Timing(seconds, max(0.0, all_rows - once) / (len(x) - MEASURED_ROWS))


@torch.no_grad()
def _let_fire(sae: TrainingSAE[Any], x: Tensor, l0: float | None) -> None:
    """Of an architecture whose features have thresholds of their own, so many for a row in the mean."""
    bias: Any = getattr(sae, "b_gate", getattr(sae, "b_enc", None))
    if l0 is None or bias is None or hasattr(sae.cfg, "k"):
        return
    hidden_pre = (x[:64] @ sae.W_enc.to(x) + bias.to(x)).flatten()
    fire = max(1, min(len(hidden_pre) - 1, round(len(hidden_pre) * l0 / sae.cfg.d_sae)))
    bias.sub_(hidden_pre.topk(fire).values[-1].to(bias) - getattr(sae, "threshold", 0))


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
