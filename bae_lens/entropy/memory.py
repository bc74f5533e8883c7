"""How much memory it takes to train BAEs on sets of vectors, and how many of them fit together."""

from dataclasses import dataclass

import torch

from bae_lens.entropy.estimate import ROWS
from bae_lens.entropy.fit import ENCODED_AT_A_TIME, FitSettings
from bae_lens.functional.covariance import TILE
from bae_lens.functional.tree_entropy import ENTRIES, MOST_FEATURES
from bae_lens.planning import FLOAT, GPU_SHARE, LONG

COPIES_OF_VECTORS = 2  # all, and those that are trained on
# Of every weight of a BAE: itself, its gradient, two moments of the optimizer, and the finished BAE's own.
COPIES_OF_A_WEIGHT = 5
# Of a batch's vectors and of its codes, in the forward and backward pass of a step.
COPIES_OF_A_BATCH, COPIES_OF_A_CODE = 6, 8
CPU_BYTES = 2 * 2**30  # at a time on a CPU, where more BAEs together are no faster


@dataclass(frozen=True)
class TrainingMemory:
    """What the memory depends on, for sets of vectors on each of which as many BAEs are trained as there are prices."""

    n_vectors: int
    """In each set."""
    d_in: int
    """Width of the vectors."""
    d_sae: int
    """Features of each BAE."""
    n_prices: int
    """BAEs trained on each set."""
    fit: FitSettings
    """Training."""

    def n_bytes(self, n_sets: int) -> int:
        """That so many sets and the BAEs trained on them take together, at most."""
        vectors = FLOAT * self.n_vectors * self.d_in
        weights = COPIES_OF_A_WEIGHT * FLOAT * (2 * self.d_in * self.d_sae + self.d_in + self.d_sae)
        batch = FLOAT * self.fit.batch_size * (COPIES_OF_A_BATCH * self.d_in + COPIES_OF_A_CODE * self.d_sae)
        order = LONG * self.fit.steps * self.fit.batch_size
        pairs = min(self.d_sae, MOST_FEATURES) ** 2
        one_at_a_time = max(
            3 * vectors,  # centered, and in float64, for their scale
            FLOAT * ENCODED_AT_A_TIME * (self.d_in + 3 * self.d_sae),  # for firing rates
            LONG * ROWS * (4 * self.d_in + 6 * self.d_sae)  # measured in float64, with pairs of features in two halves
            + (2 * LONG + 2 * FLOAT) * pairs
            + 8 * LONG * min(pairs, ENTRIES),
            4 * FLOAT * TILE**2,  # of the covariance
        )
        models = n_sets * self.n_prices
        return n_sets * COPIES_OF_VECTORS * vectors + models * (weights + batch) + order + one_at_a_time

    def sets_at_a_time(self, n_bytes: int) -> int:
        """How many sets fit with their BAEs; 0 if not even one does."""
        first, second = self.n_bytes(1), self.n_bytes(2)
        return 0 if first > n_bytes else 1 + (n_bytes - first) // (second - first)


def bytes_for_training(device: torch.device, gpu_bytes: int | None = None) -> int:
    """That BAEs trained together and their vectors may take.

    On a GPU, of which `gpu_bytes` may be used in all, or everything, it is a share of what is free beside the model.
    """
    if device.type != "cuda":
        return CPU_BYTES
    torch.cuda.empty_cache()  # of what the model's pass has left
    free, total = torch.cuda.mem_get_info(device)
    return int(GPU_SHARE * (free if gpu_bytes is None else min(free, gpu_bytes - (total - free))))
