import pytest

from bae_lens.comsem.judges.properties import KINDS, NAMED, PLACES
from bae_lens.comsem.judges.reading import ABOUT, read


def phrases(explanation):
    return [known.phrase for known in read(explanation).properties]


@pytest.mark.parametrize("phrase", [known.phrase for known, _ in (*PLACES, *KINDS)])
def test_a_phrase_is_read_as_its_own_property(phrase):
    assert phrases(phrase) == [phrase]
    assert read(phrase).meaning == ""


@pytest.mark.parametrize("value", ["ing", "don't", "'s", "x-1"])
@pytest.mark.parametrize("template", [template for template, *_ in NAMED])
def test_a_phrase_with_a_word_is_read_as_its_own_property(template, value):
    assert phrases(template.format(value)) == [template.format(value)]


def test_explanations_of_others_are_read():
    assert phrases("Plural nouns.") == ["a plural noun"]
    assert phrases("nouns that come right after the word 'the'") == ['a word directly after "the"', "a noun"]
    assert phrases("adjectives that explain a following noun") == ["an adjective"]
    assert phrases("punctuation that ends a sentence") == ["punctuation that ends a sentence"]
    assert phrases("numbers written out in words") == ["a number word"]
    assert phrases('words ending in "-tion"') == ['a word that ends in "-tion"']


def test_what_is_said_beside_a_property_is_meaning():
    assert (phrases("verbs of motion"), read("verbs of motion").meaning) == (["a verb"], "motion")
    assert (phrases("kinds of weather"), read("kinds of weather").meaning) == ([], "kinds of weather")
    assert (phrases(f"{ABOUT}nouns, first, comma"), read(f"{ABOUT}nouns, first, comma").meaning) == (
        [],
        "nouns, first, comma",
    )


@pytest.mark.parametrize(
    "explanation", ["stressed syllables", "nouns that are the subject of a verb", "words that are not nouns", ""]
)
def test_what_cannot_be_told_is_not_understood(explanation):
    assert not read(explanation).is_understood
