"""Activations at chosen hooks and positions of many windows of text, on disk, from one pass of the model."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.activations.cache import ARRAY_FILE, CHECKSUMS_FILE, COMPLETE_FILE, NORMS_FILE, SOURCE_FILE
from bae_lens.activations.fingerprint import model_fingerprint, tensor_fingerprint
from bae_lens.activations.forward import hook_widths, run_at_hooks
from bae_lens.activations.models import resolve_hook
from bae_lens.activations.precision import STORED, Dtype, as_tensor, stored
from bae_lens.activations.windows import Windows
from bae_lens.distributed.connection import is_main_process, n_processes, process_index
from bae_lens.distributed.exchange import barrier
from bae_lens.distributed.homes import all_homes, is_first_at_home, place_at_home
from bae_lens.file_exchange import bring_rows
from bae_lens.functional.outliers import SINK_NORM, is_outlier
from bae_lens.storage import (
    checksum,
    claim,
    load_array,
    locked,
    make_array,
    open_array,
    read_json,
    save_array,
    write_json,
)

# Through the model. On a CPU more are slower where its activations leave the cache; a GPU needs more to be busy.
TOKENS_AT_A_TIME = {"cpu": 1024, "cuda": 8192}
ROWS_AT_A_TIME = 8192  # read from disk, so that memory holds the activations once
DOCUMENTS_FILE = "documents.npy"


class PositionActivations:
    """What `collect` wrote: `activations` (hooks, positions, windows, d_in), memory-mapped.

    A window with an attention sink, a state of over `SINK_NORM` times the median norm of its hook and position, is left
    out everywhere, so that all entropies are of the same windows and no BAE sees little else than a few huge vectors.
    Not from `OUTLIER_NORM` on: at one position norms differ by token, and in some layers of SmolLM2 a quarter of the
    tokens have 5 to 10 times the median. They are what there is to know there, and sinks have up to 150 times it.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the folder.

        Raises FileNotFoundError if it is missing or not complete, and ValueError for damaged documents or norms.
        """
        if not _is_complete(folder):
            raise FileNotFoundError(f"no complete activations at {folder}; collect makes them")
        self.folder = folder
        self.identity: dict[str, Any] = read_json(folder / SOURCE_FILE)
        self.hook_names: list[str] = self.identity["hook_names"]
        self.positions: list[int] = self.identity["positions"]
        self.all_documents = torch.from_numpy(load_array(folder / DOCUMENTS_FILE))
        self.norms = torch.from_numpy(load_array(folder / NORMS_FILE))
        self.activations = load_array(folder / ARRAY_FILE, mmap_mode="r")
        complete = read_json(folder / COMPLETE_FILE)
        if checksum([self.all_documents.numpy()]) != complete["documents"]:
            raise ValueError(f"{DOCUMENTS_FILE} in {folder} is damaged; remove the folder to start over")
        if checksum([self.norms.numpy()]) != complete["norms"]:
            self._give_up("the norms")
        self._checksums = load_array(folder / CHECKSUMS_FILE, mmap_mode="r")
        self._checked: set[tuple[int, int]] = set()

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.activations.shape[-1]

    @cached_property
    def kept(self) -> Int[Tensor, " n_kept"]:
        """Indices of the windows without an outlier."""
        outliers = torch.zeros(len(self.all_documents), dtype=torch.bool)
        for at_position in self.norms.flatten(0, 1):
            outliers |= is_outlier(at_position, at_position.median(), SINK_NORM)
        return (~outliers).nonzero().flatten()

    @property
    def documents(self) -> Int[Tensor, " n_kept"]:
        """A number for the document of each window without an outlier."""
        return self.all_documents[self.kept]

    def vectors(
        self, pairs: Sequence[tuple[int, int]], device: str | torch.device = "cpu"
    ) -> Float[Tensor, "pairs n_kept d_in"]:
        """Activations of (hook, position) pairs, by their indices, in float32 on a device.

        Beside the result, memory holds some thousand rows of them. Each pair is checked when it is first read: raises
        ValueError if its activations are no longer what was written, and `collect` then computes them again.
        """
        vectors = torch.empty(len(pairs), len(self.kept), self.d_in, device=device)
        for at_pair, pair in zip(vectors, pairs, strict=True):
            filled = 0
            for start, rows in self._blocks(pair):
                inside = (self.kept >= start) & (self.kept < start + len(rows))
                part = rows[self.kept[inside] - start]
                at_pair[filled : filled + len(part)] = part.to(device).float()
                filled += len(part)
        return vectors

    def _blocks(self, pair: tuple[int, int]) -> Iterator[tuple[int, Shaped[Tensor, "n d_in"]]]:
        """All windows' activations as they are stored, and the number of the first."""
        damaged = 0
        for start in range(0, len(self.all_documents), ROWS_AT_A_TIME):
            block = slice(start, start + ROWS_AT_A_TIME)
            rows = np.array(self.activations[pair][block])
            if pair not in self._checked:
                damaged += len(_damaged(rows, self.norms[pair][block].numpy(), self._checksums[pair][block]))
            yield start, as_tensor(rows, self.identity["dtype"])
        if damaged:
            self._give_up(f"{damaged} windows at {self.hook_names[pair[0]]}, position {self.positions[pair[1]]},")
        self._checked.add(pair)

    def _give_up(self, damaged: str) -> NoReturn:
        """Takes back that the pass is complete, so that `collect` computes again what is damaged."""
        (self.folder / COMPLETE_FILE).unlink(missing_ok=True)
        raise ValueError(f"{damaged} in {self.folder} are damaged; run the same again, which computes them again")


