import fcntl
import io
import signal
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bae_lens.compression import code_file, code_writer, geometry_coder
from bae_lens.compression.code_file import (
    CHUNK,
    CHUNKS_AT,
    COMMIT,
    COMMIT_AT,
    DIGEST,
    MAGIC,
    PREAMBLE,
    CodeFile,
    Coding,
    chunk_rows,
    digest,
)
from bae_lens.compression.code_writer import CodeWriter
from bae_lens.compression.geometry_coder import Geometry

KEY = bytes(range(16))
D_SAE, ROWS = 20, 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(code_file, "CHUNK_ROWS", ROWS)
    monkeypatch.setattr(geometry_coder, "ONE_IN", 2)


def random_geometry(seed=0, d_sae=D_SAE):
    """Directions of whole numbers, so that they are the same on every machine."""
    W_dec = torch.from_numpy(np.random.default_rng(seed).integers(-9, 10, (d_sae, 6))).float()
    return Geometry(W_dec.T, W_dec)


GEOMETRY = random_geometry()


def random_code(n, d_sae=D_SAE, seed=0):
    rng = np.random.default_rng(seed)
    return np.packbits(rng.random((n, d_sae)) < rng.random(d_sae) / 3, axis=1)


def dependent_code(n, seed=0):
    """Every second feature is the one before, but for one bit in ten."""
    rng = np.random.default_rng(seed)
    bits = np.repeat(rng.random((n, D_SAE // 2)) < rng.random(D_SAE // 2) / 3, 2, axis=1)
    bits[:, 1::2] ^= rng.random((n, D_SAE // 2)) < 0.1
    return np.packbits(bits, axis=1)


def geometric_code(n, seed=0):
    """Eight coins, and features that mostly fire where those before decode to something near them."""
    rng, products = np.random.default_rng(seed), GEOMETRY.W_dec.numpy() @ GEOMETRY.W_enc.numpy()
    bits = (rng.random((n, D_SAE)) < 0.5).astype(np.uint8)
    for j in range(8, D_SAE):
        bits[:, j] = (bits[:, :j] @ products[:j, j] > 60) ^ (rng.random(n) < 0.01)
    return np.packbits(bits, axis=1)


def write(path, packed, append=False, key=KEY, d_sae=D_SAE, joint=True, geometry=None):
    with CodeWriter(path, d_sae, key, append, joint, geometry) as writer:
        for first in range(0, len(packed), 30):
            writer.write(packed[first : first + 30])
    return writer


def read(path, rows=None, skip_damaged=False, geometry: Geometry | None = GEOMETRY):
    with CodeFile(path, skip_damaged, geometry) as file:
        parts = [np.zeros((0, -(-file.d_sae // 8)), np.uint8), *(packed for _, packed in file.codes(rows))]
        return np.concatenate(parts), file.damaged


@pytest.fixture(scope="module", params=Coding, ids=lambda coding: coding.name.lower())
def content(tmp_path_factory, request):
    """A file of 130 vectors in three chunks: 50 and 60, then an append of 20."""
    geometry = GEOMETRY if request.param is Coding.GEOMETRY else None
    joint = request.param is not Coding.COLUMNS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_file, "CHUNK_ROWS", ROWS)
        patch.setattr(geometry_coder, "ONE_IN", 2)
        path = tmp_path_factory.mktemp("content") / "x.bae"
        code = geometric_code(130) if geometry else random_code(130)
        write(path, code[:110], joint=joint, geometry=geometry)
        write(path, code[110:], append=True, joint=joint, geometry=geometry)
        with CodeFile(path) as file:
            assert [chunk.coding for chunk in file.chunks()] == [request.param] * 3
        return path.read_bytes(), code


@pytest.mark.parametrize("n", [0, 1, 49, 50, 51, 99, 100, 101, 230])
@pytest.mark.parametrize("joint", [False, True])
def test_code_comes_back_exactly(tmp_path, n, joint):
    packed = random_code(n)
    writer = write(tmp_path / "x.bae", packed, joint=joint)
    np.testing.assert_array_equal(read(tmp_path / "x.bae")[0], packed)
    assert writer.n_bytes == (tmp_path / "x.bae").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["x.bae"]


def test_many_chunks_at_once(tmp_path):
    packed = random_code(333)
    with CodeWriter(tmp_path / "x.bae", D_SAE, KEY) as writer:
        writer.write(packed)
    np.testing.assert_array_equal(read(tmp_path / "x.bae")[0], packed)


def test_only_the_last_chunk_is_longer(tmp_path):
    write(tmp_path / "x.bae", random_code(249))
    with CodeFile(tmp_path / "x.bae") as file:
        assert [len(chunk.rows) for chunk in file.chunks()] == [50, 50, 50, 99]


def test_full_chunks_have_bounded_size():
    assert chunk_rows(2304) == ROWS
    assert chunk_rows(2**32) == 1
    assert chunk_rows(2**26) == 16


@pytest.mark.parametrize(
    "rows", [slice(0, 0), slice(3, 5), slice(49, 51), slice(50, 100), slice(60, None), slice(None, 7), slice(109, 111)]
)
def test_ranges(tmp_path, content, rows):
    path = tmp_path / "x.bae"
    path.write_bytes(content[0])
    np.testing.assert_array_equal(read(path, rows)[0], content[1][rows])


@pytest.mark.parametrize("rows", [slice(0, 131), slice(131, None), slice(-1, None), slice(9, 3), slice(0, 9, 2)])
def test_ranges_that_are_not_there(tmp_path, content, rows):
    path = tmp_path / "x.bae"
    path.write_bytes(content[0])
    with pytest.raises(ValueError, match="the 130 vectors"):
        read(path, rows)


def test_a_range_is_read_without_the_rest(tmp_path, content, monkeypatch):
    path = tmp_path / "x.bae"
    path.write_bytes(content[0])
    decoded = []
    for name in ("decode_columns", "decode_pairs", "decode_geometry"):
        decode = getattr(code_file, name)
        spied = lambda *arguments, decode=decode: decoded.append(0) or decode(*arguments)  # noqa: E731
        monkeypatch.setattr(code_file, name, spied)
    with CodeFile(path, geometry=GEOMETRY) as file:
        sizes = []

        class Spied(io.BufferedReader):
            def read(self, size=-1):
                sizes.append(size)
                return super().read(size)

        file._file.close()
        monkeypatch.setattr(file, "_file", Spied(io.FileIO(path)))
        ((part, packed),) = file.codes(slice(110, 115))
    assert part == range(110, 115)
    np.testing.assert_array_equal(packed, content[1][110:115])
    bodies = [size for size in sizes if size != CHUNK.size + DIGEST]
    assert len(decoded) == len(bodies) == 1
    assert sum(sizes) < len(content[0]) / 2


def test_append_adds_and_keeps(tmp_path, content):
    path = tmp_path / "x.bae"
    path.write_bytes(content[0])
    writer = write(path, content[1][:70], append=True)
    assert path.stat().st_size == len(content[0]) + writer.n_bytes
    np.testing.assert_array_equal(read(path)[0], np.concatenate([content[1], content[1][:70]]))


def test_append_of_another_dictionary_names_both(tmp_path, content):
    path = tmp_path / "x.bae"
    path.write_bytes(content[0])
    other = bytes(16)
    with pytest.raises(ValueError, match=f"(?s){KEY.hex()}.*{other.hex()}"):
        write(path, content[1], append=True, key=other)
    assert path.read_bytes() == content[0]


def test_append_to_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "x.bae", random_code(3), append=True)


def test_two_appends_at_once(tmp_path, content):
    path = tmp_path / "x.bae"
    path.write_bytes(content[0])
    with CodeWriter(path, D_SAE, KEY, append=True) as writer:
        writer.write(content[1])
        with pytest.raises(ValueError, match="another process is writing"):
            write(path, content[1], append=True)
    np.testing.assert_array_equal(read(path)[0], np.concatenate([content[1]] * 2))


def test_two_new_files_at_once(tmp_path, content):
    path = tmp_path / "x.bae"
    with CodeWriter(path, D_SAE, KEY) as writer:
        writer.write(content[1][:70])
        with pytest.raises(ValueError, match="another process is writing"):
            write(path, random_code(300, seed=1))
        writer.write(content[1][70:])
    np.testing.assert_array_equal(read(path)[0], content[1])
    assert [file.name for file in tmp_path.iterdir()] == ["x.bae"]


def test_new_file_that_another_process_has_just_finished(tmp_path, content, monkeypatch):
    """Its file was opened before it got its name, and locked after."""
    path = tmp_path / "x.bae"
    flock = fcntl.flock

    def late(*arguments):
        (tmp_path / "x.bae.partial").write_bytes(content[0])
        (tmp_path / "x.bae.partial").replace(path)
        flock(*arguments)

    monkeypatch.setattr(code_writer.fcntl, "flock", late)
    with pytest.raises(ValueError, match="has replaced"):
        write(path, random_code(30))
    np.testing.assert_array_equal(read(path)[0], content[1])


@pytest.mark.parametrize("append", [False, True])
def test_file_that_is_replaced_while_it_is_written(tmp_path, content, append):
    path, other = tmp_path / "x.bae", tmp_path / "other.bae"
    for place in (path, other):
        place.write_bytes(content[0])
    with pytest.raises(ValueError, match="has replaced"), CodeWriter(path, D_SAE, KEY, append) as writer:  # noqa: PT012
        writer.write(random_code(70))
        other.replace(path if append else tmp_path / "x.bae.partial")
    np.testing.assert_array_equal(read(path)[0], content[1])
    assert (tmp_path / "x.bae.partial").exists() != append  # it is another's


def test_what_a_killed_process_left_is_written_over(tmp_path, content):
    (tmp_path / "x.bae.partial").write_bytes(content[0] * 5)
    write(tmp_path / "x.bae", content[1])
    np.testing.assert_array_equal(read(tmp_path / "x.bae")[0], content[1])
    assert [file.name for file in tmp_path.iterdir()] == ["x.bae"]


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "folder.bae").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        write(tmp_path / "folder.bae", random_code(3))
    with pytest.raises(ValueError, match="20 features are packed into 3 bytes, got 4"):
        write(tmp_path / "x.bae", random_code(3, 32))
    assert [file.name for file in tmp_path.iterdir()] == ["folder.bae"]


def test_nothing_appears_until_it_is_whole(tmp_path):
    path = tmp_path / "x.bae"
    write(path, random_code(60))
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), CodeWriter(path, D_SAE, KEY) as writer:  # noqa: PT012
        writer.write(random_code(120, seed=1))
        assert path.read_bytes() == before
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.bae"]


def disk_full_after(monkeypatch, budget):
    """Makes writes fail once `budget` bytes were written, the last one half done."""
    left = [budget]

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            if left[0] <= 0:
                raise OSError(28, "No space left on device")
            n = self.file.write(bytes(content[: left[0]]))
            left[0] -= n
            return n

    original = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", **options: (
            Full(original(path, mode, **options)) if "+" in mode else original(path, mode, **options)
        ),
    )


@pytest.mark.parametrize("budget", [0, 30, 70, 200, 500])
def test_disk_full(tmp_path, monkeypatch, budget):
    path = tmp_path / "x.bae"
    path.write_text("what was there before")
    with monkeypatch.context() as patch:
        disk_full_after(patch, budget)
        with pytest.raises(OSError, match=r"No space left on device.*x\.bae"):
            write(path, random_code(230))
    assert path.read_text() == "what was there before"
    assert [file.name for file in tmp_path.iterdir()] == ["x.bae"]


@pytest.mark.parametrize("budget", [0, 30, 70, 200, 500])
def test_disk_full_while_appending(tmp_path, monkeypatch, content, budget):
    path = tmp_path / "x.bae"
    path.write_bytes(content[0])
    monkeypatch.setattr(code_writer.fcntl, "flock", lambda *_: None)
    with monkeypatch.context() as patch:
        disk_full_after(patch, budget)
        with pytest.raises(OSError, match="No space left"):
            write(path, random_code(230), append=True)
    assert path.read_bytes() == content[0]


def test_disk_full_at_the_very_end(tmp_path, monkeypatch):
    write(tmp_path / "size.bae", random_code(230))
    with monkeypatch.context() as patch:
        disk_full_after(patch, (tmp_path / "size.bae").stat().st_size)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "x.bae", random_code(230))
    assert [file.name for file in tmp_path.iterdir()] == ["size.bae"]


def test_disk_full_at_the_very_end_of_an_append(tmp_path, monkeypatch, content):
    path = tmp_path / "x.bae"
    path.write_bytes(content[0])
    size = write(path, random_code(60), append=True).n_bytes
    path.write_bytes(content[0])
    monkeypatch.setattr(code_writer.fcntl, "flock", lambda *_: None)
    with monkeypatch.context() as patch:
        disk_full_after(patch, size)
        with pytest.raises(OSError, match="No space left"):
            write(path, random_code(60), append=True)
    np.testing.assert_array_equal(read(path)[0], content[1])


def test_a_new_file_takes_the_place_of_the_old_one_at_once(tmp_path):
    write(tmp_path / "x.bae", random_code(60))
    (tmp_path / "same.bae").hardlink_to(tmp_path / "x.bae")
    write(tmp_path / "x.bae", random_code(70))
    assert len(read(tmp_path / "same.bae")[0]) == 60


KILLED_APPEND = """
import os, signal, sys, types
package = sys.modules["bae_lens"] = types.ModuleType("bae_lens")  # without what the rest of the package imports
package.__path__ = [sys.argv[3]]
import numpy as np
from bae_lens.compression import code_file
from bae_lens.compression import code_writer
code_file.CHUNK_ROWS = 50
path, survive = sys.argv[1], int(sys.argv[2])
put = code_writer.CodeWriter._put

def dying(self, content):
    global survive
    if survive == 0:
        self._file.write(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    survive -= 1
    put(self, content)

code_writer.CodeWriter._put = dying
with code_writer.CodeWriter(path, 20, bytes(range(16)), True) as writer:
    writer.write(np.zeros((200, 3), np.uint8))
"""


@pytest.mark.parametrize("survive", [0, 2])
def test_killed_append_leaves_what_was_there(tmp_path, content, survive):
    path = tmp_path / "x.bae"
    path.write_bytes(content[0])
    package = Path(code_file.__file__).parents[1]
    command = [sys.executable, "-c", KILLED_APPEND, path, str(survive), package]
    result = subprocess.run(command, check=False, timeout=120)
    assert result.returncode == -signal.SIGKILL
    assert path.stat().st_size > len(content[0])
    np.testing.assert_array_equal(read(path)[0], content[1])
    added = write(path, content[1][:7], append=True).n_bytes
    np.testing.assert_array_equal(read(path)[0], np.concatenate([content[1], content[1][:7]]))
    assert path.stat().st_size == len(content[0]) + added


def test_torn_commit_is_said_and_can_be_skipped(tmp_path, content):
    path = tmp_path / "x.bae"
    path.write_bytes(content[0][: COMMIT_AT + 8] + bytes(4) + content[0][COMMIT_AT + 12 :])
    with pytest.raises(ValueError, match="how many vectors"):
        read(path)
    packed, damaged = read(path, skip_damaged=True)
    np.testing.assert_array_equal(packed, content[1])
    assert damaged == []


def test_damaged_body_is_named_skipped_and_counted(tmp_path, content):
    path = tmp_path / "x.bae"
    path.write_bytes(content[0])
    with CodeFile(path) as file:
        offset = list(file.chunks())[1].offset or 0
    damaged = bytearray(content[0])
    damaged[offset + 5] ^= 4
    path.write_bytes(damaged)
    np.testing.assert_array_equal(read(path, slice(110, 130))[0], content[1][110:])
    with pytest.raises(ValueError, match=r"vectors 50 to 109 is damaged: its checksum differs; skip_damaged"):
        read(path)
    packed, gone = read(path, skip_damaged=True)
    np.testing.assert_array_equal(packed, np.delete(content[1], slice(50, 110), axis=0))
    assert gone == [range(50, 110)]


def test_damaged_header_is_named_skipped_and_counted(tmp_path, content):
    path = tmp_path / "x.bae"
    path.write_bytes(content[0])
    with CodeFile(path) as file:
        offset = list(file.chunks())[1].offset or 0
    damaged = bytearray(content[0])
    damaged[offset - DIGEST - 20] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="begins with vector 50 is damaged"):
        read(path)
    packed, gone = read(path, skip_damaged=True)
    np.testing.assert_array_equal(packed, np.delete(content[1], slice(50, 110), axis=0))
    assert gone == [range(50, 110)]


def test_truncated_at_every_place(tmp_path, content):
    path = tmp_path / "x.bae"
    for size in range(len(content[0])):
        path.write_bytes(content[0][:size])
        with pytest.raises(ValueError, match=r"not a \.bae file|damaged|cut off"):
            read(path)
        if size >= CHUNKS_AT:
            packed, damaged = read(path, skip_damaged=True)
            gone = [row for part in damaged for row in part]
            assert len(packed) + len(gone) == 130
            np.testing.assert_array_equal(packed, np.delete(content[1], gone, axis=0))


def test_every_bit_flipped(tmp_path, content):
    path = tmp_path / "x.bae"
    for place in range(len(content[0])):
        flipped = bytearray(content[0])
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"not a \.bae file|damaged|cut off"):
            read(path)
        if place >= COMMIT_AT:
            packed, damaged = read(path, skip_damaged=True)
            gone = [row for part in damaged for row in part]
            np.testing.assert_array_equal(packed, np.delete(content[1], gone, axis=0))
            assert len(gone) == (0 if place < CHUNKS_AT else 20 if 110 in gone else 60 if 50 in gone else 50)


