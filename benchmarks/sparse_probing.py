r"""Sparse probing by sae-probes 0.4.2 (arXiv 2502.16681): how well do the k best features of a dictionary tell a label?

In an environment of its own, where its tasks come with the package and nothing is fetched:

pip install -e ".[demo]" sae-probes==0.4.2
bae-lens compare --output runs/probing --architectures bae binary_topk standard topk gated \
    --training-tokens 262144 --cached-tokens 98304 --no-every-help
python benchmarks/sparse_probing.py --runs runs/probing --output runs/sparse_probing

Feature selection, logistic regression with its search for the penalty, and measures are sae-probes' own functions. What
is finished is kept; the same command goes on.
"""
# pyright: reportMissingImports=false

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from interval import mean_and_difference
from machine import machine
from random_features import random_features
from sae_probes import DATASETS
from sae_probes.generate_model_activations import _process_activations
from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization
from sae_probes.utils_data import get_train_test_indices, get_yvals, read_numbered_dataset_df
from sae_probes.utils_training import find_best_reg
from torch import Tensor
from tqdm import tqdm

from bae_lens import BAE, CachedActivations, load_demo_model
from bae_lens.activations.hook_names import check_different
from bae_lens.functional.rate_distortion import covariance
from bae_lens.saes.loading import load_dictionary
from bae_lens.storage import RUN_FILE, claimed, read_json, write_json, written_whole

Features = Callable[[Tensor], Tensor]
DENSE = "all dimensions"
LAST = 1024  # tokens of a prompt, of which sae-probes keeps the last


@dataclass(frozen=True)
class Task:
    """Rows of one of sae-probes' binary tasks, each of another text."""

    name: str
    prompts: list[str]
    """Those to train on, then those to test on."""
    labels: np.ndarray


