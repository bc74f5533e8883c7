"""The `.bae` file: codes of vectors in independent chunks, each with its prior and its checksums; how it is read.

All numbers are little-endian. A digest is BLAKE2b of 8 bytes, keyed by the fingerprint except in the preamble.

    preamble   magic (8 bytes), version (4), d_sae (4), fingerprint of the dictionary (16), digest of these
    commit     number of vectors (8), bytes of the file that count (8), digest of these
    chunk      magic (8), first vector (8), number of vectors n (4), number of words m (4), digest of the body,
               digest of this header; body, of the coding that the magic names:
      columns  how often each feature fired (2 d_sae), then m words of bits (4 m), as `coder` makes them
      pairs    from version 2 on: m words of a tree of pairs and the bits given it, as `pair_coder` makes them
      geometry from version 3 on: m words of a prior and the bits given it and the dictionary, as `geometry_coder`
               makes them

A chunk's header says where the next one begins, so a range of vectors is found by reading headers alone. The commit is
written last, after what it counts is on the disk: what follows the bytes that count is an append that did not finish.
"""

import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bae_lens.compression import geometry_coder, pair_coder
from bae_lens.compression.coder import decode_columns
from bae_lens.compression.geometry_coder import Geometry, decode_geometry
from bae_lens.compression.pair_coder import decode_pairs

VERSION = 3  # of which earlier versions are a part
MAGIC = b"\x89BAE\r\n\x1a\n"
CHUNK_MARK = b"\x89chunk"  # how the magics of all chunks begin
PREAMBLE, COMMIT, CHUNK = struct.Struct("<8sII16s"), struct.Struct("<QQ"), struct.Struct("<8sQII8s")
DIGEST = 8  # bytes
COMMIT_AT = PREAMBLE.size + DIGEST
CHUNKS_AT = COMMIT_AT + COMMIT.size + DIGEST
CHUNK_ROWS, CHUNK_BITS = 16_384, 2**30  # at most; the last chunk may have twice as many, and 256 MiB once decoded


class Coding(Enum):
    """How the bits of a chunk are coded, by the magic that its header begins with."""

    COLUMNS = CHUNK_MARK + b"\r\n"
    """Each feature by itself."""
    PAIRS = CHUNK_MARK + b"\n\r"
    """Given a tree of pairs."""
    GEOMETRY = CHUNK_MARK + b"\n\n"
    """Given what the features before decode to."""

    @property
    def since(self) -> int:
        """The first version of the format that has it."""
        return list(Coding).index(self) + 1

    def body_size(self, d_sae: int, n_words: int) -> int:
        """In bytes."""
        return 4 * n_words + (2 * d_sae if self is Coding.COLUMNS else 0)

    def possible(self, d_sae: int, n: int, n_words: int) -> bool:
        """Whether n vectors can take so many words, so that no header makes memory larger than the file it is in."""
        bits = 1 + n * d_sae // 16  # twice the plain ones, which no code of these kinds needs
        if self is Coding.COLUMNS:
            return n_words <= bits
        if self is Coding.PAIRS:
            tree = d_sae * math.log2(d_sae + 1) / 32
            return d_sae <= pair_coder.MOST_FEATURES and tree <= n_words + 1 and n_words <= bits + 3 * tree + d_sae
        prior = d_sae * geometry_coder.PRIOR_BITS / 32
        return d_sae <= geometry_coder.MOST_FEATURES and n_words <= bits + prior


def digest(content: bytes, key: bytes) -> bytes:
    """Checksum of 8 bytes; of a chunk, valid in files of one dictionary only, whose fingerprint is the key."""
    return blake2b(content, digest_size=DIGEST, key=key).digest()


