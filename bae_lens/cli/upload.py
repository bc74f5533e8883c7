"""`bae-lens upload`."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from urllib.parse import quote

import tyro
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from sae_lens import upload_saes_to_huggingface

from bae_lens.comparison.hooks import HOOKS_FOLDER
from bae_lens.report.card import CARD_FILE, DICTIONARY, PICTURE, REPOSITORY, without_folders
from bae_lens.saes.loading import CONFIG_FILE, WEIGHTS_FILE
from bae_lens.storage import read_json, write_json

# Of the library that the hub's client makes requests with, whichever that is, and of the system.
REQUEST_ERRORS: tuple[Any, ...] = (OSError, *HfHubHTTPError.__bases__)


@dataclass(frozen=True)
class Upload:
    """Upload dictionaries with their model cards to the Hugging Face hub; hf auth login comes first.

    SAE.from_pretrained(REPO_ID, NAME) of SAELens loads them again, after import bae_lens.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A dictionary's folder, or the --output of train, compare or demo, of which all dictionaries are uploaded."""
    repo_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO_ID")]
    """Repository on the hub, as USER/NAME; it is created if it is not there."""

    def run(self) -> str:
        """Uploads, and says what is where.

        Raises ValueError for a folder without dictionaries and a name that no repository can have, and ConnectionError
        if the hub cannot be reached or refuses.
        """
        validate_repo_id(self.repo_id)
        folders = dictionaries_in(self.folder)
        try:
            kept = self._upload(folders)
        except REQUEST_ERRORS as error:
            raise ConnectionError(
                f"{self.repo_id} could not be uploaded: {' '.join(str(error).split())}; check the connection, the name "
                "and the login (hf auth login), and run the same command again"
            ) from error
        names = ", ".join(folders)
        return f"uploaded to {self.repo_id}: {names}" + (f"; its {CARD_FILE} was there and stays" if kept else "")

    def _upload(self, folders: Mapping[str, Path]) -> bool:
        """Dictionaries by SAELens' function, then the cards. Whether the repository had one of its own, which stays."""
        cards = {
            name: (home / CARD_FILE)
            .read_text(encoding="utf-8")
            .replace(REPOSITORY, self.repo_id)
            .replace(DICTIONARY, name)
            for name, home in folders.items()
            if (home / CARD_FILE).exists()
        }
        with TemporaryDirectory() as place:
            shown = {name: copied_without_folders(home, Path(place) / name) for name, home in folders.items()}
            upload_saes_to_huggingface(dict(shown), self.repo_id, add_default_readme=not cards)
        if not cards:
            return False
        hub = HfApi()
        kept = hub.file_exists(self.repo_id, CARD_FILE)
        files: dict[str, str | bytes] = {f"{name}/{CARD_FILE}": card for name, card in cards.items()}
        for name in cards:
            if (folders[name] / PICTURE).exists():
                files[f"{name}/{PICTURE}"] = (folders[name] / PICTURE).read_bytes()
        if not kept:
            files[CARD_FILE] = repository_card(cards)
        operations = [
            CommitOperationAdd(path, content.encode() if isinstance(content, str) else content)
            for path, content in files.items()
        ]
        hub.create_commit(self.repo_id, operations, commit_message="Add model cards")
        return kept


def copied_without_folders(home: Path, copy: Path) -> Path:
    """A copy of a dictionary whose config names the model and text that it was trained on without local folders."""
    shutil.copytree(home, copy)
    config = read_json(copy / CONFIG_FILE)
    metadata = config.get("metadata", {})
    for name in ("model_name", "dataset_path"):
        if isinstance(metadata.get(name), str):
            metadata[name] = without_folders(metadata[name])
    write_json(copy / CONFIG_FILE, config)
    return copy


def dictionaries_in(folder: Path) -> dict[str, Path]:
    """The dictionaries of a folder, or the folder if it is one, by the name that each gets in a repository.

    Those of further seeds end in `_seed` and the seed; of a run at several hooks, the hook's folder comes first.
    Raises ValueError if there is none.
    """
    if _is_dictionary(folder):
        return {folder.absolute().name: folder}
    named: dict[str, Path] = {}
    for run, at in ((folder, ""), *((run, f"{run.name}/") for run in sorted((folder / HOOKS_FOLDER).glob("*")))):
        named |= {f"{at}{home.name}": home for home in sorted(run.glob("dictionaries/*"))}
        seeds = sorted(run.glob("seeds/*/dictionaries/*"))
        named |= {f"{at}{home.name}_seed{home.parents[1].name}": home for home in seeds}
    found = {name: home for name, home in named.items() if _is_dictionary(home)}
    if not found:
        raise ValueError(
            f"no dictionary is in {folder}; name the folder of one, with {CONFIG_FILE} and {WEIGHTS_FILE}, or the "
            "--output of train, compare or demo"
        )
    return found


def _is_dictionary(folder: Path) -> bool:
    whole = not folder.name.startswith(".")  # what is being written is hidden
    return whole and (folder / CONFIG_FILE).exists() and (folder / WEIGHTS_FILE).exists()


def repository_card(cards: Mapping[str, str]) -> str:
    """The cards of all dictionaries as the one that a repository opens with, with the pictures where they lie there."""
    read = {name: ModelCard(card) for name, card in cards.items()}
    tags = dict.fromkeys(tag for card in read.values() for tag in card.data.get("tags", []))
    front = ModelCardData(library_name="saelens", tags=list(tags)).to_yaml()
    bodies = (card.text.strip().replace(f"({PICTURE})", f"({quote(name)}/{PICTURE})") for name, card in read.items())
    return "\n\n".join([f"---\n{front}\n---", *bodies]) + "\n"
