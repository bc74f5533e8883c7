"""What is trained, where, and for how long."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae_lens import TrainingSAEConfig

FOLDER_NAME = r"\w[\w .+-]*"


@dataclass(frozen=True)
class TrainingSettings:
    """What all dictionaries of a comparison share."""

    training_tokens: int = 524_288
    """Tokens seen by each dictionary; more than were harvested means several epochs."""
    batch_size: int = 512
    """Tokens per optimiser step, at least 2: a BAE's penalties are statistics of the batch."""
    lr_decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no training can have."""
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2, got {self.batch_size}: the penalties are batch statistics"
            )
        if self.training_tokens < self.batch_size:
            raise ValueError(
                f"training_tokens must be at least a batch ({self.batch_size}), got {self.training_tokens}"
            )
        if not 0 <= self.lr_decay < 1:
            raise ValueError(f"lr_decay must lie in [0, 1), got {self.lr_decay}")

    @property
    def steps(self) -> int:
        """Training steps, each on one full batch."""
        return self.training_tokens // self.batch_size


@dataclass(frozen=True)
class Recipe:
    """A dictionary to be trained."""

    cfg: TrainingSAEConfig
    """SAELens training config, of any registered architecture; `normalize_activations` must be "none"."""
    lr: float
    """Learning rate of Adam."""

    def __post_init__(self) -> None:
        """Raises ValueError for a normalisation on top of the standardisation, or a learning rate of 0 or less."""
        if self.cfg.normalize_activations != "none":
            raise ValueError(
                f"normalize_activations must be 'none', got {self.cfg.normalize_activations!r}: "
                "the hidden states are standardised already"
            )
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")

    def to_dict(self) -> dict[str, Any]:
        """Everything that tells this recipe from another, as JSON values."""
        cfg = {key: value for key, value in self.cfg.to_dict().items() if key != "metadata"}
        return json.loads(json.dumps({"lr": self.lr, **cfg}))


@dataclass(frozen=True)
class Contender:
    """A dictionary in a comparison: what to try, and for a transcoder where."""

    trials: tuple[Recipe, ...]
    """Settings to choose from on the documents held out for tuning; a single one is taken as it is."""
    hook_in: str | None = None
    """Where a transcoder reads; None for an SAE, which does at the comparison's hook."""
    hook_out: str | None = None
    """Where a transcoder writes."""

    def __post_init__(self) -> None:
        """Raises ValueError if only one of a transcoder's hooks is named."""
        if (self.hook_in is None) != (self.hook_out is None):
            raise ValueError(f"hook_in and hook_out go together, got {self.hook_in} and {self.hook_out}")

    def hooks(self, hook_name: str) -> tuple[str, ...]:
        """The hooks whose hidden states it needs in a comparison at `hook_name`."""
        return (hook_name,) if self.hook_in is None or self.hook_out is None else (self.hook_in, self.hook_out)


def check_contenders(contenders: Mapping[str, Contender]) -> None:
    """Raises ValueError for none, for unequal numbers of trials, and for names that a folder cannot have."""
    if not contenders:
        raise ValueError("a comparison needs at least one dictionary, got none")
    counts = {name: len(contender.trials) for name, contender in contenders.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise ValueError(f"every dictionary must have the same number of trials, at least one, got {listed}")
    for name in contenders:
        if not re.fullmatch(FOLDER_NAME, name):
            raise ValueError(f"a dictionary's name must be made of letters, digits, spaces and _.+-, got {name!r}")
