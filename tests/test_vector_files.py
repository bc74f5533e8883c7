import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bae_lens import vector_files
from bae_lens.vector_files import VectorFile


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(vector_files, "ROWS", 12)


@pytest.fixture
def vectors():
    return torch.randn(100, 8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy(vectors, tmp_path, dtype):
    np.save(tmp_path / "x.npy", vectors.numpy().astype(dtype))
    batches = list(VectorFile(tmp_path / "x.npy"))
    assert [len(batch) for batch in batches] == [12] * 8 + [4]
    torch.testing.assert_close(torch.cat(batches), torch.from_numpy(vectors.numpy().astype(dtype)).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors(vectors, tmp_path, dtype):
    save_file({"states": vectors.to(dtype)}, tmp_path / "x.safetensors")
    torch.testing.assert_close(torch.cat(list(VectorFile(tmp_path / "x.safetensors"))), vectors.to(dtype).float())


def test_all_axes_but_the_last_count_vectors(vectors, tmp_path):
    np.save(tmp_path / "x.npy", vectors.view(20, 5, 8).numpy())
    file = VectorFile(tmp_path / "x.npy")
    assert [len(batch) for batch in file] == [10] * 10
    assert torch.equal(torch.cat(list(file)), vectors)


def test_only_what_is_asked_for_is_read(vectors, tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", vectors.numpy())
    asked = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda path, **options: asked.append(options) or load(path, **options))
    next(iter(VectorFile(tmp_path / "x.npy")))
    assert asked == [{"mmap_mode": "r", "allow_pickle": False}]


class Exploding:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_hold_anything_else_are_refused(vectors, tmp_path, capsys):
    np.save(tmp_path / "code.npy", np.array([Exploding()], dtype=object))
    np.save(tmp_path / "flat.npy", np.zeros(5))
    np.save(tmp_path / "complex.npy", np.zeros((5, 2), complex))
    np.save(tmp_path / "text.npy", np.array([["a", "b"]]))
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "broken.npy").write_bytes(b"no")
    (tmp_path / "empty.npy").write_bytes(b"")
    save_file({"x": vectors, "y": vectors.clone()}, tmp_path / "two.safetensors")
    torch.save(vectors, tmp_path / "x.pt")
    messages = {
        "code.npy": "cannot be read",
        "flat.npy": r"must hold vectors .* shape \(5,\)",
        "complex.npy": "got torch.complex128",
        "text.npy": "cannot be read",
        "broken.safetensors": "cannot be read",
        "broken.npy": "cannot be read",
        "empty.npy": "cannot be read",
        "two.safetensors": "2 arrays instead of one",
        "x.pt": r"ends in \.npy or \.safetensors",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            VectorFile(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.npy"):
        VectorFile(tmp_path / "nowhere.npy")
    assert "executed" not in capsys.readouterr().out
