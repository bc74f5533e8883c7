"""What is trained, and for how long."""

import json
from dataclasses import dataclass
from typing import Any

from sae_lens import TrainingSAEConfig


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
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")

    def to_dict(self) -> dict[str, Any]:
        """Everything that tells this recipe from another, as JSON values."""
        cfg = {key: value for key, value in self.cfg.to_dict().items() if key != "metadata"}
        return json.loads(json.dumps({"lr": self.lr, **cfg}))
