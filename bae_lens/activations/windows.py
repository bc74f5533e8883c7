"""Which tokens of a text `collect` looks at: sequences of one length, cut from documents, kept on disk as arrays."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.activations.sources import texts
from bae_lens.distributed.connection import is_main_process
from bae_lens.distributed.homes import is_first_at_home
from bae_lens.storage import checksum, load_array, read_json, save_array, write_json, written_whole

WINDOWS_PER_DOCUMENT = 8  # at most, so that a few long documents do not make the sample
SOURCE_FILE = "source.json"  # what the windows were cut from, and the checksum of the arrays
ARRAYS = ("tokens", "document")
SAMPLED_DOCUMENTS = 1024  # by which a text is known again


@dataclass(frozen=True)
class Windows:
    """Token sequences of one length, whose positions mean the same in each."""

    tokens: Int[Tensor, "n_windows length"]
    """Token ids."""
    document: Int[Tensor, " n_windows"]
    """A number for the document that each window is from."""
    starts_with_bos: bool = False
    """Whether the first column is BOS. Positions count the tokens after it from 1; BOS itself is position 0."""
    too_short: int = 0
    """Documents that were dropped because they are shorter than a window."""
    ends: Int[Tensor, "n_windows n_demonstrations"] | None = None
    """Of prompts, the column of `tokens` in which each demonstration ends. Positions then count demonstrations from 1,
    and what follows the last one in a row is padding."""

    def columns(self, positions: Sequence[int]) -> Int[Tensor, "n_windows n_positions"]:
        """Of `tokens`, for positions. Raises ValueError for none, and for one beyond the windows."""
        length = self.tokens.shape[1] - self.starts_with_bos if self.ends is None else self.ends.shape[1]
        unit = "tokens" if self.ends is None else "demonstrations"
        if not positions:
            raise ValueError("choose at least one position, got none")
        for position in positions:
            if not 1 <= position <= length:
                raise ValueError(f"positions must lie between 1 and the windows' {length} {unit}, got {position}")
        wanted = torch.tensor(positions) - 1
        if self.ends is None:
            return (wanted + self.starts_with_bos).expand(len(self.tokens), -1)
        return self.ends[:, wanted]

    def tokens_at(self, position: int) -> Int[Tensor, " n_windows"]:
        """The token of each window at a position."""
        return self.tokens.gather(1, self.columns([position]))[:, 0]


def random_windows(
    tokenizer: Any,
    documents: Iterable[Any],
    length: int,
    n_windows: int,
    seed: int = 0,
    per_document: int = WINDOWS_PER_DOCUMENT,
) -> Windows:
    """Windows of `length` tokens from random places of documents (rows with a column `text`), in their order.

    Documents begin alike, so windows from their beginnings would hold few different tokens at position 1. Each window
    begins with BOS, where the tokenizer has one: the model's first token gathers attention, and its state is that of no
    content. Windows of a document do not overlap, and there are at most `per_document`.

    Raises ValueError if the documents give fewer windows, and for a length or number of windows below 1.
    """
    rng = np.random.default_rng(seed)

    def starts(n_tokens: int, wanted: int) -> Iterator[int]:
        count = min(n_tokens // length, wanted)
        # Gaps of random sizes before non-overlapping windows at random places.
        gaps = np.sort(rng.integers(0, n_tokens - count * length + 1, size=count))
        return (int(gap) + i * length for i, gap in enumerate(gaps))

    return _cut(tokenizer, documents, length, n_windows, per_document, starts)


def first_windows(tokenizer: Any, documents: Iterable[Any], length: int, n_windows: int) -> Windows:
    """The first `length` tokens of each document that is as long, after BOS where the tokenizer has one (section 3.2).

    Raises ValueError as `random_windows`.
    """
    return _cut(tokenizer, documents, length, n_windows, 1, lambda _, wanted: iter([0][:wanted]))


def _cut(
    tokenizer: Any,
    documents: Iterable[Any],
    length: int,
    n_windows: int,
    per_document: int,
    starts: Callable[[int, int], Iterator[int]],
) -> Windows:
    """`starts` gives, for a document's number of tokens and the windows wanted of it, where they begin."""
    if length < 1:
        raise ValueError(f"windows must be at least 1 token long, got {length}")
    if n_windows < 1 or per_document < 1:
        raise ValueError(f"ask for at least 1 window, and 1 a document, got {n_windows} and {per_document}")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = torch.empty(n_windows, len(bos) + length, dtype=torch.int32)
    tokens[:, : len(bos)] = torch.tensor(bos)
    document = torch.empty(n_windows, dtype=torch.int64)
    found = too_short = longest = 0
    with tqdm(total=n_windows, desc="choosing windows", unit="window", disable=not is_main_process()) as progress:
        for number, text in enumerate(texts(documents)):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            longest = max(longest, len(ids))
            if len(ids) < length:
                too_short += 1
                continue
            before, ids = found, torch.tensor(ids, dtype=torch.int32)
            for start in starts(len(ids), min(per_document, n_windows - found)):
                tokens[found, len(bos) :] = ids[start : start + length]
                document[found] = number
                found += 1
            progress.update(found - before)
            if found == n_windows:
                return Windows(tokens, document, bool(bos), too_short)
    if too_short and not found:
        raise ValueError(
            f"no document reaches position {length}, the longest of {too_short} has {longest} tokens; add longer "
            "documents, or ask for shorter windows"
        )
    raise ValueError(
        f"the text gives {found} of {n_windows} windows of {length} tokens, at most {per_document} a document "
        f"({too_short} documents are shorter); add text, or ask for fewer or shorter windows, or more a document"
    )


