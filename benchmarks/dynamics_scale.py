"""Is the plan of `bae-lens dynamics` true, and how fast is what it plans? For the paper's setting, with random weights.

    python benchmarks/dynamics_scale.py --output runs/scale                  # on a GPU, the paper's setting
    python benchmarks/dynamics_scale.py --output runs/scale --model smollm2 --device cpu --windows 60 --length 64 \
        --positions 7 --vectors 4096 --steps 8

The pass runs over windows of random tokens, one at a time and in batches, in turns; BAEs are trained on random vectors
for a few steps, as many together as the plan says. Memory is the peak of tensors on a GPU, and of the process on a CPU.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from machine import machine
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig

from bae_lens import Windows, load_demo_model
from bae_lens.activations.model_shape import model_shape
from bae_lens.activations.position_cache import collect
from bae_lens.cli.device import DEFAULT_DEVICE
from bae_lens.entropy.dynamics import training_memory
from bae_lens.entropy.fit import fit_curves
from bae_lens.entropy.memory import bytes_for_training
from bae_lens.entropy.plan import plan_dynamics
from bae_lens.entropy.presets import paper_settings
from bae_lens.planning import Resources
from bae_lens.storage import write_json

PAPER_MODEL = Path(__file__).parent / "paper" / "llama_3.2_1b.json"
TURNS = 3


@dataclass(frozen=True)
class Scale:
    """The pass and the training, measured beside their plan."""

    output: Path
    model: str = str(PAPER_MODEL)
    """A Llama's config.json, whose weights are random, or smollm2."""
    windows: int = 96
    """For the pass."""
    length: int = 1024
    positions: int = 11
    vectors: int = 262_144
    """In each set that BAEs are trained on."""
    steps: int = 50
    sets: int | None = None
    """Trained on together; by default as many as fit."""
    device: str = DEFAULT_DEVICE
    results: Path = field(default=Path(__file__).parent / "results" / "dynamics_scale.json")

    def run(self) -> None:
        shape = model_shape(self.model)
        model = load_demo_model(self.device) if self.model == "smollm2" else _random_model(self.model, self.device)
        found: dict[str, Any] = {**machine(), "device": _device_name(self.device)}
        found["pass"] = self._pass(model, shape)
        print(json.dumps(found["pass"]), flush=True)
        del model
        torch.cuda.empty_cache()
        found["training"] = self._training(shape.d_model)
        print(json.dumps(found["training"]), flush=True)
        write_json(self.results, found, indent=1)

    def _pass(self, model: Any, shape: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        sizes = (self.windows, self.length + 1)
        tokens = torch.randint(10, 10_000, sizes, generator=generator, dtype=torch.int32)
        windows = Windows(tokens, torch.arange(self.windows), starts_with_bos=True)
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(shape.n_layers)]
        positions = [2**i for i in range(self.positions)]
        seconds: dict[str, list[float]] = {"one at a time": [], "batches": []}
        peak = 0
        for _ in range(TURNS):
            for name, batch_size in (("one at a time", 1), ("batches", None)):
                folder = self.output / name.replace(" ", "_")
                shutil.rmtree(folder, ignore_errors=True)
                once = partial(collect, model, windows, hooks, positions, folder, batch_size)
                taken, memory = _timed(once, self.device)
                seconds[name].append(taken)
                peak = max(peak, memory) if batch_size is None else peak
        settings = paper_settings(shape.d_model, self.windows)
        room = Resources(10**13, 10**13, on_gpu=self.device.startswith("cuda"))
        plan = plan_dynamics(
            shape, range(shape.n_layers), self.positions, self.length, self.windows, settings, "float32", room
        )
        stage = plan.stages[2]
        return {
            "tokens_per_second": {name: tokens.numel() / median(taken) for name, taken in seconds.items()},
            "seconds": seconds,
            "peak_gb": peak / 1e9,
            "planned_gb": (stage.device or stage.host) / 1e9,
        }

    def _training(self, d_in: int) -> dict[str, Any]:
        settings = paper_settings(d_in, self.vectors)
        memory = training_memory(self.vectors, 1, d_in, settings)
        device = torch.device(self.device)
        n_sets = self.sets or max(1, memory.sets_at_a_time(bytes_for_training(device)))
        fit = replace(settings.fit, steps=self.steps)

        def train() -> None:
            vectors = torch.randn(n_sets, self.vectors, d_in, device=device)
            fit_curves(vectors, settings.d_sae, 0, settings.entropy_coefficients, fit)

        short = replace(fit, steps=1)
        _timed(
            lambda: fit_curves(torch.randn(1, 1024, d_in, device=device), settings.d_sae, 0, (0.1,), short), self.device
        )
        first, _ = _timed(train, self.device)
        fit = replace(fit, steps=2 * self.steps)
        second, peak = _timed(train, self.device)
        return {
            "sets_at_a_time": n_sets,
            "milliseconds_per_step_and_bae": 1e3 * (second - first) / self.steps / n_sets,
            "peak_gb": peak / 1e9,
            "planned_gb": memory.n_bytes(n_sets) / 1e9,
        }


def _random_model(path: str, device: str) -> HookedSAETransformer:
    config = json.loads(Path(path).read_text())
    cfg = HookedTransformerConfig(
        n_layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        n_ctx=2048,
        d_head=config["head_dim"],
        n_heads=config["num_attention_heads"],
        n_key_value_heads=config["num_key_value_heads"],
        d_mlp=config["intermediate_size"],
        d_vocab=config["vocab_size"],
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=config["head_dim"],
        final_rms=True,
        seed=0,
        device=device,
    )
    return HookedSAETransformer(cfg)


def _timed(work: Callable[[], Any], device: str) -> tuple[float, int]:
    """Seconds, and the peak of memory in bytes."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return seconds, torch.cuda.max_memory_allocated() if on_gpu else int(status["VmHWM"].split()[0]) * 1024


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


if __name__ == "__main__":
    tyro.cli(Scale).run()
