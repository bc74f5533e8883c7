"""What `comsem` scores and `dashboard` shows: the dictionaries of a run, or any others, with their model and a text."""

import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_lens import SAE, HookedSAETransformer

from bae_lens.activations.contexts import held_out_documents
from bae_lens.activations.device_map import DeviceMap
from bae_lens.activations.fingerprint import model_fingerprint
from bae_lens.activations.models import load_model
from bae_lens.activations.precision import Dtype, check_dtype, torch_dtype
from bae_lens.activations.sources import DEMO_TEXT, load_text
from bae_lens.comparison.experiment import FOLDER_NAME
from bae_lens.comparison.hooks import HOOKS_FOLDER
from bae_lens.comsem.collect.corpus import CorpusSettings
from bae_lens.comsem.collect.dictionaries import load_dictionary
from bae_lens.saes.loading import CONFIG_FILE
from bae_lens.storage import RUN_FILE, read_json, validated


@dataclass(frozen=True)
class AnalyzedRun:
    """What is read of a run's file."""

    model: str
    """Name of the language model."""
    model_weights: str
    """By which the model is known."""
    dataset: str
    """Name of the text."""
    text_column: str
    """Where the text is in its rows."""
    dataset_split: str
    """Of the text."""
    seed: int
    """Of the order of documents."""
    contexts: dict[str, Any]
    """How the text was cut, with `context_size`."""
    recipes: dict[str, Any]
    """By name of the dictionary."""
    model_dtype: Dtype = "float32"
    """What the model's weights were in."""


@dataclass(frozen=True)
class Text:
    """Documents by name."""

    name: str
    column: str = "text"
    """Where the text is in its rows."""
    split: str = "train"
    """Of a dataset on the hub."""
    held_out_by: int | None = None
    """Seed of the training of which only the documents held out are read; None for all documents."""

    def documents(self, seed: int, in_corpus_order: bool) -> Iterable[Any]:
        """Rows with a column `text`, in an order that `seed` decides, or the corpus'."""
        text = load_text(self.name, self.column, self.split)
        if self.held_out_by is not None:
            return held_out_documents(text, self.held_out_by, in_corpus_order)
        return text if in_corpus_order else text.shuffle(seed=seed)