def test_swapped_chunks_are_noticed(tmp_path, content):
    path = tmp_path / "x.bae"
    path.write_bytes(content[0])
    with CodeFile(path) as file:
        starts = [(chunk.offset or 0) - CHUNK.size - DIGEST for chunk in file.chunks()]
    first, second = content[0][starts[0] : starts[1]], content[0][starts[1] : starts[2]]
    path.write_bytes(content[0][: starts[0]] + second + first + content[0][starts[2] :])
    with pytest.raises(ValueError, match="begins with vector 0 is damaged"):
        read(path)


def hostile(d_sae=D_SAE, version=3, n_rows=0, end=None, chunks=(), magic=Coding.COLUMNS.value):
    """A file whose digests are all right, whatever it says."""
    preamble = PREAMBLE.pack(MAGIC, version, d_sae, KEY)
    parts = []
    for first, n, n_words, body in chunks:
        header = CHUNK.pack(magic, first, n, n_words, digest(body, KEY))
        parts += [header, digest(header, KEY), body]
    content = b"".join(parts)
    commit = COMMIT.pack(n_rows, CHUNKS_AT + len(content) if end is None else end)
    return preamble + digest(preamble, b"") + commit + digest(commit, KEY) + content


HUGE_32, HUGE_64 = 2**32 - 1, 2**64 - 1
BODY = struct.pack("<20H", *range(20)) + bytes(8)


