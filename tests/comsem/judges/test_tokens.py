import sys

import pytest

from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.judges.properties import BY_PHRASE, KINDS, PLACES
from bae_lens.comsem.judges.tokens import Tagger


def tag(texts):
    return [(text, text.upper(), f"T{number}") for number, text in enumerate(texts)]


def word(marked, tagger=None):
    return (tagger or Tagger(tag)).word(Instance.from_marked(marked))


def test_a_token_is_told_by_its_word_and_those_beside_it():
    found = word("The Elb<<ph>>ant, old, slept.")
    assert (found.token, found.text, found.lemma, found.tag) == ("ph", "Elbphant", "elbphant", "T1")
    assert (found.before, found.after, found.number) == ("the", ",", 1)
    assert (word("<<The>> end").before, word("The <<end>>").after) == ("", "")
    assert word("well-<<known>> man").text == "well-known"


def test_quotation_marks_and_brackets_hold_what_is_between_them():
    for marked, quoted, bracketed in (
        ('He said "<<no>>" twice.', True, False),
        ('He said "no" <<twice>>.', False, False),
        ("He said \u201c<<no>>\u201d twice.", True, False),
        ("It (the <<end>>) came.", False, True),
        ("It (the end) <<came>>.", False, False),
        ('He said <<">>no" twice.', False, False),
    ):
        found = word(marked)
        assert (found.quoted, found.bracketed) == (quoted, bracketed), marked


def test_white_space_is_no_word():
    found = word("one<<\n>>two")
    assert (found.text, found.tag, found.is_word, found.number) == ("", "", False, -1)
    assert [known.phrase for known, _ in (*PLACES, *KINDS) if known.holds(found)] == []


def test_the_first_word_may_stand_after_a_quotation_mark():
    first = BY_PHRASE["the first word of a sentence"]
    assert first.holds(word('"<<We>> came."'))
    assert not first.holds(word('<<">>We came."'))
    assert not first.holds(word('"We <<came>>."'))


def test_hanta_knows_parts_of_speech():
    tagger = Tagger()
    tags = [found.tag for found in tagger.words(Instance("Three geese crossed the narrow road.", (0, 5), []))]
    assert tags == ["CRD", "NN2", "VVD", "AT0", "AJ0", "NN1", "PUN"]
    assert word("Three <<geese>> slept.", tagger).lemma == "goose"


def test_it_must_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "HanTa.HanoverTagger", None)
    monkeypatch.setitem(sys.modules, "HanTa", None)
    with pytest.raises(ImportError, match=r"bae-lens\[offline-judge\]"):
        Tagger()