@dataclass(frozen=True)
class SparseProbing:
    """What is probed, on how much."""

    runs: tuple[Path, ...]
    """Folders of `bae-lens compare`, each with its own hook."""
    output: Path
    """Folder for activations and results."""
    tasks: int = 24
    """A seeded sample of those with prompts of `characters` in the mean, at most."""
    characters: int = 100
    """Of a prompt, in the mean over a task: long prompts take most of the time."""
    train_rows: int = 384
    """To learn from; sae-probes takes 1024."""
    test_rows: int = 192
    """To test on. As many of either class as of the other."""
    ks: tuple[int, ...] = (1, 4, 16, 64)
    """Features that a probe sees: those whose means differ most between the classes."""
    seed: int = 42
    """sae-probes' own; of the rows, the tasks and the folds."""
    summary: Path = field(default=Path(__file__).parent / "results" / "sparse_probing.json")

    def run(self) -> None:
        runs = [read_json(folder / RUN_FILE) for folder in self.runs]
        hooks = [str(run["hook_name"]) for run in runs]
        check_different(hooks)
        settings = {name: value for name, value in asdict(self).items() if name not in ("runs", "output", "summary")}
        with claimed(self.output, {**settings, "runs": runs}):
            self._run(hooks)

    def _run(self, hooks: list[str]) -> None:
        tasks = self._tasks()
        self._activations(tasks, hooks)
        results = {hook: self._probed(folder, hook, tasks) for folder, hook in zip(self.runs, hooks, strict=True)}
        write_json(self.summary, {**machine(), "tasks": [task.name for task in tasks], "auc": results})
        for hook, by_name in results.items():
            print(f"\n{hook}: AUC over {len(tasks)} tasks, and less the BAE's\n\n{self._table(by_name)}")

    def _tasks(self) -> list[Task]:
        half = (self.train_rows + self.test_rows) / 2
        frames = {name: read_numbered_dataset_df(name) for name in DATASETS}
        fitting = [
            name
            for name, frame in frames.items()
            if frame["prompt"].str.len().mean() <= self.characters and np.bincount(get_yvals(name)).min() >= half
        ]
        if len(fitting) < self.tasks:
            raise ValueError(
                f"{len(fitting)} tasks have prompts of {self.characters} characters in the mean at most and {half:g} "
                f"rows of either class, and {self.tasks} were asked for; choose fewer tasks or rows, or more characters"
            )
        tasks = []
        for name in sorted(random.Random(self.seed).sample(fitting, self.tasks), key=DATASETS.index):
            labels = get_yvals(name)
            rows = np.concatenate(get_train_test_indices(labels, self.train_rows, self.test_rows, seed=self.seed))
            tasks.append(Task(name, frames[name]["prompt"].iloc[rows].tolist(), labels[rows]))
        print(f"{self.tasks} of {len(fitting)} tasks: {', '.join(task.name for task in tasks)}")
        return tasks

    def _activations(self, tasks: list[Task], hooks: list[str]) -> None:
        """At the last token of each prompt."""
        missing = [task for task in tasks if not self._path(task).exists()]
        model = load_demo_model() if missing else None
        for task in tqdm(missing, "activations"):
            order = sorted(range(len(task.prompts)), key=lambda i: len(task.prompts[i]))  # little padding
            found = _process_activations(model, [task.prompts[i] for i in order], 32, LAST, hooks, None, "cpu")
            in_place = {hook: torch.empty_like(x).index_copy_(0, torch.tensor(order), x) for hook, x in found.items()}
            self._path(task).parent.mkdir(parents=True, exist_ok=True)
            with written_whole(self._path(task)) as partial:
                torch.save(in_place, partial)

    def _path(self, task: Task) -> Path:
        return self.output / "activations" / f"{task.name}.pt"

    def _probed(self, folder: Path, hook: str, tasks: list[Task]) -> dict[str, dict[str, list[float]]]:
        """Test AUC by features, k and task."""
        states = {task.name: torch.load(self._path(task))[hook].float() for task in tasks}
        results: dict[str, dict[str, list[float]]] = {}
        for name, features in [*_dictionaries(folder), *_baselines(folder, hook), (DENSE, lambda x: x)]:
            path = self.output / hook / f"{name}.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                found = [self._auc(name, features(states[task.name]), task.labels) for task in tqdm(tasks, name)]
                write_json(path, {k: [by_k[k] for by_k in found] for k in found[0]})
            results[name] = read_json(path)
        return results

    @torch.no_grad()
    def _auc(self, name: str, features: Tensor, labels: np.ndarray) -> dict[str, float]:
        x, x_test = features.split([self.train_rows, self.test_rows])
        y, y_test = labels[: self.train_rows], labels[self.train_rows :]
        best = get_sorted_indices(x, torch.from_numpy(y), mean_act_normalization)
        chosen = {"all": best} if name == DENSE else {str(k): best[:k] for k in self.ks}
        return {k: self._probe(x[:, columns], y, x_test[:, columns], y_test) for k, columns in chosen.items()}

    def _probe(self, x: Tensor, y: np.ndarray, x_test: Tensor, y_test: np.ndarray) -> float:
        found = find_best_reg(x.numpy(), y, x_test.numpy(), y_test, penalty="l2", seed=self.seed)
        return round(found.metrics.test_auc, 4)

    def _table(self, results: dict[str, dict[str, list[float]]]) -> str:
        ks = [str(k) for k in self.ks]
        lines = [f"| features | {' | '.join(f'k = {k}' for k in ks)} |", f"| --- |{' ---: |' * len(ks)}"]
        for name, by_k in results.items():
            cells = [mean_and_difference(by_k.get(k, by_k.get("all", [])), results["BAE"][k]) for k in ks]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def _dictionaries(folder: Path) -> Iterator[tuple[str, Features]]:
    for path in sorted((folder / "dictionaries").iterdir()):
        sae = load_dictionary(path)
        yield path.name, lambda x, sae=sae: _dense(sae.encode(x))
        if isinstance(sae, BAE) and sae.cfg.architecture() == "bae":
            graded = sae.to_graded_sae()
            yield f"{path.name}, graded", graded.encode
            yield f"{path.name}, pre-activations", lambda x, sae=sae: x @ sae.W_enc + sae.b_enc


def _baselines(folder: Path, hook: str) -> Iterator[tuple[str, Features]]:
    """Of which nothing was trained, or PCA alone, on the tokens that the dictionaries were trained on."""
    train = CachedActivations(folder / "activations" / "train", hook)
    x = train.rows(train.content[:: -(-len(train.content) // 32_768)])
    mean, d_sae = x.mean(0), 4 * train.d_in
    components = torch.linalg.eigh(covariance(x)).eigenvectors.flip(1).float()
    directions, threshold = random_features(x, d_sae)
    yield "random features", lambda x: ((x - mean) @ directions >= threshold).float()
    yield "PCA", lambda x: (x - mean) @ components
    yield "PCA, signs", lambda x: ((x - mean) @ components > 0).float()
    yield "dimensions", lambda x: x
    yield "dimensions, signs", lambda x: (x > mean).float()


def _dense(feature_acts: Tensor) -> Tensor:
    return feature_acts.to_dense() if feature_acts.is_sparse else feature_acts


if __name__ == "__main__":
    tyro.cli(SparseProbing).run()
