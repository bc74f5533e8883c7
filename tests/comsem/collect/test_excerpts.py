from dataclasses import replace

import pytest

from bae_lens.comsem.collect.collector import collect
from bae_lens.comsem.collect.corpus import CorpusSettings, TextContext
from bae_lens.comsem.collect.instances import Excerpt
from bae_lens.comsem.collect.sampling import SamplingSettings
from tests.comsem.conftest import DIGITS, VOCABULARY

CORPUS = CorpusSettings(tokens=1500, context_size=16)
SAMPLING = SamplingSettings(max_features=None, excerpts=True)
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 2.5)


@pytest.fixture(scope="module")
def collection(word_model, make_sae, make_bae, word_texts):
    sae = make_sae()
    for digit, strength in zip(DIGITS, STRENGTHS, strict=True):
        sae.W_enc.data[VOCABULARY.index(digit), 0] = strength
    return collect(word_model, {"sae": sae, "bae": make_bae()}, word_texts, CORPUS, SAMPLING)


def test_activations_are_the_dictionarys_own_and_bits_of_a_binary_one(collection):
    strengths = dict(zip(DIGITS, STRENGTHS, strict=True))
    for name, dictionary in collection.dictionaries.items():
        digits = dictionary.features[0]
        assert len(digits.excerpts) == len(digits.held_out) + len(digits.controls) == 16
        for excerpt in digits.excerpts:
            expected = [strengths.get(token, 0.0) for token in excerpt.token_texts]
            assert excerpt.activations == (expected if name == "sae" else [float(value > 0) for value in expected])
        assert all(any(excerpt.activations) for excerpt in digits.excerpts[:8])
        assert not any(any(excerpt.activations) for excerpt in digits.excerpts[8:])


def test_excerpts_are_those_of_the_instances_in_their_order(collection):
    for dictionary in collection.dictionaries.values():
        for feature in [*dictionary.features, *dictionary.random_features]:
            shown = [*feature.held_out, *feature.controls]
            for instance, excerpt in zip(shown, feature.excerpts, strict=True):
                assert excerpt.text in instance.sentence
                assert instance.text in excerpt.token_texts
    for feature in collection.dictionaries["bae"].random_features:
        assert {sum(excerpt.activations) for excerpt in feature.excerpts[: len(feature.held_out)]} == {1}


def test_instances_are_the_same_whether_excerpts_are_kept_or_not(word_model, known_sae, word_texts):
    without = collect(word_model, {"sae": known_sae}, word_texts, CORPUS, replace(SAMPLING, excerpts=False))
    with_excerpts = collect(word_model, {"sae": known_sae}, word_texts, CORPUS, SAMPLING)
    for a, b in zip(without.dictionaries["sae"].features, with_excerpts.dictionaries["sae"].features, strict=True):
        assert a == replace(b, excerpts=[])


def test_an_excerpt_ends_with_its_sentence_and_its_reach():
    text = "a b. c d e f"
    spans = [(0, 0), (0, 1), (2, 3), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12)]
    context = TextContext(0, list(range(8)), text, spans, [(0, 4), (5, 12)])
    assert context.excerpt(4, 2, {5: 3.0, 7: 1.0}) == Excerpt("c d e", [(0, 1), (2, 3), (4, 5)], [0.0, 3.0, 0.0])
    assert context.excerpt(6, 1, {}) == Excerpt("d e f", [(0, 1), (2, 3), (4, 5)], [0.0] * 3), "and no further back"
    assert context.excerpt(1, 9, {}) == Excerpt("a b.", [(0, 1), (2, 3), (3, 4)], [0.0] * 3), "without BOS"
