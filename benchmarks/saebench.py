"""What does SAEBench say of dictionaries of a finished comparison, on a local model and local text?

In an environment of its own (`saebench_constraints.txt` says why):

pip install -c benchmarks/saebench_constraints.txt -e ".[demo]" sae-bench && pip uninstall -y torchvision
python benchmarks/saebench.py --run-folder demo
"""
# pyright: reportMissingImports=false

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import sae_bench.evals.core.main as core
import sae_bench.evals.sparse_probing.main as probing
import tyro
from datasets import Dataset
from machine import machine
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.sae_bench_utils import dataset_info, dataset_utils
from sae_lens import SAE, ActivationsStore
from transformer_lens import HookedTransformer

from bae_lens import BAE, CachedActivations, demo_dataset, load_demo_model
from bae_lens.activations.contexts import PADDING
from bae_lens.storage import write_text

PARTIES = {"Democratic": "Democratic", "Republican": "Republican"}
ERAS = {"until 1859": range(1790, 1860), "1860 to 1932": range(1860, 1933), "since 1933": range(1933, 2100)}


@dataclass(frozen=True)
class SAEBench:
    """SAEBench's core evaluation on the held-out contexts, and sparse probing for the party and era of a passage."""

    run_folder: Path
    """Folder of `bae-lens demo`."""
    dictionaries: tuple[str, ...] = ("BAE", "Top-k")
    """BAEs are measured through their graded view, too."""
    batch_size: int = 8
    reconstruction_batches: int = 2
    """On which the model runs three times, to its end."""
    sparsity_batches: int = 16
    train_passages: int = 60
    """Of each class."""
    test_passages: int = 30
    """Of each class, from other addresses."""
    passage_tokens: int = 64
    output: Path = Path("runs/saebench")
    """Folder for what SAEBench writes."""
    summary: Path = field(default=Path(__file__).parent / "results" / "saebench.json")

    def run(self) -> None:
        saes = self._saes()
        model = load_demo_model()
        # SAEBench loads its model by name, which must be one that TransformerLens lists
        with mock.patch.object(HookedTransformer, "from_pretrained_no_processing", return_value=model):
            self._core(saes)
            self._probing(saes)
        results = {name: self._results(name) for name, _ in saes}
        write_text(self.summary, json.dumps({**machine(), "results": results}, indent=1))

    def _saes(self) -> list[tuple[str, SAE[Any]]]:
        saes = []
        for name in self.dictionaries:
            sae = SAE.load_from_disk(self.run_folder / "dictionaries" / name)
            saes.append((name, sae))
            if isinstance(sae, BAE):
                saes.append((f"{name}, graded", sae.to_graded_sae()))
        return saes

    def _core(self, saes: list[tuple[str, SAE[Any]]]) -> None:
        hook_name = saes[0][1].cfg.metadata.hook_name
        tokens = CachedActivations(self.run_folder / "activations" / "test", hook_name).contexts.tokens
        contexts = Dataset.from_dict({"tokens": tokens[(tokens != PADDING).all(1)].tolist()})
        from_sae = ActivationsStore.from_sae

        def store(model: Any, sae: Any, dataset: str, **options: Any) -> ActivationsStore:  # noqa: ARG001
            return from_sae(model, sae, contexts, **options)

        with mock.patch.object(ActivationsStore, "from_sae", store):  # SAEBench loads its text by name, too
            core.multiple_evals(
                saes,
                n_eval_reconstruction_batches=self.reconstruction_batches,
                n_eval_sparsity_variance_batches=self.sparsity_batches,
                eval_batch_size_prompts=self.batch_size,
                compute_featurewise_density_statistics=True,
                compute_featurewise_weight_based_metrics=True,
                exclude_special_tokens_from_reconstruction=True,
                dataset="held-out contexts",
                context_size=tokens.shape[1],
                output_folder=str(self.output / "core"),
                device="cpu",
                force_rerun=True,
            )

    def _probing(self, saes: list[tuple[str, SAE[Any]]]) -> None:
        addresses = list(demo_dataset())
        classes = {
            "sotu/party": {name: [a for a in addresses if a["party"] == party] for name, party in PARTIES.items()},
            "sotu/era": {name: [a for a in addresses if a["year"] in years] for name, years in ERAS.items()},
        }
        config = SparseProbingEvalConfig(
            dataset_names=list(classes),
            model_name="smollm2",
            probe_train_set_size=self.train_passages,
            probe_test_set_size=self.test_passages,
            context_length=self.passage_tokens,
            llm_batch_size=32,
            llm_dtype="float32",
        )

        def passages(name: str, train_size: int, test_size: int, seed: int) -> tuple[dict[str, list[str]], ...]:
            rng = random.Random(seed)
            return tuple(
                {label: _passages(own[start::2], size, rng) for label, own in classes[name].items()}
                for start, size in ((0, train_size), (1, test_size))
            )

        dataset_info.chosen_classes_per_dataset.update({name: list(own) for name, own in classes.items()})
        with mock.patch.object(dataset_utils, "get_multi_label_train_test_data", passages):
            probing.run_eval(
                config,
                saes,
                "cpu",
                str(self.output / "sparse_probing"),
                force_rerun=True,
                clean_up_activations=True,
                artifacts_path=str(self.output / "artifacts"),
            )

    def _results(self, name: str) -> dict[str, Any]:
        files = {
            part: self.output / part / f"{name}_custom_sae_eval_results.json" for part in ("core", "sparse_probing")
        }
        results = {part: json.loads(file.read_text()) for part, file in files.items()}
        return {
            "core": results["core"]["eval_result_metrics"],
            "sparse_probing": results["sparse_probing"]["eval_result_details"],
        }


def _passages(addresses: list[dict[str, Any]], n: int, rng: random.Random) -> list[str]:
    """Passages of a hundred words, from addresses in turn."""
    passages = []
    for number in range(n):
        words = addresses[number % len(addresses)]["text"].split()
        start = rng.randrange(max(1, len(words) - 100))
        passages.append(" ".join(words[start : start + 100]))
    return passages


if __name__ == "__main__":
    tyro.cli(SAEBench).run()
