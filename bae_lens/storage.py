"""Files and folders that are whole or absent: JSON, checked arrays, whose a folder is, how long its stages took."""

import glob
import json
import os
import resource
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np
import psutil
from filelock import FileLock, Timeout
from jaxtyping import Int
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from bae_lens.distributed.connection import is_main_process
from bae_lens.distributed.exchange import barrier, gather
from bae_lens.distributed.homes import is_first_at_home, made_if_used

T = TypeVar("T")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to, which takes the place of `path` when the block ends.

    If the block raises, what it wrote is removed and `path` stays as it was. Each process has a place of its own, so of
    two that write one file at a time the last to end wins, whole. What killed processes left behind is removed. A
    folder that is replaced is absent for a moment.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove(left)
    partial, replaced = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("partial", "replaced"))
    _remove(partial)
    try:
        yield partial
        if partial.is_dir() and path.exists():
            os.replace(path, replaced)
            try:
                os.replace(partial, path)
            except BaseException:
                os.replace(replaced, path)
                raise
            _remove(replaced)
        else:
            os.replace(partial, path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file that is at any moment either there whole or as it was before."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Writes JSON values, or dataclasses of them, as `write_text` does."""
    values = asdict(content) if is_dataclass(content) and not isinstance(content, type) else content
    write_text(path, json.dumps(values, indent=indent))


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises ValueError if the file was damaged since, or is not one that it wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove its folder to start over") from error


def validated(kind: type[T], content: Any, name: str) -> T:
    """JSON values as the (nested) dataclass that they were made of.

    Raises ValueError if they are not of this kind, as those of another version of bae_lens may be; `name` says whose.
    """
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        (first, *others) = error.errors()
        where = ".".join(map(str, first["loc"])) or "content"
        more = f" and {len(others)} more" if others else ""
        raise ValueError(
            f"{name} is no {kind.__name__} of this version of bae_lens ({where}: {first['msg']}{more}); make it again"
        ) from error


def make_array(
    path: Path, shape: tuple[int, ...], dtype: type[np.generic] = np.float32, *, sparse: bool = False
) -> None:
    """Makes an array of zeros, unless it is there, with room on the disk for all of its values.

    A sparse one takes room for those that are written, or that `reserve_rows` is told of.
    Raises OSError if there is no room: a mapped file whose disk is full would end the process without a word.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.dtype(dtype), shape=shape)
        if not sparse:
            _reserve(partial, path, [(0, partial.stat().st_size)])


def reserve_rows(path: Path, rows: Iterable[slice]) -> None:
    """Sees to it that the disk has room for these rows of a sparse array. Raises OSError as `make_array`."""
    array = open_array(path)
    per_row, bounds = array.nbytes // len(array), [each.indices(len(array))[:2] for each in rows]
    _reserve(path, path, [(array.offset + start * per_row, (stop - start) * per_row) for start, stop in bounds])


def _reserve(path: Path, named: Path, parts: Sequence[tuple[int, int]]) -> None:
    """Gives parts of a file, from so many bytes on so many, the blocks of the disk that they will need.

    An error calls it `named`.
    """
    with path.open("r+b") as file:
        try:
            for start, n_bytes in parts:
                _reserve_part(file, start, n_bytes)
        except OSError as error:
            needed = sum(n_bytes for _, n_bytes in parts) / 2**30
            reason = f"{os.strerror(error.errno or 0)}: {named} needs {needed:.2g} GiB"
            raise OSError(error.errno, f"{reason}; make room, or choose a folder on another disk") from error


def _reserve_part(file: IO[bytes], start: int, n_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), start, n_bytes)
        return
    file.seek(start)
    while block := file.read(min(2**20, start + n_bytes - file.tell())):
        file.seek(-len(block), os.SEEK_CUR)
        file.write(block)


def open_array(path: Path) -> np.memmap:
    """An array that `make_array` made, for writing."""
    return np.lib.format.open_memmap(path, mode="r+")


def save_array(path: Path, values: Int[Tensor, "..."]) -> None:
    """Writes a file that is at any moment either there whole or as it was before."""
    with written_whole(path) as partial, partial.open("wb") as file:
        np.save(file, values.numpy())


def load_array(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """Raises ValueError if the file cannot be read."""
    try:
        return np.load(path, mmap_mode=mmap_mode)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove its folder to start over") from error


def checksum(arrays: Iterable[np.ndarray]) -> int:
    """1 plus the CRC-32 of the arrays' bytes, one array after another, so that it is never 0."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc + 1


RUN_FILE = "run.json"
STAGES_FILE = "stages.json"
LOCK_FILE = ".lock"
ACTIVATIONS_FOLDER = "activations"  # of a run, in which they are cached
WINDOWS_FOLDER = "windows"  # of the tokens that a run chose before it knew that it could go on
NAMED_DIFFERENCES = 4  # in the message that a folder is for something else

OnStage = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Stage:
    """A part of the work, over all runs that it took."""

    name: str
    """What was done."""
    seconds: float
    """Time that it took."""
    peak_memory_gib: float
    """Largest resident memory of a process up to the end of this stage."""


def unwatched(*_: Any) -> None:
    """For a run of whose progress nobody is told."""


class Stopwatch:
    """Times the stages of a run, adding to the times of earlier runs in the same folder.

    `on_stage` is told of each stage when it begins, with None, and when it has ended, with the seconds that it took.
    """

    def __init__(self, folder: Path, on_stage: OnStage = unwatched) -> None:
        self.path, self.on_stage = folder / STAGES_FILE, on_stage
        earlier = read_json(self.path) if self.path.exists() else []
        self.stages = {s.name: s for s in (validated(Stage, stage, str(self.path)) for stage in earlier)}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time that the block takes, even if it is interrupted."""
        self.on_stage(name, None)
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - start)
        self.on_stage(name, time.monotonic() - start)

    def add(self, name: str, seconds: float) -> None:
        """Adds time to a stage, in seconds, and notes the peak memory."""
        before = self.stages.get(name, Stage(name, 0.0, 0.0))
        peak = max(before.peak_memory_gib, _peak_memory_gib())
        self.stages[name] = Stage(name, before.seconds + seconds, peak)
        self._write()

    def compare_notes(self) -> None:
        """Of several processes, of which each has timed what it did: a stage took what it took the slowest."""
        for stages in gather(self.stages):
            for name, stage in stages.items():
                own = self.stages.get(name) or stage
                memory = max(own.peak_memory_gib, stage.peak_memory_gib)
                self.stages[name] = Stage(name, max(own.seconds, stage.seconds), memory)
        self._write()

    def _write(self) -> None:
        if is_main_process():
            write_json(self.path, [asdict(stage) for stage in self.stages.values()])


def existing_folder(folder: Path) -> Path:
    """The folder itself, or the nearest of those above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def check_folder(folder: Path) -> None:
    """Raises ValueError if `folder` holds files that are not those of a run, or cannot be written to."""
    existing = existing_folder(folder)
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"the output folder {folder} is not writable: check {existing}, or choose another folder")
    if folder.exists() and not (folder / RUN_FILE).exists() and not all(map(_of_a_claim, folder.iterdir())):
        raise ValueError(f"the output folder {folder} holds files of something else; choose an empty one")


