"""Does a BAE find the entropy of vectors whose entropy is known (section 3.1, Fig. 2)?

Sweeps the number of coins and of features with the recipe of `fit_bae`, with parts of it switched off, and with the
settings of the paper's authors, then harder data. Run from the repository with

    python benchmarks/entropy_recovery.py --parts ours harder
    python benchmarks/entropy_recovery.py --parts authors no_price no_elimination --widths 64 --authors-epochs 40
    python benchmarks/entropy_recovery.py --parts authors_budget

Everything is written to benchmarks/results/entropy_recovery.json after every part, the figure beside it.
"""

import json
import time
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import machine
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from tqdm import tqdm

from bae_lens import (
    BAE,
    FitSettings,
    Recovery,
    TrainingBAE,
    TrainingBAEConfig,
    biased_coins,
    correlated_coins,
    estimate_entropy,
    fit_baes,
    oblique_directions,
    random_directions,
    recover,
    with_noise,
)
from bae_lens.entropy.recovery import N_TRAIN, N_VECTORS, RANKS, WIDTHS, D, score
from bae_lens.report.entropy import recovery_chart
from bae_lens.report.figures import draw
from bae_lens.report.png import write_panels
from bae_lens.storage import write_text, written_whole

RESULTS = Path(__file__).parent / "results"
AUTHORS_LR = 5e-4


