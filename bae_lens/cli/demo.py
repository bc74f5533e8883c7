"""`bae-lens demo`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bae_lens.activations.contexts import ContextSettings
from bae_lens.activations.forward import hook_widths
from bae_lens.activations.models import DEMO_MODEL
from bae_lens.activations.sources import DEMO_TEXT
from bae_lens.cli.device import DEFAULT_DEVICE
from bae_lens.cli.experiment import LOADING, REPORT, run_experiment, summary
from bae_lens.cli.progress import Progress
from bae_lens.comparison.dictionaries import ARCHITECTURES, default_spec
from bae_lens.comparison.experiment import Contender, Experiment
from bae_lens.distributed.joining import joined
from bae_lens.storage import flat
from bae_lens.training.recipe import TrainingSettings
from bae_lens.training.tracking import UNTRACKED, Tracking

CONTEXTS = ContextSettings(cached_tokens=49_152, held_out_tokens=8_192, loss_contexts=16)
TRAINING = TrainingSettings(training_tokens=196_608)
FULL_CONTEXTS = ContextSettings(cached_tokens=98_304)
FULL_TRAINING = TrainingSettings(training_tokens=393_216)
SHORT_LR = 2e-3  # with fewer steps: at the usual 1e-3 ReLU and Gated SAEs end with twice the features asked for
TRAINING_SECONDS = {"bae": 15.0, "standard": 18.0, "topk": 24.0, "gated": 41.0, "topk_transcoder": 25.0}


@dataclass(frozen=True)
class Demo:
    """Train a BAE, ReLU, Top-k and Gated SAEs and a transcoder side by side on the embedded model and text.

    Needs the extra bae-lens[demo] and no network.
    """

    output: Path = Path("demo")
    """Folder for everything the demo writes; run it again to go on after an interruption or to reuse what is there."""
    full: bool = False
    """Twice the tokens to train on and to measure on, and codes with every help, in several times the time."""
    hook_name: str = "blocks.10.hook_resid_post"
    """Where in the model the activations are taken."""
    expansion: int = 4
    """Features per dimension of the activations (d_sae / d_in)."""
    l0: int = 32
    """Features per token that BAE and Top-k are held at; the penalties of the others are fixed to come near 32."""
    contexts: ContextSettings = field(default_factory=lambda: CONTEXTS)
    """How documents are cut into contexts, and how many are cached."""
    training: TrainingSettings = field(default_factory=lambda: TRAINING)
    """How long each dictionary is trained, and on how much at a time."""
    seed: int = 0
    """Seed of the choice of documents, the order of tokens and the initial weights."""
    device: str = DEFAULT_DEVICE
    """Where the model and the dictionaries run."""
    tracking: Tracking = UNTRACKED
    """Where metrics go while dictionaries train."""

    def run(self) -> str:
        """Compares, saying how it goes on, writes the results into `output`, and returns the table."""
        experiment = Experiment(
            DEMO_MODEL,
            DEMO_TEXT,
            self.hook_name,
            contexts=self.contexts,
            training=self.training,
            l0=float(self.l0),
            seed=self.seed,
            seeds=(self.seed,),
            every_help=self.full,
        )
        with joined(self.device, self.output, flat(asdict(self))) as device:
            progress = Progress(self.expected_seconds())
            comparison = run_experiment(
                experiment,
                self.contenders,
                self.output,
                device,
                progress.on_stage,
                progress.on_measured,
                tracking=self.tracking,
            )
            return summary(comparison, self.output)

    def contenders(self, model: Any, hook_name: str) -> dict[str, Contender]:
        """The demo's dictionaries at the width of the hook."""
        d_sae = self.expansion * hook_widths(model, [hook_name])[hook_name]
        specs = [default_spec(architecture, self.l0, d_sae) for architecture in ARCHITECTURES]
        made = {name: spec.contender(model, hook_name, self.expansion, self.training.steps) for name, spec in specs}
        return made if self.full else {name: _learning_faster(contender) for name, contender in made.items()}

    def expected_seconds(self) -> dict[str, float]:
        """The stages in their order, with what they took on two idle cores, scaled to what is asked for."""
        tokens = self.contexts.cached_tokens + self.contexts.held_out_tokens
        seconds = {LOADING: 24.0, "choose contexts": tokens / 28_000, "activations": tokens / 1_500}
        names = {architecture: default_spec(architecture, self.l0, 1)[0] for architecture in ARCHITECTURES}
        for architecture, name in names.items():
            share = self.training.training_tokens / TRAINING.training_tokens
            seconds[f"train {name}"] = TRAINING_SECONDS[architecture] * share
            seconds[f"measure {name}"] = self.contexts.held_out_tokens / 1_500
        seconds["language model's loss"] = 1.9 * self.contexts.loss_contexts
        seconds["baselines"] = 10.0
        return {**seconds, **{f"dashboards of {name}": 0.3 for name in names.values()}, REPORT: 1.0}

    @classmethod
    def defaults(cls, arguments: Sequence[str]) -> "Demo":
        """What holds where these arguments of the command say nothing: with --full, the larger budget."""
        return cls(full=True, contexts=FULL_CONTEXTS, training=FULL_TRAINING) if "--full" in arguments else cls()


def _learning_faster(contender: Contender) -> Contender:
    trials = (recipe if recipe.lr > SHORT_LR else replace(recipe, lr=SHORT_LR) for recipe in contender.trials)
    return replace(contender, trials=tuple(trials))
