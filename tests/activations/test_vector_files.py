from itertools import product

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from bae_lens.activations import vector_files
from bae_lens.activations.vector_files import VectorFile, values_in


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(vector_files, "ROWS", 12)


@pytest.fixture
def vectors():
    return torch.randn(100, 8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", np.int32])
def test_npy(vectors, tmp_path, dtype):
    np.save(tmp_path / "x.npy", vectors.numpy().astype(dtype))
    batches = list(VectorFile(tmp_path / "x.npy"))
    assert [len(batch) for batch in batches] == [12] * 8 + [4]
    torch.testing.assert_close(torch.cat(batches), torch.from_numpy(vectors.numpy().astype(dtype).astype(np.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_tensors(vectors, tmp_path, suffix, dtype):
    path = tmp_path / f"x{suffix}"
    torch.save(vectors.to(dtype), path) if suffix == ".pt" else save_file({"states": vectors.to(dtype)}, path)
    file = VectorFile(path)
    torch.testing.assert_close(torch.cat(list(file)), vectors.to(dtype).float())
    torch.testing.assert_close(file.read(), vectors.to(dtype).float())
    assert [len(batch) for batch in file] == [12] * 8 + [4]


def test_tensor_saved_from_a_model(vectors, tmp_path):
    torch.save(torch.nn.Parameter(vectors).T.contiguous().T, tmp_path / "x.pt")
    (batch, *_) = VectorFile(tmp_path / "x.pt")
    assert torch.equal(batch, vectors[:12])
    assert not batch.requires_grad


def lists(rows, kind):
    """A column of lists of numbers, of whatever length."""
    return pa.array(rows, kind)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 8)])
def test_columns_of_lists(vectors, tmp_path, kind):
    path = tmp_path / "x.parquet"
    columns = {"id": list(range(100)), "vector": lists(vectors.tolist(), kind), "text": ["a"] * 100}
    parquet.write_table(pa.table(columns), path, row_group_size=30)
    for file in (VectorFile(path), VectorFile(path, "vector")):
        assert file.shape == (100, 8)
        assert len(file) == 100
        assert max(len(batch) for batch in file) <= 12
        torch.testing.assert_close(torch.cat(list(file)), vectors)


def test_one_of_several_arrays_is_chosen_by_name(vectors, tmp_path):
    save_file({"x": vectors, "y": 2 * vectors}, tmp_path / "two.safetensors")
    columns = {name: lists(vectors.tolist(), pa.list_(pa.float32())) for name in ("x", "y")}
    parquet.write_table(pa.table(columns), tmp_path / "two.parquet")
    assert torch.equal(VectorFile(tmp_path / "two.safetensors", "y").read(), 2 * vectors)
    assert VectorFile(tmp_path / "two.parquet", "x").shape == (100, 8)
    for name in ("two.safetensors", "two.parquet"):
        with pytest.raises(ValueError, match=r"it holds 2 .* instead of one, and none was named: x, y"):
            VectorFile(tmp_path / name)
        with pytest.raises(ValueError, match=r"it has no 'z' among its .*: x, y"):
            VectorFile(tmp_path / name, "z")
    np.save(tmp_path / "x.npy", vectors.numpy())
    with pytest.raises(ValueError, match=r"a \.npy file holds one array without a name, got 'x'"):
        VectorFile(tmp_path / "x.npy", "x")


@pytest.mark.parametrize("wrong", [[1.0] * 7, [1.0] * 9, None, [1.0, None, *[1.0] * 6]])
def test_rows_of_a_column_that_are_no_vectors_are_named(vectors, tmp_path, wrong):
    rows = vectors.tolist()
    rows[40] = wrong
    parquet.write_table(pa.table({"vector": lists(rows, pa.list_(pa.float32()))}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"row (40|from 36 on) of vector holds no 8 numbers|a row from 36 on"):
        VectorFile(tmp_path / "x.parquet").read()


def test_values_for_each_vector(tmp_path):
    (tmp_path / "x.txt").write_text("one\ntwo words\n\u00fc\n", encoding="utf-8")
    np.save(tmp_path / "x.npy", np.array([3, 1, 3]))
    save_file({"x": torch.zeros(3, 2), "of": torch.tensor([3, 1, 3])}, tmp_path / "x.safetensors")
    parquet.write_table(pa.table({"of": ["a", "b", "a"], "gap": [1, None, 2]}), tmp_path / "x.parquet")
    assert values_in(tmp_path / "x.txt") == ["one", "two words", "\u00fc"]
    assert values_in(tmp_path / "x.npy") == values_in(tmp_path / "x.safetensors", "of") == [3, 1, 3]
    assert values_in(tmp_path / "x.parquet", "of") == ["a", "b", "a"]
    messages = {
        ("x.parquet", "gap"): "row 1 of gap in .* has no value",
        ("x.parquet", "by"): "it has no 'by' among its columns: of, gap",
        ("x.safetensors", "x"): "must hold one value for each vector",
        ("x.csv", "of"): r"values by name are in \.parquet and \.safetensors files",
    }
    (tmp_path / "x.csv").write_text("of\n1\n")
    for (file, name), message in messages.items():
        with pytest.raises(ValueError, match=message):
            values_in(tmp_path / file, name)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.txt"):
        values_in(tmp_path / "nowhere.txt")


def test_no_vectors(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((0, 8)))
    np.save(tmp_path / "y.npy", np.zeros((3, 0, 8)))
    for name in ("x.npy", "y.npy"):
        assert VectorFile(tmp_path / name).read().shape == (0, 8)


@pytest.mark.parametrize("shape", [(20, 5, 8), (1, 100, 8), (2, 50, 1, 8), (100, 8)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_all_axes_but_the_last_count_vectors(vectors, tmp_path, shape, order):
    np.save(tmp_path / "x.npy", np.asarray(vectors.view(shape).numpy(), order=order))
    file = VectorFile(tmp_path / "x.npy")
    assert max(len(batch) for batch in file) <= 12
    assert torch.equal(torch.cat(list(file)), vectors)


@pytest.mark.parametrize(
    ("suffix", "shape"),
    [(".parquet", (-1, 5_120)), *product((".npy", ".pt", ".safetensors"), [(-1, 5_120), (1, -1, 5_120)])],
)
def test_no_more_is_in_memory_than_a_batch(tmp_path, suffix, shape):
    """Of what this process owns; pages of the file that were read can be taken back at any time."""
    vectors, path = torch.ones(4_000, 5_120).view(shape), tmp_path / f"x{suffix}"
    match suffix:
        case ".npy":
            np.save(path, vectors.numpy())
        case ".pt":
            torch.save(vectors, path)
        case ".parquet":
            flat = pa.array(vectors.flatten().numpy())
            column = pa.FixedSizeListArray.from_arrays(flat, 5_120)
            parquet.write_table(pa.table({"x": column}), path, row_group_size=100)
            del flat, column
        case _:
            save_file({"x": vectors}, path)
    del vectors

    def own() -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared

    before = own()
    most = max(own() for _ in VectorFile(path))
    assert most - before < 20 * 2**20  # of 78 MiB


class Exploding:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_hold_anything_else_are_refused(vectors, tmp_path, capsys):
    np.save(tmp_path / "code.npy", np.array([Exploding()], dtype=object))
    np.save(tmp_path / "flat.npy", np.zeros(5))
    np.save(tmp_path / "number.npy", np.array(5.0))
    np.save(tmp_path / "complex.npy", np.zeros((5, 2), complex))
    np.save(tmp_path / "bool.npy", np.zeros((5, 2), bool))
    np.save(tmp_path / "text.npy", np.array([["a", "b"]]))
    np.savez(tmp_path / "arrays.npz", np.zeros((2, 3)))
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays.npy")
    parquet.write_table(pa.table({"x": [1.0, 2.0], "y": [["a"], ["b"]]}), tmp_path / "table.parquet")
    for name in ("broken.safetensors", "broken.npy", "broken.pt", "broken.parquet"):
        (tmp_path / name).write_bytes(b"no")
    for name in ("empty.safetensors", "empty.npy", "empty.pt", "empty.parquet"):
        (tmp_path / name).write_bytes(b"")
    save_file({"x": vectors, "y": vectors.clone()}, tmp_path / "two.safetensors")
    torch.save([vectors], tmp_path / "list.pt")
    torch.save(Exploding(), tmp_path / "code.pt")
    torch.save(vectors.to_sparse(), tmp_path / "sparse.pt")
    torch.save(torch.zeros(10**12, 0), tmp_path / "narrow.pt")
    np.save(tmp_path / "narrow.npy", np.zeros((10**6, 0)))
    torch.save(torch.zeros(1).expand(10**6, 10**6), tmp_path / "expanded.pt")
    torch.save(torch.zeros(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), tmp_path / "quarter.pt")
    torch.save(vectors.to("meta"), tmp_path / "meta.pt")
    torch.save(vectors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(vectors, tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:1500])
    messages = {
        "code.npy": "cannot be read",
        "flat.npy": r"must hold vectors .* shape \(5,\)",
        "number.npy": r"must hold vectors .* shape \(\)",
        "complex.npy": "got torch.complex128",
        "bool.npy": "got torch.bool",
        "text.npy": "cannot be read",
        "arrays.npy": "numpy.save did not write it",
        "broken.safetensors": "cannot be read",
        "broken.npy": "cannot be read",
        "broken.pt": "torch.save did not write it",
        "empty.safetensors": "cannot be read",
        "empty.npy": "cannot be read",
        "empty.pt": "torch.save did not write it",
        "two.safetensors": "2 arrays instead of one",
        "table.parquet": "it holds 0 columns of lists of numbers",
        "broken.parquet": "cannot be read",
        "empty.parquet": "cannot be read",
        "list.pt": "holds a list instead of one tensor",
        "code.pt": "code or objects, which are not executed",
        "sparse.pt": "torch.sparse_coo",
        "meta.pt": "on the device meta",
        "old.pt": "since version 1.6",
        "half.pt": "cannot be read",
        "narrow.pt": r"must hold vectors .* shape \(1000000000000, 0\)",
        "narrow.npy": r"must hold vectors .* shape \(1000000, 0\)",
        "expanded.pt": "repeats its values",
        "quarter.pt": "cannot be read",
        "x.csv": r"ends in \.npy, \.pt, \.safetensors",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            VectorFile(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.npy"):
        VectorFile(tmp_path / "nowhere.npy")
    assert "executed" not in capsys.readouterr().out
