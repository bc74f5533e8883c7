"""A comparison under way: dictionaries trained, chosen and measured on activations that are there."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain
from math import log
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens import SAE

from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.paired import PairedActivations
from bae_lens.activations.streaming import StreamedActivations
from bae_lens.comparison.baselines import Baselines
from bae_lens.comparison.experiment import Contender, Experiment
from bae_lens.comparison.origin import ModelOrigin, VectorOrigin
from bae_lens.comparison.results import Comparison, Corpus, DictionaryResult, Run, Trial
from bae_lens.distributed.exchange import barrier, gather
from bae_lens.distributed.homes import is_first_at_home
from bae_lens.distributed.work import share
from bae_lens.evaluation.features import FeatureDashboard
from bae_lens.evaluation.metrics import DictionaryMetrics, evaluate_dictionary
from bae_lens.evaluation.model_loss import LanguageModelLoss
from bae_lens.file_exchange import bring_together
from bae_lens.storage import Stopwatch, read_json, validated, write_json, written_whole
from bae_lens.training.recipe import Recipe
from bae_lens.training.tracking import Tracking
from bae_lens.training.trainer import TrainedDictionary, can_share_steps, train_dictionary

STREAMED_FILE = "streamed.json"  # the `Corpus` that was streamed, as it was when training ended
L0_TOLERANCE = 0.25  # how far from the asked L0 a trial may be, relative, to be chosen for its explained variance

OnMeasured = Callable[[str, DictionaryMetrics], None]


class _Training(NamedTuple):
    """A dictionary to be trained, or one that is pretrained and has no recipe, and in which folder it is kept."""

    name: str
    recipe: Recipe | None
    seed: int
    folder: Path

    @property
    def home(self) -> Path:
        """Of the dictionary and its measures, or of the measures alone."""
        return self.folder / ("pretrained" if self.recipe is None else "dictionaries") / self.name


class _Untrained(NamedTuple):
    """A pretrained dictionary in the place of a `TrainedDictionary`."""

    sae: SAE[Any]
    seconds: None = None
    memory_gib: None = None
    curve: tuple[()] = ()


class Comparing:
    """The parts of a comparison that is under way, each of which is kept as a file when it is done."""

    def __init__(
        self,
        origin: ModelOrigin | VectorOrigin,
        splits: dict[str, dict[str, CachedActivations]],
        contenders: Mapping[str, Contender],
        experiment: Experiment,
        folder: Path,
        stopwatch: Stopwatch,
        device: str,
        on_measured: OnMeasured,
        shard_features: bool,
        tracking: Tracking,
        streamed: StreamedActivations | None,
    ) -> None:
        self.origin, self.splits, self.contenders, self.experiment = origin, splits, contenders, experiment
        self.folder, self.stopwatch, self.device = folder, stopwatch, device
        self.on_measured, self.shard_features, self.tracking = on_measured, shard_features, tracking
        self.streamed = streamed

    def result(self, share_steps: bool) -> Comparison:
        """Trains and measures what is not there yet, and puts all together."""
        tried = {name: self._tried(name, contender) for name, contender in self.contenders.items()}
        self._share(list(chain.from_iterable(tried.values())), self._try, share_steps)
        chosen = {name: self._choose(name, trainings) for name, trainings in tried.items()}
        barrier()  # before the dictionaries that are chosen are looked for
        trainings = [
            self._training(name, recipe, seed)
            for name, (recipe, _) in chosen.items()
            for seed in self.experiment.seeds[: 1 if recipe is None else None]
        ]
        self._share(trainings, self._train_and_measure, share_steps)
        trained = {(each.name, each.seed): self._trained(each) for each in trainings}
        losses = self._language_model_losses(trainings, trained)
        metrics = {(each.name, each.seed): self._measure(each, trained[each.name, each.seed].sae) for each in trainings}
        first = self.experiment.seeds[0]
        dashboards = {
            each.name: partial(
                self._dashboards,
                each,
                trained[each.name, first].sae,
                metrics[each.name, first].code.firing_rates,
            )
            for each in trainings
            if each.seed == first
        }
        make_baselines = partial(self._baselines, max(dictionary.sae.cfg.d_sae for dictionary in trained.values()))
        share([make_baselines, *dashboards.values()], lambda make: make())
        bring_together(self.folder)
        self.stopwatch.compare_notes()
        baselines = make_baselines()
        return Comparison(
            self.experiment,
            self._trained_on(),
            self.origin.corpus(self._states("test")),
            list(self.stopwatch.stages.values()),
            baselines.pca,
            baselines.gaussian_bound,
            baselines.sign_coding,
            [
                self._dictionary_result(name, recipe, trials, trained, metrics, losses, dashboards[name]())
                for name, (recipe, trials) in chosen.items()
            ],
            split=self.origin.split,
            random_coding=baselines.random_coding,
        )

    def _share(self, trainings: list[_Training], work: Callable[[_Training], None], share_steps: bool) -> None:
        """Each is worked on in one process; but first, if so wished, all train those that can be trained together."""
        for training in trainings:
            if share_steps and training.recipe is not None and can_share_steps(training.recipe.cfg):
                self._train(training)
        share(trainings, work)
        bring_together(self.folder)
        self.stopwatch.compare_notes()

    def _states(self, split: str) -> CachedActivations:
        return self.splits[split][self.experiment.hook_name]

    def _trained_on(self) -> Corpus:
        """What was trained on."""
        if self.streamed is None:
            return self.origin.corpus(self._states("train"))
        path = self.folder / STREAMED_FILE
        return validated(Corpus, read_json(path), str(path))

    def _training(self, name: str, recipe: Recipe | None, seed: int) -> _Training:
        return _Training(name, recipe, seed, self.experiment.seed_folder(self.folder, seed))

    def _tried(self, name: str, contender: Contender) -> list[_Training]:
        """What there is to choose from; nothing if there is a single recipe, or none."""
        if len(contender.trials) <= 1:
            return []
        first, trials = self.experiment.seeds[0], self.folder / "trials"
        return [_Training(name, recipe, first, trials / str(i)) for i, recipe in enumerate(contender.trials)]

    def _try(self, training: _Training) -> None:
        trained, path = self._train(training), training.home / "trial.json"
        if not path.exists():
            with self.stopwatch.stage(f"tune {training.name}"):
                metrics = self._evaluate(training.name, trained.sae, "tune")
            explained = (metrics.explained_variance, metrics.code.informative_l0, metrics.bits)
            assert training.recipe is not None
            write_json(path, Trial(training.recipe.to_dict(), *explained))

    def _choose(self, name: str, tried: list[_Training]) -> tuple[Recipe | None, list[Trial]]:
        """The recipe to use, and what it was chosen from; its dictionary of the first seed is trained already."""
        if not tried:
            return next(iter(self.contenders[name].trials), None), []
        paths = [training.home / "trial.json" for training in tried]
        trials = [validated(Trial, read_json(path), str(path)) for path in paths]
        best = tried[best_trial(trials, self.experiment.l0)]
        home = self._training(*best[:3]).home
        if is_first_at_home() and not home.exists():
            home.parent.mkdir(exist_ok=True)
            with written_whole(home) as partial:
                shutil.copytree(best.home, partial)
        return best.recipe, trials

    def _train_and_measure(self, training: _Training) -> None:
        self.on_measured(training.name, self._measure(training, self._train(training).sae))

    def _train(self, training: _Training) -> TrainedDictionary | _Untrained:
        if training.recipe is None:
            return self._trained(training)
        with self.stopwatch.stage(f"train {training.name}"):
            return self._trained(training)

    def _trained(self, training: _Training) -> TrainedDictionary | _Untrained:
        name, recipe, seed, folder = training
        contender, train = self.contenders[name], self.splits["train"]
        if recipe is None:
            assert contender.pretrained is not None
            return _Untrained(contender.pretrained.sae.to(self.device))
        sides = [train[hook] for hook in contender.hooks(self.experiment.hook_name)]
        cached = sides[0] if contender.hook_name is None else PairedActivations(*sides)
        placed = (self.device, self.origin.metadata, self.shard_features, self.tracking)
        states = self.streamed or cached
        trained = train_dictionary(name, recipe, states, self.experiment.training, folder, seed, *placed)
        path = self.folder / STREAMED_FILE
        if self.streamed is not None and is_first_at_home() and not path.exists():
            write_json(path, self.origin.corpus(self.streamed))
        return trained

    def _evaluate(self, name: str, sae: SAE[Any], split: str) -> DictionaryMetrics:
        hooks = self.contenders[name].hooks(self.experiment.hook_name)
        sides = [self.splits[split][hook] for hook in hooks]
        inputs, *targets = [side.rows(side.content) for side in sides]
        return evaluate_dictionary(sae, inputs, *targets, optimize=self.experiment.every_help and split == "test")

    def _measure(self, training: _Training, sae: SAE[Any]) -> DictionaryMetrics:
        path = training.home / "metrics.json"
        if not path.exists():
            with self.stopwatch.stage(f"measure {training.name}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, self._evaluate(training.name, sae, "test"))
        return validated(DictionaryMetrics, read_json(path), str(path))

    def _language_model_losses(
        self, trainings: list[_Training], trained: Mapping[tuple[str, int], TrainedDictionary | _Untrained]
    ) -> Mapping[tuple[str, int], LanguageModelLoss | None]:
        if not self.origin.predicts:
            return dict.fromkeys(trained)
        saes = {key: dictionary.sae for key, dictionary in trained.items()}
        paths = {(each.name, each.seed): each.home / "language_model.json" for each in trainings}
        missing = {key for there in gather([key for key in saes if not paths[key].exists()]) for key in there}
        if missing:
            with self.stopwatch.stage("language model's loss"):
                losses = self.origin.losses({"/".join(map(str, key)): saes[key] for key in saes if key in missing})
            for key in missing if is_first_at_home() else ():
                write_json(paths[key], losses["/".join(map(str, key))])
            barrier()
        return {key: validated(LanguageModelLoss, read_json(path), str(path)) for key, path in paths.items()}

    def _dashboards(self, training: _Training, sae: SAE[Any], firing_rates: list[float]) -> list[FeatureDashboard]:
        path = training.home / "features.json"
        if not path.exists():
            states = self.splits["test"][self.contenders[training.name].hooks(self.experiment.hook_name)[0]]
            with self.stopwatch.stage(f"dashboards of {training.name}"):
                dashboards = self.origin.dashboards(sae, states, firing_rates)
            write_json(path, [asdict(dashboard) for dashboard in dashboards])
        return [validated(FeatureDashboard, dashboard, str(path)) for dashboard in read_json(path)]

    def _baselines(self, d_sae: int) -> Baselines:
        path = self.folder / "baselines.json"
        if not path.exists():
            with self.stopwatch.stage("baselines"):
                write_json(path, Baselines.of(self._states("train"), self._states("test"), d_sae))
        return validated(Baselines, read_json(path), str(path))

    def _dictionary_result(
        self,
        name: str,
        recipe: Recipe | None,
        trials: list[Trial],
        trained: Mapping[tuple[str, int], TrainedDictionary | _Untrained],
        metrics: dict[tuple[str, int], DictionaryMetrics],
        losses: Mapping[tuple[str, int], LanguageModelLoss | None],
        features: list[FeatureDashboard],
    ) -> DictionaryResult:
        contender, sae = self.contenders[name], trained[name, self.experiment.seeds[0]].sae
        hooks = contender.hooks(self.experiment.hook_name)
        runs = [
            Run(
                seed,
                trained[name, seed].seconds,
                trained[name, seed].memory_gib,
                list(trained[name, seed].curve),
                metrics[name, seed],
                losses[name, seed],
            )
            for seed in self.experiment.seeds
            if (name, seed) in trained
        ]
        return DictionaryResult(
            name=name,
            architecture=(sae if recipe is None else recipe).cfg.architecture(),
            hook_name=hooks[0],
            hook_name_out=hooks[-1],
            d_sae=sae.cfg.d_sae,
            trials=trials,
            recipe={} if recipe is None else recipe.to_dict(),
            runs=runs,
            features=features,
            pretrained=None if contender.pretrained is None else contender.pretrained.source,
        )


def best_trial(trials: list[Trial], l0: float | None) -> int:
    """Index of the trial to choose: the largest explained variance among those near `l0`, or else the nearest."""
    near = [i for i, trial in enumerate(trials) if l0 is None or abs(trial.informative_l0 / l0 - 1) <= L0_TOLERANCE]
    if near:
        return max(near, key=lambda i: trials[i].explained_variance)
    assert l0 is not None
    return min(range(len(trials)), key=lambda i: abs(log(max(trials[i].informative_l0, 1e-9) / l0)))