@torch.no_grad()
def collect(
    model: Any,
    windows: Windows,
    hook_names: Sequence[str],
    positions: Sequence[int],
    folder: Path,
    batch_size: int | None = None,
    dtype: Dtype = "float32",
) -> PositionActivations:
    """Runs the model over the windows, up to the deepest hook's layer, and keeps the activations at the positions.

    `batch_size` is in windows; by default they hold about a thousand tokens, on a GPU eight thousand. `dtype` is what
    activations are kept in: those of 16 bits take half the disk.
    An interrupted pass goes on after its last complete batch; a complete one is opened as it is. Windows whose
    activations are no longer what was written are computed again, and a warning gives their number. Several processes
    share the batches; what a machine that shares no folder with the others has is brought to them.
    Raises ValueError for a hook the model does not have or that is not one vector a token, hooks of different widths, a
    position beyond the windows or windows beyond the model's context, activations that are not finite or beyond the
    dtype, and a folder that holds activations of something else or at which another process is at work; OSError for a
    full disk.
    """
    hooks = [resolve_hook(model, name) for name in hook_names]
    if not hooks or not positions:
        raise ValueError("choose at least one hook and one position")
    columns = windows.columns(positions)
    widths = hook_widths(model, hooks)
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{hook} is {width} wide" for hook, width in widths.items())
        raise ValueError(f"hooks must be equally wide, but {listed}; look at them one after the other")
    length = int(columns.max()) + 1
    if length > model.cfg.n_ctx:
        raise ValueError(
            f"column {length - 1} of the windows lies beyond the model's context of {model.cfg.n_ctx} tokens; "
            "look at earlier positions only"
        )
    source = {
        "model": model_fingerprint(model),
        "windows": tensor_fingerprint(
            windows.tokens, windows.document, *([] if windows.ends is None else [windows.ends])
        ),
        "hook_names": hooks,
        "positions": list(positions),
        "dtype": dtype,
    }
    n, width = len(windows.tokens), widths[hooks[0]]
    with locked(folder) if is_first_at_home() else nullcontext():
        claim(folder / SOURCE_FILE, source)
        if not all_homes(_is_complete(folder)):
            if is_first_at_home():
                save_array(folder / DOCUMENTS_FILE, windows.document)
                make_array(folder / ARRAY_FILE, (len(hooks), len(positions), n, width), STORED[dtype])
                make_array(folder / NORMS_FILE, (len(hooks), len(positions), n))
                make_array(folder / CHECKSUMS_FILE, (len(hooks), len(positions), n), np.int64)
            barrier()
            _forget_damaged(folder)
            batch_size = batch_size or max(1, tokens_at_a_time(str(model.cfg.device)) // length)
            _collect_missing(model, windows.tokens, hooks, columns, folder, batch_size, dtype)
            if is_first_at_home():
                sums = {"documents": windows.document.numpy(), "norms": load_array(folder / NORMS_FILE)}
                write_json(folder / COMPLETE_FILE, {name: checksum([array]) for name, array in sums.items()})
            barrier()
    return PositionActivations(folder)


def tokens_at_a_time(device: str) -> int:
    """Tokens that go through a model on this device together."""
    return TOKENS_AT_A_TIME.get(torch.device(device).type, TOKENS_AT_A_TIME["cuda"])


def _collect_missing(
    model: Any,
    tokens: Int[Tensor, "n_windows length"],
    hooks: list[str],
    columns: Int[Tensor, "n_windows positions"],
    folder: Path,
    batch_size: int,
    dtype: Dtype,
) -> None:
    array, norms, sums = (open_array(folder / name) for name in (ARRAY_FILE, NORMS_FILE, CHECKSUMS_FILE))
    by_window = [np.moveaxis(each, 2, 0) for each in (norms, array, sums)]
    bring_rows(by_window, _written(sums), batch_size)
    n, written = len(tokens), _written(sums)
    missing = [rows for start in range(0, n, batch_size) if not written[rows := slice(start, start + batch_size)].all()]
    own = missing[process_index() :: n_processes()]
    left = sum(int((~written[rows]).sum()) for rows in own)
    barrier()  # before one of them is done
    with tqdm(
        total=n, initial=n - left, desc="activations by position", unit="window", disable=not is_main_process()
    ) as progress:
        for rows in own:
            length = int(columns[rows].max()) + 1
            batch = run_at_hooks(model, tokens[rows, :length].long(), hooks, columns=columns[rows])
            for index, hook in enumerate(hooks):
                at_hook = batch[hook].transpose(0, 1)
                norms[index, :, rows] = torch.linalg.vector_norm(at_hook, dim=-1, dtype=torch.float64).float().numpy()
                array[index, :, rows] = written_rows = _stored_at(hook, at_hook, dtype)
                at_positions = zip(written_rows, norms[index, :, rows], strict=True)
                sums[index, :, rows] = [_checksums(*at_position) for at_position in at_positions]
            progress.update(int((~written[rows]).sum()))
    barrier()
    bring_rows(by_window, _written(sums), batch_size)


def _written(sums: Int[np.ndarray, "hooks positions n"]) -> Bool[np.ndarray, " n"]:
    return (sums != 0).all((0, 1))


def _stored_at(hook: str, states: Float[Tensor, "*shape"], dtype: Dtype) -> Shaped[np.ndarray, "*shape"]:
    try:
        return stored(states, dtype)
    except ValueError as error:
        raise ValueError(f"at {hook}, {error}") from error


def _is_complete(folder: Path) -> bool:
    return all((folder / name).exists() for name in (COMPLETE_FILE, ARRAY_FILE, NORMS_FILE, CHECKSUMS_FILE))


def _forget_damaged(folder: Path) -> None:
    """Windows whose activations do not have the checksum that they were written with count as missing."""
    array, norms = (load_array(folder / name, mmap_mode="r") for name in (ARRAY_FILE, NORMS_FILE))
    sums = open_array(folder / CHECKSUMS_FILE)
    damaged = set[int]()
    own, n_readers = place_at_home()
    for pair in list(np.ndindex(*array.shape[:2]))[own::n_readers]:
        for start in range(0, array.shape[2], ROWS_AT_A_TIME):
            block = slice(start, start + ROWS_AT_A_TIME)
            damaged |= {start + i for i in _damaged(array[pair][block], norms[pair][block], sums[pair][block])}
    barrier()  # before the sums of other pairs are taken back
    sums[:, :, sorted(damaged)] = 0
    if damaged:
        n = sums.shape[2]
        warnings.warn(f"{len(damaged)} of {n} windows in {folder} are damaged and computed again", stacklevel=4)
    barrier()


def _damaged(
    rows: Shaped[np.ndarray, "n d_in"], norms: Float[np.ndarray, " n"], sums: Int[np.ndarray, " n"]
) -> list[int]:
    """Rows that were written, and are no longer what they were."""
    written = sums.nonzero()[0]
    return [int(i) for i, now in zip(written, _checksums(rows[written], norms[written]), strict=True) if sums[i] != now]


def _checksums(rows: Shaped[np.ndarray, "n d_in"], norms: Float[np.ndarray, " n"]) -> list[int]:
    return [checksum([norm, row]) for norm, row in zip(norms[:, None], rows, strict=True)]
