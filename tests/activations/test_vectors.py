import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from bae_lens import ContextSettings, Vectors, choose_vectors
from bae_lens.activations.vectors import VectorFiles

SETTINGS = ContextSettings(cached_tokens=10_000, held_out_tokens=10_000, tuning_tokens=10_000)


def rows_of(chosen):
    return {split: contexts.tokens.flatten() for split, contexts in chosen.items()}


@pytest.fixture
def files(tmp_path):
    """1,500 vectors in two files, of 30 videos each of which goes on in the second, with a text for each."""
    x, video = torch.randn(1_500, 4), np.arange(1_500) % 30
    parts = {"a.parquet": slice(0, 600), "b.parquet": slice(600, 1_500)}
    for name, rows in parts.items():
        vector = pa.array(x[rows].tolist(), pa.list_(pa.float32()))
        texts = [f"shot {row}" for row in range(1_500)[rows]]
        parquet.write_table(pa.table({"x": vector, "video": video[rows], "text": texts}), tmp_path / name)
    np.save(tmp_path / "video.npy", video)
    return x, torch.from_numpy(video), [str(tmp_path / name) for name in parts]


def test_documents_stay_whole(files, tmp_path):
    x, video, paths = files
    vectors = VectorFiles(tuple(paths), documents="video", labels="text").open()
    assert torch.equal(torch.cat(list(vectors)), x)
    chosen = choose_vectors(vectors, SETTINGS, tune=True)
    rows = rows_of(chosen)
    assert sorted(torch.cat([*rows.values()]).tolist()) == list(range(1_500))
    of = {split: set(video[own].tolist()) for split, own in rows.items()}
    assert {split: len(videos) for split, videos in of.items()} == {"train": 24, "test": 3, "tune": 3}
    assert of["train"].isdisjoint(of["test"] | of["tune"])
    assert of["test"].isdisjoint(of["tune"])
    assert all(torch.equal(own.sort().values, own) for own in rows.values())
    assert torch.equal(chosen["test"].document, video[rows["test"]])
    assert str(vectors.split_by()) == (
        "1,500 vectors of width 4 were split by 30 documents: one in 10 is for measuring, one for tuning, and the "
        "others are for training."
    )
    assert (vectors.row_name(599), vectors.row_name(600)) == ("row 599 of a.parquet", "row 0 of b.parquet")
    assert vectors.label(600) == "shot 600"
    by_file = VectorFiles(tuple(paths), documents=str(tmp_path / "video.npy")).open()
    assert torch.equal(rows_of(choose_vectors(by_file, SETTINGS))["test"], rows["test"])


def test_without_documents_neighbors_stay_together():
    vectors = Vectors([torch.randn(5_000, 4)])
    rows = rows_of(choose_vectors(vectors, SETTINGS, tune=True))
    assert {split: len(own) for split, own in rows.items()} == {"train": 4_000, "test": 500, "tune": 500}
    for own in rows.values():
        blocks, counts = (own // 50).unique(return_counts=True)
        assert (counts == 50).all()
    assert blocks.max() - blocks.min() > 30  # spread over all rows
    assert "100 blocks of 50 neighboring rows, since no documents were named" in str(vectors.split_by())
    assert Vectors([torch.zeros(10**6, 1)]).block_rows == 1_024
    other = rows_of(choose_vectors(vectors, SETTINGS, seed=1))
    assert not torch.equal(other["test"], rows["test"])
    assert torch.equal(rows_of(choose_vectors(vectors, SETTINGS))["test"], rows["test"])


def test_no_more_are_taken_than_asked_for():
    settings = ContextSettings(cached_tokens=1_000, held_out_tokens=70)
    rows = rows_of(choose_vectors(Vectors([torch.randn(5_000, 4)]), settings))
    assert {split: len(own) for split, own in rows.items()} == {"train": 1_000, "test": 70}
    blocks, counts = (rows["train"] // 50).unique(return_counts=True)
    assert len(blocks) == 20
    assert (counts == 50).all()


def test_too_few_are_refused():
    with pytest.raises(ValueError, match=r"9 vectors are too few to split: one in 10 is measured on"):
        choose_vectors(Vectors([torch.randn(9, 4)]), SETTINGS)
    with pytest.raises(ValueError, match="3 documents are too few"):
        choose_vectors(Vectors([torch.randn(900, 4)], documents=[i % 3 for i in range(900)]), SETTINGS)
    with pytest.raises(ValueError, match="of 600 vectors 60 are for test, where at least 64 are needed"):
        choose_vectors(Vectors([torch.randn(600, 4)]), SETTINGS)


def test_what_does_not_fit_is_refused(tmp_path):
    x = torch.randn(20, 4)
    np.save(tmp_path / "wide.npy", np.zeros((20, 5)))
    with pytest.raises(ValueError, match=re.escape("as wide as one another, got an array: 4, wide.npy: 5")):
        Vectors([x, tmp_path / "wide.npy"])
    with pytest.raises(ValueError, match="there must be one value for each of 20 vectors, got 19 documents"):
        Vectors([x], documents=[0] * 19)
    with pytest.raises(ValueError, match="one value for each of 20 vectors, got 21 labels"):
        Vectors([x], labels=["a"] * 21)
    for nothing in ([], [x[:0]]):
        with pytest.raises(ValueError, match="there are no vectors"):
            Vectors(nothing)
    with pytest.raises(ValueError, match=r"an array must hold vectors \(\.\.\., d\), got one of shape \(5,\)"):
        Vectors([torch.zeros(5)])


def test_other_vectors_have_another_fingerprint(tmp_path):
    x = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "same.npy", x)
    x[200, 3] += 1
    np.save(tmp_path / "other.npy", x)
    x, same, other = (Vectors([tmp_path / f"{name}.npy"]).fingerprint for name in ("x", "same", "other"))
    assert x == same != other