@pytest.mark.parametrize(
    "file",
    [
        {"version": 0},
        {"version": 4},
        {"d_sae": 0},
        {"n_rows": HUGE_64},
        {"end": HUGE_64},
        {"end": 0},
        {"n_rows": 5},
        {"d_sae": HUGE_32, "n_rows": 5, "chunks": [(0, 5, 2, BODY)]},
        {"n_rows": HUGE_32, "chunks": [(0, HUGE_32, 2, BODY)]},
        {"n_rows": 0, "chunks": [(0, 0, 2, BODY)]},
        {"n_rows": 5, "chunks": [(0, 5, HUGE_32, BODY)]},
        {"n_rows": 5, "chunks": [(HUGE_64, 5, 2, BODY)]},
        {"n_rows": 5, "chunks": [(0, 5, 2, BODY)]},
        {"n_rows": 25, "chunks": [(0, 25, 2, BODY)]},
        {"n_rows": 5, "chunks": [(0, 5, 0, BODY)]},
        {"n_rows": 3, "chunks": [(0, 5, 0, bytes(40))]},
        {"d_sae": HUGE_32, "n_rows": 5, "chunks": [(0, 5, 2, bytes(8))], "magic": Coding.PAIRS.value},
        {"d_sae": 2**24 - 1, "n_rows": 5, "chunks": [(0, 5, 2, bytes(8))], "magic": Coding.PAIRS.value},
        {"n_rows": HUGE_32, "chunks": [(0, HUGE_32, 2, bytes(8))], "magic": Coding.PAIRS.value},
        {"n_rows": 5, "chunks": [(0, 5, HUGE_32, bytes(8))], "magic": Coding.PAIRS.value},
        {"n_rows": 5, "chunks": [(0, 5, 0, b"")], "magic": Coding.PAIRS.value},
        {"n_rows": 5, "chunks": [(0, 5, 9, bytes(36))], "magic": Coding.PAIRS.value},
        {"n_rows": 5, "chunks": [(0, 5, 9, bytes(range(36)))], "magic": Coding.PAIRS.value},
        {"n_rows": 5, "chunks": [(0, 5, 2, BODY)], "magic": MAGIC},
        {"d_sae": HUGE_32, "n_rows": 5, "chunks": [(0, 5, 2, bytes(8))], "magic": Coding.GEOMETRY.value},
        {"d_sae": 8192, "n_rows": 5, "chunks": [(0, 5, 2, bytes(8))], "magic": Coding.GEOMETRY.value},
        {"n_rows": HUGE_32, "chunks": [(0, HUGE_32, 2, bytes(8))], "magic": Coding.GEOMETRY.value},
        {"n_rows": 5, "chunks": [(0, 5, HUGE_32, bytes(8))], "magic": Coding.GEOMETRY.value},
        {"n_rows": 5, "chunks": [(0, 5, 9, bytes(36))], "magic": Coding.GEOMETRY.value},
        {"n_rows": 5, "chunks": [(0, 5, 9, bytes(range(36)))], "magic": Coding.GEOMETRY.value},
    ],
)
def test_hostile_headers(tmp_path, file):
    path = tmp_path / "x.bae"
    path.write_bytes(hostile(**file))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"version|at least one feature|cut off|instead of|damaged"):
        read(path)
    if {"version", "d_sae"}.isdisjoint(file):
        read(path, skip_damaged=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_memory_does_not_grow_with_what_a_file_says_or_how_many_chunks_it_has(tmp_path):
    empty = bytes(2 * D_SAE)
    path = tmp_path / "many.bae"
    path.write_bytes(hostile(n_rows=4_000, chunks=[(i, 1, 0, empty) for i in range(4_000)]))
    words = 2**26
    header = CHUNK.pack(Coding.COLUMNS.value, 0, 5, words, bytes(DIGEST))
    commit = COMMIT.pack(5, CHUNKS_AT + len(header) + DIGEST + 2 * D_SAE + 4 * words)
    with (tmp_path / "long.bae").open("wb") as file:
        file.write(hostile()[:COMMIT_AT] + commit + digest(commit, KEY) + header + digest(header, KEY))
        file.truncate(COMMIT.unpack(commit)[1])
    for name, message in (("many.bae", None), ("long.bae", "vector 0 is damaged")):
        tracemalloc.start()
        if message is None:
            with CodeFile(tmp_path / name) as file:
                assert sum(len(packed) for _, packed in file.codes(slice(0, 10))) == 10
                assert file.n_rows == 4_000
        else:
            with pytest.raises(ValueError, match=message):
                read(tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_mixture_of_damage(content, data, tmp_path_factory):
    damaged = bytearray(content[0])
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["overwrite", "delete", "insert"]))
        what = data.draw(st.binary(min_size=1, max_size=12))
        damaged[place : place + {"overwrite": len(what), "delete": len(what), "insert": 0}[kind]] = (
            b"" if kind == "delete" else what
        )
    path = tmp_path_factory.getbasetemp() / "mixture.bae"
    path.write_bytes(damaged)
    for skip in (False, True):
        try:
            packed, gone = read(path, skip_damaged=skip)
        except ValueError:
            continue
        missing = [row for part in gone for row in part]
        kept = np.delete(content[1], missing, axis=0)
        if skip:  # the end may be gone together with what says that it was there
            assert len(packed) <= len(kept)
        else:
            assert len(packed) == len(kept)
        np.testing.assert_array_equal(packed, kept[: len(packed)])


