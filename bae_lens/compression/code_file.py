"""The `.bae` file: codes of vectors in independent chunks, each with its prior and its checksums; how it is read.

All numbers are little-endian. A digest is BLAKE2b of 8 bytes, keyed by the fingerprint except in the preamble.

    preamble   magic (8 bytes), version (4), d_sae (4), fingerprint of the dictionary (16), digest of these
    commit     number of vectors (8), bytes of the file that count (8), digest of these
    chunk      magic (8), first vector (8), number of vectors n (4), number of words m (4), digest of the body,
               digest of this header; body: how often each feature fired (2 d_sae), then m words of entropy-coded
               bits (4 m), as `coder` makes them; or, with the other magic and from version 2 on, m words of a tree of
               pairs and the bits given it (4 m), as `pair_coder` makes them

A chunk's header says where the next one begins, so a range of vectors is found by reading headers alone. The commit is
written last, after what it counts is on the disk: what follows the bytes that count is an append that did not finish.
"""

import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bae_lens.compression.coder import decode_columns
from bae_lens.compression.pair_coder import MOST_FEATURES, decode_pairs

VERSION = 2  # of which version 1 is a part
MAGIC, CHUNK_MAGIC, PAIRS_MAGIC = b"\x89BAE\r\n\x1a\n", b"\x89chunk\r\n", b"\x89chunk\n\r"
CHUNK_MARK = b"\x89chunk"  # how both begin
PREAMBLE, COMMIT, CHUNK = struct.Struct("<8sII16s"), struct.Struct("<QQ"), struct.Struct("<8sQII8s")
DIGEST = 8  # bytes
COMMIT_AT = PREAMBLE.size + DIGEST
CHUNKS_AT = COMMIT_AT + COMMIT.size + DIGEST
CHUNK_ROWS, CHUNK_BITS = 16_384, 2**30  # at most; the last chunk may have twice as many, and 256 MiB once decoded


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
    pairs: bool = False
    """Whether its bits are coded given a tree of pairs."""


class CodeFile:
    """A `.bae` file, opened for reading; a context manager. Memory is bounded by the size of a chunk, whatever it says.

    Raises ValueError, saying what is wrong, if this is no such file, one of another version, or one that is damaged or
    cut off. With `skip_damaged` chunks that are damaged are left out instead, and `damaged` lists their rows as they
    are come upon.
    """

    def __init__(self, path: str | Path, skip_damaged: bool = False) -> None:
        self.path, self.skip_damaged = Path(path), skip_damaged
        self.damaged: list[range] = []
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
            position, row = chunk.offset + self._body_size(chunk.n_words, chunk.pairs), chunk.rows.stop
        if self._n_rows is not None and row != self._n_rows:
            self._fail(f"it holds {row} vectors instead of {self._n_rows}")
            if row < self._n_rows:
                yield Chunk(range(row, self._n_rows))

    def codes(self, rows: slice | None = None) -> Iterator[tuple[range, np.ndarray]]:
        """The packed codes (n, ceil(d_sae / 8)) of `rows`, chunk by chunk, and which rows they are.

        Reads those chunks alone that hold some of them. Raises ValueError for a range that is not within the file, and
        for a damaged chunk.
        """
        wanted = self._range(rows)
        for chunk in self.chunks():
            if chunk.rows.start >= wanted.stop:
                break
            part = range(max(chunk.rows.start, wanted.start), min(chunk.rows.stop, wanted.stop))
            if part:
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
        offset, pairs = position + CHUNK.size + DIGEST, magic == PAIRS_MAGIC
        in_order = first >= row if self.skip_damaged else first == row
        fits = (
            0 < n < 2 * chunk_rows(self.d_sae)
            and self._possible_words(n, n_words, pairs)
            and offset + self._body_size(n_words, pairs) <= self.end
        )
        return (
            Chunk(range(first, first + n), offset, n_words, body, pairs)
            if magic in (CHUNK_MAGIC, PAIRS_MAGIC) and in_order and fits
            else None
        )

    def _possible_words(self, n: int, n_words: int, pairs: bool) -> bool:
        """Whether n vectors can take so many words, so that no header makes memory larger than the file it is in."""
        most = 1 + n * self.d_sae // 16  # twice the plain bits, which no code of this kind needs
        if not pairs:
            return n_words <= most
        tree = self.d_sae * math.log2(self.d_sae + 1) / 32
        return self.d_sae <= MOST_FEATURES and tree <= n_words + 1 and n_words <= most + 3 * tree + self.d_sae

    def _next_chunk(self, position: int, row: int) -> Chunk | None:
        """The first with an undamaged header after `position`."""
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            while (position := content.find(CHUNK_MARK, position + 1, self.end)) >= 0:
                if chunk := self._chunk_at(position, row):
                    return chunk
        return None

    def _body_size(self, n_words: int, pairs: bool) -> int:
        return 4 * n_words if pairs else 2 * self.d_sae + 4 * n_words

    def _decode(self, chunk: Chunk) -> np.ndarray | None:
        try:
            if chunk.offset is None:
                raise ValueError("its header cannot be found")
            self._file.seek(chunk.offset)
            body = self._file.read(self._body_size(chunk.n_words, chunk.pairs))
            if digest(body, self.fingerprint) != chunk.digest:
                raise ValueError("its checksum differs")
            if chunk.pairs:
                return decode_pairs(np.frombuffer(body, "<u4").astype(np.uint32), len(chunk.rows), self.d_sae)
            counts = np.frombuffer(body, "<u2", self.d_sae)
            words = np.frombuffer(body, "<u4", offset=2 * self.d_sae)
            return decode_columns(counts, words.astype(np.uint32), len(chunk.rows))
        except ValueError as error:
            self._fail(f"the chunk of vectors {chunk.rows.start} to {chunk.rows.stop - 1} is damaged: {error}")
        if chunk.rows not in self.damaged:
            self.damaged.append(chunk.rows)
        return None

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
