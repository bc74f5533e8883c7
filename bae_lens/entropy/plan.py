"""What `entropy_dynamics` would take in disk and memory, from sizes alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bae_lens.activations.model_shape import ModelShape
from bae_lens.activations.position_cache import ROWS_AT_A_TIME, tokens_at_a_time
from bae_lens.activations.precision import STORED, Dtype
from bae_lens.entropy.dynamics import DynamicsSettings, training_memory
from bae_lens.entropy.estimate import RESAMPLINGS
from bae_lens.entropy.memory import CPU_BYTES, FLOAT, GPU_SHARE, LONG, TrainingMemory

INT = 4  # bytes of a token


@dataclass(frozen=True)
class Resources:
    """What there is, in bytes."""

    disk: int
    """Free."""
    memory: int
    """Of the device: a GPU's, or the host's."""
    on_gpu: bool
    """Whether the device is a GPU."""


@dataclass(frozen=True)
class StagePlan:
    """A part of the work."""

    name: str
    """As in `stages.json`."""
    work: str
    """How much of what."""
    disk: int
    """Bytes of the arrays that it writes."""
    host: int
    """Bytes of the host's memory at most, without what the system keeps of files."""
    device: int
    """Bytes of the GPU's memory at most; 0 without one."""


@dataclass(frozen=True)
class DynamicsPlan:
    """What a run takes, stage by stage."""

    stages: list[StagePlan]
    """In their order."""
    n_tokens: int
    """That go through the model, BOS included."""
    n_baes: int
    """That are trained."""
    steps: int
    """Of each BAE."""
    sets_at_a_time: int
    """Sets of activations, each with its BAEs, that are trained on together."""
    misfits: list[str]
    """What does not fit, and by what to shrink, in a sentence each."""

    @property
    def disk(self) -> int:
        """Bytes of all stages together."""
        return sum(stage.disk for stage in self.stages)

    @property
    def host(self) -> int:
        """Bytes of the stage that takes most of the host's memory."""
        return max(stage.host for stage in self.stages)

    @property
    def device(self) -> int:
        """Bytes of the stage that takes most of the GPU's memory."""
        return max(stage.device for stage in self.stages)


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
    usable = int(GPU_SHARE * resources.memory)
    beside = usable - shape.n_bytes
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
    plan = DynamicsPlan(stages, n_tokens, n_baes, settings.fit.steps, at_a_time, [])
    where = "the GPU" if resources.on_gpu else "the machine"
    if plan.disk > resources.disk:
        fewer = n_windows * resources.disk // plan.disk
        plan.misfits.append(
            f"{_gb(plan.disk)} of disk are needed and {_gb(resources.disk)} are free; ask for at most {fewer:,} "
            f"windows in place of {n_windows:,}, fewer layers or positions, or activations in 16 bits if they are in 32"
        )
    if running > beside:
        plan.misfits.append(
            f"running the model takes {_gb(shape.n_bytes + running)} of memory and {where} has {_gb(usable)} for it; "
            "choose a smaller model, or a lower position"
        )
    elif memory.n_bytes(1) > beside:
        fewer = _windows_that_fit(memory, beside) * n_windows // memory.n_vectors
        instead = f"at most {fewer:,} windows in place of {n_windows:,}, or for " if fewer else ""
        plan.misfits.append(
            f"training on one set of activations takes {_gb(memory.n_bytes(1))} of memory and {where} has "
            f"{_gb(beside)} beside the model; ask for {instead}fewer features or prices, or smaller batches"
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


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.3g} GB"