@settings(max_examples=200, deadline=None)
@given(garbage=st.binary(max_size=300), whole=st.booleans())
def test_garbage(garbage, whole, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "garbage.bae"
    path.write_bytes(garbage if whole else MAGIC + garbage)
    with pytest.raises(ValueError, match=r"not a \.bae file|damaged"):
        read(path)


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["code.bae", "pairs.bae", "geometry.bae"])
def test_files_written_by_earlier_versions_stay_readable(name):
    """Of version 1 of the format, of version 2 with trees of pairs, and of version 3 given a geometry."""
    version, coding, expected = {
        "code.bae": (1, Coding.COLUMNS, random_code(120)),
        "pairs.bae": (2, Coding.PAIRS, dependent_code(120)),
        "geometry.bae": (3, Coding.GEOMETRY, geometric_code(120)),
    }[name]
    with CodeFile(GOLDEN / name) as file:
        assert (file.version, {chunk.coding for chunk in file.chunks()}) == (version, {coding})
    np.testing.assert_array_equal(read(GOLDEN / name)[0], expected)


@pytest.mark.parametrize("name", ["code.bae", "pairs.bae"])
def test_files_of_earlier_versions_grow_as_such(tmp_path, name):
    path = tmp_path / "x.bae"
    path.write_bytes((GOLDEN / name).read_bytes())
    before = read(path)[0]
    with CodeFile(path) as file:
        key = file.fingerprint
    write(path, geometric_code(120), append=True, key=key, geometry=GEOMETRY)
    with CodeFile(path) as file:
        assert file.version == (1 if name == "code.bae" else 2)
        assert all(chunk.coding.since <= file.version for chunk in file.chunks())
    np.testing.assert_array_equal(read(path)[0], np.concatenate([before, geometric_code(120)]))


