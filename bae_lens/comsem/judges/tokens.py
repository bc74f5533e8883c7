"""What can be told of a token by looking: its word, the words beside it, its part of speech, its place."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from bae_lens.comsem.collect.instances import Instance, Span
from bae_lens.extras import naming_the_command

WORD = re.compile(r"\w[\w'\u2019-]*|[^\w\s]")
OPENING, CLOSING = "([{\u201c\u2018", ")]}\u201d\u2019"
STRAIGHT_QUOTE = '"'

Tagged = tuple[str, str, str]
"""A word, its lemma, and its part of speech in the C5 tagset of the British National Corpus."""
Tag = Callable[[list[str]], list[Tagged]]


@dataclass(frozen=True)
class Word:
    """The word that a token is in, as it stands in its sentence."""

    token: str
    """What of it the token is, without space."""
    text: str
    """The whole word."""
    lemma: str
    """In small letters."""
    tag: str
    """Part of speech, C5; "" for a token that is white space."""
    before: str
    """The word before, in small letters; "" for the first."""
    after: str
    """The word after, in small letters; "" for the last."""
    number: int
    """Among the sentence's words, from 0, punctuation not counted; -1 for white space and before the first word."""
    quoted: bool
    """Whether it stands inside quotation marks."""
    bracketed: bool
    """Whether it stands inside brackets."""

    @property
    def is_word_or_number(self) -> bool:
        """Whether it begins with a letter or a digit."""
        return self.text[:1].isalnum()

    @property
    def is_word(self) -> bool:
        """Whether it begins with a letter."""
        return self.text[:1].isalpha()


class Tagger:
    """Reads sentences; what was read is remembered."""

    def __init__(self, tag: Tag | None = None) -> None:
        """`tag` gives lemmas and parts of speech; by default HanTa. Raises ImportError if it is not installed."""
        self._tag = tag or load_hanta()
        self._sentence = lru_cache(maxsize=65_536)(self._read)

    def word(self, instance: Instance, span: Span | None = None) -> Word:
        """The first word that the token, or another span of its sentence, shares a character with."""
        start, end = span or instance.token
        token = instance.sentence[start:end].strip()
        for (first, last), word in self._sentence(instance.sentence):
            if first < end and start < last:
                return Word(token, *word)
        return Word(token, token, token.lower(), "", "", "", -1, False, False)

    def words(self, instance: Instance) -> list[Word]:
        """All of its sentence, each as a token of its own."""
        return [Word(word[0], *word) for _, word in self._sentence(instance.sentence)]

    def _read(self, sentence: str) -> list[tuple[Span, tuple[str, str, str, str, str, int, bool, bool]]]:
        spans = [match.span() for match in WORD.finditer(sentence)]
        texts = [sentence[slice(*span)] for span in spans]
        tagged = self._tag(texts)
        beside = ["", *(text.lower() for text in texts), ""]
        read, quotes, brackets, words = [], 0, 0, -1
        for number, (span, (text, lemma, tag)) in enumerate(zip(spans, tagged, strict=True)):
            quotes += (text == "\u201c") - (text == "\u201d")
            brackets += (text in "([{") - (text in ")]}")
            if text == STRAIGHT_QUOTE:
                quotes = 1 - quotes
            words += text[0].isalnum()
            marks = text in OPENING + CLOSING + STRAIGHT_QUOTE
            place = (beside[number], beside[number + 2], words, quotes > 0 and not marks, brackets > 0 and not marks)
            read.append((span, (text, lemma.lower(), tag, *place)))
        return read


def load_hanta() -> Tag:
    """HanTa's English model. Raises ImportError if the extra is not installed."""
    with naming_the_command():
        from HanTa.HanoverTagger import HanoverTagger
    tagger = HanoverTagger("morphmodel_en.pgz")

    def tag(texts: list[str]) -> list[Tagged]:
        return (
            [(text, str(lemma), str(tag)) for text, lemma, tag in tagger.tag_sent(texts, taglevel=1)] if texts else []
        )

    return tag
