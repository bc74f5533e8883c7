"""How a `.bae` file is written (`code_file` has the format): nothing half-written is ever taken for whole."""

import fcntl
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from bae_lens.compression.code_file import (
    CHUNK,
    COMMIT,
    COMMIT_AT,
    DIGEST,
    MAGIC,
    PREAMBLE,
    VERSION,
    CodeFile,
    Coding,
    chunk_rows,
    digest,
)
from bae_lens.compression.coder import encode_columns
from bae_lens.compression.geometry_coder import Geometry, GeometryCode, sparse_enough
from bae_lens.compression.pair_coder import MOST_FEATURES, PairCode
from bae_lens.functional.pair_tree import bernoulli_bits


class CodeWriter:
    """Writes packed codes into a `.bae` file, chunk by chunk; a context manager.

    Only the last chunk may be longer or shorter, so that no few vectors at the end have a prior of their own.
    With `joint`, each chunk is coded as it is shortest: feature by feature, given a tree of pairs, or, where there is a
    `geometry`, given that; but an append to a file of an earlier version only as that version may hold.
    A new file appears under its name only when the block has ended well, and what was there before stays until then.
    An append leaves the file's vectors as they were unless the block ends well, even if the process is killed.
    Raises ValueError for an append to a file of another dictionary (naming both) and to a damaged one, if another
    process writes the same file, and for codes of another width; OSError if there is no space.
    """

    def __init__(
        self,
        path: str | Path,
        d_sae: int,
        fingerprint: bytes,
        append: bool = False,
        joint: bool = True,
        geometry: Geometry | None = None,
    ) -> None:
        self.path, self.d_sae, self.fingerprint, self.append = Path(path), d_sae, fingerprint, append
        self.joint, self.geometry, self.version = joint, geometry, VERSION
        self.n_bytes = 0
        """Bytes added to the file, once the block has ended."""
        self.fired = np.zeros(d_sae, np.int64)
        """How often each feature fired in what was added, once the block has ended."""
        self.joint_bits = 0.0
        """What the bits that were added need as their chunks are coded, without what describes that, and headers."""
        self.codings: Counter[Coding] = Counter()
        """Of the chunks that were added."""
        self._rows, self._kept, self._committed = 0, 0, False
        self._pending: list[np.ndarray] = []
        self._partial = self.path.with_name(f"{self.path.name}.partial")

    def __enter__(self) -> "CodeWriter":
        if self.path.is_dir():
            raise IsADirectoryError(f"{self.path} is a folder; name a file in it")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self.path.parent}; make it, or choose another")
        if not self.append:
            self._partial.touch()
        self._file = (self.path if self.append else self._partial).open("r+b", buffering=0)
        try:
            self._lock()
        except BaseException:
            self._file.close()
            raise
        try:
            self._begin_append() if self.append else self._begin()
        except BaseException:
            self._file.close()
            if not self.append:
                self._partial.unlink()
            raise
        return self

    def write(self, packed: np.ndarray) -> None:
        """Adds the packed codes (n, ceil(d_sae / 8)) of n vectors."""
        if packed.shape[1] != -(-self.d_sae // 8):
            raise ValueError(
                f"{self.d_sae} features are packed into {-(-self.d_sae // 8)} bytes, got {packed.shape[1]}"
            )
        self._pending.append(packed)
        size = chunk_rows(self.d_sae)
        if sum(map(len, self._pending)) >= 2 * size:
            rows = np.concatenate(self._pending)
            while len(rows) >= 2 * size:
                self._write_chunk(rows[:size])
                rows = rows[size:]
            self._pending = [rows]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._committed:
                self._file.close()
            else:
                self._abandon()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing {self.path}; wait for it") from error
        self._check_place()

    def _in_place(self) -> bool:
        """Whether the file that is open still is the one of its name."""
        written = self.path if self.append else self._partial
        return written.exists() and os.path.samestat(written.stat(), os.fstat(self._file.fileno()))

    def _check_place(self) -> None:
        if not self._in_place():
            raise ValueError(f"another process has replaced {self.path} meanwhile; try again")

    def _begin(self) -> None:
        self._file.truncate(0)
        preamble = PREAMBLE.pack(MAGIC, VERSION, self.d_sae, self.fingerprint)
        self._put(preamble + digest(preamble, b"") + bytes(COMMIT.size + DIGEST))

    def _begin_append(self) -> None:
        with CodeFile(self.path) as existing:
            existing.check_fingerprint(self.fingerprint)
        self.version = existing.version
        self._rows, self._kept = existing.n_rows, existing.end
        self._file.truncate(existing.end)
        self._file.seek(existing.end)

    def _write_chunk(self, packed: np.ndarray) -> None:
        counts, words = encode_columns(packed, self.d_sae)
        alone = float(bernoulli_bits(counts.astype(np.int64), len(packed)).sum())
        columns = _Coded(Coding.COLUMNS, alone, words, counts.astype("<u2").tobytes())
        coded = min([columns, *self._coded_jointly(packed, int(counts.sum()))], key=lambda coded: len(coded.body))
        header = CHUNK.pack(
            coded.coding.value, self._rows, len(packed), len(coded.words), digest(coded.body, self.fingerprint)
        )
        self._put(header + digest(header, self.fingerprint) + coded.body)
        self._rows += len(packed)
        self.fired += counts
        self.joint_bits += coded.joint_bits
        self.codings[coded.coding] += 1

    def _coded_jointly(self, packed: np.ndarray, n_on: int) -> Iterator["_Coded"]:
        """In the ways that are asked for, that the version of the file has, and that these vectors admit."""
        versions = range(self.version + 1) if self.joint else ()
        if Coding.PAIRS.since in versions and self.d_sae <= MOST_FEATURES:
            pairs = PairCode(packed, self.d_sae)
            yield _Coded(Coding.PAIRS, pairs.joint_bits, pairs.encode())
        geometry = self.geometry if Coding.GEOMETRY.since in versions else None
        if geometry is not None and sparse_enough(n_on, len(packed), self.d_sae):
            code = GeometryCode(packed, self.d_sae, geometry)
            yield _Coded(Coding.GEOMETRY, code.joint_bits, code.words)

    def _finish(self) -> None:
        if any(map(len, self._pending)):
            self._write_chunk(np.concatenate(self._pending))
        os.fsync(self._file.fileno())
        self._check_place()
        end = self._file.tell()
        commit = COMMIT.pack(self._rows, end)
        self._file.seek(COMMIT_AT)
        self._committed = self.append  # what follows may fail after it was done, and an append that counts must stay
        self._put(commit + digest(commit, self.fingerprint))
        os.fsync(self._file.fileno())
        if not self.append:
            os.replace(self._partial, self.path)
            self._committed = True
        self.n_bytes = end - self._kept

    def _abandon(self) -> None:
        """Removes what was written, of a file that does not count it."""
        try:
            if self.append:
                self._file.truncate(self._kept)
            elif self._in_place():
                self._partial.unlink()
        finally:
            self._file.close()

    def _put(self, content: bytes) -> None:
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            error.filename = str(self.path)
            raise


@dataclass(frozen=True)
class _Coded:
    """The bits of a chunk in one of the ways to code them."""

    coding: Coding
    joint_bits: float
    words: np.ndarray
    before: bytes = b""
    """What the body has before the words."""

    @property
    def body(self) -> bytes:
        return self.before + self.words.astype("<u4").tobytes()
