"""What `compare` would take in disk, memory and time, from sizes and from what a few steps took."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from bae_lens.activations.forward import stop_layer
from bae_lens.activations.model_shape import ModelShape
from bae_lens.activations.precision import STORED, torch_dtype
from bae_lens.comparison.baselines import BASELINE_ROWS, RANDOM_ROWS, ROWS_PER_FEATURE
from bae_lens.comparison.experiment import Contender, Experiment, needed_hooks
from bae_lens.comparison.timing import CONTEXTS, DictionaryTiming, PassTiming
from bae_lens.entropy.memory import COPIES_OF_A_BATCH, COPIES_OF_A_CODE, COPIES_OF_A_WEIGHT
from bae_lens.functional.optimized_code import LARGEST_COUPLINGS
from bae_lens.functional.rate_distortion import RANDOM_L0
from bae_lens.planning import FLOAT, LONG, Plan, Resources, StagePlan, gb
from bae_lens.saes.transcoder import output_width

CHECKPOINTS = 2  # on the disk at a time, one of which is being written
COPIES_IN_A_CHECKPOINT = 3  # of every weight: itself and two moments of the optimizer
BATCHES_FOR_A_GPU = 6  # ready on the host, one of which is being gathered and one copied
MEASURED_ROWS = 2048  # at a time
CODES_MEASURED = 6  # of these rows at a time
COPIES_FOR_BASELINES = 5  # of activations for PCA, as numbers of 4 bytes


@dataclass(frozen=True)
class Timings:
    """What was timed; see `timing`."""

    model: PassTiming | None
    """None if it could not be timed."""
    dictionaries: Mapping[str, Mapping[str, DictionaryTiming]]
    """By hook of the comparison and name."""


@dataclass(frozen=True)
class _Size:
    """Of a dictionary and its training."""

    d_in: int
    d_out: int
    d_sae: int
    batch_size: int

    @classmethod
    def of(cls, cfg: Any, batch_size: int) -> "_Size":
        return cls(cfg.d_in, output_width(cfg), cfg.d_sae, batch_size)

    @property
    def weights(self) -> int:
        """Bytes of its file."""
        return FLOAT * (self.d_sae * (self.d_in + self.d_out + 2) + self.d_out)

    @property
    def training(self) -> int:
        """Bytes of memory in a step, at most."""
        vectors = COPIES_OF_A_BATCH * (self.d_in + self.d_out)
        return COPIES_OF_A_WEIGHT * self.weights + FLOAT * self.batch_size * (vectors + COPIES_OF_A_CODE * self.d_sae)

    def features_that_fit(self, n_bytes: int) -> int:
        """The largest `d_sae` with which a step takes so many bytes."""
        one, two = (_Size(self.d_in, self.d_out, d_sae, self.batch_size).training for d_sae in (1, 2))
        return max(0, 1 + (n_bytes - one) // (two - one))


def plan_comparison(
    shape: ModelShape,
    experiment: Experiment,
    contenders: Mapping[str, Mapping[str, Contender]],
    resources: Resources,
    model_beside: bool = True,
    timings: Timings | None = None,
) -> Plan:
    """Of comparisons by hook whose documents are as long as their contexts, by a tokenizer with BOS.

    `model_beside` says whether the model runs where dictionaries are trained. Memory is an upper bound of what tensors
    take, to which Python and its libraries add about a gigabyte on the host. Time is that of one process, without what
    is not timed: choosing contexts, measuring with every help, dashboards and the report. What is done at every hook
    is one stage, of all hooks together.
    """
    contexts, hooks = experiment.contexts, needed_hooks(contenders)
    widths = [shape.width_at(hook) for hook in sorted(hooks)]
    tuned = any(len(contender.trials) > 1 for made in contenders.values() for contender in made.values())
    tokens = [contexts.cached_tokens, contexts.held_out_tokens, *([contexts.tuning_tokens] if tuned else [])]
    n_contexts = sum(-(-n // (contexts.context_size - 1)) for n in tokens)
    rows = n_contexts * contexts.context_size
    chosen = LONG * (rows + n_contexts)
    cached = len(widths) * LONG + contexts.context_size * (
        STORED[experiment.cache_dtype]().itemsize * sum(widths) + FLOAT * len(widths)
    )  # of a context
    n_layers = stop_layer(hooks) or shape.n_layers
    model = shape.n_parameters * torch_dtype(experiment.model_dtype).itemsize
    running = _running_bytes(shape, experiment, len(widths))
    of_model = timings and timings.model

    def stage(name: str, work: str, disk: int, on_host: int, on_device: int, seconds: float | None = None) -> StagePlan:
        placed = (on_host + model, on_device) if not model_beside else (on_host, on_device + model)
        host, device = placed if resources.on_gpu else (sum(placed), 0)
        return StagePlan(name, work, disk, host, device, seconds)

    sizes = {hook: _sizes(made, experiment) for hook, made in contenders.items()}
    largest = max(((hook, name) for hook in sizes for name in sizes[hook]), key=lambda at: sizes[at[0]][at[1]].weights)
    at_hooks = [
        _stages_at(hook, made, sizes[hook], largest, shape, experiment, stage, chosen, resources, timings)
        for hook, made in contenders.items()
    ]
    stages = [
        stage("load model and text", f"{shape.n_parameters:,} parameters", 0, model if model_beside else 0, 0),
        stage("choose contexts", f"{n_contexts:,} of {contexts.context_size:,} tokens", chosen, 2 * chosen, 0),
        stage(
            "activations",
            f"{rows:,} tokens through {n_layers} layers",
            n_contexts * cached + chosen,
            chosen + 2 * FLOAT * CONTEXTS * contexts.context_size * sum(widths),
            running if model_beside else 0,
            of_model and of_model.layer * rows * n_layers,
        ),
        *_together(at_hooks),
    ]
    beside = resources.usable - (model if model_beside or not resources.on_gpu else 0)
    misfits = [
        *_disk_misfits(sum(stage.disk for stage in stages), cached + 2 * chosen // n_contexts, experiment, resources),
        *(_model_misfits(model, running, experiment, resources) if model_beside or not resources.on_gpu else []),
        *(misfit for at_hook in sizes.values() for misfit in _training_misfits(at_hook, beside, resources)),
    ]
    return Plan(stages, list(dict.fromkeys(misfits)))


def _sizes(contenders: Mapping[str, Contender], experiment: Experiment) -> dict[str, _Size]:
    batch_size = experiment.training.batch_size
    return {name: _Size.of(contender.trials[0].cfg, batch_size) for name, contender in contenders.items()}


def _stages_at(
    hook: str,
    contenders: Mapping[str, Contender],
    sizes: Mapping[str, _Size],
    largest: tuple[str, str],
    shape: ModelShape,
    experiment: Experiment,
    stage: Callable[..., StagePlan],
    chosen: int,
    resources: Resources,
    timings: Timings | None,
) -> list[StagePlan]:
    """What is done at a hook once activations are there; `chosen` are the bytes of contexts.

    Checkpoints are there of one dictionary at a time, and counted for the `largest`, given by hook and name.
    """
    contexts, training = experiment.contexts, experiment.training
    width = max(max(size.d_in, size.d_out) for size in sizes.values())
    widest = max(size.d_sae for size in sizes.values())
    held_out = FLOAT * contexts.held_out_tokens * 2 * max(width, shape.width_at(hook))
    of_model = timings and timings.model
    stages, finished = [], 0
    for name, contender in contenders.items():
        size, timing = sizes[name], timings and timings.dictionaries[hook][name]
        tried, n_seeds = len(contender.trials), len(experiment.seeds)
        trained = n_seeds if tried == 1 else tried + n_seeds - 1
        checkpoint = COPIES_IN_A_CHECKPOINT * size.weights
        batches = BATCHES_FOR_A_GPU * FLOAT * training.batch_size * (size.d_in + size.d_out)
        stages.append(
            stage(
                f"train {name}",
                f"{trained} x {training.steps:,} steps of {training.batch_size:,}, {size.d_sae:,} features",
                size.weights * (trained + (tried > 1)) + CHECKPOINTS * checkpoint * ((hook, name) == largest),
                chosen + (batches + checkpoint if resources.on_gpu else 0),
                finished + size.training,
                timing and timing.step * training.steps * trained,
            )
        )
        finished += n_seeds * size.weights
        measured = contexts.held_out_tokens * n_seeds + (contexts.tuning_tokens * tried if tried > 1 else 0)
        couplings = FLOAT * min(size.d_sae**2, LARGEST_COUPLINGS) if experiment.every_help else 0
        stages.append(
            stage(
                f"measure {name}",
                f"{measured:,} tokens{', with every help' if experiment.every_help else ''}",
                0,
                held_out,
                finished + CODES_MEASURED * FLOAT * MEASURED_ROWS * size.d_sae + couplings,
                timing and (None if experiment.every_help else timing.measured_token * measured),
            )
        )
    known = min(BASELINE_ROWS, contexts.cached_tokens)
    stages += [
        stage(
            "language model's loss",
            f"{contexts.loss_contexts:,} contexts with each dictionary",
            0,
            chosen,
            finished,
            of_model
            and contexts.loss_contexts
            * contexts.context_size
            * _seconds_of_predictions(of_model, shape.n_layers, contenders, experiment, hook),
        ),
        stage(
            "baselines",
            f"{known:,} and {contexts.held_out_tokens:,} tokens",
            0,
            COPIES_FOR_BASELINES * FLOAT * known * shape.width_at(hook)
            + held_out
            + _random_bytes(widest, min(known, RANDOM_ROWS) + contexts.held_out_tokens),
            finished,
        ),
    ]
    return stages


def _together(at_hooks: Sequence[Sequence[StagePlan]]) -> Iterator[StagePlan]:
    """The stages of all hooks by their names, one after another."""
    named: dict[str, list[StagePlan]] = {}
    for stage in chain.from_iterable(at_hooks):
        named.setdefault(stage.name, []).append(stage)
    for name, stages in named.items():
        works = Counter(stage.work for stage in stages)
        hooks = {work: f" at {n} of {len(at_hooks)} hooks" if len(at_hooks) > 1 else "" for work, n in works.items()}
        seconds = [stage.seconds for stage in stages if stage.seconds is not None]
        yield StagePlan(
            name,
            "; ".join(f"{work}{where}" for work, where in hooks.items()),
            sum(stage.disk for stage in stages),
            max(stage.host for stage in stages),
            max(stage.device for stage in stages),
            sum(seconds) if len(seconds) == len(stages) else None,
        )


def _random_bytes(d_sae: int, n_tokens: int) -> int:
    """Of random features: their bits at every L0, one of these codes as numbers, and two Gram matrices in float64."""
    n_features = min(d_sae, RANDOM_ROWS // ROWS_PER_FEATURE)
    return n_features * (n_tokens * (len(RANDOM_L0) + FLOAT) + 2 * 8 * n_features)


def _seconds_of_predictions(
    timing: PassTiming, n_layers: int, contenders: Mapping[str, Contender], experiment: Experiment, hook: str
) -> float:
    """Of a token: as the model is, then with zeros at each hook and with each dictionary, from its layer on."""
    written = [contender.hooks(hook)[-1] for contender in contenders.values()]
    below = min((stop_layer(contender.hooks(hook)) or 1) for contender in contenders.values()) - 1
    n_passes = len(set(written)) + len(written) * len(experiment.seeds)
    return timing.layer * (n_layers + n_passes * (n_layers - below)) + timing.prediction * (1 + n_passes)


def _running_bytes(shape: ModelShape, experiment: Experiment, n_hooks: int) -> int:
    """What a batch of contexts takes inside the model: what the hooks keep, a layer's attention, and a layer's MLP."""
    length, itemsize = experiment.contexts.context_size, torch_dtype(experiment.model_dtype).itemsize
    attention = 4 * shape.n_heads * CONTEXTS * length**2
    return itemsize * (CONTEXTS * length * ((n_hooks + 12) * shape.d_model + 4 * shape.d_mlp) + attention)


def _disk_misfits(disk: int, bytes_of_a_context: int, experiment: Experiment, resources: Resources) -> list[str]:
    if disk <= resources.disk:
        return []
    contexts, too_many = experiment.contexts, -(-(disk - resources.disk) // bytes_of_a_context)
    fewer = contexts.cached_tokens - too_many * (contexts.context_size - 1)
    instead = f"cache at most {fewer:,} tokens in place of {contexts.cached_tokens:,}" if fewer > 0 else ""
    narrower = "keep them in bfloat16" if experiment.cache_dtype == "float32" else ""
    remedy = ", or ".join(filter(None, (instead, narrower, "choose another disk")))
    return [f"{gb(disk)} of disk are needed and {gb(resources.disk)} are free; {remedy}"]


def _model_misfits(model: int, running: int, experiment: Experiment, resources: Resources) -> list[str]:
    if model + running <= resources.usable:
        return []
    narrower = "--model-dtype bfloat16, " if experiment.model_dtype == "float32" else ""
    return [
        f"running the model takes {gb(model + running)} of memory and {resources.where} has {gb(resources.usable)} for "
        f"it; choose {narrower}shorter contexts, or another --model-device"
    ]


def _training_misfits(sizes: Mapping[str, _Size], beside: int, resources: Resources) -> list[str]:
    misfits, finished = [], 0
    for name, size in sizes.items():
        if finished + size.training > beside:
            fewer = size.features_that_fit(beside - finished)
            instead = f"ask for at most {fewer:,} features in place of {size.d_sae:,}, or for " if fewer else "ask for "
            misfits.append(
                f"training {name} takes {gb(finished + size.training)} of memory, with the dictionaries before it, and "
                f"{resources.where} has {gb(max(0, beside))} for it; {instead}smaller batches, run the model on "
                "another --model-device, or train it with train --shard-features in several processes"
            )
        finished += size.weights
    return misfits
