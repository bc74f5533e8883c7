"""Dictionaries by name: from a few words to recipes that fit a model's hooks, with small grids to tune over."""

import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from sae_lens import SAE

from bae_lens.activations.forward import hook_widths
from bae_lens.activations.vectors import VECTORS_HOOK
from bae_lens.comparison.experiment import Contender, Pretrained
from bae_lens.saes.loading import load_pretrained
from bae_lens.saes.saelens_compat import SAE_TRAINING_CLASS_REGISTRY
from bae_lens.saes.starting import check_architecture, inherited
from bae_lens.saes.training_config import Preset
from bae_lens.saes.transcoder import hooks_of
from bae_lens.training.recipe import Recipe

BAE_LR = {"default": 6e-3, "optimized": 6e-3, "paper": 5e-4, "authors": 5e-4}
BINARY_TOPK_LR = 4e-3
SAE_LR = 1e-3
TRIAL_FACTOR = 1.6  # between neighboring trials of a default grid
WARM_UP_SHARE = 8  # a sparsity penalty grows over an eighth of the steps
BINARY = ("bae", "binary_transcoder")
BINARY_TOPK = ("binary_topk", "binary_topk_transcoder")
WidthsAt = Callable[[Sequence[str]], Mapping[str, int]]
ARCHITECTURES = ("bae", "standard", "topk", "gated", "topk_transcoder")  # compared if nothing else is said


@dataclass(frozen=True)
class DictionarySpec:
    """A dictionary as a config file or the command line describes it."""

    architecture: str
    """bae, standard, topk, gated, jumprelu, batchtopk, matryoshka_batchtopk, transcoder, topk_transcoder,
    binary_transcoder, binary_topk and binary_topk_transcoder (Binary Sparse Coding, arXiv 2509.25596), or another that
    SAELens trains."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of its training config."""
    lr: float | None = None
    """Learning rate; by default 6e-3 for a BAE or a binary transcoder (5e-4 for the published presets), 4e-3 for
    binary_topk and its transcoder, and 1e-3 for the others."""
    preset: Preset = "default"
    """For a binary code: our defaults, these with the bits of each vector chosen, the paper's formulas, or those of its
    authors' code."""
    trials: tuple[dict[str, Any], ...] = ({},)
    """What to try: for each trial `lr` and fields of the config that differ from the above."""
    hook_name: str | None = None
    """Where a transcoder reads; by default the input of the MLP in the layer of the comparison's hook."""
    hook_name_out: str | None = None
    """Where a transcoder writes; by default the output of that MLP."""
    start_from: str | None = None
    """A saved dictionary to go on from, by its folder or RELEASE/SAE_ID; it says what `config` does not."""

    def __post_init__(self) -> None:
        """Raises ValueError for an architecture that cannot be trained."""
        if self.architecture not in SAE_TRAINING_CLASS_REGISTRY:
            known = ", ".join(SAE_TRAINING_CLASS_REGISTRY)
            raise ValueError(f"architecture must be one of {known}, got {self.architecture!r}")

    @property
    def is_transcoder(self) -> bool:
        return "d_out" in _field_names(self.architecture)

    def contender(self, model: Any, hook_name: str, expansion: int, training_steps: int) -> Contender:
        """The recipes of all trials, for `expansion` features per dimension of what is read.

        Raises ValueError for hooks that the model does not have, fields that the config does not have, values that it
        refuses, and a transcoder's hooks given to an SAE.
        """
        return self.contender_by_width(partial(hook_widths, model), hook_name, expansion, training_steps)

    def contender_by_width(self, widths_at: WidthsAt, hook_name: str, expansion: int, training_steps: int) -> Contender:
        """As `contender`, where `widths_at` gives the widths at some hooks."""
        if self.is_transcoder and hook_name == VECTORS_HOOK:
            raise ValueError(
                f"a {self.architecture} reads at one hook of a language model and writes at another, and vectors come "
                "without a model; leave it out"
            )
        if self.is_transcoder:
            layer = re.match(r"(.*\.\d+)\.", hook_name)
            if layer is None and not (self.hook_name and self.hook_name_out):
                raise ValueError(
                    f"{hook_name} is in no layer; name hook_name and hook_name_out of the {self.architecture}"
                )
            hook_name = self.hook_name or f"{layer and layer[1]}.mlp.hook_in"
            hook_name_out = self.hook_name_out or f"{layer and layer[1]}.hook_mlp_out"
            hooks = [hook_name, hook_name_out]
        elif self.hook_name or self.hook_name_out:
            raise ValueError(f"only transcoders take hook_name and hook_name_out, and {self.architecture} is none")
        else:
            hooks = [hook_name]
        at_hook = widths_at(hooks)
        widths = {side: at_hook[hook] for side, hook in zip(("d_in", "d_out"), hooks, strict=False)}
        start = None if self.start_from is None else load_pretrained(self.start_from)
        if start is not None:
            check_architecture(self.architecture, start)
        recipes = tuple(self._recipe(trial, widths, expansion, training_steps, start) for trial in self.trials)
        reads, writes = hooks if self.is_transcoder else (None, None)
        return Contender(recipes, reads, writes)

    def _recipe(
        self,
        trial: dict[str, Any],
        widths: dict[str, int],
        expansion: int,
        training_steps: int,
        start: SAE[Any] | None,
    ) -> Recipe:
        training_class, config_class = SAE_TRAINING_CLASS_REGISTRY[self.architecture]
        given = {**self.config, **trial}
        lr = as_given(float | None, given.pop("lr", self.lr), "lr")
        if lr is None:
            lr = default_lr(self.architecture, self.preset)
        known = _field_names(self.architecture) - widths.keys()
        for key in given:
            if key not in known:
                raise ValueError(f"{config_class.__name__} takes {', '.join(sorted(known))}, but no {key!r}")
        types = {config_field.name: config_field.type for config_field in fields(config_class)}
        given = {key: as_given(types[key], value, f"{self.architecture}: {key}") for key, value in given.items()}
        values = {
            "d_sae": expansion * widths["d_in"],
            **_schedule(self.architecture, training_steps),
            **({} if start is None else _going_on(self.architecture, start)),
            **widths,
            **given,
        }
        if not values["d_sae"] >= 1:
            raise ValueError(f"d_sae must be at least 1, got {values['d_sae']}; raise expansion")
        try:
            if self.architecture in BINARY:
                cfg = config_class.preset(self.preset, training_steps=training_steps, **values)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                cfg = config_class(**values)
            training_class(cfg).encode(torch.zeros(1, widths["d_in"]))
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"{self.architecture} cannot be made with {given}: {error}") from error
        return Recipe(cfg, lr, start)


