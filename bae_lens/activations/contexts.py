"""Which tokens of a text are looked at: documents cut into contexts, some of them held out for evaluation."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from bae_lens.activations.fingerprint import tensor_fingerprint
from bae_lens.activations.sources import texts
from bae_lens.distributed.connection import is_main_process
from bae_lens.distributed.homes import is_first_at_home
from bae_lens.storage import load_array, read_json, save_array, write_json, written_whole

Split = Literal["train", "tune", "test"]
HELD_OUT_EVERY = 10  # every tenth document is held out for evaluation
TUNING_AFTER = 5  # and the fifth after it for tuning
PADDING = -1  # in token arrays, after the end of a document shorter than the context
CONTEXTS_FOLDER = "contexts"  # of a run, in which they are kept
FINGERPRINTS_FILE = "fingerprints.json"  # of each split


@dataclass(frozen=True)
class Contexts:
    """Token sequences with the documents they were cut from."""

    tokens: Int[Tensor, "n_contexts context_size"]
    """Token ids, beginning with BOS where the tokenizer has one; `PADDING` after a document's end."""
    document: Int[Tensor, " n_contexts"]
    """Index of each context's document in the order in which documents were read."""

    def is_special(self, special_tokens: Sequence[int]) -> Bool[Tensor, " n_tokens"]:
        """Which tokens, one context after another, are padding or among these."""
        return torch.isin(self.tokens.flatten(), torch.tensor([PADDING, *special_tokens]))


@dataclass(frozen=True)
class ContextSettings:
    """How documents become contexts."""

    context_size: int = 128
    """Tokens per context, BOS included."""
    cached_tokens: int = 131_072
    """Tokens to cache for training, BOS not counted."""
    held_out_tokens: int = 16_384
    """Tokens to cache from held-out documents."""
    tuning_tokens: int = 8_192
    """Tokens to cache from documents held out for tuning, if there is anything to tune."""
    loss_contexts: int = 32
    """Held-out contexts on which the model's loss is measured."""
    contexts_per_document: int = 8
    """At most so many contexts, at random places, from one document, so that a few long ones do not make the corpus."""

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that leave nothing to train on."""
        for name, value in asdict(self).items():
            least = 3 if name == "context_size" else 1  # BOS, a token, and the one to predict from it
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


def first_contexts(contexts: Contexts, n_tokens: int, special_tokens: Sequence[int]) -> Contexts:
    """The first ones that have so many tokens, these special ones not counted, or all if they have fewer."""
    counted = (~contexts.is_special(special_tokens)).view(contexts.tokens.shape).sum(1)
    n = int(torch.searchsorted(counted.cumsum(0), n_tokens)) + 1
    return Contexts(contexts.tokens[:n], contexts.document[:n])


def split_of(document: int) -> Split:
    """What a document serves for, by its number in the shuffled text: of ten in a row one for test, one for tuning."""
    place = document % HELD_OUT_EVERY
    return "test" if place == 0 else "tune" if place == TUNING_AFTER else "train"


def held_out_documents(text: Any, seed: int, in_corpus_order: bool = False) -> Any:
    """The test documents of a text that `choose_contexts` gets shuffled with this seed, in that order or the corpus'.

    A text that is streamed from a hub keeps the shuffled order.
    """
    if not isinstance(text, Dataset):
        return (row for number, row in enumerate(text.shuffle(seed=seed)) if split_of(number) == "test")
    shuffled = Dataset.from_dict({"row": range(len(text))}).shuffle(seed=seed)["row"]
    rows = [row for number, row in enumerate(shuffled) if split_of(number) == "test"]
    return text.select(sorted(rows) if in_corpus_order else rows)


def choose_contexts(
    tokenizer: Any, documents: Iterable[Any], settings: ContextSettings, seed: int = 0, *, tune: bool = False
) -> dict[str, Contexts]:
    """Contexts for `"train"` and, from documents of their own (every tenth), `"test"`, up to the tokens asked for.

    With `tune` there is also `"tune"`, from another tenth of the documents, which training leaves out in any case.
    `documents` are rows with a column `text`, as of a dataset.

    Warns if they run out before. Raises ValueError if a split gets nothing at all or a row's text is no string.
    """
    rng = np.random.default_rng(seed)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = settings.context_size - len(bos)
    wanted = {"train": settings.cached_tokens, "test": settings.held_out_tokens}
    if tune:
        wanted["tune"] = settings.tuning_tokens
    chosen: dict[str, list[tuple[int, list[int]]]] = {split: [] for split in wanted}
    missing = dict(wanted)
    index = -1
    with tqdm(
        total=sum(missing.values()), desc="choosing contexts", unit="token", disable=not is_main_process()
    ) as progress:
        for index, text in enumerate(texts(documents)):
            split = split_of(index)
            if missing.get(split, 0) <= 0:
                if max(missing.values()) <= 0:
                    break
                continue
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            windows = [ids[start : start + room] for start in range(0, len(ids), room)]
            for window in rng.permutation(len(windows))[: settings.contexts_per_document]:
                if missing[split] <= 0:
                    break
                chosen[split].append((index, bos + windows[window]))
                missing[split] -= len(windows[window])
                progress.update(len(windows[window]))
    for split, contexts in chosen.items():
        if not contexts:
            raise ValueError(
                f"no {split} document among {index + 1} (of {HELD_OUT_EVERY} in a row the first is for test and the "
                f"{TUNING_AFTER + 1}th for tune); add text"
            )
        if missing[split] > 0:
            found = f"the text gave {wanted[split] - missing[split]} of the {wanted[split]} {split} tokens asked for"
            warnings.warn(f"{found}; add text or raise contexts_per_document", stacklevel=2)
    return {split: _stack(contexts, settings.context_size) for split, contexts in chosen.items()}


def kept_contexts(folder: Path, choose: Callable[[], dict[str, Contexts]]) -> dict[str, Contexts]:
    """What `choose` gives, by split, kept in `folder`, and from then on what is there.

    A text is tokenized once; that it has changed since is not noticed.

    Raises ValueError for a folder that was damaged, FileNotFoundError for one in which files are missing, and whatever
    `choose` does.
    """
    if folder.exists():
        return _kept(folder)
    contexts = choose()
    if is_first_at_home():
        with written_whole(folder) as partial:
            for split, chosen in contexts.items():
                (partial / split).mkdir(parents=True)
                save_array(partial / split / "tokens.npy", chosen.tokens)
                save_array(partial / split / "document.npy", chosen.document)
            write_json(partial / FINGERPRINTS_FILE, {split: _fingerprint(each) for split, each in contexts.items()})
    return contexts


def _kept(folder: Path) -> dict[str, Contexts]:
    fingerprints, contexts = read_json(folder / FINGERPRINTS_FILE), {}
    for split, fingerprint in fingerprints.items():
        parts = (load_array(folder / split / f"{part}.npy") for part in ("tokens", "document"))
        contexts[split] = Contexts(*map(torch.from_numpy, parts))
        if _fingerprint(contexts[split]) != fingerprint:
            raise ValueError(
                f"the {split} contexts kept in {folder} are damaged; remove that folder to choose them again"
            )
    return contexts


def _fingerprint(contexts: Contexts) -> str:
    return tensor_fingerprint(contexts.tokens, contexts.document)


def _stack(contexts: list[tuple[int, list[int]]], context_size: int) -> Contexts:
    tokens = torch.full((len(contexts), context_size), PADDING)
    for row, (_, ids) in enumerate(contexts):
        tokens[row, : len(ids)] = torch.tensor(ids)
    return Contexts(tokens, torch.tensor([index for index, _ in contexts]))