def _of_a_claim(path: Path) -> bool:
    """Whether a run that ended before it had claimed its folder may have left this."""
    partial = any(path.match(f".{name}.*.partial") for name in (RUN_FILE, WINDOWS_FOLDER))
    return partial or path.name in (LOCK_FILE, WINDOWS_FOLDER)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder, made if need be, alone among processes; nothing is left of it if nothing was put there.

    Raises ValueError if another process holds it.
    """
    lock = folder / LOCK_FILE
    try:
        with made_if_used(folder), FileLock(lock, timeout=0):
            try:
                yield
            finally:
                if list(folder.iterdir()) == [lock]:
                    lock.unlink()
    except Timeout as error:
        raise ValueError(f"another process is at work in {folder}; wait for it, or choose another folder") from error


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Holds the place of a file that takes long to write, alone among processes.

    Raises ValueError if another one holds it, and OSError if it is a folder or has none to be in.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}; make it, or choose another for {path.name}")
    lock = path.with_name(f".{path.name}{LOCK_FILE}")
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise ValueError(f"another process is writing {path}; wait for it, or choose another file") from error


@contextmanager
def claimed(folder: Path, purpose: dict[str, Any]) -> Iterator[None]:
    """Holds `folder` for a run of this purpose, made of JSON values, alone among processes.

    Of several processes that share a run, the first that sees the folder holds it for all that do.
    If the block raises ValueError before it has put anything there, the folder is free again for another purpose.
    Raises ValueError as `check_folder` and `locked`, and as `claim` if it is the home of another run.
    """
    if is_first_at_home():
        check_folder(folder)
    with locked(folder) if is_first_at_home() else nullcontext():
        claim(folder / RUN_FILE, {**purpose, "version": version("bae-lens")})
        try:
            yield
        except ValueError:
            if is_first_at_home() and {path.name for path in folder.iterdir()} <= {LOCK_FILE, RUN_FILE, STAGES_FILE}:
                (folder / STAGES_FILE).unlink(missing_ok=True)
                (folder / RUN_FILE).unlink()
            raise


def claim(path: Path, purpose: dict[str, Any]) -> None:
    """Writes down in the file `path` what its folder is for, or compares with what stands there.

    Of several processes that share a folder, the first writes, and all compare. Raises ValueError as `check_same`.
    """
    if is_first_at_home() and not path.exists():
        write_json(path, purpose, indent=2)
    barrier()
    check_same(read_json(path), purpose, path.parent)


def check_same(earlier: Any, now: Any, folder: Path) -> None:
    """Raises ValueError, naming what differs, unless a folder that was made for `earlier` serves for `now`."""
    there, here = flat(earlier), flat(json.loads(json.dumps(now)))
    absent = object()
    changed = [key for key in {**there, **here} if there.get(key, absent) != here.get(key, absent)]
    if changed:
        before, after = ([repr(side[key]) if key in side else "nothing" for key in changed] for side in (there, here))
        pairs = zip(changed, before, after, strict=True)
        named = [f"{key or 'content'}: {value} there, {other} now" for key, value, other in pairs]
        more = [f"{len(changed) - NAMED_DIFFERENCES} more"] if len(changed) > NAMED_DIFFERENCES else []
        listed = "; ".join([*named[:NAMED_DIFFERENCES], *more])
        raise ValueError(f"{folder} holds something else ({listed}); choose another folder")


def flat(content: Any, name: str = "") -> dict[str, Any]:
    """All values of nested mappings and lists, by their path; an empty one is a value itself."""
    if isinstance(content, dict) and content:
        parts = content.items()
    elif isinstance(content, list) and content:
        parts = enumerate(content)
    else:
        return {name.removeprefix("."): content}
    return {path: value for key, part in parts for path, value in flat(part, f"{name}.{key}").items()}


def _peak_memory_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
