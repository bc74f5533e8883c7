"""Text as a model reads it and as a person does: contexts of tokens that know their sentences."""

import bisect
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from bae_lens.activations.sources import texts
from bae_lens.comsem.collect.instances import Excerpt, Instance, Span
from bae_lens.comsem.collect.sentences import sentence_spans

MARGIN = 300  # characters of a sentence shown on either side of a token, for text without full stops


@dataclass(frozen=True)
class CorpusSettings:
    """How much of a text is analyzed, and how it is cut."""

    tokens: int | None = 65_536
    """Tokens to analyze, BOS not counted; the text may have fewer. None for all that there are."""
    context_size: int = 128
    """Tokens per context, BOS included."""
    contexts_per_document: int | None = 16
    """At most so many contexts, at random places, from one document; None for all, in order."""
    sentences: int | None = None
    """Read each sentence by itself, as the authors do, and at most so many; None for contexts that go on over them."""

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that leave nothing to analyze."""
        if self.context_size < 3:
            raise ValueError(f"context_size must be at least 3, got {self.context_size}")
        for name in ("tokens", "contexts_per_document", "sentences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class TextContext:
    """A run of tokens as the model sees it, with its sentences."""

    document: int
    """Number of the document that it is from."""
    tokens: list[int]
    """Token ids, beginning with BOS where the tokenizer has one."""
    text: str
    """From the first token to the last."""
    spans: list[Span]
    """Start and end of each token in `text`, without white space around it; BOS is empty."""
    sentences: list[Span]
    """Start and end of each sentence in `text`, cut off where the context begins and ends: what the model sees."""

    @cached_property
    def sentence_of(self) -> list[int]:
        """Index of each token's sentence. White space belongs to the sentence before it."""
        starts = [start for start, _ in self.sentences]
        return [max(0, bisect.bisect_right(starts, start) - 1) for start, _ in self.spans]

    def instance(self, position: int, highlights: Iterable[int]) -> Instance:
        """The token at `position` in its sentence, with the tokens at `highlights`, which belong to it too."""
        start, end = self.sentences[self.sentence_of[position]]
        first, last = self.spans[position]
        start = min(first, max(start, first - MARGIN))
        end = max(last, min(end, last + MARGIN))
        spans = merged(self.spans[other] for other in highlights)
        inside = [(a - start, b - start) for a, b in spans if start <= a and b <= end]
        return Instance(self.text[start:end], (first - start, last - start), inside, position)

    def nearby(self, position: int, reach: int) -> list[int]:
        """Positions of the tokens within `reach` in the same sentence, those without characters left out."""
        sentence = self.sentence_of[position]
        near = range(max(0, position - reach), min(len(self.tokens), position + reach + 1))
        return [other for other in near if self.sentence_of[other] == sentence and self.spans[other][1]]

    def excerpt(self, position: int, reach: int, activations: Mapping[int, float]) -> Excerpt:
        """The tokens that are `nearby`, with their activations by position; 0 for those not named."""
        positions = self.nearby(position, reach)
        start = min(self.spans[other][0] for other in positions)
        end = max(self.spans[other][1] for other in positions)
        spans = [(first - start, last - start) for first, last in (self.spans[other] for other in positions)]
        return Excerpt(self.text[start:end], spans, [activations.get(other, 0.0) for other in positions])


def merged(spans: Iterable[Span]) -> list[Span]:
    """Spans in order, those that overlap as one: a character may be in several tokens of its bytes.

    >>> merged([(4, 6), (0, 1), (5, 7), (7, 8)])
    [(0, 1), (4, 7), (7, 8)]
    """
    found: list[Span] = []
    for start, end in sorted(set(spans)):
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif start < end:
            found.append((start, end))
    return found


def text_contexts(
    tokenizer: Any, documents: Iterable[Any], settings: CorpusSettings, seed: int = 0
) -> Iterator[TextContext]:
    """Contexts of the documents (strings, or rows with a column `text`), one document in memory at a time.

    Raises ValueError for a tokenizer that cannot say where its tokens are in the text, and as `texts` does.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("ComSem needs to know where tokens are in the text: use a fast tokenizer")
    rng = np.random.default_rng(seed)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room, missing = settings.context_size - len(bos), sys.maxsize if settings.tokens is None else settings.tokens
    read = texts(documents)
    for index, text in enumerate(
        read if settings.sentences is None else islice(_sentences_alone(read), settings.sentences)
    ):
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        sentences = sentence_spans(text)
        starts = np.arange(0, len(ids) if sentences else 0, room)
        if settings.contexts_per_document is not None:
            starts = rng.permutation(starts)[: settings.contexts_per_document]
        for start in starts.tolist():
            stop = min(start + room, len(ids), start + missing)
            yield _cut(index, text, sentences, bos, ids[start:stop], offsets[start:stop])
            missing -= stop - start
            if missing <= 0:
                return


def _sentences_alone(documents: Iterable[str]) -> Iterator[str]:
    return (text[start:end] for text in documents for start, end in sentence_spans(text))


def _cut(
    document: int, text: str, sentences: list[Span], bos: list[int], ids: list[int], offsets: list[Span]
) -> TextContext:
    spans = [_strip(text, *span) for span in offsets]
    starts = [start for start, _ in sentences]
    first = max(0, bisect.bisect_right(starts, spans[0][0]) - 1)
    last = max(0, bisect.bisect_right(starts, spans[-1][0]) - 1)
    start, end = spans[0][0], spans[-1][1]
    return TextContext(
        document,
        bos + ids,
        text[start:end],
        [(0, 0)] * len(bos) + [(a - start, b - start) for a, b in spans],
        [(max(a, start) - start, min(b, end) - start) for a, b in sentences[first : last + 1]],
    )


def _strip(text: str, start: int, end: int) -> Span:
    """The span without white space at its ends; a span of white space alone stays as it is."""
    token = text[start:end]
    if not token.strip():
        return start, end
    return start + len(token) - len(token.lstrip()), start + len(token.rstrip())


READER = TypeAdapter(TextContext)


class ContextStore:
    """Contexts on disk, so that memory does not grow with the corpus; each is found by its place in the file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._end = 0

    def write(self, context: TextContext) -> int:
        """Keeps a context and returns its place."""
        place, line = self._end, json.dumps(asdict(context)).encode() + b"\n"
        self._file.seek(place)
        self._end += self._file.write(line)
        return place

    def read(self, place: int) -> TextContext:
        """The context at a place."""
        self._file.seek(place)
        return READER.validate_json(self._file.readline())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
