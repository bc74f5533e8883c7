"""What is asked about: tokens in their sentences, and those that belong to one feature."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

Span = tuple[int, int]
WORD = re.compile(r"\w+|[^\w\s]")
CUT = "\u2026"  # stands for words that were left out


@dataclass(frozen=True)
class Instance:
    """A token in its sentence."""

    sentence: str
    token: Span
    """Start and end of the token in the sentence."""
    highlights: list[Span]
    """Tokens on which the feature fires, in order, as one where they share a character; for an instance on which it
    does not, as many others."""
    position: int | None = None
    """Number of the token among those that the model read, from 0, BOS included; None where it is not known."""

    @property
    def text(self) -> str:
        """The token itself."""
        return self.sentence[slice(*self.token)]

    @property
    def marked(self) -> str:
        """The sentence with the token between << and >>."""
        return self._mark([self.token])

    @property
    def highlighted(self) -> str:
        """The sentence with all highlights between << and >>."""
        return self._mark(self.highlights)

    def _mark(self, spans: list[Span]) -> str:
        parts, end = [], 0
        for start, stop in spans:
            parts += [self.sentence[end:start], "<<", self.sentence[start:stop], ">>"]
            end = stop
        return "".join([*parts, self.sentence[end:]])

    def shortened(self, words: int, spans: Sequence[Span]) -> "Instance":
        """The same with at most `words` words of the sentence before and after the spans, and … for the others.

        >>> Instance.from_marked("In spring the old <<cat>> ran away, we hear.").shortened(2, [(18, 21)]).marked
        '… the old <<cat>> ran away …'
        """
        first, last = min(start for start, _ in spans), max(end for _, end in spans)
        found = [match.span() for match in WORD.finditer(self.sentence)]
        before, after = [start for start, end in found if end <= first], [end for start, end in found if start >= last]
        start, end = 0, len(self.sentence)
        if len(before) > words:
            start = before[-words] if words else first
        if len(after) > words:
            end = after[words - 1] if words else last
        opening, closing = f"{CUT} " if start else "", f" {CUT}" if end < len(self.sentence) else ""
        shift = len(opening) - start
        return Instance(
            opening + self.sentence[start:end] + closing,
            (self.token[0] + shift, self.token[1] + shift),
            [(a + shift, b + shift) for a, b in self.highlights if start <= a and b <= end],
            self.position,
        )

    @classmethod
    def from_marked(cls, marked: str) -> "Instance":
        """From a sentence whose token stands between << and >>. Raises ValueError if none does.

        >>> Instance.from_marked("A <<cat>> sat.")
        Instance(sentence='A cat sat.', token=(2, 5), highlights=[(2, 5)], position=None)
        """
        before, found, rest = marked.partition("<<")
        token, closed, after = rest.partition(">>")
        if not (found and closed and token):
            raise ValueError(f"an instance needs a token between << and >>, got {marked!r}")
        span = (len(before), len(before) + len(token))
        return cls(before + token + after, span, [span])


@dataclass(frozen=True)
class Excerpt:
    """Some tokens in a row, with how strongly a feature fires on each."""

    text: str
    """In which the tokens lie."""
    tokens: list[Span]
    """Start and end of each token in the text."""
    activations: list[float]
    """On each token: a binary code's bit where it differs from what is usual, or else the activation; 0 where it does
    not fire."""

    @property
    def token_texts(self) -> list[str]:
        """The tokens themselves, without white space around them."""
        return [self.text[slice(*token)] for token in self.tokens]


@dataclass(frozen=True)
class FeatureInstances:
    """What is shown and asked of one feature."""

    feature: int
    firing_rate: float
    """Share of the tokens on which it fires."""
    n_instances: int
    """Tokens that activate it: among their 10 strongest features is this one."""
    explain: list[Instance]
    """Activating tokens from which it is explained."""
    held_out: list[Instance]
    """Other activating tokens."""
    controls: list[Instance]
    """Tokens in whose sentences it fires nowhere, matched to `held_out`; see `TokenPool.matched`."""
    excerpts: list[Excerpt] = field(default_factory=list)
    """The tokens near each of `held_out`, then near each of `controls`; empty unless they were asked for."""
