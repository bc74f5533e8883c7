"""What is asked about: tokens in their sentences, and those that belong to one feature."""

from dataclasses import dataclass, field

Span = tuple[int, int]


@dataclass(frozen=True)
class Instance:
    """A token in its sentence."""

    sentence: str
    token: Span
    """Start and end of the token in the sentence."""
    highlights: list[Span]
    """Tokens on which the feature fires, in order, as one where they share a character; for an instance on which it
    does not, as many others."""

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

    @classmethod
    def from_marked(cls, marked: str) -> "Instance":
        """From a sentence whose token stands between << and >>. Raises ValueError if none does.

        >>> Instance.from_marked("A <<cat>> sat.")
        Instance(sentence='A cat sat.', token=(2, 5), highlights=[(2, 5)])
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
