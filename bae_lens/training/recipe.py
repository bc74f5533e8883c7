"""What is trained, where, and for how long."""

import json
import math
from copy import copy
from dataclasses import dataclass
from typing import Any

from sae_lens import SAE, TrainingSAEConfig

from bae_lens.activations.fingerprint import model_fingerprint
from bae_lens.saes.starting import check_start


@dataclass(frozen=True)
class TrainingSettings:
    """What all dictionaries of a comparison share."""

    training_tokens: int = 524_288
    """Tokens seen by each dictionary; more than were cached means several epochs."""
    batch_size: int = 512
    """Tokens per optimizer step, at least 2: a BAE's penalties are statistics of the batch."""
    lr_decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to 0."""
    autocast: bool = False
    """Whether matrices are multiplied in bfloat16, as SAELens does it; weights stay in float32."""
    compile: bool = False
    """Whether the forward and backward pass of a step is compiled, as SAELens does it, of use on a GPU: the first steps
    then take up to a minute, later ones less time. On a CPU sparse codes are multiplied densely in it."""

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
    """SAELens training config, of any registered architecture; `normalize_activations` must be "none". A binary code's
    own `standardize_activations` is turned off: what it is trained on is standardized by all of the corpus. One that is
    trained in less than float32 is saved in float32, which can absorb that."""
    lr: float
    """Learning rate of Adam."""
    start: SAE[Any] | None = None
    """A saved dictionary, for raw activations, whose weights are those at the start; by default they are drawn."""

    def __post_init__(self) -> None:
        """Raises ValueError for a normalization on top of the standardization, a learning rate of 0 or less, or
        a start of another kind or width.
        """
        if self.cfg.normalize_activations != "none":
            raise ValueError(
                f"normalize_activations must be 'none', got {self.cfg.normalize_activations!r}: "
                "the activations are standardized already"
            )
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if getattr(self.cfg, "standardize_activations", False):
            cfg: Any = copy(self.cfg)
            cfg.standardize_activations = False
            object.__setattr__(self, "cfg", cfg)
        if self.start is not None:
            check_start(self.cfg, self.start)

    def to_dict(self) -> dict[str, Any]:
        """Everything that tells this recipe from another, as JSON values."""
        cfg = {key: value for key, value in self.cfg.to_dict().items() if key != "metadata"}
        start = {} if self.start is None else {"start_from": model_fingerprint(self.start)}
        return json.loads(json.dumps({"lr": self.lr, **start, **cfg}))
