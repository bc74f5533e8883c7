import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from bae_lens.activations import sources
from bae_lens.activations.sources import load_text, texts


def write(path: Path, values: Sequence[str | None]) -> None:
    """A file of one column `text`, or of paragraphs."""
    path.parent.mkdir(exist_ok=True)
    rows = [{"text": value} for value in values]
    if path.suffix == ".txt":
        path.write_text("\n\n".join(map(str, values)))
    elif path.suffix == ".csv":
        path.write_text("\n".join(["text", *map(str, values)]))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))


def read(name: Any) -> list[str]:
    return list(texts(load_text(str(name))))


def test_text_file_has_a_document_a_paragraph(tmp_path):
    (tmp_path / "one.txt").write_text("first line\nsecond line\n\nanother paragraph\n")
    assert [text.strip() for text in read(tmp_path / "one.txt")] == [
        "first line\nsecond line",
        "another paragraph",
    ]


def test_folder_has_a_document_a_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"file {name}\n\nstill {name}")
    assert read(tmp_path) == ["file a\n\nstill a", "file b\n\nstill b"]


def test_jsonl_file_has_a_document_a_line(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read(path) == ["one", "two"]


def test_text_that_is_none_is_refused(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"content": "one"}\n')
    with pytest.raises(ValueError, match=r"has no column 'text' of strings; choose its text column among content"):
        load_text(str(path))
    with pytest.raises(ValueError, match="found no text"):
        load_text(str(tmp_path / "missing.txt"))
    (tmp_path / "book.pdf").write_text("")
    with pytest.raises(ValueError, match=r"must end in one of .txt"):
        load_text(str(tmp_path / "book.pdf"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds no documents"):
        load_text(str(tmp_path / "empty.txt"))


def test_text_can_be_in_another_column(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "no", "body": "one"}\n{"text": "no", "body": "two"}\n')
    dataset: Any = load_text(str(path), column="body")
    assert list(dataset) == [{"text": "one"}, {"text": "two"}]


def test_hub_dataset_is_streamed(monkeypatch):
    def stream(name, split, streaming):
        return Dataset.from_dict({"text": [f"{name} {split} {streaming}"]})

    monkeypatch.setattr(sources, "load_dataset", stream)
    assert read("someone/texts") == ["someone/texts train True"]


NAMES = ("notes[1]", "talk by *", "what?", "a{b,c}", "x#y%20", "corpus [2024]/a", "-", "ä ö")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_a_file_is_that_of_the_file(tmp_path, name, suffix):
    for written, text in ((name, "right"), ("notes1", "wrong"), ("talk by a", "wrong"), ("whats", "wrong")):
        write(tmp_path / f"{written}{suffix}", [text])
    assert [text.strip() for text in read(tmp_path / f"{name}{suffix}")] == ["right"]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".csv"])
def test_empty_files_of_any_type_are_refused_by_their_name(tmp_path, suffix):
    path = tmp_path / f"empty{suffix}"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"empty{re.escape(suffix)} holds no documents: it is empty"):
        load_text(str(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_row_without_text_is_named_as_it_stands_in_the_file(tmp_path, suffix):
    write(tmp_path / f"gaps{suffix}", ["one", "two", None, "four", None])
    with pytest.raises(ValueError, match=rf"row 2 of .*gaps{re.escape(suffix)} has no text in its column 'text'"):
        load_text(str(tmp_path / f"gaps{suffix}"))


def test_words_that_pandas_takes_for_missing_are_text(tmp_path):
    words = ["NA", "null", "nan", "None", "n/a"]
    write(tmp_path / "words.csv", words)
    assert read(tmp_path / "words.csv") == words


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (
            DatasetDict({"train": Dataset.from_dict({"text": ["a"]})}),
            "choose one of the splits train: documents are rows",
        ),
        (Dataset.from_dict({"input_ids": [[1, 2]]}), "row 0 has no column 'text' but input_ids; .* not tokenized"),
        (["one", None], "row 1 of the text holds None instead of a string"),
        ([{"text": "one"}, {"text": 2}], "row 1 of the text holds 2 instead of a string"),
    ],
)
def test_documents_that_are_none_are_refused(documents, message):
    with pytest.raises(ValueError, match=message):
        list(texts(documents))


def test_name_that_datasets_takes_for_several_places_is_refused(tmp_path):
    (tmp_path / "a::b.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a::b.txt has :: in its name, .*; rename it"):
        load_text(str(tmp_path / "a::b.txt"))