@dataclass(frozen=True)
class Scored:
    """Dictionaries with the model that they read and a text."""

    dictionaries: dict[str, SAE[Any] | Path]
    """By name."""
    model: str
    """Name of the language model."""
    text: Text
    context_size: int
    """Tokens per context, BOS included."""
    model_dtype: Dtype = "float32"
    """What the model's weights are in."""
    model_weights: str | None = None
    """By which the model is known; None where that is not written down."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """With which the dictionaries were trained on the model, for TransformerLens."""
    run: Path | None = None
    """Folder of the run that they are of."""

    def load_model(self, device: str, device_map: DeviceMap | None = None) -> Any:
        """Raises ValueError if it is another one than the run's, and for a device map of a model with options.

        The run may have had it in the other of its forms: on one device, or as a bridge by a device map.
        """
        check_dtype(self.model_dtype, device)
        if self.model_options:
            if device_map is not None:
                raise ValueError(
                    f"{self.model} is read with options of TransformerLens ({', '.join(self.model_options)}), which "
                    "takes no device map; leave out --device-map"
                )
            return HookedSAETransformer.from_pretrained_no_processing(
                self.model, device=device, dtype=torch_dtype(self.model_dtype), **self.model_options
            )
        model = load_model(self.model, device, self.context_size, self.model_dtype, device_map)
        if self.run is not None:
            self._check_weights(model_fingerprint(model), device_map)
        return model

    def _check_weights(self, weights: str, device_map: DeviceMap | None) -> None:
        if weights == self.model_weights:
            return
        in_other_form = None if device_map else {"": "cpu"}
        with suppress(ValueError):  # it may have one form
            other = load_model(self.model, "cpu", self.context_size, self.model_dtype, in_other_form)
            if model_fingerprint(other) == self.model_weights:
                return
        raise ValueError(
            f"a run is read with the model that it was made with, but {self.run} had {self.model} with weights "
            f"{self.model_weights}, and they are {weights} now; bring that model back, or give folders of dictionaries "
            "instead of the run"
        )


def scored_sources(
    sources: Sequence[str], names: Sequence[str], model: str | None, text: Text | None, device: str
) -> Scored:
    """The dictionaries of a run, or of these names, as `scored_run`; or any others, as `scored_dictionaries`.

    Raises ValueError for a run with other sources or another model, and for names of dictionaries that are in no run.
    """
    if not any(map(is_run, sources)):
        if names:
            raise ValueError(
                f"dictionaries are chosen by name where they are those of a run, got {', '.join(names)}; give the "
                "folders that you mean instead"
            )
        return scored_dictionaries(sources, model, text, device)
    folder, *others = sources
    if others:
        raise ValueError("a run is scored by itself; to score its dictionaries with others, give their folders")
    if model is not None:
        raise ValueError("model is for dictionaries that are in no run; a run names its own")
    return scored_run(Path(folder), names, text)


def scored_run(folder: Path, names: Sequence[str], text: Text | None) -> Scored:
    """Dictionaries of a run, by default all that are finished, on its held-out documents or another text.

    Raises ValueError for a folder that is no run or one at several hooks, and for what is no longer there.
    """
    path = folder / RUN_FILE
    content = read_json(path)
    if isinstance(content, dict) and (hook_names := content.get("hook_names")):
        raise ValueError(
            f"dictionaries of one hook are needed, and {folder} has those of {len(hook_names)} in "
            f"{folder / HOOKS_FOLDER}; choose one of the folders there, such as {hook_names[0]}"
        )
    if isinstance(content, dict) and "vectors" in content:
        raise ValueError(
            f"{folder} holds dictionaries of vectors, and this needs tokens of a language model; choose another run"
        )
    run = validated(AnalyzedRun, content, str(path))
    for name in (run.model, run.dataset) if text is None else (run.model,):
        if Path(name).is_absolute() and not Path(name).exists():
            raise ValueError(f"{path} names {name}, which is not there; bring it back, or write there where it is")
    for name in run.recipes:
        if not re.fullmatch(FOLDER_NAME, name):
            raise ValueError(f"{path} names a dictionary {name!r}, which is no name of a folder in it; rename it")
    finished = [name for name in run.recipes if (folder / "dictionaries" / name).is_dir()]
    for name in names or finished[:1] or ("any",):
        if name not in finished:
            known = ", ".join(finished) or "none"
            raise ValueError(f"{folder} has no finished dictionary {name!r}; finished ones: {known}")
    return Scored(
        dictionaries={name: folder / "dictionaries" / name for name in names or finished},
        model=run.model,
        text=text or Text(run.dataset, run.text_column, run.dataset_split, held_out_by=run.seed),
        context_size=run.contexts["context_size"],
        model_dtype=run.model_dtype,
        model_weights=run.model_weights,
        run=folder,
    )


def scored_dictionaries(sources: Sequence[str], model: str | None, text: Text | None, device: str) -> Scored:
    """Dictionaries by folder or RELEASE/SAE_ID, on any text; the packaged one by default.

    The model is the one that all of them name, or `model`. Raises ValueError if they name none or several, and for
    what is neither run nor dictionary.
    """
    found: dict[str, SAE[Any]] = {}
    for source in sources:
        folder = Path(source)
        if folder.is_dir() and not (folder / CONFIG_FILE).exists():
            raise ValueError(
                f"{folder} holds no {RUN_FILE}; choose what demo, compare or train wrote, or folders of dictionaries, "
                f"which hold a {CONFIG_FILE}"
            )
        name = folder.resolve().name if folder.is_dir() else source.replace("/", "_")
        if name in found:
            raise ValueError(f"two dictionaries are called {name}; rename one of the folders")
        with warnings.catch_warnings():  # of options of the model, which `load_model` takes
            warnings.filterwarnings("ignore", r"\s*This SAE has non-empty model_from_pretrained_kwargs")
            found[name] = load_dictionary(source, device)
    named = {name: str(sae.cfg.metadata.model_name or "") for name, sae in found.items()}
    if model is None and not all(named.values()):
        nameless = ", ".join(name for name, its_model in named.items() if not its_model)
        raise ValueError(f"{nameless} does not say which model it reads; name it with --model")
    if model is None and len(set(named.values())) > 1:
        models = "; ".join(f"{name} reads {its_model}" for name, its_model in named.items())
        raise ValueError(f"dictionaries are scored together if they read one model, but {models}; score them apart")
    options = [dict(sae.cfg.metadata.model_from_pretrained_kwargs or {}) for sae in found.values()]
    if any(other != options[0] for other in options):
        raise ValueError(f"{', '.join(found)} read their model with different options; score them apart")
    return Scored(
        dictionaries=dict(found),
        model=model or next(iter(named.values())),
        text=text or Text(DEMO_TEXT),
        context_size=CorpusSettings().context_size,
        model_options=options[0],
    )


def is_run(source: str) -> bool:
    """Whether it is a folder that demo, compare or train wrote."""
    return (Path(source) / RUN_FILE).exists()
