import errno
import os
import zlib

import numpy as np
import pytest
import torch

from bae_lens.storage import (
    checksum,
    load_array,
    make_array,
    open_array,
    read_json,
    reserve_rows,
    save_array,
    write_json,
    written_whole,
)


def test_array_is_made_once_of_zeros_and_keeps_what_is_written(tmp_path):
    path = tmp_path / "deep" / "a.npy"

    make_array(path, (3, 2), np.int64)
    open_array(path)[1] = 7
    make_array(path, (3, 2), np.int64)

    assert open_array(path).tolist() == [[0, 0], [7, 7], [0, 0]]


@pytest.mark.parametrize("allocates", [True, False])
def test_array_has_its_room_on_the_disk_before_anything_is_written(tmp_path, monkeypatch, allocates):
    if not allocates:
        monkeypatch.delattr(os, "posix_fallocate")

    make_array(tmp_path / "a.npy", (2**18, 3))

    size = 2**18 * 3 * 4
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= size
    assert not open_array(tmp_path / "a.npy").any()


@pytest.mark.parametrize("allocates", [True, False])
def test_sparse_array_has_room_for_the_rows_that_are_reserved(tmp_path, monkeypatch, allocates):
    if not allocates:
        monkeypatch.delattr(os, "posix_fallocate")
    path = tmp_path / "a.npy"
    make_array(path, (64, 2**16), sparse=True)
    assert path.stat().st_blocks * 512 < 2**16
    for _ in range(2):
        reserve_rows(path, [slice(3, 5), slice(60, 61)])
        assert 3 * 2**18 <= path.stat().st_blocks * 512 < 4 * 2**18
        open_array(path)[4] = 7
    assert open_array(path)[3:6, 0].tolist() == [0, 7, 0]


def test_array_without_room_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a.npy needs 0.5 GiB; make room, or choose a folder"):
        make_array(tmp_path / "a.npy", (2**17, 2**10))
    assert not list(tmp_path.iterdir())
    make_array(tmp_path / "a.npy", (2**17, 2**10), sparse=True)
    with pytest.raises(
        OSError, match=r"No space left on device: .*a.npy needs 0.25 GiB; make room, or choose a folder"
    ):
        reserve_rows(tmp_path / "a.npy", [slice(2**16)])


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


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".a.json.999999999.partial").write_text("half")
    (tmp_path / f".a.json.{os.getppid()}.partial").write_text("of a process that is alive")
    write_json(tmp_path / "a.json", {"whole": True})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", f".a.json.{os.getppid()}.partial"}


def test_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")
    replace = os.replace

    def refused(source, target):
        if str(source).endswith(".partial"):
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OSError, match="no"), written_whole(tmp_path / "a") as partial:
        partial.mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["a", "a/old"]


STRANGE = [b"[" * 10**6, b'{"a": ' * 50_000, b"", b"\xff", b"9" * 5000, b'{"a": 1}{"a": 2}']


@pytest.mark.parametrize("content", STRANGE, ids=["lists", "objects", "empty", "bytes", "digits", "two"])
def test_json_that_nobody_wrote_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run.json cannot be read \(.*\); remove its folder to start over"):
        read_json(tmp_path / "run.json")
