"""Dictionaries of vectors that come without a language model, side by side."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bae_lens.activations.fingerprint import tensor_fingerprint
from bae_lens.activations.vector_cache import cache_vectors, check_vectors
from bae_lens.activations.vectors import VECTORS_HOOK, Vectors, choose_vectors
from bae_lens.comparison.comparing import OnMeasured
from bae_lens.comparison.experiment import Contender, Experiment, check_contenders, check_hooks
from bae_lens.comparison.origin import VectorOrigin
from bae_lens.comparison.results import Comparison
from bae_lens.comparison.run import compare_cached
from bae_lens.file_exchange import bring_together
from bae_lens.storage import ACTIVATIONS_FOLDER, OnStage, Stopwatch, claimed, unwatched
from bae_lens.training.tracking import UNTRACKED, Tracking


def compare_vectors(
    vectors: Vectors,
    contenders: Mapping[str, Contender],
    experiment: Experiment,
    folder: Path,
    device: str = "cpu",
    on_stage: OnStage = unwatched,
    on_measured: OnMeasured = unwatched,
    *,
    share_steps: bool = False,
    shard_features: bool = False,
    tracking: Tracking = UNTRACKED,
) -> Comparison:
    """`compare` on vectors without a language model, with all that can be measured without one.

    `experiment.model` must be None; of its contexts the numbers of tokens count, which say how many vectors are used at
    most. How vectors are split says `choose_vectors`, and the result. A dictionary's features are shown with the rows
    on which they fire most.

    Raises ValueError as `compare`, `choose_vectors` and `cache_vectors` do, for transcoders, which need two hooks, and
    for fewer vectors to train on than a batch.
    """
    if experiment.model is not None:
        raise ValueError(f"vectors have no model: Experiment.model must be None, got {experiment.model!r}")
    if experiment.streams:
        raise ValueError(
            "vectors are read from files, and no model computes them: keep_activations must be all, got "
            f"{experiment.keep_activations!r}"
        )
    experiment = replace(experiment, hook_name=VECTORS_HOOK)
    check_contenders(contenders)
    for name, contender in contenders.items():
        hook_name, *others = contender.hooks(VECTORS_HOOK)
        if others:
            raise ValueError(f"{name} is a transcoder, which needs activations at two hooks of a model; leave it out")
        if hook_name != VECTORS_HOOK and (contender.pretrained is None or contender.pretrained.elsewhere):
            raise ValueError(
                f"{name} is to read {hook_name} of a model, and vectors have {VECTORS_HOOK} only; name that hook"
            )
    share_steps |= shard_features
    check_hooks(contenders, experiment, {VECTORS_HOOK: vectors.d}, share_steps, shard_features)
    tune = any(len(contender.trials) > 1 for contender in contenders.values())
    chosen = choose_vectors(vectors, experiment.contexts, experiment.seed, tune=tune)
    n_train, batch_size = len(chosen["train"].tokens), experiment.training.batch_size
    if n_train < batch_size:
        raise ValueError(
            f"of {len(vectors)} vectors {n_train} are for training, and a batch takes {batch_size}; add vectors, or "
            "choose a smaller batch_size"
        )
    check_vectors(vectors, chosen.values(), experiment.cache_dtype)
    purpose = {
        **experiment.identity,
        "vectors": vectors.fingerprint,
        "documents": tensor_fingerprint(vectors.document),
        "labels": vectors.labels_fingerprint,
        "recipes": {name: contender.identity for name, contender in contenders.items()},
    }
    with claimed(folder, purpose):
        stopwatch = Stopwatch(folder, on_stage)
        bring_together(folder)
        with stopwatch.stage("activations"):
            splits = {
                split: {
                    VECTORS_HOOK: cache_vectors(
                        vectors, rows, folder / ACTIVATIONS_FOLDER / split, experiment.cache_dtype
                    )
                }
                for split, rows in chosen.items()
            }
        return compare_cached(
            VectorOrigin(vectors, experiment),
            splits,
            contenders,
            experiment,
            folder,
            stopwatch,
            device,
            on_measured=on_measured,
            share_steps=share_steps,
            shard_features=shard_features,
            tracking=tracking,
        )
