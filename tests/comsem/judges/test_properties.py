import pytest

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.properties import candidates
from bae_lens.comsem.judges.reading import read
from bae_lens.comsem.judges.tokens import Tagger


@pytest.fixture(scope="module")
def word():
    tagger = Tagger()
    return lambda marked: tagger.word(Instance.from_marked(marked))


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
