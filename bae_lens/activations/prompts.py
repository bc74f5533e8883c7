"""Prompts of demonstrations: JSON lines, where each demonstration ends, and an example from the embedded text."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from bae_lens.activations.demo_model import demo_dataset
from bae_lens.activations.windows import Windows

UNGROUPED = "prompts"
CENTURIES = {"nineteenth": range(1801, 1901), "twentieth": range(1901, 2001)}
SENTENCE_WORDS = range(8, 21)


@dataclass(frozen=True)
class Prompt:
    """A text, and where its demonstrations end."""

    text: str
    """Whole, without BOS."""
    ends: tuple[int, ...]
    """How many characters there are up to the end of each demonstration, or tokens."""
    in_tokens: bool = False
    """Whether ends are counted in tokens."""
    group: str = UNGROUPED
    """Prompts of a group are measured together."""
    origin: str = "the prompt"
    """How messages call it."""

    def __post_init__(self) -> None:
        """Raises ValueError for no end, and ends that do not increase."""
        if not self.ends or self.ends[0] < 1 or any(a >= b for a, b in zip(self.ends, self.ends[1:], strict=False)):
            raise ValueError(f"demonstrations must end one after another, but {self.origin} has ends {list(self.ends)}")


def read_prompts(path: Path, marker: str | None = None) -> list[Prompt]:
    """The prompts in a file of JSON lines: objects with a `text` and, if wanted, the name of a `group`.

    Demonstrations end at the characters that a list `ends` counts, at the tokens that a list `positions` counts (BOS
    left out), or else after each `marker` in the text.
    Raises OSError if there is no such file, and ValueError, naming the line, for what is no such object, prompts
    without ends or without the marker, and groups that only some of them name.
    """
    prompts = [
        _prompt(line, marker, f"line {number} of {path}")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if line.strip()
    ]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one JSON object a line")
    named = [prompt for prompt in prompts if prompt.group is not UNGROUPED]
    if 0 < len(named) < len(prompts):
        first = next(prompt for prompt in prompts if prompt.group is UNGROUPED)
        raise ValueError(f"either every prompt names its group or none does, but {first.origin} has none; give it one")
    return prompts


def _prompt(line: str, marker: str | None, origin: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"a prompt is a JSON object on a line of its own, but {origin} is not JSON: {error}"
        ) from error
    if not isinstance(row, dict) or not isinstance(text := row.get("text"), str):
        raise ValueError(f"a prompt is a JSON object with a text, got {line[:60]} in {origin}; add a string text")
    group = row.get("group", UNGROUPED)
    if not isinstance(group, str) or not re.fullmatch(r"[\w-]+", group):
        raise ValueError(f"a group is a name of letters, digits, - and _, got {group!r} in {origin}; rename it")
    for key in ("ends", "positions"):
        if key in row:
            ends = row[key]
            if not isinstance(ends, list) or not all(type(end) is int for end in ends):
                raise ValueError(f"{key} is a list of whole numbers, got {ends!r} in {origin}; correct it")
            return Prompt(text, tuple(ends), key == "positions", group, origin)
    if not marker:
        raise ValueError(
            f"where demonstrations end must be known, but {origin} has neither ends (characters) nor positions "
            "(tokens); add them, or name the marker that ends a demonstration"
        )
    ends = tuple(match.end() for match in re.finditer(re.escape(marker), text))
    if not ends:
        raise ValueError(f"the marker {marker!r} must end each demonstration, but {origin} does not hold it")
    return Prompt(text, ends, False, group, origin)


def prompt_windows(tokenizer: Any, prompts: Sequence[Prompt]) -> dict[str, Windows]:
    """The tokens of each group's prompts, after BOS where the tokenizer has one, and where demonstrations end in them.

    A demonstration ends with the token that holds its last character. Each prompt counts as a document.
    Raises ValueError for prompts with unequal numbers of demonstrations, an end beyond the prompt or within a token,
    and for ends in characters if the tokenizer does not know where its tokens lie in the text.
    """
    first = prompts[0]
    for prompt in prompts:
        if len(prompt.ends) != len(first.ends):
            raise ValueError(
                f"prompts must hold equally many demonstrations, but {first.origin} holds {len(first.ends)} and "
                f"{prompt.origin} {len(prompt.ends)}; shorten or leave out those that differ"
            )
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.group, []).append(prompt)
    return {group: _windows(tokenizer, members) for group, members in groups.items()}


def _windows(tokenizer: Any, prompts: Sequence[Prompt]) -> Windows:
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows, ends = zip(*(_tokens_and_ends(tokenizer, prompt) for prompt in prompts), strict=True)
    tokens = torch.zeros(len(rows), len(bos) + max(map(len, rows)), dtype=torch.int32)
    tokens[:, : len(bos)] = torch.tensor(bos)
    for padded, row in zip(tokens, rows, strict=True):
        padded[len(bos) : len(bos) + len(row)] = row
    columns = torch.stack(ends) - 1 + len(bos)
    return Windows(tokens, torch.arange(len(rows)), bool(bos), ends=columns)


def _tokens_and_ends(tokenizer: Any, prompt: Prompt) -> tuple[Int[Tensor, " n"], Int[Tensor, " n_demonstrations"]]:
    """Tokens without BOS, and how many of them there are up to the end of each demonstration."""
    options = {} if prompt.in_tokens else {"return_offsets_mapping": True}
    try:
        encoded = tokenizer(prompt.text, add_special_tokens=False, verbose=False, **options)
    except NotImplementedError as error:
        raise ValueError(
            "this tokenizer does not know where its tokens lie; give positions in place of ends"
        ) from error
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int32)
    length, unit = (len(ids), "tokens") if prompt.in_tokens else (len(prompt.text), "characters")
    if prompt.ends[-1] > length:
        raise ValueError(
            f"demonstrations must end within the text, but {prompt.origin} has {length} {unit} and an end at "
            f"{prompt.ends[-1]}; correct it"
        )
    if prompt.in_tokens:
        return ids, torch.tensor(prompt.ends)
    token_ends = [end for _, end in encoded["offset_mapping"]]
    if beyond := [end for end in prompt.ends if end not in token_ends]:
        raise ValueError(
            f"a demonstration must end where a token does, but no token of {prompt.origin} ends at character "
            f"{beyond[0]}; end demonstrations with a line break, or give positions"
        )
    return ids, torch.from_numpy(np.searchsorted(token_ends, prompt.ends, side="right"))


def century_prompts(n_prompts: int = 512, n_demonstrations: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Rows for `read_prompts`: sentences of the embedded addresses, each followed by its century.

    Half of the sentences are of the nineteenth and half of the twentieth century, in random order, and no sentence is
    used twice. There are `n_prompts` with correct labels (group `"correct"`), and as many of the same sentences with
    the labels of each prompt shuffled among them (group `"shuffled"`).
    Raises ValueError for more sentences than there are.
    """
    rng = np.random.default_rng(seed)
    n = n_prompts * n_demonstrations
    pools = [_sentences(years) for years in CENTURIES.values()]
    label = rng.permutation(np.arange(n) % 2)
    if n_prompts < 1 or n_demonstrations < 1 or max(np.bincount(label)) > min(map(len, pools)):
        raise ValueError(
            f"{n_prompts} prompts of {n_demonstrations} demonstrations need as many sentences of each century, and "
            f"there are {' and '.join(str(len(pool)) for pool in pools)}; ask for at least 1, and for fewer"
        )
    drawn = [iter(rng.permutation(len(pool))) for pool in pools]
    sentences = np.array([pools[century][next(drawn[century])] for century in label]).reshape(n_prompts, -1)
    label = label.reshape(n_prompts, -1)
    return [
        {"group": group, **_demonstrations(sentences[i].tolist(), labels.tolist())}
        for group, shuffled in (("correct", label), ("shuffled", rng.permuted(label, axis=1)))
        for i, labels in enumerate(shuffled)
    ]


def _sentences(years: range) -> list[str]:
    """Different sentences of a length that fits several into a prompt, in the order of the addresses."""
    found: dict[str, None] = {}
    for row in demo_dataset():
        if int(row["year"]) in years:  # pyright: ignore[reportCallIssue, reportArgumentType]
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(row["text"].split())):  # pyright: ignore[reportCallIssue, reportArgumentType]
                if len(sentence.split()) in SENTENCE_WORDS:
                    found[sentence] = None
    return list(found)


def _demonstrations(sentences: Sequence[str], labels: Sequence[int]) -> dict[str, Any]:
    names = list(CENTURIES)
    parts = [f"Sentence: {text}\nCentury: {names[label]}\n" for text, label in zip(sentences, labels, strict=True)]
    return {"text": "".join(parts), "ends": np.cumsum([len(part) for part in parts]).tolist()}
