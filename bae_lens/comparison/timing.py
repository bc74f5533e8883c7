"""How long the parts of a comparison take on this machine, from a few seconds of each on random activations."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import StandardSAE, StandardSAEConfig, TrainingSAE
from torch import Tensor

from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.cache_writer import cache_activations
from bae_lens.activations.contexts import Contexts
from bae_lens.activations.precision import Dtype
from bae_lens.activations.shallow_model import shallow_model
from bae_lens.evaluation.metrics import evaluate_dictionary
from bae_lens.evaluation.model_loss import LossMeter
from bae_lens.saes.loading import load_dictionary
from bae_lens.saes.saelens_compat import get_sae_training_class
from bae_lens.training.recipe import Recipe, TrainingSettings
from bae_lens.training.trainer import take_step, trainer_of

LAYERS = 2  # of the model that is timed
CONTEXTS = 16  # in a batch, as `cache_activations` takes them
WARM_UP, STEPS = 2, 7
TIMED_ROWS = 128
PREDICTED_CONTEXTS = 8


@dataclass(frozen=True)
class PassTiming:
    """Of a language model, in seconds for each token."""

    layer: float
    """In one layer, with a share of what it takes to bring activations to the disk."""
    prediction: float
    """From the last layer to a loss."""


@dataclass(frozen=True)
class DictionaryTiming:
    """Of a dictionary, in seconds."""

    step: float
    """An optimizer step."""
    measured_token: float
    """Measuring it on a token, without every help."""


def time_pass(
    config: Any, n_hooks: int, context_size: int, folder: Path, device: str, dtype: Dtype, cache_dtype: Dtype
) -> PassTiming:
    """Of a pass whose activations at some hooks, three at most, go to disk, in `folder`.

    Raises ValueError as `shallow_model`.
    """
    model = shallow_model(config, LAYERS, context_size, device, dtype)
    hooks = [f"blocks.{LAYERS - 1}.{kind}" for kind in ("hook_resid_post", "hook_resid_mid", "hook_resid_pre")]
    vocabulary = config.get_text_config().vocab_size

    def cached(n_contexts: int, part: Path) -> CachedActivations:
        tokens = torch.randint(vocabulary, (n_contexts, context_size))
        contexts = Contexts(tokens, torch.arange(n_contexts))
        return cache_activations(model, contexts, hooks[:n_hooks], part, dtype=cache_dtype)[hooks[0]]

    with tempfile.TemporaryDirectory(dir=folder) as parts:
        activations = cached(CONTEXTS, Path(parts, "warm-up"))
        once = _timed(lambda: cached(CONTEXTS, Path(parts, "once")))
        thrice = _timed(lambda: cached(3 * CONTEXTS, Path(parts, "thrice")))
        meter = LossMeter(model, activations, PREDICTED_CONTEXTS)
        narrow = StandardSAE(StandardSAEConfig(d_in=activations.d_in, d_sae=1)).to(device)
        narrow.cfg.metadata.hook_name = hooks[0]
        predictions = _timed(lambda: meter({"narrow": narrow}))
    layer = max(0.0, thrice - once) / (2 * CONTEXTS * context_size * LAYERS)
    # As the model is, with zeros, and with the dictionary, the last two from the last layer on.
    passes, layers = 3, LAYERS + 2
    return PassTiming(layer, max(0.0, predictions / meter.tokens.numel() - layers * layer) / passes)


def time_dictionary(recipe: Recipe, settings: TrainingSettings, l0: float | None, device: str) -> DictionaryTiming:
    """Of a new dictionary of whose features about `l0` fire and an eighth are dead, as they are after some training."""
    cfg: Any = recipe.cfg
    if hasattr(cfg, "entropy_start_step"):
        cfg = replace(cfg, entropy_start_step=0)
    torch.manual_seed(0)
    sae = get_sae_training_class(cfg.architecture())[0](cfg).to(device)
    x = torch.randn(settings.batch_size, cfg.d_in + getattr(cfg, "d_out", 0), device=device)
    _let_fire(sae, x[:, : cfg.d_in], l0)
    trainer = trainer_of(sae, recipe.lr, settings, device)

    def step() -> None:
        trainer.n_forward_passes_since_fired[::8] = trainer.cfg.dead_feature_window + 1  # Top-k revives them
        take_step(trainer, x).loss.item()
        trainer.n_training_steps += 1

    for _ in range(WARM_UP):
        step()
    seconds = statistics.median(_timed(step) for _ in range(STEPS))
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        finished = load_dictionary(Path(folder), device)
    x = torch.randn(4 * TIMED_ROWS, x.shape[1])

    def measure(n: int) -> float:
        sides = (side[:n] for side in x.split([cfg.d_in, x.shape[1] - cfg.d_in], dim=1) if side.shape[1])
        return _timed(lambda: evaluate_dictionary(finished, *sides, optimize=False))

    measure(TIMED_ROWS)
    once, all_rows = measure(TIMED_ROWS), measure(len(x))
    return DictionaryTiming(seconds, max(0.0, all_rows - once) / (len(x) - TIMED_ROWS))


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
