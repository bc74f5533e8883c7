"""What `entropy_dynamics` would take in disk and memory, and how many models fit in memory together."""

from collections.abc import Sequence
from dataclasses import dataclass

from bae_lens.activations.model_shape import ModelShape
from bae_lens.activations.position_cache import ROWS_AT_A_TIME, STORED, StatesDtype, tokens_at_a_time
from bae_lens.entropy.estimate import ROWS
from bae_lens.entropy.fit import ENCODED_AT_A_TIME, FitSettings
from bae_lens.functional.covariance import TILE

FLOAT, LONG, INT = 4, 8, 4  # bytes
# Of every weight of a BAE: itself, its gradient, two moments of the optimizer, and the finished copy.
COPIES_OF_A_WEIGHT = 5
# Of a batch's vectors, and of its codes, in the forward and backward pass of a step.
COPIES_OF_A_BATCH, COPIES_OF_A_CODE = 6, 8
SPARE = 0.9  # of a GPU's memory is counted on; the rest is the driver's and lost between blocks


@dataclass(frozen=True)
class Training:
    """The sizes that the memory of training depends on."""

    n_vectors: int
    """In each set."""
    d_in: int
    d_sae: int
    n_prices: int
    """BAEs trained on each set."""
    fit: FitSettings
    copies: int
    """Of each set of vectors that memory holds: 1, or 2 if some are held out."""

    def n_bytes(self, n_sets: int) -> int:
        """Memory that so many sets of vectors and the BAEs trained on them take together, at most."""
        n_models = n_sets * self.n_prices
        vectors = FLOAT * self.n_vectors * self.d_in
        weights = COPIES_OF_A_WEIGHT * FLOAT * (2 * self.d_in * self.d_sae + self.d_in + self.d_sae)
        batch = FLOAT * self.fit.batch_size * (COPIES_OF_A_BATCH * self.d_in + COPIES_OF_A_CODE * self.d_sae)
        order = LONG * self.fit.steps * self.fit.batch_size
        one_at_a_time = max(
            3 * vectors,  # centered, and in float64, for their scale
            FLOAT * ENCODED_AT_A_TIME * (self.d_in + 3 * self.d_sae),  # for their rates
            LONG * ROWS * (4 * self.d_in + 6 * self.d_sae),  # measured in float64
            4 * FLOAT * TILE**2,  # of the covariance
        )
        return n_sets * self.copies * vectors + n_models * (weights + batch) + order + one_at_a_time

    def sets_at_a_time(self, n_bytes: int) -> int:
        """How many sets of vectors fit with their BAEs; 0 if not even one does."""
        first, second = self.n_bytes(1), self.n_bytes(2)
        return 0 if first > n_bytes else 1 + (n_bytes - first) // (second - first)


@dataclass(frozen=True)
class Stage:
    """A part of the work."""

    name: str
    work: str
    """How much of what."""
    disk: int
    """Bytes that it writes, of arrays."""
    host: int
    """Bytes of the host's memory at most, without what the system keeps of files."""
    device: int
    """Bytes of the GPU's memory at most; 0 without one."""


@dataclass(frozen=True)
class Resources:
    """What there is, in bytes."""

    disk: int
    memory: int
    """Of the device: a GPU's, or the host's."""
    on_gpu: bool


