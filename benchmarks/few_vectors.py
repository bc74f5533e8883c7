"""Which training settings for a thousand vectors in 576 dimensions, as `bae-lens dynamics` has them?

    python benchmarks/few_vectors.py --output runs/few_vectors

The setting is chosen on other documents, layers and positions than those whose entropies are shown: sotu from its other
end, in the order that `bae-lens dynamics` shuffles it to. Settings are compared by the loss that they train, on
held-out documents: squared error of vectors with mean square 576, plus bits at their price.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro
from machine import machine

from bae_lens import FitSettings, estimate_entropy, fit_baes, load_model, load_text, pca_quantization, random_windows
from bae_lens.activations.models import DEMO_MODEL
from bae_lens.activations.position_cache import collect
from bae_lens.activations.sources import DEMO_TEXT
from bae_lens.entropy.dynamics import FEW_VECTORS, held_out
from bae_lens.storage import write_text

HOOKS, POSITIONS = ("blocks.12.hook_resid_post", "blocks.22.hook_resid_post"), (3, 24)
SLOWER = replace(FEW_VECTORS, lr=3e-3)
SETTINGS = {
    "as in `dynamics`, 256 steps": FEW_VECTORS,
    "as for coins, 256 steps": FitSettings(steps=256, batch_size=256),
    "lr 3e-3": SLOWER,
    "lr 3e-3, with elimination": replace(SLOWER, elimination=True),
    "lr 3e-3, 128 steps": replace(SLOWER, steps=128),
    "lr 3e-3, 512 steps": replace(SLOWER, steps=512),
    "lr 3e-3, encoder bias 0": replace(SLOWER, encoder_bias=0.0),
    "lr 3e-3, entropy from 25 %": replace(SLOWER, entropy_from=0.25),
    "lr 1e-3": replace(FEW_VECTORS, lr=1e-3),
}


@dataclass(frozen=True)
class FewVectors:
    """Held-out loss of BAEs trained on two hooks and two positions, their mean."""

    output: Path
    """Folder for the activations."""
    windows: int = 1024
    entropy_coefficient: float = 1.0
    seed: int = 0
    results: Path = field(default=Path(__file__).parent / "results" / "few_vectors.json")

    def run(self) -> None:
        model = load_model(DEMO_MODEL)
        text = load_text(DEMO_TEXT).shuffle(seed=self.seed)
        text = text.select(range(len(text) - 1, -1, -1))
        windows = random_windows(model.tokenizer, text, max(POSITIONS), self.windows, self.seed, per_document=10)
        states = collect(model, windows, HOOKS, POSITIONS, self.output)
        test = held_out(states.documents, FEW_VECTORS.batch_size)
        vectors = states.vectors([(hook, position) for hook in range(len(HOOKS)) for position in range(len(POSITIONS))])
        rows: list[dict[str, Any]] = []
        for name, setting in SETTINGS.items():
            baes = fit_baes(vectors[:, ~test], vectors.shape[2], self.seed, [self.entropy_coefficient], setting)
            estimates = [
                (estimate_entropy(bae, x[test]), estimate_entropy(bae, x[~test]))
                for bae, x in zip(baes, vectors, strict=True)
            ]
            points = [(unseen.bits, unseen.explained_variance) for unseen, _ in estimates]
            seen = fmean(seen.explained_variance for _, seen in estimates)
            rows.append({**self._row(name, points, vectors.shape[2]), "train_ev": seen})
            print(rows[-1], flush=True)
        shares = (0.3, 0.4, 0.5, 0.7)
        curves = [pca_quantization(x[~test], x[test], shares) for x in vectors]
        for i, share in enumerate(shares):
            rows.append(self._row(f"PCA, quantized for {share}", [curve[i] for curve in curves], vectors.shape[2]))
            print(rows[-1], flush=True)
        sizes = {"train": int((~test).sum()), "held_out": int(test.sum()), "documents": len(states.documents.unique())}
        write_text(self.results, json.dumps({**machine(), **sizes, "rows": rows}, indent=1))

    def _row(self, name: str, points: Any, d_in: int) -> dict[str, Any]:
        bits, share = (fmean(values) for values in zip(*points, strict=True))
        loss = d_in * (1 - share) + self.entropy_coefficient * bits
        return {"setting": name, "bits": bits, "ev": share, "loss": loss}


if __name__ == "__main__":
    tyro.cli(FewVectors).run()
