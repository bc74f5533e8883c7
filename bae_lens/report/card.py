"""A model card beside every dictionary of a comparison, as the Hugging Face hub shows it."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from bae_lens.comparison.results import Comparison, DictionaryResult, Run
from bae_lens.report.explanations import EXPLANATIONS, in_units
from bae_lens.saes.saelens_compat import SAE_CLASS_REGISTRY
from bae_lens.storage import write_text, written_whole

CARD_FILE, PICTURE = "README.md", "explained_variance_by_bits.png"
REPOSITORY, DICTIONARY = "<repo_id>", "<sae_id>"  # in a card that is not uploaded yet, as SAELens writes them
OF_VECTORS = ("cached_tokens", "held_out_tokens", "tuning_tokens")  # settings of contexts that vectors have too
TAGS = ["sparse-autoencoder", "mechanistic-interpretability"]


def write_cards(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes a `README.md` beside every dictionary trained in a comparison's folder, and returns the paths.

    The picture of explained variance against bits goes with it if `write_pictures` has drawn it there.
    """
    picture = folder / "pictures" / PICTURE
    cards = []
    for dictionary in comparison.dictionaries:
        for run in dictionary.runs if dictionary.pretrained is None else ():
            home = comparison.experiment.seed_folder(folder, run.seed) / "dictionaries" / dictionary.name
            if picture.exists():
                with written_whole(home / PICTURE) as partial:
                    shutil.copyfile(picture, partial)
            write_text(home / CARD_FILE, card(comparison, dictionary, run, with_picture=picture.exists()))
            cards.append(home / CARD_FILE)
    return cards


def card(comparison: Comparison, dictionary: DictionaryResult, run: Run, with_picture: bool) -> str:
    """The card of one dictionary, trained with one seed: front matter in YAML, then Markdown."""
    parts = [
        f"---\n{ModelCardData(library_name='saelens', tags=[dictionary.architecture, *TAGS]).to_yaml()}\n---",
        f"# {dictionary.name}",
        _origin(comparison, dictionary),
        _loading(dictionary),
        _measured_on(comparison),
        _measures(comparison, dictionary, run),
    ]
    if with_picture:
        unit = comparison.experiment.unit
        parts.append(f"![Explained variance against bits per {unit}, beside what it was compared with]({PICTURE})")
    parts.append(_recipe(comparison, dictionary, run))
    return "\n\n".join(parts) + "\n"


def _origin(comparison: Comparison, dictionary: DictionaryResult) -> str:
    reads, writes = dictionary.hook_name, dictionary.hook_name_out
    dataset = without_folders(comparison.experiment.dataset)
    what = f"A dictionary of {dictionary.d_sae:,} features, `{dictionary.architecture}`,"
    if comparison.experiment.model is None:
        return f"{what} of the vectors in `{dataset}`, trained by bae_lens on {comparison.train.tokens:,} of them."
    where = f"at `{reads}`" if reads == writes else f"from `{reads}` to `{writes}`"
    return (
        f"{what} {where} of `{without_folders(comparison.experiment.model)}`, trained by bae_lens on "
        f"{comparison.train.tokens:,} tokens of `{dataset}`."
    )


def _measured_on(comparison: Comparison) -> str:
    n = f"## Measured\n\nOn {comparison.test.tokens:,}"
    if comparison.split is None:
        return f"{n} tokens of documents that it was not trained on."
    return f"{n} vectors that it was not trained on. {comparison.split}"


def _loading(dictionary: DictionaryResult) -> str:
    # SAELens saves what it only trains under that name, such as BatchTopK, as another architecture of its own.
    registered = SAE_CLASS_REGISTRY.get(dictionary.architecture)
    ours = registered is not None and registered[0].__module__.startswith("bae_lens.")
    lines = [
        *(["import bae_lens  # which makes the architecture known to SAELens"] if ours else []),
        "from sae_lens import SAE",
        "",
        f'sae = SAE.from_pretrained("{REPOSITORY}", "{DICTIONARY}")',
    ]
    return "\n".join(["```python", *lines, "```"])


def _measures(comparison: Comparison, dictionary: DictionaryResult, run: Run) -> str:
    """The columns of the comparison's table, one a line."""
    alone = replace(dictionary, runs=[run])
    shown = {heading: cell for heading, cell in comparison.columns.items() if heading not in ("dictionary", "writes")}
    said = {heading: in_units(EXPLANATIONS[heading], comparison.experiment.unit) for heading in shown}
    rows = [f"| {heading} | {cell(alone)} | {said[heading]} |" for heading, cell in shown.items()]
    return "\n".join(["| measure | value | what it is |", "| --- | ---: | --- |", *rows])


def _recipe(comparison: Comparison, dictionary: DictionaryResult, run: Run) -> str:
    experiment = comparison.experiment
    contexts = asdict(experiment.contexts)
    if experiment.model is None:
        contexts = {name: value for name, value in contexts.items() if name in OF_VECTORS}
    settings: dict[str, Any] = {
        "seed": run.seed,
        **asdict(experiment.training),
        **contexts,
        **dictionary.recipe,
    }
    chosen = f" The best of {len(dictionary.trials)} settings that were tried." if dictionary.trials else ""
    special = " and all special tokens" if experiment.model is not None else ""
    outliers = f"{comparison.train.outlier_tokens:,} {experiment.unit}s of outlying norm{special} were left out."
    if comparison.train.sample_tokens is not None:
        streamed = "Activations were computed when they were due; their mean, scale and median norm are those of"
        outliers += f" {streamed} a sample of {comparison.train.sample_tokens:,} tokens."
    recipe = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return f"## Recipe\n\nIn training {outliers}{chosen}\n\n```yaml\n{recipe}```"


def without_folders(name: str) -> str:
    """Of a local path its last part: where it lies on a disk concerns nobody else."""
    return Path(name).name if Path(name).is_absolute() else name