def test_a_file_grows_by_chunks_of_every_coding(tmp_path):
    path = tmp_path / "x.bae"
    write(path, random_code(60), joint=False)
    write(path, geometric_code(120), append=True, geometry=GEOMETRY)
    write(path, dependent_code(60), append=True, geometry=GEOMETRY)
    writer = write(path, geometric_code(70, seed=1), append=True, geometry=GEOMETRY)
    with CodeFile(path) as file:
        codings = [chunk.coding for chunk in file.chunks()]
    assert codings == [Coding.COLUMNS, *[Coding.GEOMETRY] * 2, Coding.PAIRS, Coding.GEOMETRY]
    assert writer.codings == {Coding.GEOMETRY: 1}
    code = np.concatenate([random_code(60), geometric_code(120), dependent_code(60), geometric_code(70, seed=1)])
    np.testing.assert_array_equal(read(path)[0], code)
    np.testing.assert_array_equal(read(path, slice(0, 60), geometry=None)[0], code[:60])
    np.testing.assert_array_equal(read(path, slice(55, 245))[0], code[55:245])


def test_a_code_that_is_all_off(tmp_path):
    path = tmp_path / "x.bae"
    write(path, np.zeros((60, 3), np.uint8), geometry=GEOMETRY)
    with CodeFile(path) as file:
        # Of each feature no parent and the rate 0: 4 words along a tree, where the numbers of a geometry take 10.
        assert [(chunk.coding, chunk.n_words) for chunk in file.chunks()] == [(Coding.PAIRS, 4)]
    np.testing.assert_array_equal(read(path)[0], np.zeros((60, 3), np.uint8))