@dataclass(frozen=True)
class PretrainedSpec:
    """A dictionary that is measured beside those that are trained, as a config file or the command line names it."""

    pretrained: str
    """Its folder, as SAELens saves any dictionary, or RELEASE/SAE_ID on the hub."""
    hook_name: str | None = None
    """Where it is measured, if that is not where it says it reads; an SAE must read at the comparison's hook unless
    this is said."""
    hook_name_out: str | None = None
    """Where what a transcoder writes is measured, likewise."""

    def contender_by_width(self, widths_at: WidthsAt, hook_name: str, expansion: int, training_steps: int) -> Contender:  # noqa: ARG002
        """The dictionary, on the CPU. Raises ValueError as `load_pretrained` and `Pretrained` do, and for one that does
        not say where it reads.
        """
        sae = load_pretrained(self.pretrained)
        if not (self.hook_name or sae.cfg.metadata.hook_name):
            raise ValueError(f"{self.pretrained} does not say which hook it reads; name its hook_name in a file")
        hooks = hooks_of(sae)
        is_transcoder = hasattr(sae.cfg, "d_out")
        if self.hook_name_out is not None and not is_transcoder:
            raise ValueError(f"only transcoders take hook_name_out, and {self.pretrained} is none")
        reads = self.hook_name or hooks[0]
        writes = (self.hook_name_out or hooks[1]) if is_transcoder else reads
        sae.cfg.metadata.hook_name = reads
        if is_transcoder:
            sae.cfg.metadata.hook_name_out = writes
        return Contender(
            hook_name=reads,
            hook_name_out=writes,
            pretrained=Pretrained(self.pretrained, sae, elsewhere=self.hook_name is not None),
        )


