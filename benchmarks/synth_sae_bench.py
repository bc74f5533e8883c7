r"""SynthSAEBench (arXiv 2602.14687): dictionaries on activations with known true features, by SAELens' own metrics.

    python benchmarks/synth_sae_bench.py --output runs/synth
    python benchmarks/synth_sae_bench.py --output runs/synth16k --l0 25 --samples 200_000_000 --device cuda \
        --source decoderesearch/synth-sae-bench-16k-v1

The first is scaled down for a CPU: the published model with a quarter of its features, roots and dictionary, and a
third of its dimensions; firing probabilities, hierarchy, correlations and magnitudes are made alike. The second is the
published model at its budget. All dictionaries of a seed take their steps on the same batches; with the first seed
every learning rate is tried, also on these. What is measured of a seed is kept; the same command goes on, as one with
more seeds does.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import machine
from sae_lens import SAE, TrainingSAE
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
)
from sae_lens.synthetic.synthetic_model import LowRankCorrelationConfig, OrthogonalizationConfig
from sae_lens.training.sae_trainer import SAETrainer
from tqdm import tqdm

from bae_lens.comparison.dictionaries import default_lr, default_spec
from bae_lens.functional.losses import marginal_entropy
from bae_lens.functional.tree_entropy import PairCounts, learn_tree
from bae_lens.markdown import markdown_table
from bae_lens.saes.saelens_compat import SAE_TRAINING_CLASS_REGISTRY
from bae_lens.saes.training_config import TrainingBAEConfig
from bae_lens.storage import claimed, read_json, write_json, written_whole
from bae_lens.training.recipe import TrainingSettings
from bae_lens.training.trainer import take_step, trainer_of

SCALED = SyntheticModelConfig(
    num_features=4096,
    hidden_dim=256,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
    hierarchy=HierarchyConfig(
        total_root_nodes=32,
        branching_factor=4,
        max_depth=3,
        mutually_exclusive_portion=1.0,
        compensate_probabilities=True,
        scale_children_by_parent=True,
    ),
    orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
    correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
    mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
    bias=0.5,
    seed=42,
)
SHOWN = {  # measures, and their headings
    "explained_variance": "explained variance",
    "l0": "L0",
    "mcc": "MCC",
    "f1_score": "F1",
    "precision": "precision",
    "recall": "recall",
    "uniqueness": "uniqueness",
    "shrinkage": "shrinkage",
    "dead_latents": "dead",
    "marginal_bits": "marginal bits",
    "joint_bits": "joint bits",
}
L0_TOLERANCE = 0.1  # how far from the asked L0 a dictionary may be, relative, to be chosen for what it explains
WIDTH = 4  # true features for each of a dictionary's, as in the paper: 16,384 for 4096


@dataclass
class SynthSAEBench:
    """Which model, dictionaries and budget."""

    output: Path
    """Folder for the results."""
    source: str | None = None
    """A synthetic model on the hub or in a folder; by default the scaled one."""
    architectures: tuple[str, ...] = ("bae", "topk", "batchtopk", "jumprelu", "matryoshka_batchtopk")
    """As `bae-lens compare` names them, each with its default settings."""
    lr_factors: tuple[float, ...] = (1.0,)
    """Learning rates to try with the first seed, times `bae-lens compare`'s. Of those with about `l0` features, the one
    that explains most is used."""
    seeds: int = 3
    """Of weights and samples."""
    samples: int = 1_048_576
    """To train on."""
    batch_size: int = 1024
    """Samples in a step."""
    l0: int = 12
    """Features that are to fire for each sample."""
    eval_samples: int = 65_536
    """To measure on."""
    device: str = "cpu"
    """For everything."""

    def run(self) -> None:
        settings = {name: value for name, value in asdict(self).items() if name not in ("output", "seeds")}
        with claimed(self.output, settings):
            self._run()

    def _run(self) -> None:
        model = SyntheticModel.load_from_source(self.source or self._scaled(), device=self.device)
        truth = self._kept("truth.json", lambda: self._entropy(self._samples(model, 10**6, encode=None)))
        print(f"true features: {truth}")
        tried = self._kept(
            "seed_0.json", partial(self._rows, model, 0, dict.fromkeys(self.architectures, self.lr_factors))
        )
        best = {row["architecture"]: row for row in sorted(tried, key=self._worth)}
        chosen = {architecture: (row["lr_factor"],) for architecture, row in best.items()}
        rows = [
            *best.values(),
            *(
                row
                for seed in range(1, self.seeds)
                for row in self._kept(f"seed_{seed}.json", partial(self._rows, model, seed, chosen))
            ),
        ]
        result = {**machine(), "true_features": truth, "tried": tried, "dictionaries": rows}
        write_json(self.output / "result.json", result)
        self._show(rows)

    def _worth(self, row: dict[str, Any]) -> tuple[bool, float]:
        """Of a dictionary that was tried: first those near the asked L0, and of these the one that explains most."""
        miss = abs(row["l0"] / self.l0 - 1)
        near = miss <= L0_TOLERANCE
        return near, row["explained_variance"] if near else -miss

    def _scaled(self) -> str:
        """The folder of the scaled model, whose directions take minutes to make nearly orthogonal."""
        folder = (self.output / "model").resolve()
        if not folder.exists():
            with written_whole(folder) as partial_folder:
                SyntheticModel(SCALED).save(partial_folder)
        return str(folder)

    def _kept(self, name: str, make: Any) -> Any:
        if not (self.output / name).exists():
            write_json(self.output / name, make())
        return read_json(self.output / name)

    def _rows(self, model: SyntheticModel, seed: int, lr_factors: dict[str, tuple[float, ...]]) -> list[dict[str, Any]]:
        """What came out for each dictionary of a seed; they are trained side by side on each batch."""
        settings = TrainingSettings(training_tokens=self.samples, batch_size=self.batch_size)
        trainers = {
            (architecture, factor): self._trainer(model, architecture, factor, seed, settings)
            for architecture, factors in lr_factors.items()
            for factor in factors
        }
        torch.manual_seed(seed)
        for _ in tqdm(range(settings.steps), f"training, seed {seed}"):
            batch = model.sample(self.batch_size)
            for trainer in trainers.values():
                take_step(trainer, batch)
                trainer.n_training_steps += 1
        return [self._measured(model, *made, seed, trainer.sae) for made, trainer in trainers.items()]

    def _trainer(
        self, model: SyntheticModel, architecture: str, lr_factor: float, seed: int, settings: TrainingSettings
    ) -> SAETrainer[Any, Any]:
        d_sae = model.cfg.num_features // WIDTH
        training_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
        values = {"d_in": model.cfg.hidden_dim, "d_sae": d_sae, **default_spec(architecture, self.l0, d_sae)[1].config}
        if architecture == "bae":
            cfg = TrainingBAEConfig.preset("default", training_steps=settings.steps, **values)
        else:
            cfg = config_class(**values)
        torch.manual_seed(seed)
        lr = lr_factor * default_lr(architecture)
        return trainer_of(training_class(cfg).to(self.device), lr, settings, self.device)

    def _measured(
        self, model: SyntheticModel, architecture: str, lr_factor: float, seed: int, trained: TrainingSAE[Any]
    ) -> dict[str, Any]:
        folder = self.output / f"{architecture}_{seed}_{lr_factor:g}"
        trained.save_inference_model(folder)
        sae = SAE.load_from_disk(folder, self.device)
        torch.manual_seed(10**5 + seed)
        found = eval_sae_on_synthetic_data(
            sae, model.feature_dict, model.activation_generator, self.eval_samples, self.batch_size
        )
        bits = self._entropy(self._samples(model, 2 * 10**5 + seed, sae.encode))
        return {"architecture": architecture, "lr_factor": lr_factor, "seed": seed, **found.to_dict(), **bits}

    @torch.no_grad()
    def _samples(self, model: SyntheticModel, seed: int, encode: Any) -> Iterator[torch.Tensor]:
        """Which features fire, of the model or a dictionary that encodes; twice as many samples as are measured."""
        torch.manual_seed(seed)
        for _ in range(2 * self.eval_samples // self.batch_size):
            acts = model.activation_generator(self.batch_size)
            yield ((acts if encode is None else encode(model.feature_dict(acts))) > 0).float()

    def _entropy(self, codes: Iterator[torch.Tensor]) -> dict[str, float]:
        """Bits to say which features fire: each by itself, and along a tree learnt from half of the samples."""
        halves: list[PairCounts] = []
        for number, code in enumerate(codes):
            if number % (self.eval_samples // self.batch_size) == 0:
                halves.append(PairCounts(code))
            halves[-1].add(code)
        known, new = halves
        return {
            "l0": float(new.fired.sum()) / new.n,
            "marginal_bits": marginal_entropy(new.fired / new.n).item(),
            "joint_bits": learn_tree(known).mean_bits(new),
        }

    def _show(self, rows: list[dict[str, Any]]) -> None:
        lines = []
        for architecture in self.architectures:
            own = [{**row["classification"], **row} for row in rows if row["architecture"] == architecture]
            values = {name: torch.tensor([row[name] for row in own], dtype=torch.float64) for name in SHOWN}
            cells = [f"{each.mean():.3g} ± {(each.max() - each.min()) / 2:.2g}" for each in values.values()]
            lines.append([architecture, f"{own[0]['lr_factor']:g} x", *cells])
        print(markdown_table(["architecture", "learning rate", *SHOWN.values()], lines, 2))


if __name__ == "__main__":
    tyro.cli(SynthSAEBench).run()
