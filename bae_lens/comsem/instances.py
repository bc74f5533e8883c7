"""What is judged: tokens in their sentences, and the verdicts on them."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

Question = Literal["token", "marked token", "passage", "highlights"]
"""What a judge is asked of an instance and a description: whether it describes

- the token in its sentence, asked one call each, the sentence unmarked (the paper's question);
- the token marked in its sentence;
- anything in the sentence ("detection" in EleutherAI's delphi);
- all of the tokens highlighted in the sentence ("fuzzing" there).
"""

Span = tuple[int, int]


@dataclass(frozen=True)
class Instance:
    """A token in its sentence."""

    sentence: str
    token: Span
    """Start and end of the token in the sentence."""
    highlights: list[Span]
    """Tokens on which the feature fires, in order; for an instance on which it does not, as many others."""

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
    def from_dict(cls, content: dict[str, Any]) -> "Instance":
        start, end = content["token"]
        return cls(content["sentence"], (start, end), [(start, end) for start, end in content["highlights"]])

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
class FeatureInstances:
    """What is shown and asked of one feature."""

    feature: int
    firing_rate: float
    """Share of the tokens on which it fires."""
    n_instances: int
    """Tokens that activate it: among their 10 strongest features is this one."""
    describe: list[Instance]
    """Activating tokens from which it is described."""
    held_out: list[Instance]
    """Other activating tokens."""
    controls: list[Instance]
    """Tokens in whose sentences it fires nowhere, matched to `held_out`; see `TokenPool.matched`."""


@dataclass(frozen=True)
class Verdict:
    """A judge's answer about one instance."""

    yes: bool | None
    """None if the answer could not be parsed, or if there was none."""
    probability: float | None = None
    """Of yes against no, where the judge says."""
    failed: bool = False
    """There was no answer at all."""


@runtime_checkable
class Judge(Protocol):
    """Whoever puts into words what tokens have in common, and says whether the words fit others."""

    name: str
    needs_background: bool
    """Whether it judges by comparison with the corpus: then it is tested after instances have been collected."""

    def prepare(self, background: list[Instance]) -> None:
        """Shows the judge ordinary tokens of the corpus, once, before it is asked about the corpus."""
        ...

    async def describe(self, examples: list[Instance], marked: bool) -> str | None:
        """One phrase for what the tokens have in common; None if there was no answer, empty if it was of no use.

        `marked`: the tokens are shown marked in their sentences, otherwise beside them.
        """
        ...

    async def judge(self, description: str, instances: list[Instance], question: Question) -> list[Verdict]:
        """A verdict for each instance."""
        ...

    async def close(self) -> None:
        """Ends what the judge holds open; it may be asked again."""
        ...