def kept_windows(folder: Path, source: dict[str, Any], cut: Callable[[], Windows]) -> Windows:
    """The windows that the folder keeps of this `source`, JSON values; or those that `cut` gives, which it keeps then.

    Whatever the folder holds of another source, or is damaged, is replaced. Raises ValueError for windows with ends,
    which it does not keep.
    """
    windows = _read(folder, source)
    if windows is None:
        windows = cut()
        if windows.ends is not None:
            raise ValueError(
                f"windows are kept without ends, got those of {windows.ends.shape[1]} demonstrations; make them anew "
                "with prompt_windows"
            )
        if is_first_at_home():
            _keep(windows, source, folder)
    return windows


def _keep(windows: Windows, source: dict[str, Any], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(folder) as partial:
        partial.mkdir()
        for name in ARRAYS:
            save_array(partial / f"{name}.npy", getattr(windows, name))
        kept = {"starts_with_bos": windows.starts_with_bos, "too_short": windows.too_short}
        write_json(partial / SOURCE_FILE, {"source": source, "checksum": _checksum(windows), "windows": kept})


def _read(folder: Path, source: dict[str, Any]) -> Windows | None:
    try:
        kept = read_json(folder / SOURCE_FILE)
        if kept["source"] != json.loads(json.dumps(source)):
            return None
        tokens, document = (torch.from_numpy(load_array(folder / f"{name}.npy")) for name in ARRAYS)
        windows = Windows(tokens, document, **kept["windows"])
        return windows if _checksum(windows) == kept["checksum"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _checksum(windows: Windows) -> int:
    return checksum([windows.tokens.numpy(), windows.document.numpy()])


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hexadecimal digits that depend on how a tokenizer cuts text, and on its BOS."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    # Set by whoever tokenized last.
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    content = json.dumps([rules, tokenizer.bos_token_id], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def text_fingerprint(documents: Any) -> str:
    """16 hexadecimal digits that depend on how many documents a sequence has and on up to `SAMPLED_DOCUMENTS` texts.

    Evenly spaced ones, so that it takes a moment for any size: another order or choice is noticed, a change within
    single documents need not be.
    """
    digest = hashlib.sha256(str(len(documents)).encode())
    step = max(1, -(-len(documents) // SAMPLED_DOCUMENTS))
    for text in texts(documents[i] for i in range(0, len(documents), step)):
        digest.update(text.encode())
    return digest.hexdigest()[:16]
