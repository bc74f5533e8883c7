"""What is compared: what all dictionaries share, and what is tried for each."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from sae_lens import SAE

from bae_lens.activations.contexts import ContextSettings
from bae_lens.activations.fingerprint import model_fingerprint
from bae_lens.activations.models import resolve_hook
from bae_lens.activations.precision import Dtype
from bae_lens.activations.sources import TEXT_COLUMN
from bae_lens.activations.streaming import KeepActivations
from bae_lens.distributed.connection import n_processes
from bae_lens.storage import RUN_FILE, read_json
from bae_lens.training.recipe import Recipe, TrainingSettings
from bae_lens.training.trainer import can_share_steps, check_processes, check_widths

FOLDER_NAME = r"\w[\w .+-]*"


@dataclass(frozen=True)
class Experiment:
    """What all dictionaries of a comparison share."""

    model: str | None
    """Name of the model, as `load_model` takes it; None for vectors that come without one."""
    dataset: str
    """Name of the dataset, as `load_text` takes it, or of what holds the vectors."""
    hook_name: str
    """Where in the model the activations are taken."""
    text_column: str = TEXT_COLUMN
    """Column of the text."""
    dataset_split: str = "train"
    """Split of the text, if it comes from the hub."""
    contexts: ContextSettings = field(default_factory=ContextSettings)
    """How documents are cut into contexts, and how many are cached."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """How long each dictionary is trained, and on how much at a time."""
    l0: float | None = None
    """Features per token at which dictionaries are to be compared; says which of several trials is chosen."""
    seed: int = 0
    """Seed of the choice of documents."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the trainings: of the order of tokens and the initial weights."""
    every_help: bool = True
    """Whether codes are measured with every help too, see `BestCode`, which takes most of the time of measuring."""
    model_dtype: Dtype = "float32"
    """In which the model runs."""
    cache_dtype: Dtype = "float32"
    """In which activations are kept on disk, or in memory while they are due."""
    keep_activations: KeepActivations = "all"
    """What of the training activations is kept on disk: all, cached before training; each machine's own part, computed
    when it is due; or none. The training is the same with either of the last two; see `StreamedActivations`."""
    sample_tokens: int = 65_536
    """Unless all are kept: training tokens whose activations are cached before, for mean, scale and median norm."""

    def __post_init__(self) -> None:
        """Raises ValueError without seeds or with one twice, for an L0 of 0, for fewer tokens than a batch, for an
        empty sample, and for something else to keep.
        """
        if self.contexts.cached_tokens < self.training.batch_size:
            raise ValueError(
                f"cached_tokens must be at least a batch ({self.training.batch_size}), "
                f"got {self.contexts.cached_tokens}"
            )
        if self.l0 is not None and not self.l0 > 0:
            raise ValueError(f"l0 must be positive, got {self.l0}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different, at least one, got {list(self.seeds)}")
        if self.keep_activations not in get_args(KeepActivations):
            raise ValueError(
                f"keep_activations must be one of {', '.join(get_args(KeepActivations))}, got {self.keep_activations!r}"
            )
        if self.sample_tokens < 1:
            raise ValueError(f"sample_tokens must be at least 1, got {self.sample_tokens}")

    @property
    def streams(self) -> bool:
        """Whether activations are computed when training needs them."""
        return self.keep_activations != "all"

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from another, as JSON values: not whether what is streamed is kept, and no sample without."""
        left_out = ("keep_activations",) if self.streams else ("keep_activations", "sample_tokens")
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @property
    def unit(self) -> str:
        """What every row of activations belongs to: a token or, without a model, a vector."""
        return "vector" if self.model is None else "token"

    def seed_folder(self, folder: Path, seed: int) -> Path:
        """Where in a comparison's folder the dictionaries of a seed are kept, under `dictionaries`."""
        return folder if seed == self.seeds[0] else folder / "seeds" / str(seed)


FOLDED_NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")  # that a dictionary itself brings about


@dataclass(frozen=True)
class Pretrained:
    """A dictionary that was trained elsewhere, for raw activations."""

    source: str
    """Its folder, or RELEASE/SAE_ID."""
    sae: SAE[Any]
    """As it is loaded; at hook_z it takes heads concatenated."""
    elsewhere: bool = False
    """Whether it may be measured at other hooks than it says it reads."""

    def __post_init__(self) -> None:
        """Raises ValueError for a dictionary whose input must be normalized by what is not in its file."""
        normalization = self.sae.cfg.normalize_activations
        if normalization not in FOLDED_NORMALIZATIONS:
            raise ValueError(
                f"{self.source} takes activations that are normalized ({normalization}) by a factor that is not in its "
                "file; fold it in (sae.fold_activation_norm_scaling_factor(factor)), save it, and give that folder"
            )
        self.sae.turn_off_forward_pass_hook_z_reshaping()

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from another: its config, but for the metadata, and its weights."""
        config = {name: value for name, value in self.sae.cfg.to_dict().items() if name != "metadata"}
        return {**config, "weights": model_fingerprint(self.sae)}


@dataclass(frozen=True)
class Contender:
    """A dictionary in a comparison: what to try, and for a transcoder where; or one that is pretrained."""

    trials: tuple[Recipe, ...] = ()
    """Settings to choose from on the documents held out for tuning; a single one is taken as it is. None for a
    pretrained one."""
    hook_name: str | None = None
    """Where a transcoder or a pretrained one reads; None for an SAE, which does at the comparison's hook."""
    hook_name_out: str | None = None
    """Where it writes."""
    pretrained: Pretrained | None = None
    """The dictionary, if there is nothing to train."""

    def __post_init__(self) -> None:
        """Raises ValueError if only one of the hooks is named, and for trials of what is not trained."""
        if (self.hook_name is None) != (self.hook_name_out is None):
            raise ValueError(f"hook_name and hook_name_out go together, got {self.hook_name} and {self.hook_name_out}")
        if self.trials and self.pretrained is not None:
            raise ValueError(f"{self.pretrained.source} is pretrained, and takes no trials, got {len(self.trials)}")

    def resolved(self, model: Any) -> "Contender":
        """With the names that the model has for the hooks; raises ValueError for hooks that it does not have."""
        if self.hook_name is None or self.hook_name_out is None:
            return self
        hook_name, hook_name_out = (resolve_hook(model, hook) for hook in (self.hook_name, self.hook_name_out))
        return replace(self, hook_name=hook_name, hook_name_out=hook_name_out)

    def hooks(self, hook_name: str) -> tuple[str, ...]:
        """The hooks whose activations it needs in a comparison at `hook_name`: one of an SAE, two of a transcoder."""
        return (
            (hook_name,)
            if self.hook_name is None or self.hook_name_out is None
            else tuple(dict.fromkeys((self.hook_name, self.hook_name_out)))
        )

    @property
    def identity(self) -> Any:
        """What tells it from another, as JSON values."""
        return [recipe.to_dict() for recipe in self.trials] if self.pretrained is None else self.pretrained.identity