@dataclass(frozen=True)
class EntropyRecovery:
    """Recovery of known entropies."""

    parts: tuple[str, ...] = ("ours", "harder", "no_price", "authors", "no_elimination", "covariance")
    """Which parts to run, in this order."""
    seeds: int = 1
    """Seeds of data and weights, for our recipe."""
    authors_epochs: int = 100
    """The authors train for 2000."""
    ranks: tuple[int, ...] = (2, 8, 32, 48)
    """Coins in all parts but the first two."""
    widths: tuple[int, ...] = (64, 256)
    """Features in all parts but the first two."""
    checkpoints: Path = Path("runs/entropy_recovery")
    """Where a long training is kept every thousand steps, from which the same command goes on."""
    output: Path = field(default=RESULTS / "entropy_recovery.json")
    """The results; an earlier file keeps the parts that are not run again."""

    def run(self) -> None:
        results = json.loads(self.output.read_text()) if self.output.exists() else {}
        for part in self.parts:
            start = time.perf_counter()
            rows = getattr(self, part)()
            results[part] = {**machine(), "seconds": time.perf_counter() - start, "rows": rows}
            write_text(self.output, json.dumps(results, indent=1))
            print(f"\n{part}: {results[part]['command']}, {results[part]['seconds']:.0f} s\n{table(rows)}", flush=True)
        if "ours" in results:
            parts = {
                "with elimination": "ours",
                "penalties off": "no_price",
                "authors' settings, 40 epochs": "authors",
                "authors' settings, 2000 epochs": "authors_budget",
            }
            rows = {
                name: [Recovery(**row) for row in results[part]["rows"]]
                for name, part in parts.items()
                if part in results and "agreement" in results[part]["rows"][0]  # not from an earlier layout
            }
            chart = recovery_chart(rows)
            draw(chart).write_html(self.output.with_suffix(".html"), config={"displayModeBar": False})
            write_panels({"": chart}, self.output.with_suffix(".png"))

    def ours(self) -> list[dict[str, Any]]:
        return [row for seed in range(self.seeds) for row in sweep(RANKS, WIDTHS, FitSettings(), 0.3, seed)]

    def no_elimination(self) -> list[dict[str, Any]]:
        return sweep(self.ranks, self.widths, FitSettings(elimination=False), 0.3, 0)

    def no_price(self) -> list[dict[str, Any]]:
        return sweep(self.ranks, self.widths, FitSettings(elimination=False), 0.0, 0)

    def harder(self) -> list[dict[str, Any]]:
        g = torch.Generator().manual_seed(0)
        n = N_VECTORS
        coins = random_directions(n, 16, D, g)
        data = {
            "biased, rates .02 to .5": biased_coins(n, [0.5 * (i + 1) / 24 for i in range(24)], D, g),
            "correlated, flip .1": correlated_coins(n, 16, D, g),
            "correlated, flip .02": correlated_coins(n, 16, D, g, flip=0.02),
            "cosine .3": oblique_directions(n, 16, D, g, cosine=0.3),
            "cosine .6": oblique_directions(n, 16, D, g, cosine=0.6),
            "random, 32 in 64": oblique_directions(n, 32, D, g),
            "random, 64 in 64": oblique_directions(n, 64, D, g),
            "random, 96 in 64": oblique_directions(n, 96, D, g),
            "noise, SNR 100": with_noise(coins, 100.0, g),
            "noise, SNR 10": with_noise(coins, 10.0, g),
            "noise, SNR 2": with_noise(coins, 2.0, g),
        }
        start = time.perf_counter()
        vectors = torch.stack([known.vectors for known in data.values()])
        baes = fit_baes(vectors[:, :N_TRAIN], 256)
        seconds = (time.perf_counter() - start) / len(data)
        rows = []
        for (name, known), bae in zip(data.items(), baes, strict=True):
            estimate = estimate_entropy(bae, known.vectors[N_TRAIN:])
            recovery = score(known, N_TRAIN, bae, estimate, 0, seconds)
            rows.append({"data": name, **recovery.to_dict(), "true_marginal_bits": known.marginal_bits})
        return rows

    def authors(self) -> list[dict[str, Any]]:
        """Their formulas, learning rate, batch and initial weights, on the vectors as they are, for fewer epochs."""
        return self._authors(self.authors_epochs)

    def authors_budget(self) -> list[dict[str, Any]]:
        """The same for as long as they train, in one cell."""
        return replace(self, ranks=(16,), widths=(64,))._authors(2000)

    def _authors(self, epochs: int) -> list[dict[str, Any]]:
        steps = epochs * (N_TRAIN // 512)
        return self._trained(
            lambda d_sae: TrainingBAEConfig.preset("authors", d_in=D, d_sae=d_sae, training_steps=steps),
            steps,
            AUTHORS_LR,
            False,
        )

    def covariance(self) -> list[dict[str, Any]]:
        """Our steps and learning rate, with the covariance penalty instead of elimination."""
        settings = FitSettings()

        def config(d_sae: int) -> TrainingBAEConfig:
            return TrainingBAEConfig(
                d_in=D,
                d_sae=d_sae,
                covariance_coefficient=1e-2,
                encoder_bias_init=0.0,
                entropy_start_step=round(settings.entropy_from * settings.steps),
            )

        return self._trained(config, settings.steps, settings.lr, True)

    def _trained(self, config: Any, steps: int, lr: float, standardize: bool) -> list[dict[str, Any]]:
        rows = []
        for rank, d_sae in product(self.ranks, self.widths):
            known = random_directions(N_VECTORS, rank, D, torch.Generator().manual_seed(0))
            torch.manual_seed(0)
            x = known.vectors
            if standardize:
                x = x - x[:N_TRAIN].mean(0)
                x = x * (D / x[:N_TRAIN].square().sum(1).mean()).sqrt()
            kept = self.checkpoints / f"rank_{rank}_width_{d_sae}_lr_{lr}_steps_{steps}.pt"
            bae, seconds = train_plainly(config(d_sae), x[:N_TRAIN], steps, lr, kept)
            estimate = estimate_entropy(bae, x[N_TRAIN:])
            rows.append(score(replace(known, vectors=x), N_TRAIN, bae, estimate, 0, seconds).to_dict())
        return rows


def sweep(
    ranks: tuple[int, ...], widths: tuple[int, ...], settings: FitSettings, price: float, seed: int
) -> list[dict[str, Any]]:
    """All ranks of a width are trained together."""
    return [row.to_dict() for d_sae in widths for row in recover(ranks, d_sae, seed, price, settings)]


def train_plainly(cfg: TrainingBAEConfig, x: Tensor, steps: int, lr: float, kept: Path) -> tuple[BAE, float]:
    """Adam alone, as in the authors' code: SAELens' trainer would clip the gradients. The BAE, and seconds."""
    bae = TrainingBAE(cfg)
    optimizer = torch.optim.Adam(bae.parameters(), lr=lr)
    first, seconds, order = 0, 0.0, ()
    kept.parent.mkdir(parents=True, exist_ok=True)
    if kept.exists():
        first, seconds, weights, moments = torch.load(kept)
        bae.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    start, per_epoch = time.perf_counter() - seconds, len(x) // 512
    for i in tqdm(range(first, steps), f"{cfg.d_sae} features", initial=first, total=steps, leave=False):
        epoch, batch = divmod(i, per_epoch)
        if i == first or batch == 0:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(512)
        step = TrainStepInput(
            sae_in=x[order[batch]],
            coefficients=bae.get_coefficients(),
            dead_neuron_mask=None,
            n_training_steps=i,
            is_logging_step=False,
        )
        optimizer.zero_grad()
        bae.training_forward_pass(step).loss.backward()
        optimizer.step()
        if (i + 1) % 1000 == 0:
            with written_whole(kept) as partial:
                torch.save((i + 1, time.perf_counter() - start, bae.state_dict(), optimizer.state_dict()), partial)
    return bae.to_inference(), time.perf_counter() - start


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    names = [name for name in rows[0] if name not in ("interval",)]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = (
            f"{row[name]:.3g}"
            if name in ("fvu", "seconds")
            else f"{row[name]:.2f}"
            if isinstance(row[name], float)
            else row[name]
            for name in names
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(EntropyRecovery).run()