@dataclass(frozen=True)
class DynamicsPlan:
    """What a run takes, stage by stage."""

    stages: list[Stage]
    n_tokens: int
    """That go through the model, BOS included."""
    n_baes: int
    steps: int
    """Of each BAE."""
    sets_at_a_time: int
    """Hooks and positions whose BAEs are trained together."""
    misfits: list[str]
    """What does not fit, and what to shrink, in a sentence each."""

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
    training: Training,
    dtype: StatesDtype,
    resources: Resources,
) -> DynamicsPlan:
    """Of windows of `length` tokens after BOS, looked at behind some layers.

    `training` has the windows as its vectors. Disk and tokens are exact for a tokenizer with BOS; memory is an upper
    bound of what tensors take, to which Python and its libraries add about a gigabyte on the host.
    """
    n, n_hooks = training.n_vectors, len(layers)
    n_tokens = n * (length + 1)
    n_sets, n_baes = n_hooks * n_positions, n_hooks * n_positions * training.n_prices
    windows = INT * n_tokens + LONG * n
    norms, checksums = FLOAT * n_sets * n, LONG * n_sets * n
    states = STORED[dtype]().itemsize * n_sets * n * shape.d_model
    running = _running_bytes(shape, n_hooks, length + 1, "cuda" if resources.on_gpu else "cpu")
    free = int(SPARE * resources.memory) - shape.n_bytes
    at_a_time = min(n_sets, training.sets_at_a_time(free))
    trained = training.n_bytes(max(1, at_a_time))
    reading = 3 * FLOAT * ROWS_AT_A_TIME * shape.d_model + norms
    device = int(resources.on_gpu)
    stages = [
        Stage("windows", f"{n:,} of {length + 1:,} tokens", windows, 2 * windows, 0),
        Stage("model", f"{shape.n_parameters:,} parameters", 0, 2 * shape.n_bytes, device * shape.n_bytes),
        Stage(
            "activations",
            f"{n_tokens:,} tokens through {max(layers) + 1} layers",
            states + norms + checksums + LONG * n,
            windows + norms + (1 - device) * (shape.n_bytes + running),
            device * (shape.n_bytes + running),
        ),
        Stage(
            "entropies",
            f"{n_baes:,} BAEs of {training.fit.steps:,} steps, {max(1, at_a_time) * training.n_prices:,} at a time",
            0,
            windows + reading + (1 - device) * (shape.n_bytes + trained),
            device * (shape.n_bytes + trained),
        ),
    ]
    plan = DynamicsPlan(stages, n_tokens, n_baes, training.fit.steps, at_a_time, [])
    plan.misfits.extend(_misfits(plan, training, resources, shape.n_bytes + running))
    return plan


def _running_bytes(shape: ModelShape, n_hooks: int, length: int, device: str) -> int:
    """What a batch of windows takes inside the model: what the hooks keep, one layer's attention, one layer's MLP."""
    windows = max(1, tokens_at_a_time(device) // length)
    tokens = windows * length
    attention = 4 * shape.n_heads * windows * length**2
    return FLOAT * (tokens * ((n_hooks + 12) * shape.d_model + 4 * shape.d_mlp) + attention)


def _misfits(plan: DynamicsPlan, training: Training, resources: Resources, running: int) -> list[str]:
    found = []
    n = training.n_vectors
    if plan.disk > resources.disk:
        fewer = n * resources.disk // plan.disk
        found.append(
            f"{_gb(plan.disk)} of disk are needed and {_gb(resources.disk)} are free: ask for at most {fewer:,} "
            f"windows in place of {n:,}, fewer layers or positions, or activations in 16 bits if they are in 32"
        )
    memory = int(SPARE * resources.memory)
    kind = "the GPU" if resources.on_gpu else "the machine"
    if running > memory:
        found.append(
            f"running the model takes {_gb(running)} of memory and {kind} has {_gb(memory)} for it: choose a smaller "
            "model, or a lower position"
        )
    elif plan.sets_at_a_time == 0:
        beside = memory - (plan.stages[1].device or plan.stages[1].host // 2)
        per_vector = (training.copies + 1) * FLOAT * training.d_in
        excess = training.n_bytes(1) - beside
        fewer = max(0, n - -(-excess // per_vector))
        found.append(
            f"training a BAE takes {_gb(training.n_bytes(1))} of memory and {kind} has {_gb(beside)} beside the model: "
            + (f"ask for at most {fewer:,} windows in place of {n:,}, or for" if fewer else "ask for")
            + " fewer features or prices"
        )
    return found


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.3g} GB"