@pytest.mark.parametrize("skip_damaged", [False, True])
def test_a_geometry_is_asked_for_where_it_is_needed(tmp_path, skip_damaged):
    """It is not damage that it is missing."""
    path = tmp_path / "x.bae"
    write(path, geometric_code(60), geometry=GEOMETRY)
    with pytest.raises(ValueError, match=f"by the geometry of its dictionary.*{KEY.hex()} as sae"):
        read(path, geometry=None, skip_damaged=skip_damaged)


def test_every_chunk_is_coded_as_it_is_shortest(tmp_path, monkeypatch):
    """Features that follow from one another, then few vectors of many features, whose trees would be longer."""
    monkeypatch.setattr(code_file, "CHUNK_ROWS", 300)
    d_sae = 4_000
    related = np.packbits(np.repeat(np.random.default_rng(0).random((300, d_sae // 4)) < 0.1, 4, axis=1), axis=1)
    sizes = {}
    for joint in (False, True):
        path = tmp_path / f"{joint}.bae"
        first = write(path, related, d_sae=d_sae, joint=joint)
        few = np.packbits(np.random.default_rng(1).random((1, d_sae)) < 0.5, axis=1)
        second = write(path, few, append=True, d_sae=d_sae, joint=joint)
        sizes[joint] = (first.n_bytes, second.n_bytes)
        np.testing.assert_array_equal(read(path)[0], np.concatenate([related, few]))
    with CodeFile(tmp_path / "True.bae") as file:
        assert [chunk.coding for chunk in file.chunks()] == [Coding.PAIRS, Coding.COLUMNS]
    assert sizes[True][0] < 0.5 * sizes[False][0]
    assert sizes[True][1] == sizes[False][1]


def test_a_tree_of_another_dictionary_is_damage(tmp_path):
    """The digests of chunks are those of one dictionary's files."""
    ours, theirs = tmp_path / "ours.bae", tmp_path / "theirs.bae"
    write(ours, dependent_code(60))
    write(theirs, dependent_code(60, seed=1), key=bytes(16))
    ours.write_bytes(ours.read_bytes()[:CHUNKS_AT] + theirs.read_bytes()[CHUNKS_AT:])
    with pytest.raises(ValueError, match=r"damaged|cut off"):
        read(ours)
