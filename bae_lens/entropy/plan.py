"""What `entropy_dynamics` would take in disk and memory, from sizes alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bae_lens.activations.model_shape import ModelShape
from bae_lens.activations.position_cache import ROWS_AT_A_TIME, tokens_at_a_time
from bae_lens.activations.precision import STORED, Dtype
from bae_lens.entropy.dynamics import DynamicsSettings, training_memory
from bae_lens.entropy.estimate import RESAMPLINGS
from bae_lens.entropy.memory import CPU_BYTES, TrainingMemory
from bae_lens.planning import FLOAT, INT, LONG, Plan, Resources, StagePlan, gb


@dataclass(frozen=True)
class DynamicsPlan(Plan):
    """What the entropies of a model take, stage by stage."""

    n_tokens: int
    """That go through the model, BOS included."""
    n_baes: int
    """That are trained."""
    steps: int
    """Of each BAE."""
    sets_at_a_time: int
    """Sets of activations, each with its BAEs, that are trained on together."""


def plan_dynamics(
    shape: ModelShape,
    layers: Sequence[int],
    n_positions: int,
    length: int,
    n_windows: int,
    settings: DynamicsSettings,
    dtype: Dtype,
    resources: Resources,
) -> DynamicsPlan:
    """Of windows of `length` tokens after BOS, looked at behind some layers, at as many positions as `n_positions`.

    Disk and tokens are exact for a tokenizer with BOS, whose windows have no outliers; memory is an upper bound of what
    tensors take, to which Python and its libraries add about a gigabyte on the host.
    """
    memory = training_memory(n_windows, n_positions, shape.d_model, settings)
    states = len(layers) * n_positions * n_windows
    n_tokens, n_sets = n_windows * (length + 1), states // memory.n_vectors
    n_baes = n_sets * memory.n_prices
    windows, norms = INT * n_tokens + LONG * n_windows, FLOAT * states
    running = _running_bytes(shape, len(layers), length + 1, "cuda" if resources.on_gpu else "cpu")
    beside = resources.usable - shape.n_bytes
    at_a_time = min(n_sets, max(1, memory.sets_at_a_time(beside if resources.on_gpu else min(beside, CPU_BYTES))))
    trained = memory.n_bytes(at_a_time)
    reading = norms + 3 * FLOAT * ROWS_AT_A_TIME * shape.d_model

    def stage(name: str, work: str, disk: int, on_host: int, with_model: int) -> StagePlan:
        on_device = shape.n_bytes + with_model
        return StagePlan(name, work, disk, *((on_host, on_device) if resources.on_gpu else (on_host + on_device, 0)))

    stages = [
        stage("model", f"{shape.n_parameters:,} parameters", 0, shape.n_bytes, 0),
        stage("windows", f"{n_windows:,} of {length + 1:,} tokens", windows, 2 * windows, 0),
        stage(
            "activations",
            f"{n_tokens:,} tokens through {max(layers) + 1} layers",
            STORED[dtype]().itemsize * states * shape.d_model + norms + LONG * states + LONG * n_windows,
            windows + norms,
            running,
        ),
        stage(
            "entropies",
            f"{n_baes:,} BAEs of {settings.fit.steps:,} steps, {at_a_time * memory.n_prices:,} at a time",
            0,
            windows + reading + 2 * FLOAT * RESAMPLINGS * n_windows,
            trained,
        ),
    ]
    plan = DynamicsPlan(stages, [], n_tokens, n_baes, settings.fit.steps, at_a_time)
    if plan.disk > resources.disk:
        fewer = n_windows * resources.disk // plan.disk
        plan.misfits.append(
            f"{gb(plan.disk)} of disk are needed and {gb(resources.disk)} are free; ask for at most {fewer:,} "
            f"windows in place of {n_windows:,}, fewer layers or positions, or activations in 16 bits if they are in 32"
        )
    if running > beside:
        plan.misfits.append(
            f"running the model takes {gb(shape.n_bytes + running)} of memory and {resources.where} has "
            f"{gb(resources.usable)} for it; choose a smaller model, or a lower position"
        )
    elif memory.n_bytes(1) > beside:
        fewer = _windows_that_fit(memory, beside) * n_windows // memory.n_vectors
        instead = f"at most {fewer:,} windows in place of {n_windows:,}, or for " if fewer else ""
        plan.misfits.append(
            f"training on one set of activations takes {gb(memory.n_bytes(1))} of memory and {resources.where} has "
            f"{gb(beside)} beside the model; ask for {instead}fewer features or prices, or smaller batches"
        )
    return plan


def _running_bytes(shape: ModelShape, n_hooks: int, length: int, device: str) -> int:
    """What a batch of windows takes inside the model: what the hooks keep, a layer's attention, and a layer's MLP."""
    windows = max(1, tokens_at_a_time(device) // length)
    attention = 4 * shape.n_heads * windows * length**2
    return FLOAT * (windows * length * ((n_hooks + 12) * shape.d_model + 4 * shape.d_mlp) + attention)


def _windows_that_fit(memory: TrainingMemory, n_bytes: int) -> int:
    """The largest number of vectors with which a single set and its BAEs fit."""
    low, high = 0, memory.n_vectors
    while low < high:
        middle = (low + high + 1) // 2
        fits = replace(memory, n_vectors=middle).n_bytes(1) <= n_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
