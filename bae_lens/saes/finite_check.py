"""Refusing activations that are not finite, without waiting for an accelerator in every step."""

import torch
from jaxtyping import Float
from torch import Tensor

ANSWERS_AT_ONCE = ("cpu",)  # devices on which looking costs no wait
STEPS_PER_ANSWER = 100  # of other devices, for which each answer is a wait


class FiniteCheck:
    """Raises ValueError for NaN and infinite activations, on a CPU at once and elsewhere every 100 steps.

    What has not been answered when a dictionary is saved is asked for by `answer`.
    """

    def __init__(self) -> None:
        self._bad_rows: list[Tensor] = []
        self._n_rows = 0

    def __call__(self, x: Float[Tensor, "*batch d_in"], step: int) -> None:
        """Counts the rows of a batch that are not finite."""
        self._bad_rows.append((~torch.isfinite(x)).any(-1).sum())
        self._n_rows += x.shape[:-1].numel()
        if x.device.type in ANSWERS_AT_ONCE or len(self._bad_rows) == STEPS_PER_ANSWER:
            self.answer(f"at training step {step}")

    def answer(self, when: str) -> None:
        """Raises ValueError if a batch since the last answer was not finite; waits for the device."""
        n_batches, n_rows, bad_rows = len(self._bad_rows), self._n_rows, sum(map(int, self._bad_rows))
        self._bad_rows, self._n_rows = [], 0
        if bad_rows:
            batches = "the batch" if n_batches == 1 else f"the last {n_batches} batches"
            raise ValueError(
                f"activations must be finite, but {bad_rows} of {n_rows} rows of {batches} {when} hold NaN or "
                "infinity; check the model's dtype (float16 overflows)"
            )