def needed_hooks(contenders: Mapping[str, Mapping[str, Contender]]) -> list[str]:
    """Where activations are taken for these contenders at these hooks of comparisons."""
    sides = (contender.hooks(hook) for hook, made in contenders.items() for contender in made.values())
    return list(dict.fromkeys([*contenders, *chain.from_iterable(sides)]))


def check_contenders(contenders: Mapping[str, Contender]) -> None:
    """Raises ValueError for none, for unequal numbers of trials, and for names that a folder cannot have."""
    if not contenders:
        raise ValueError("a comparison needs at least one dictionary, got none")
    counts = {name: len(contender.trials) for name, contender in contenders.items() if contender.pretrained is None}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise ValueError(f"every dictionary must have the same number of trials, at least one, got {listed}")
    for name in contenders:
        if not re.fullmatch(FOLDER_NAME, name):
            raise ValueError(f"a dictionary's name must be made of letters, digits, spaces and _.+-, got {name!r}")


def check_streamed(contenders: Mapping[str, Contender], experiment: Experiment, share_steps: bool) -> None:
    """Raises ValueError if activations are to be streamed to several trainings, or to processes that share no steps."""
    if not experiment.streams:
        return
    recipes = [recipe for contender in contenders.values() for recipe in contender.trials]
    if len(contenders) != 1 or len(recipes) != 1 or len(experiment.seeds) != 1:
        raise ValueError(
            f"activations are streamed to one dictionary, of one recipe and one seed, got {len(contenders)} with "
            f"{len(recipes)} recipes and {len(experiment.seeds)} seeds; train each by itself, or keep all activations"
        )
    if n_processes() > 1 and not share_steps:
        raise ValueError(
            f"{n_processes()} processes that stream activations share every step, got share_steps=False; set it, train "
            "in one process, or keep all activations"
        )
    if n_processes() > 1 and not can_share_steps(recipes[0].cfg):
        raise ValueError(
            f"{n_processes()} processes stream activations to a bae or a binary_transcoder, whose steps they share, "
            f"got a {recipes[0].cfg.architecture()}; train it in one process, or keep all activations"
        )


def check_run(folder: Path, *, several_hooks: bool) -> None:
    """Raises ValueError for a folder of a run at several hooks where one is asked for, and the other way round."""
    path = folder / RUN_FILE
    if path.exists() and ("hook_names" in read_json(path)) != several_hooks:
        there, now = ("one hook", "several") if several_hooks else ("several hooks", "one")
        raise ValueError(f"{folder} holds a run at {there}, but this is one at {now}; choose another folder")


def check_hooks(
    contenders: Mapping[str, Contender],
    experiment: Experiment,
    widths: dict[str, int],
    share_steps: bool,
    shard_features: bool,
) -> None:
    """Raises ValueError for dictionaries that do not fit their hooks, or that processes cannot share as they are to.

    `widths` are those of all hooks, in the order in which the model reaches them.
    """
    order = list(widths)
    for name, contender in contenders.items():
        hooks = contender.hooks(experiment.hook_name)
        if contender.pretrained is not None:
            _check_pretrained(name, contender.pretrained, hooks, experiment.hook_name)
            check_widths(name, contender.pretrained.sae.cfg, {hook: widths[hook] for hook in hooks})
        if order.index(hooks[0]) > order.index(hooks[-1]):
            raise ValueError(f"{name} reads after it writes: the model reaches {hooks[-1]} before {hooks[0]}")
        for recipe in contender.trials:
            if shard_features or (share_steps and can_share_steps(recipe.cfg)):
                check_processes(name, recipe.cfg, shard_features)
            check_widths(name, recipe.cfg, {hook: widths[hook] for hook in hooks})


def _check_pretrained(name: str, pretrained: Pretrained, hooks: tuple[str, ...], hook_name: str) -> None:
    """Raises ValueError for an SAE that says it reads elsewhere, unless that was allowed."""
    if len(hooks) == 1 and hooks != (hook_name,) and not pretrained.elsewhere:
        raise ValueError(
            f"{name} ({pretrained.source}) reads {hooks[0]}, and the comparison is at {hook_name}; compare there, or "
            "describe it in a file with the hook_name at which it shall be measured all the same"
        )