def chunk_rows(d_sae: int) -> int:
    """Vectors in a chunk but the last: the more, the less the 16 bits a feature for its prior weigh."""
    return max(1, min(CHUNK_ROWS, CHUNK_BITS // d_sae))


@dataclass(frozen=True)
class Chunk:
    """Where some vectors are, or, without an offset, which ones cannot be found."""

    rows: range
    """Which vectors."""
    offset: int | None = None
    """Of the body, in bytes."""
    n_words: int = 0
    """Of 32 bits, that the body holds."""
    digest: bytes = b""
    """Of the body."""
    coding: Coding = Coding.COLUMNS
    """How its bits are coded."""


class CodeFile:
    """A `.bae` file, opened for reading; a context manager. Memory is bounded by the size of a chunk, whatever it says.

    Raises ValueError, saying what is wrong, if this is no such file, one of another version, or one that is damaged or
    cut off. With `skip_damaged` chunks that are damaged are left out instead, and `damaged` lists their rows as they
    are come upon. Chunks that are coded given their dictionary's geometry are read with it alone, once
    `check_fingerprint` has found that it is the one.
    """

    def __init__(self, path: str | Path, skip_damaged: bool = False, geometry: Geometry | None = None) -> None:
        self.path, self.skip_damaged, self.geometry = Path(path), skip_damaged, geometry
        self.damaged: list[range] = []
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder; name a .bae file")
        self._file = self.path.open("rb")
        try:
            self.version, self.d_sae, self.fingerprint = _read_preamble(self._file, self.path)
            self._n_rows, self.end = self._committed()
            self.n_rows = 0
            for chunk in self.chunks():
                self.n_rows = chunk.rows.stop
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "CodeFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def chunks(self) -> Iterator[Chunk]:
        """The chunks in order, found by their headers alone; gaps where headers are damaged.

        They are looked up anew each time, so that memory does not grow with their number. Raises ValueError for a
        damaged header.
        """
        position, row = CHUNKS_AT, 0
        while position < self.end:
            chunk = self._chunk_at(position, row)
            if chunk is None:
                self._fail(f"the header of the chunk that begins with vector {row} is damaged")
                chunk = self._next_chunk(position, row)
                if chunk is None:
                    break
            if chunk.rows.start > row:
                yield Chunk(range(row, chunk.rows.start))
            yield chunk
            assert chunk.offset is not None
            position, row = chunk.offset + chunk.coding.body_size(self.d_sae, chunk.n_words), chunk.rows.stop
        if self._n_rows is not None and row != self._n_rows:
            self._fail(f"it holds {row} vectors instead of {self._n_rows}")
            if row < self._n_rows:
                yield Chunk(range(row, self._n_rows))

    def codes(self, rows: slice | None = None) -> Iterator[tuple[range, np.ndarray]]:
        """The packed codes (n, ceil(d_sae / 8)) of `rows`, chunk by chunk, and which rows they are.

        Reads those chunks alone that hold some of them. Raises ValueError for a range that is not within the file, for
        a damaged chunk, and for one that needs the geometry of a dictionary where there is none.
        """
        wanted = self._range(rows)
        for chunk in self.chunks():
            if chunk.rows.start >= wanted.stop:
                break
            part = range(max(chunk.rows.start, wanted.start), min(chunk.rows.stop, wanted.stop))
            if part:
                if chunk.coding is Coding.GEOMETRY and self.geometry is None:
                    raise ValueError(
                        f"{self.path} is coded by the geometry of its dictionary, without which its bits cannot be "
                        f"read; give the dictionary with fingerprint {self.fingerprint.hex()} as sae"
                    )
                packed = self._decode(chunk)
                if packed is not None:
                    yield part, packed[part.start - chunk.rows.start : part.stop - chunk.rows.start]

    def check_fingerprint(self, fingerprint: bytes) -> None:
        """Raises ValueError, naming both, if the file was made by another dictionary."""
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"{self.path} was made by the dictionary with fingerprint {self.fingerprint.hex()}, but this one has "
                f"{fingerprint.hex()}; load the dictionary that made it"
            )

    def _range(self, rows: slice | None) -> range:
        rows = rows or slice(None)
        start = 0 if rows.start is None else rows.start
        stop = self.n_rows if rows.stop is None else rows.stop
        if rows.step not in (None, 1) or not 0 <= start <= stop <= self.n_rows:
            raise ValueError(
                f"rows must be a slice, of step 1, of the {self.n_rows} vectors in {self.path}, "
                f"got {rows.start}:{rows.stop}:{rows.step}"
            )
        return range(start, stop)

    def _committed(self) -> tuple[int | None, int]:
        """Number of vectors and of bytes that count; the former is None if only the chunks themselves can tell."""
        size = os.fstat(self._file.fileno()).st_size
        fields = _fields(self._file, COMMIT_AT, COMMIT, self.fingerprint)
        if fields is None:
            self._fail("the entry that says how many vectors it holds is damaged")
            return None, size
        n_rows, end = fields
        if not CHUNKS_AT <= end <= size:
            self._fail(f"it is cut off: {size} of {end} bytes are there")
        return n_rows, min(end, size)

    def _chunk_at(self, position: int, row: int) -> Chunk | None:
        """The chunk whose header lies there, if it is undamaged; of vectors beyond `row` if others may be skipped."""
        fields = _fields(self._file, position, CHUNK, self.fingerprint)
        if fields is None:
            return None
        magic, first, n, n_words, body = fields
        if magic not in (coding.value for coding in Coding):
            return None
        coding, offset = Coding(magic), position + CHUNK.size + DIGEST
        in_order = first >= row if self.skip_damaged else first == row
        fits = (
            0 < n < 2 * chunk_rows(self.d_sae)
            and coding.possible(self.d_sae, n, n_words)
            and offset + coding.body_size(self.d_sae, n_words) <= self.end
        )
        return Chunk(range(first, first + n), offset, n_words, body, coding) if in_order and fits else None

    def _next_chunk(self, position: int, row: int) -> Chunk | None:
        """The first with an undamaged header after `position`."""
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            while (position := content.find(CHUNK_MARK, position + 1, self.end)) >= 0:
                if chunk := self._chunk_at(position, row):
                    return chunk
        return None

    def _decode(self, chunk: Chunk) -> np.ndarray | None:
        try:
            if chunk.offset is None:
                raise ValueError("its header cannot be found")
            self._file.seek(chunk.offset)
            body = self._file.read(chunk.coding.body_size(self.d_sae, chunk.n_words))
            if digest(body, self.fingerprint) != chunk.digest:
                raise ValueError("its checksum differs")
            return self._decode_body(chunk, body)
        except ValueError as error:
            self._fail(f"the chunk of vectors {chunk.rows.start} to {chunk.rows.stop - 1} is damaged: {error}")
        if chunk.rows not in self.damaged:
            self.damaged.append(chunk.rows)
        return None

    def _decode_body(self, chunk: Chunk, body: bytes) -> np.ndarray:
        n, at = len(chunk.rows), len(body) - 4 * chunk.n_words
        words = np.frombuffer(body, "<u4", offset=at).astype(np.uint32)
        if chunk.coding is Coding.COLUMNS:
            return decode_columns(np.frombuffer(body, "<u2", self.d_sae), words, n)
        if chunk.coding is Coding.PAIRS:
            return decode_pairs(words, n, self.d_sae)
        assert self.geometry is not None
        return decode_geometry(words, n, self.d_sae, self.geometry)

    def _fail(self, problem: str) -> None:
        if not self.skip_damaged:
            raise ValueError(f"{self.path}: {problem}; skip_damaged reads what is undamaged")


def _read_preamble(file: BinaryIO, path: Path) -> tuple[int, int, bytes]:
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError(f"{path} is not a .bae file; bae-lens compress makes one")
    fields = _fields(file, 0, PREAMBLE, b"")
    if fields is None:
        raise ValueError(f"{path}: its first {COMMIT_AT} bytes are damaged, so that it cannot be read")
    _, version, d_sae, fingerprint = fields
    if not 1 <= version <= VERSION:
        raise ValueError(f"{path} has version {version} of the format, and this reads 1 to {VERSION}; upgrade bae-lens")
    if d_sae < 1:
        raise ValueError(f"{path}: a code has at least one feature, got {d_sae}")
    return version, d_sae, fingerprint


def _fields(file: BinaryIO, offset: int, layout: struct.Struct, key: bytes) -> tuple | None:
    """What is written there, or None if it is cut off or does not agree with the digest behind it."""
    file.seek(offset)
    content = file.read(layout.size + DIGEST)
    fields, check = content[: layout.size], content[layout.size :]
    return layout.unpack(fields) if digest(fields, key) == check else None
