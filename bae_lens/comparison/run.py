"""Several dictionaries on the same activations with the same budget, tuned alike, as one result (Table 1)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.cache_writer import cache_activations
from bae_lens.activations.contexts import CONTEXTS_FOLDER, Contexts, choose_contexts, first_contexts, kept_contexts
from bae_lens.activations.fingerprint import model_fingerprint
from bae_lens.activations.forward import hook_widths
from bae_lens.activations.models import resolve_hook
from bae_lens.activations.paired import PairedActivations
from bae_lens.activations.streaming import StreamedActivations
from bae_lens.comparison.comparing import Comparing, OnMeasured
from bae_lens.comparison.experiment import (
    Contender,
    Experiment,
    check_contenders,
    check_hooks,
    check_run,
    check_streamed,
    needed_hooks,
)
from bae_lens.comparison.origin import ModelOrigin, VectorOrigin
from bae_lens.comparison.results import Comparison, earlier_comsem
from bae_lens.distributed.connection import is_main_process
from bae_lens.evaluation.hooking import check_attachable
from bae_lens.file_exchange import bring_together
from bae_lens.saes.saelens_compat import get_special_token_ids
from bae_lens.storage import ACTIVATIONS_FOLDER, OnStage, Stopwatch, claimed, unwatched
from bae_lens.training.tracking import UNTRACKED, Tracking


def compare(
    model: Any,
    documents: Any,
    contenders: Mapping[str, Contender],
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
) -> Comparison:
    """Trains and measures all contenders on the activations of one pass of the model over the text.

    `model` is a TransformerLens model with hooks, `documents` a dataset with a column `text`, which is not looked at if
    `folder` keeps the contexts of an earlier start; `experiment` gives their names and everything else that the
    contenders share. Every contender sees the same tokens in the same order; each seed gives another order. Of its
    trials, all trained with the first seed, the one chosen has the largest explained variance on the tuning documents
    among those within 25 % of the asked informative L0, or else the L0 nearest to it; it is then trained with the other
    seeds. Everything reported is measured on test documents. (The first seed's run is the one that was chosen, which
    favors it a little over the others.)

    `folder` keeps the contexts, their activations, every dictionary (`dictionaries/NAME`, other seeds under `seeds`,
    other trials under `trials`), `result.json` and SAEBench's keys in `saebench`. An interrupted comparison goes on
    where it stopped, and nothing that is finished is done again. `loading_seconds` is what model and text took to load,
    for the report. `on_stage` is told of stages as by a `Stopwatch`, `on_measured` of each dictionary as soon as it is
    measured.

    Several processes share the pass, and each trains and measures dictionaries of its own, one after the other; with
    `share_steps` all train those together that can be, one at a time, by rows of a batch, or with `shard_features` by
    features. The result, which all of them return, does not depend on their number, but for rounding where steps are
    shared. Machines that share no folder end with the same files, but for the result, which is written on the first.
    `tracking` says where metrics go while dictionaries train.

    If the experiment does not keep all activations, there is one dictionary, whose training activations are computed
    when they are due; a sample of them is cached, for PCA and the other baselines too.

    Raises ValueError, before any training, if the trials of two contenders differ in number, for hooks that the model
    does not have, where no dictionary can be attached or whose widths disagree with the configs, for contexts longer
    than the model's, for a split without documents, for fewer tokens to train on than a batch, and for a folder that
    holds anything else.
    """
    share_steps |= shard_features
    experiment, contenders = checked(model, contenders, experiment, share_steps, shard_features)
    check_streamed(contenders, experiment, share_steps)
    check_run(folder, several_hooks=False)
    with claimed(folder, purpose(model, contenders, experiment)):
        stopwatch = Stopwatch(folder, on_stage)
        bring_together(folder)
        stopwatch.add("load model and text", loading_seconds)
        with stopwatch.stage("choose contexts"):
            contexts = chosen_contexts(model, documents, contenders.values(), experiment, folder)
        with stopwatch.stage("activations"):
            hooks, streamed = needed_hooks({experiment.hook_name: contenders}), None
            splits = cached_splits(model, contexts, hooks, experiment, folder)
            if experiment.streams:
                (contender,) = contenders.values()
                sides = [splits["train"][hook] for hook in contender.hooks(experiment.hook_name)]
                streamed = _streamed(model, contexts["train"], sides, experiment, folder)
        return compare_cached(
            ModelOrigin(model, splits, experiment),
            splits,
            contenders,
            experiment,
            folder,
            stopwatch,
            device,
            streamed,
            on_measured=on_measured,
            share_steps=share_steps,
            shard_features=shard_features,
            tracking=tracking,
        )


def checked(
    model: Any, contenders: Mapping[str, Contender], experiment: Experiment, share_steps: bool, shard_features: bool
) -> tuple[Experiment, dict[str, Contender]]:
    """Both with the names that the model has for hooks. Raises ValueError for what does not fit the model; `compare`
    says what.
    """
    experiment = replace(experiment, hook_name=resolve_hook(model, experiment.hook_name))
    made = {name: contender.resolved(model) for name, contender in contenders.items()}
    if experiment.contexts.context_size > model.cfg.n_ctx:
        size = experiment.contexts.context_size
        raise ValueError(f"context_size must be at most the model's {model.cfg.n_ctx}, got {size}")
    check_contenders(made)
    widths = hook_widths(model, needed_hooks({experiment.hook_name: made}))
    check_hooks(made, experiment, widths, share_steps, shard_features)
    for site in dict.fromkeys(contender.hooks(experiment.hook_name) for contender in made.values()):
        check_attachable(model, site)
    return experiment, made


def purpose(model: Any, contenders: Mapping[str, Contender], experiment: Experiment) -> dict[str, Any]:
    """What a comparison's folder is for, as it is written down there."""
    return {
        **experiment.identity,
        "model_weights": model_fingerprint(model),
        "recipes": {name: contender.identity for name, contender in contenders.items()},
        "hooks": {name: contender.hooks(experiment.hook_name) for name, contender in contenders.items()},
    }


