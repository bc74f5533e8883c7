"""Language models and texts by name: embedded, local, or from the Hugging Face hub."""

import difflib
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from bae_lens.activations.demo_model import demo_dataset, load_demo_model, load_hooked

DEMO_MODEL, DEMO_TEXT = "smollm2", "sotu"
LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
TEXT_COLUMN = "text"


def load_model(name: str, device: str = "cpu") -> Any:
    """A model with hooks: `"smollm2"` (embedded), a local folder, or a name on the hub, weights unprocessed.

    Models that TransformerLens converts become a `HookedSAETransformer`, all others a `SAETransformerBridge`.
    Raises ImportError if the embedded model is not installed, and what the hub raises for a name it does not know.
    """
    if name == DEMO_MODEL:
        return load_demo_model(device)
    from sae_lens import HookedSAETransformer
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from transformer_lens.loading_from_pretrained import convert_hf_model_config, get_official_model_name

    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ValueError(f"a local model folder needs a config.json, and {folder} has none")
        try:
            convert_hf_model_config(str(folder))
        except NotImplementedError:
            return SAETransformerBridge.boot_transformers(name, device=device)
        return load_hooked(folder, device)
    try:
        get_official_model_name(name)
    except ValueError:
        return SAETransformerBridge.boot_transformers(name, device=device)
    return HookedSAETransformer.from_pretrained_no_processing(name, device=device)


def located(name: str) -> str:
    """The name of a model or text as it is understood from any working directory: local paths become absolute."""
    return str(Path(name).absolute()) if name not in (DEMO_MODEL, DEMO_TEXT) and Path(name).exists() else name


def resolve_hook(model: Any, hook_name: str) -> str:
    """The name under which the model caches a hook, resolving a TransformerBridge's aliases.

    Raises ValueError for a hook that the model does not have, naming near ones.
    """
    if hasattr(model, "_resolve_hook_name"):
        hook_name = model._resolve_hook_name(hook_name)
    if hook_name not in model.hook_dict:
        near = difflib.get_close_matches(hook_name, model.hook_dict, n=4, cutoff=0.5)
        raise ValueError(f"the model has no hook {hook_name!r}; near ones: {', '.join(near) or 'none'}")
    return hook_name


def load_text(name: str, column: str = TEXT_COLUMN, split: str = "train") -> Dataset | IterableDataset:
    """Documents with a column `text`: `"sotu"` (embedded), a local file or folder, or a hub dataset (streamed).

    Local files are .txt, .jsonl, .json, .parquet or .csv. A folder of .txt files has a document a file; a single .txt
    file has a document a paragraph. `column` is the one that holds the text, `split` that of a hub dataset.
    Raises ValueError for other files and for a dataset without text.
    """
    path = Path(name)
    if name == DEMO_TEXT:
        dataset: Dataset | IterableDataset = demo_dataset()
    elif path.is_dir():
        dataset = _load_files("text", sorted(path.rglob("*.txt")), path, sample_by="document")
    elif path.suffix in LOADERS:
        options = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
        dataset = _load_files(LOADERS[path.suffix], [path] if path.is_file() else [], path, **options)
    elif path.is_file():
        raise ValueError(f"a text file must end in one of {', '.join(LOADERS)}, got {path}")
    else:
        dataset = load_dataset(name, split=split, streaming=True)
    return _with_text_column(dataset, column, name)


def _with_text_column(dataset: Any, column: str, name: str) -> Dataset | IterableDataset:
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"{name} holds no documents")
    if not isinstance(row.get(column), str):
        raise ValueError(f"{name} has no column {column!r} of strings; choose its text column among {', '.join(row)}")
    if column == TEXT_COLUMN:
        return dataset
    others = [other for other in row if other != column]
    return dataset.remove_columns(others).rename_column(column, TEXT_COLUMN)


def _load_files(loader: str, files: list[Path], path: Path, **options: Any) -> Dataset:
    if not files:
        raise ValueError(f"found no text at {path}")
    try:
        dataset = load_dataset(loader, data_files=[str(file) for file in files], split="train", **options)
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{path} holds no documents that can be read: {error.__cause__ or error}") from error
    assert isinstance(dataset, Dataset)
    return dataset
