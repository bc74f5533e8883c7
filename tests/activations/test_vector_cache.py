import numpy as np
import pytest
import torch

from bae_lens import CachedActivations, Vectors, cache_vectors
from bae_lens.activations import vector_cache
from bae_lens.activations.contexts import Contexts
from bae_lens.activations.precision import stored
from bae_lens.activations.vector_files import ROWS
from bae_lens.activations.vectors import VECTORS_HOOK


@pytest.fixture
def file(tmp_path):
    x = torch.randn(3_000, 6) + 2
    np.save(tmp_path / "x.npy", x.numpy())
    return x, tmp_path / "x.npy"


def contexts(rows):
    return Contexts(rows[:, None], torch.zeros_like(rows))


def test_the_chosen_rows_are_copied(file, tmp_path):
    x, path = file
    x[77] *= 100  # an outlier
    np.save(path, x.numpy())
    rows = torch.arange(0, 3_000, 7)
    cached = cache_vectors(Vectors([path]), contexts(rows), tmp_path / "cache")
    assert cached.widths == {VECTORS_HOOK: 6}
    assert torch.equal(cached.rows(torch.arange(len(rows))), x[rows])
    assert cached.outliers.nonzero().flatten().tolist() == [11]
    assert len(cached.content) == len(rows) - 1
    ordinary = x[rows][cached.content]
    torch.testing.assert_close(cached.standardization.mean, ordinary.mean(0))
    batch = next(cached.shuffled(64, seed=0))
    assert batch.shape == (64, 6)
    again = CachedActivations(tmp_path / "cache", VECTORS_HOOK)
    assert torch.equal(again.rows(torch.tensor([3])), x[rows[3:4]])


def test_an_interrupted_copy_goes_on(file, tmp_path, monkeypatch):
    x, path = file
    rows, read, copied = torch.arange(3_000), Vectors.__iter__, []

    def interrupted(vectors):
        batches = read(vectors)
        yield from (next(batches), next(batches))
        raise KeyboardInterrupt

    def noted(chosen, dtype):
        copied.append(len(chosen))
        return stored(chosen, dtype)

    monkeypatch.setattr(Vectors, "__iter__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_vectors(Vectors([path]), contexts(rows), tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="no complete cache"):
        CachedActivations(tmp_path / "cache", VECTORS_HOOK)
    monkeypatch.setattr(Vectors, "__iter__", read)
    monkeypatch.setattr(vector_cache, "stored", noted)
    cached = cache_vectors(Vectors([path]), contexts(rows), tmp_path / "cache")
    assert copied == [3_000 - 2 * ROWS]
    assert torch.equal(cached.rows(rows), x)
    cache_vectors(Vectors([path]), contexts(rows), tmp_path / "cache")
    assert len(copied) == 1


def test_vectors_that_are_not_finite_are_refused(file, tmp_path):
    x, path = file
    x[1_500, 2] = torch.nan
    np.save(path, x.numpy())
    with pytest.raises(ValueError, match="vectors must be finite, but row 1500 holds NaN or infinity"):
        cache_vectors(Vectors([path]), contexts(torch.arange(3_000)), tmp_path / "cache")
    cached = cache_vectors(Vectors([path]), contexts(torch.arange(1_500)), tmp_path / "others")
    assert len(cached.content) == 1_500


def test_a_cache_of_other_vectors_is_refused(file, tmp_path):
    x, path = file
    rows = torch.arange(100)
    cache_vectors(Vectors([path]), contexts(rows), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"holds something else \(vectors: "):
        cache_vectors(Vectors([x + 1]), contexts(rows), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"holds something else \(contexts: "):
        cache_vectors(Vectors([path]), contexts(rows + 1), tmp_path / "cache")
    half = cache_vectors(Vectors([path]), contexts(rows), tmp_path / "half", "float16")
    assert half.activations.dtype == np.float16
    torch.testing.assert_close(half.rows(rows), x[:100], rtol=1e-3, atol=1e-3)
