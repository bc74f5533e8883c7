"""A comparison at each of several hooks, on the activations of one pass of the model."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from bae_lens.activations.fingerprint import model_fingerprint
from bae_lens.activations.hook_names import check_different, layer_hook
from bae_lens.activations.models import resolve_hook
from bae_lens.comparison.comparing import OnMeasured
from bae_lens.comparison.dictionaries import DictionarySpec, PretrainedSpec
from bae_lens.comparison.experiment import Contender, Experiment, check_run, needed_hooks
from bae_lens.comparison.hook_results import HookComparisons, HookRow
from bae_lens.comparison.origin import ModelOrigin
from bae_lens.comparison.results import Comparison
from bae_lens.comparison.run import cached_splits, checked, chosen_contexts, compare_cached, purpose
from bae_lens.distributed.connection import is_main_process, n_processes
from bae_lens.distributed.work import share
from bae_lens.evaluation.metrics import DictionaryMetrics
from bae_lens.file_exchange import bring_together
from bae_lens.storage import OnStage, Stage, Stopwatch, claimed, unwatched
from bae_lens.training.tracking import UNTRACKED, Tracking

HOOKS_FOLDER = "hooks"  # of a run at several hooks, in which each has the folder of its comparison, under its name


def compare_hooks(
    model: Any,
    documents: Any,
    contenders: Mapping[str, Mapping[str, Contender]],
    experiment: Experiment,
    folder: Path,
    device: str = "cpu",
    loading_seconds: float = 0.0,
    on_stage: OnStage = unwatched,
    on_measured: OnMeasured = unwatched,
    *,
    share_steps: bool = False,
    shard_features: bool = False,
    tracking: Tracking = UNTRACKED,
) -> HookComparisons:
    """Trains and measures contenders at each of several hooks, all on the same tokens of one pass of the model.

    `contenders` are those of each hook, by its name and then by theirs; `experiment` says everything else, and its
    `hook_name` is not looked at. What happens at a hook is what `compare` does, and so are the other arguments.
    `on_stage` and `on_measured` are told the hook after the name. A token that is an outlier at one hook is left out at
    all of them.

    `folder` keeps contexts and activations once, what `compare` writes for each hook in `hooks/HOOK_NAME`, and in
    `result.json` what is returned. A run that was interrupted goes on where it stopped.

    Of several processes each does all that there is to do at one hook after another, as long as there are hooks for
    all of them, and they share the dictionaries of the rest; the result does not depend on their number. With
    `share_steps` or `shard_features` they share the steps of all trainings, one hook after another.

    Raises ValueError, before any training, as `compare` for each hook, for a hook that comes twice or is in no layer,
    and for a folder of a run at one hook.
    """
    if experiment.streams:
        raise ValueError(
            f"compare_hooks caches all activations, got keep_activations={experiment.keep_activations!r}; stream with "
            "compare, one hook at a time, or keep all"
        )
    share_steps |= shard_features
    contenders = {hook: contenders[given] for hook, given in _resolved(model, list(contenders)).items()}
    parts = {
        hook: checked(model, made, replace(experiment, hook_name=hook), share_steps, shard_features)
        for hook, made in contenders.items()
    }
    check_run(folder, several_hooks=True)
    shared = {name: value for name, value in experiment.identity.items() if name != "hook_name"}
    whole = {**shared, "model_weights": model_fingerprint(model), "hook_names": list(parts)}
    with ExitStack() as claims:
        claims.enter_context(claimed(folder, whole))
        for hook, (at_hook, made) in parts.items():
            of_hook = {**purpose(model, made, at_hook), "run": {"hook_names": list(parts)}}
            claims.enter_context(claimed(folder / HOOKS_FOLDER / hook, of_hook))
        stopwatch = Stopwatch(folder, on_stage)
        bring_together(folder)
        stopwatch.add("load model and text", loading_seconds)
        made_at = {hook: made for hook, (_, made) in parts.items()}
        with stopwatch.stage("choose contexts"):
            contenders_at_all = chain.from_iterable(made.values() for made in made_at.values())
            contexts = chosen_contexts(model, documents, contenders_at_all, experiment, folder)
        with stopwatch.stage("activations"):
            splits = cached_splits(model, contexts, needed_hooks(made_at), experiment, folder)
        works = {
            hook: partial(
                compare_cached,
                ModelOrigin(model, splits, at_hook),
                splits,
                made,
                at_hook,
                folder / HOOKS_FOLDER / hook,
                Stopwatch(folder / HOOKS_FOLDER / hook, partial(_stage_at, on_stage, hook)),
                device,
                shard_features=shard_features,
                tracking=tracking,
            )
            for hook, (at_hook, made) in parts.items()
        }
        told = {hook: partial(_measured_at, on_measured, hook) for hook in works}
        n = n_processes()
        alone = [] if share_steps or n == 1 else list(works)[: len(works) // n * n]
        share(alone, lambda hook: works[hook](on_measured=told[hook], share_steps=False))
        bring_together(folder)
        stopwatch.compare_notes()
        rows, stages, first = [], list(stopwatch.stages.values()), None
        for hook, work in works.items():
            comparison = work(on_measured=unwatched if hook in alone else told[hook], share_steps=share_steps)
            rows += HookRow.all_of(comparison)
            stages.append(_in_all(comparison, hook))
            first = first or comparison
        assert first is not None
        tokens = (first.train.tokens, first.test.tokens, first.train.outlier_tokens)
        result = HookComparisons(first.experiment, *tokens, stages, rows)
        if is_main_process():
            result.save(folder)
        return result


def _resolved(model: Any, hook_names: Sequence[str]) -> dict[str, str]:
    """The given names by those that the model has for the hooks."""
    if not hook_names:
        raise ValueError("compare_hooks needs at least one hook, got none")
    resolved = [resolve_hook(model, hook_name) for hook_name in hook_names]
    check_different(resolved)
    check_in_layers(resolved)
    return dict(zip(resolved, hook_names, strict=True))


def check_in_layers(hook_names: Sequence[str]) -> None:
    """Raises ValueError for hooks that are in no layer, of which there is no curve."""
    for hook_name in hook_names:
        if layer_hook(hook_name) is None:
            raise ValueError(
                f"several hooks must each be in a layer, as blocks.0.hook_resid_pre is, got {hook_name}; run it alone"
            )


def check_specs(specs: Mapping[str, DictionarySpec | PretrainedSpec], widths: Mapping[str, int]) -> None:
    """Raises ValueError for dictionaries that are described for one hook where there are several, given with widths.

    Such is one that is trained already or starts from one that is, a transcoder that names its hooks, and an SAE with a
    number of features where widths differ.
    """
    if len(widths) < 2:
        return
    for name, spec in specs.items():
        if isinstance(spec, PretrainedSpec):
            raise ValueError(
                f"a pretrained dictionary is compared at the one hook that it reads, but {name} would be at "
                f"{len(widths)}; leave it out, or choose its hook alone"
            )
        if spec.start_from is not None:
            raise ValueError(
                f"a saved dictionary is trained further at the one hook that it reads, but {name} starts from one at "
                f"{len(widths)}; leave start_from out, or choose its hook alone"
            )
        named = [hook for hook in (spec.hook_name, spec.hook_name_out) if hook]
        if named:
            raise ValueError(
                f"a transcoder at several hooks takes the MLP in the layer of each, but {name} names "
                f"{' and '.join(named)}; leave hook_name and hook_name_out out, or choose one hook"
            )
        fixed = any("d_sae" in settings for settings in (spec.config, *spec.trials))
        if fixed and not spec.is_transcoder and len(set(widths.values())) > 1:
            examples = {width: hook for hook, width in widths.items()}
            listed = ", ".join(f"{width} at {hook}" for width, hook in sorted(examples.items()))
            raise ValueError(
                f"d_sae can be fixed for hooks of one width, but {name} has it and widths are {listed}; leave it out "
                "for expansion times each width, or run hooks of one width together"
            )


def _stage_at(on_stage: OnStage, hook: str, name: str, seconds: float | None) -> None:
    on_stage(f"{name} at {hook}", seconds)


def _measured_at(on_measured: OnMeasured, hook: str, name: str, metrics: DictionaryMetrics) -> None:
    on_measured(f"{name} at {hook}", metrics)


def _in_all(comparison: Comparison, hook: str) -> Stage:
    seconds = sum(stage.seconds for stage in comparison.stages)
    return Stage(hook, seconds, max(stage.peak_memory_gib for stage in comparison.stages))
