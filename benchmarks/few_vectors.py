"""Which training settings for a thousand vectors in 576 dimensions, as `bae-lens dynamics` has them?

python benchmarks/few_vectors.py --states runs/dynamics/hidden_states
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from bae_lens.dynamics import FEW_VECTORS
from bae_lens.entropy import estimate_entropy
from bae_lens.fit import FitSettings, fit_bae
from bae_lens.harvest import write_text
from bae_lens.position_states import PositionStates
from bae_lens.rate_distortion import pca_quantisation


@dataclass(frozen=True)
class FewVectors:
    """Held-out quality of BAEs trained on one hook and position."""

    states: Path
    """Hidden states that `bae-lens dynamics` collected; the last hook and position are used."""
    entropy_coefficient: float = 1.0
    output: Path = field(default=Path(__file__).parent / "results" / "few_vectors.json")

    def run(self) -> None:
        states = PositionStates(self.states)
        (vectors,) = states.vectors([(len(states.hook_names) - 1, len(states.positions) - 1)])
        train, test = vectors[:-200], vectors[-200:]
        settings = {
            "as for coins, 256 steps": FitSettings(steps=256, batch_size=256),
            "with elimination": replace(FEW_VECTORS, elimination=True),
            "as in `dynamics`": FEW_VECTORS,
            "128 steps": replace(FEW_VECTORS, steps=128),
        }
        rows: list[dict[str, Any]] = []
        for name, setting in settings.items():
            bae = fit_bae(train, vectors.shape[1], 0, self.entropy_coefficient, setting)
            estimate = estimate_entropy(bae, test)
            seen = estimate_entropy(bae, train).explained_variance
            rows.append({"setting": name, "bits": estimate.bits, "ev": estimate.explained_variance, "train_ev": seen})
            print(rows[-1], flush=True)
        for bits, share in pca_quantisation(train, test, [0.3, 0.4, 0.5, 0.7]):
            rows.append({"setting": "PCA, quantised", "bits": bits, "ev": share})
            print(rows[-1], flush=True)
        write_text(self.output, json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1))


if __name__ == "__main__":
    tyro.cli(FewVectors).run()