def chosen_contexts(
    model: Any, documents: Any, contenders: Iterable[Contender], experiment: Experiment, folder: Path
) -> dict[str, Contexts]:
    """Contexts by split of the documents, which `folder` keeps.

    Raises ValueError, before anything is kept, for fewer tokens than a batch of what is to be trained.
    """
    contenders = list(contenders)

    def choose() -> dict[str, Contexts]:
        tune = any(len(contender.trials) > 1 for contender in contenders)
        texts = documents.shuffle(seed=experiment.seed)
        contexts = choose_contexts(model.tokenizer, texts, experiment.contexts, experiment.seed, tune=tune)
        n_train = int((~contexts["train"].is_special(_special_tokens(model))).sum())
        batch_size = experiment.training.batch_size
        if n_train < batch_size and any(contender.pretrained is None for contender in contenders):
            raise ValueError(
                f"{n_train} tokens were chosen for training, and a batch takes {batch_size}; add text, raise "
                "cached_tokens, or choose a smaller batch_size"
            )
        return contexts

    return kept_contexts(folder / CONTEXTS_FOLDER, choose)


def cached_splits(
    model: Any, contexts: Mapping[str, Contexts], hooks: list[str], experiment: Experiment, folder: Path
) -> dict[str, dict[str, CachedActivations]]:
    """Activations by split and by hook, which `folder` keeps; of training contexts that are streamed, a sample."""
    if experiment.streams:
        sample = first_contexts(contexts["train"], experiment.sample_tokens, _special_tokens(model))
        contexts = {**contexts, "train": sample}
    return {
        split: cache_activations(
            model, chosen, hooks, folder / ACTIVATIONS_FOLDER / split, dtype=experiment.cache_dtype
        )
        for split, chosen in contexts.items()
    }


def _streamed(
    model: Any, contexts: Contexts, sides: Sequence[CachedActivations], experiment: Experiment, folder: Path
) -> StreamedActivations:
    """All training activations, of which the sides of a dictionary have a sample."""
    sample = sides[0] if len(sides) == 1 else PairedActivations(*sides)
    keeps_own = experiment.keep_activations == "own"
    return StreamedActivations(model, contexts, sample, folder / ACTIVATIONS_FOLDER / "streamed", keeps_own=keeps_own)


def _special_tokens(model: Any) -> list[int]:
    return sorted(get_special_token_ids(model.tokenizer))


def compare_cached(
    origin: ModelOrigin | VectorOrigin,
    splits: dict[str, dict[str, CachedActivations]],
    contenders: Mapping[str, Contender],
    experiment: Experiment,
    folder: Path,
    stopwatch: Stopwatch,
    device: str,
    streamed: StreamedActivations | None = None,
    *,
    on_measured: OnMeasured,
    share_steps: bool,
    shard_features: bool,
    tracking: Tracking,
) -> Comparison:
    """What `compare` does once the activations are there and everything is `checked`; the first process writes it.

    What is `streamed` takes the place of training activations that are cached, of which there is a sample.
    """
    comparing = Comparing(
        origin,
        splits,
        contenders,
        experiment,
        folder,
        stopwatch,
        device,
        on_measured,
        shard_features,
        tracking,
        streamed,
    )
    comparison = replace(comparing.result(share_steps), comsem=earlier_comsem(folder))
    if is_main_process():
        comparison.save(folder)
    return comparison
