"""The folder of a run: whose it is, what it holds, and how long its stages took."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bae_lens.harvest import read_json, write_text
from bae_lens.parallel import is_first, wait_for_all

RUN_FILE = "run.json"
LOCK_FILE = ".lock"


@dataclass(frozen=True)
class Stage:
    """A part of the work, over all runs that it took."""

    name: str
    """What was done."""
    seconds: float
    """Time that it took."""
    peak_memory_gib: float
    """Largest resident memory of a process up to the end of this stage."""


class Stopwatch:
    """Times the stages of a run, adding to the times of earlier runs in the same folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "stages.json"
        earlier = read_json(self.path) if self.path.exists() else []
        self.stages = {stage["name"]: Stage(**stage) for stage in earlier}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time that the block takes, even if it is interrupted."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - start)

    def add(self, name: str, seconds: float) -> None:
        """Adds time to a stage, in seconds, and notes the peak memory."""
        before = self.stages.get(name, Stage(name, 0.0, 0.0))
        peak = max(before.peak_memory_gib, _peak_memory_gib())
        self.stages[name] = Stage(name, before.seconds + seconds, peak)
        if is_first():
            write_text(self.path, json.dumps([asdict(stage) for stage in self.stages.values()]))


def check_folder(folder: Path) -> None:
    """Raises ValueError if `folder` holds files that are not those of a run, or cannot be written to."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"the output folder {folder} is not writable: check {existing}, or choose another folder")
    ours = {LOCK_FILE, RUN_FILE, f"{RUN_FILE}.partial"}
    if folder.exists() and not (folder / RUN_FILE).exists() and {path.name for path in folder.iterdir()} - ours:
        raise ValueError(f"the output folder {folder} holds files of something else; choose an empty one")


@contextmanager
def claimed(folder: Path, purpose: dict[str, Any]) -> Iterator[None]:
    """Holds `folder` for a run of this purpose, made of JSON values, alone among processes.

    Of several processes that share a run, the first holds it for all of them.
    Raises ValueError as `check_folder`, if another process holds it, and if it is the home of another run, saying what
    differs.
    """
    if not is_first():
        wait_for_all()
        yield
        return
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK_FILE, timeout=0):
            _claim(folder, {**purpose, "version": version("bae-lens")})
            wait_for_all()
            yield
    except Timeout as error:
        raise ValueError(f"another process is at work in {folder}; wait for it, or choose another folder") from error


def _claim(folder: Path, purpose: dict[str, Any]) -> None:
    now = json.loads(json.dumps(purpose))
    if (folder / RUN_FILE).exists():
        earlier, new = _flat(read_json(folder / RUN_FILE)), _flat(now)
        changed = [key for key in {**earlier, **new} if earlier.get(key) != new.get(key)]
        if changed:
            differences = "; ".join(f"{key}: {earlier.get(key)!r} there, {new.get(key)!r} now" for key in changed)
            raise ValueError(f"the output folder {folder} holds another run ({differences}); choose another folder")
    write_text(folder / RUN_FILE, json.dumps(now, indent=2))


def _flat(content: Any, name: str = "") -> dict[str, Any]:
    """All values of nested mappings and lists, by their path."""
    if isinstance(content, dict):
        parts = content.items()
    elif isinstance(content, list):
        parts = enumerate(content)
    else:
        return {name.removeprefix("."): content}
    return {path: value for key, part in parts for path, value in _flat(part, f"{name}.{key}").items()}


def _peak_memory_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