def default_lr(architecture: str, preset: Preset = "default") -> float:
    """Learning rate where none is said.

    Of a `binary_topk` with 32 features of 2304, in the middle of SmolLM2-135M: on 65,536 tokens the explained variance
    is 0.570 at 1e-3, 0.645 at 2e-3, 0.672 at 4e-3 and 0.644 at 8e-3; of its transcoder from the input to the output of
    the MLP there 0.265, 0.345, 0.390 and 0.371.
    """
    if architecture in BINARY:
        return BAE_LR[preset]
    return BINARY_TOPK_LR if architecture in BINARY_TOPK else SAE_LR


def default_spec(architecture: str, l0: int, d_sae: int, trials: int = 1) -> tuple[str, DictionarySpec]:
    """Name and settings of an architecture for about `l0` features per token, on standardized activations.

    Where the architecture can be told L0, it is, and further trials vary the learning rate; elsewhere they vary the
    penalty, whose middle value was found for 32 features of 2304 in the middle of SmolLM2-135M.
    Raises ValueError for an architecture without default.
    """
    rate: dict[str, Any] = {"k": l0}
    quadratic = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(l0), "l0_coefficient": 1.0}
    matryoshka = {"k": float(l0), "matryoshka_widths": [d_sae // 4, d_sae // 2, d_sae]}
    defaults: dict[str, tuple[str, dict[str, Any], str]] = {
        "bae": ("BAE", {"target_l0": float(l0)}, "lr"),
        "standard": ("ReLU", {"l1_coefficient": 2.8}, "l1_coefficient"),
        "topk": ("Top-k", rate, "lr"),
        "binary_topk": ("Binary Top-k", rate, "lr"),
        "gated": ("Gated", {"l1_coefficient": 4.4}, "l1_coefficient"),
        "jumprelu": ("JumpReLU", quadratic, "lr"),
        "batchtopk": ("BatchTopK", {"k": float(l0)}, "lr"),
        "matryoshka_batchtopk": ("Matryoshka", matryoshka, "lr"),
        "transcoder": ("Transcoder", {"l1_coefficient": 8.3}, "l1_coefficient"),
        "topk_transcoder": ("Top-k transcoder", rate, "lr"),
        "binary_transcoder": ("Binary transcoder", {"target_l0": float(l0)}, "lr"),
        "binary_topk_transcoder": ("Binary Top-k transcoder", rate, "lr"),
    }
    if architecture not in defaults:
        raise ValueError(
            f"{architecture!r} has no default settings; it must be one of {', '.join(defaults)}, or described in a file"
        )
    name, config, tuned = defaults[architecture]
    middle = config.get(tuned, default_lr(architecture))
    factors = [TRIAL_FACTOR ** (index - (trials - 1) / 2) for index in range(trials)]
    return name, DictionarySpec(architecture, config, trials=tuple({tuned: middle * factor} for factor in factors))


def as_given(expected: Any, value: Any, where: str) -> Any:
    """A value from a file as the type that a field expects. Raises ValueError, in one line, if it is none."""
    try:
        return TypeAdapter(expected).validate_json(json.dumps(value, default=str), strict=True)
    except TypeError as error:
        raise ValueError(f"{where}: names must be text, got {reprlib.repr(value)}") from error
    except ValidationError as error:
        first = error.errors()[0]
        part = ".".join(["", *map(str, first["loc"])])
        raise ValueError(f"{where}{part}: {first['msg']}, got {reprlib.repr(first['input'])}") from None


def _field_names(architecture: str) -> set[str]:
    return {config_field.name for config_field in fields(SAE_TRAINING_CLASS_REGISTRY[architecture][1])}


def _going_on(architecture: str, start: SAE[Any]) -> dict[str, Any]:
    """What a saved dictionary says of the config, and no time until penalties are in force, which they were before."""
    values = {**inherited(start), "l1_warm_up_steps": 0, "l0_warm_up_steps": 0, "entropy_start_step": 0}
    return {name: value for name, value in values.items() if name in _field_names(architecture)}


def _schedule(architecture: str, training_steps: int) -> dict[str, int]:
    """Warm-up steps of a sparsity penalty, where the architecture has one."""
    known = _field_names(architecture)
    return {name: training_steps // WARM_UP_SHARE for name in ("l1_warm_up_steps", "l0_warm_up_steps") if name in known}
