"""A model card beside every dictionary of a comparison, as the Hugging Face hub shows it."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from bae_lens.comparison.results import TABLE, Comparison, DictionaryResult, Run
from bae_lens.report.explanations import EXPLANATIONS
from bae_lens.saes.saelens_compat import SAE_CLASS_REGISTRY
from bae_lens.storage import write_text, written_whole

CARD_FILE, PICTURE = "README.md", "explained_variance_by_bits.png"
REPOSITORY, DICTIONARY = "<repo_id>", "<sae_id>"  # in a card that is not uploaded yet, as SAELens writes them
TAGS = ["sparse-autoencoder", "mechanistic-interpretability"]


def write_cards(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes a `README.md` beside every dictionary in a comparison's folder, and returns the paths.

    The picture of explained variance against bits goes with it if `write_pictures` has drawn it there.
    """
    picture = folder / "pictures" / PICTURE
    cards = []
    for dictionary in comparison.dictionaries:
        for run in dictionary.runs:
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
        f"## Measured\n\nOn {comparison.test.tokens:,} tokens of documents that it was not trained on.",
        _measures(dictionary, run),
    ]
    if with_picture:
        parts.append(f"![Explained variance against bits per token, beside what it was compared with]({PICTURE})")
    parts.append(_recipe(comparison, dictionary, run))
    return "\n\n".join(parts) + "\n"


def _origin(comparison: Comparison, dictionary: DictionaryResult) -> str:
    reads, writes = dictionary.hook_name, dictionary.hook_name_out
    where = f"at `{reads}`" if reads == writes else f"from `{reads}` to `{writes}`"
    return (
        f"A dictionary of {dictionary.d_sae:,} features, `{dictionary.architecture}`, {where} of "
        f"`{without_folders(comparison.experiment.model)}`, trained by bae_lens on {comparison.train.tokens:,} tokens "
        f"of `{without_folders(comparison.experiment.dataset)}`."
    )


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


def _measures(dictionary: DictionaryResult, run: Run) -> str:
    """The columns of the comparison's table, one a line."""
    alone = replace(dictionary, runs=[run])
    measures = {heading: cell(alone) for heading, cell in TABLE.items() if heading not in ("dictionary", "writes")}
    rows = [f"| {heading} | {value} | {EXPLANATIONS[heading]} |" for heading, value in measures.items()]
    return "\n".join(["| measure | value | what it is |", "| --- | ---: | --- |", *rows])


def _recipe(comparison: Comparison, dictionary: DictionaryResult, run: Run) -> str:
    experiment = comparison.experiment
    settings: dict[str, Any] = {
        "seed": run.seed,
        **asdict(experiment.training),
        **asdict(experiment.contexts),
        **dictionary.recipe,
    }
    chosen = f" The best of {len(dictionary.trials)} settings that were tried." if dictionary.trials else ""
    outliers = f"{comparison.train.outlier_tokens:,} tokens of outlying norm and all special tokens were left out."
    recipe = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return f"## Recipe\n\nIn training {outliers}{chosen}\n\n```yaml\n{recipe}```"


def without_folders(name: str) -> str:
    """Of a local path its last part: where it lies on a disk concerns nobody else."""
    return Path(name).name if Path(name).is_absolute() else name
