import pytest

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.properties import ABOUT, KINDS, NAMED, PLACES, candidates, read
from bae_lens.comsem.judges.tokens import Tagger


@pytest.fixture(scope="module")
def word():
    tagger = Tagger()
    return lambda marked: tagger.word(Instance.from_marked(marked))


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
    assert phrases('words ending in "-tion"') == ['a word that ends in "-tion"', "a word"][:1]


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


@pytest.mark.parametrize(
    ("explanation", "fits", "does_not"),
    [
        ("a word directly after a comma", "At last, <<winter>> came.", "At <<last>>, winter came."),
        ("a word after a preposition", "They went by <<boat>>.", "They <<went>> by boat."),
        ("the last word of a sentence", "They left <<early>>.", "They <<left>> early."),
        ("a year", "It was <<1872>> then.", "It cost <<1872000>> then."),
        ("a number", "Only <<forty>> came.", "Only <<some>> came."),
        ("a past participle", "It was <<broken>> again.", "It <<was>> broken again."),
        ("a form of the verb to have", "They <<had>> time.", "They <<took>> time."),
        ("a comparative", "A <<colder>> night.", "A <<cold>> night."),
        ("part of a longer word", "The ele<<ph>>ant slept.", "The <<elephant>> slept."),
        ("a word in capital letters", "The <<NATO>> met.", "The <<Senate>> met."),
        ("a word with an apostrophe", "They <<don't>> know.", "They <<do>> know."),
        ("a long word", "The <<administration>> met.", "The <<men>> met."),
        ('a word directly before "of"', "A <<cup>> of tea.", "A cup of <<tea>>."),
        ('a word that begins with "un-"', "It was <<unfair>>.", "It was <<fair>>."),
        ('a form of the word "go"', "They <<went>> home.", "They <<ran>> home."),
        ('the word "and"', "You <<and>> me.", "You <<or>> me."),
    ],
)
def test_properties_hold_of_what_they_name(word, explanation, fits, does_not):
    (known,) = read(explanation).properties
    assert known.holds(word(fits))
    assert not known.holds(word(does_not))


def test_candidates_are_all_listed_properties_and_those_of_the_words(word):
    found = {known.phrase: of_one_word for known, of_one_word in candidates([word("The old <<horses>> slept.")])}
    assert found["a noun"] is False
    assert {phrase for phrase, of_one_word in found.items() if of_one_word} == {
        'a word directly after "old"',
        'a word directly before "slept"',
        'a word that ends in "-es"',
        'a word that ends in "-ses"',
        'a word that ends in "-rses"',
        'a word that begins with "ho-"',
        'a word that begins with "hor-"',
        'a word that begins with "hors-"',
        'a form of the word "horse"',
        'the word "horses"',
    }
