import zlib

import numpy as np
import pytest
import torch

from bae_lens.storage import checksum, load_array, open_array, save_array


def test_array_is_made_once_of_zeros_and_keeps_what_is_written(tmp_path):
    path = tmp_path / "a.npy"

    open_array(path, (3, 2), np.int64)[1] = 7

    assert open_array(path, (3, 2), np.int64).tolist() == [[0, 0], [7, 7], [0, 0]]


def test_saved_array_is_loaded(tmp_path):
    save_array(tmp_path / "a.npy", torch.arange(3))

    assert load_array(tmp_path / "a.npy").tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_damaged_array_is_refused(tmp_path):
    save_array(tmp_path / "a.npy", torch.arange(3))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-5])

    with pytest.raises(ValueError, match=r"a.npy cannot be read .* remove its folder to start over"):
        load_array(tmp_path / "a.npy")


def test_checksum_is_that_of_all_bytes_in_order():
    first, second = np.arange(6.0).reshape(2, 3), np.ones((2, 2))

    assert checksum([first, second]) == zlib.crc32(first.tobytes() + second.tobytes()) + 1
    assert checksum([first.T]) != checksum([first])
