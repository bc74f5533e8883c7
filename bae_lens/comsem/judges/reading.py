"""Reading explanations of tokens: which properties they name, and what else they mean."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bae_lens.comsem.judges.properties import BY_PHRASE, KINDS, NAMED, PLACES, Property

ABOUT = "about: "  # before words that say what is meant, whatever else they may name
Found = tuple[tuple[int, int], Property]
"""A property, and where an explanation names it."""

# What is left of an explanation of form when the property's own words are taken out, and says nothing about meaning.
WORDS_OF_FORM = frozenset(
    """
    a about after all always an and any anywhere are article articles as at be before being by case character
    characters clause come comes common describe describes describing directly each either english every explain
    explains expressing following followed for form forms found function functioning grammatical have in
    immediately inside is it its kind kinds language letter letters like mark marks modifies modify modifying
    name noun nouns of often on one only or other part parts phrase phrases place position precedes preceding
    punctuation qualify right sentence sentences sort sorts speech stand standing stands such symbol symbols
    text that the their them these they this token tokens type types use used usually verb verbs way when where
    which whole whose with word words written
    """.split()  # noqa: SIM905
)
FORMAL = frozenset(
    """
    accusative active clause consonant consonants conjugated dative declension genitive grammatical
    grammatically inflected letter letters nominative object passive phrase plural predicate prefix prefixes
    rhyme rhymes rhyming sentence singular spelled spelling spelt stressed subject subjects subjunctive suffix
    suffixes syllable syllables syntactic tense token tokens unstressed vowel vowels
    """.split()  # noqa: SIM905
)

EXCEPTING = frozenset(("not", "never", "except", "excluding", "without", "other"))


@dataclass(frozen=True)
class Reading:
    """What an explanation asks for."""

    properties: tuple[Property, ...]
    """That a token must have, all of them."""
    meaning: str
    """What it must mean beside; "" if that does not matter."""

    @property
    def is_understood(self) -> bool:
        """Whether there is anything to go by."""
        return bool(self.properties or self.meaning)


def read(explanation: str) -> Reading:
    """Of the properties that an explanation names the first place and the first kind, and what else it means.

    Nothing is understood where it speaks of grammar or spelling for which there is no test here, or names what a token
    is not.

    >>> [found.phrase for found in read("plural nouns directly after a comma").properties]
    ['a word directly after a comma', 'a plural noun']
    >>> read("verbs of motion").meaning
    'motion'
    >>> read("stressed syllables").is_understood
    False
    """
    text = " ".join(explanation.strip().rstrip(".").split())
    if text.startswith(ABOUT):
        return Reading((), text.removeprefix(ABOUT))
    if text in BY_PHRASE:
        return Reading((BY_PHRASE[text],), "")
    properties = []
    for family in (_named, _earliest(PLACES), _earliest(KINDS)):
        found = family(text)
        if found is not None:
            (start, end), known = found
            properties.append(known)
            text = f"{text[:start]} {text[end:]}"
    words = [word for word in re.findall(r"[a-z][a-z'-]*", text.lower()) if word not in WORDS_OF_FORM]
    beyond = FORMAL | EXCEPTING if properties else FORMAL
    if any(word in beyond for word in words) or not (words or properties):
        return Reading((), "")
    return Reading(tuple(properties), " ".join(words) if properties else text)


def _named(text: str) -> Found | None:
    for phrase, pattern, make in NAMED:
        if match := re.search(pattern, text, re.IGNORECASE):
            value = match["word"].lower()
            return match.span(), Property(phrase.format(value), make(value))
    return None


def _earliest(family: Sequence[tuple[Property, re.Pattern[str]]]) -> Callable[[str], Found | None]:
    def find(text: str) -> Found | None:
        matches = [(match.span(), known) for known, pattern in family if (match := pattern.search(text))]
        return min(matches, key=lambda found: found[0][0], default=None)

    return find
