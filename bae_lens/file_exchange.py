"""What runs write on machines that share no folder: files that one of them has are brought to the others."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePath

import numpy as np
import torch
from jaxtyping import Bool

from bae_lens.distributed.exchange import barrier, gather
from bae_lens.distributed.homes import home_index, is_first_at_home, n_homes, send_between_homes
from bae_lens.storage import ACTIVATIONS_FOLDER, written_whole

PIECE_BYTES = 2**26


def bring_together(folder: Path) -> None:
    """Gives every machine the files of a run that others have and it lacks; returns when all have all of them.

    A folder that a machine lacks appears there whole, at once. Activations are left out, which `bring_rows` brings, and
    so are files with a dot before their name.
    """
    if n_homes() == 1:
        return
    listings = [listing for listing in gather(_files(folder) if is_first_at_home() else None) if listing is not None]
    sizes = {path: size for listing in reversed(listings) for path, size in listing.items()}
    if is_first_at_home():
        with ExitStack() as writing:
            root, place = None, folder
            for path in sorted(sizes, key=lambda path: path.parts):
                having = [path in listing for listing in listings]
                target = None
                if not having[home_index()]:
                    if root is None or root not in (path, *path.parents):
                        writing.close()
                        root = _topmost_missing(folder, path)
                        (folder / root).parent.mkdir(parents=True, exist_ok=True)
                        place = writing.enter_context(written_whole(folder / root))
                    target = place / path.relative_to(root)
                    target.parent.mkdir(parents=True, exist_ok=True)
                if not all(having):
                    _bring(folder / path, sizes[path], having.index(True), target)
    barrier()


def _files(folder: Path) -> dict[PurePath, int]:
    """Paths within the folder of what is brought to others, and bytes."""
    paths = {path: path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {
        PurePath(relative): path.stat().st_size
        for path, relative in paths.items()
        if ACTIVATIONS_FOLDER not in relative.parts and not any(part.startswith(".") for part in relative.parts)
    }


def _topmost_missing(folder: Path, path: PurePath) -> PurePath:
    return next(part for part in (*reversed(path.parents), path) if not (folder / part).exists())


def _bring(path: Path, n_bytes: int, home: int, target: Path | None) -> None:
    """From that home to `target`, if that is a place here."""
    here = home == home_index()
    with ExitStack() as stack:
        read = stack.enter_context(path.open("rb")) if here else None
        written = stack.enter_context(target.open("wb")) if target else None
        for start in range(0, n_bytes, PIECE_BYTES):
            piece = np.zeros(min(PIECE_BYTES, n_bytes - start), dtype=np.uint8)
            if read is not None:
                read.readinto(piece.data)
            send_between_homes(torch.from_numpy(piece), home)
            if written is not None:
                written.write(piece.data)


def bring_rows(arrays: Sequence[np.ndarray], written: Bool[np.ndarray, " n"], batch_size: int) -> None:
    """Gives every machine the rows of arrays, (n, ...), that others have `written` and it has not.

    They are brought by batches, each from the first machine that has written all of it. The last of the arrays, which
    tells what is written, is filled last. Returns when all are done.
    """
    if n_homes() == 1:
        return
    everyones = [theirs for theirs in gather(written if is_first_at_home() else None) if theirs is not None]
    if is_first_at_home():
        for rows, having in _batches(everyones, batch_size):
            if any(having) and not all(having):
                for array in arrays:
                    values = np.ascontiguousarray(array[rows])
                    send_between_homes(torch.from_numpy(values.reshape(-1).view(np.uint8)), having.index(True))
                    if not having[home_index()]:
                        array[rows] = values
    barrier()


def _batches(everyones: list[Bool[np.ndarray, " n"]], batch_size: int) -> Iterator[tuple[slice, list[bool]]]:
    for start in range(0, len(everyones[0]), batch_size):
        rows = slice(start, start + batch_size)
        yield rows, [bool(theirs[rows].all()) for theirs in everyones]
