import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bae_lens.comsem.collect.corpus import ContextStore, CorpusSettings, text_contexts


def contexts(tokenizer, texts, seed=0, **settings):
    return list(text_contexts(tokenizer, texts, CorpusSettings(**settings), seed))


def test_tokens_know_their_place_in_the_sentences_that_the_model_sees(word_tokenizer):
    text = "Word1 word2 the. Word3 word4, 5. Word6 word7."
    found = contexts(word_tokenizer, [text], context_size=6, contexts_per_document=None)
    second = found[1]
    assert [second.text[start:end] for start, end in second.spans] == ["", "word4", ",", "5", ".", "Word6"]
    assert second.text == "word4, 5. Word6"
    assert second.instance(2, [1, 2]).highlighted == "<<word4>><<,>> 5."
    assert second.instance(5, [5]).marked == "<<Word6>>"


def test_contexts_in_order_hold_every_token_once(word_tokenizer, word_texts):
    found = contexts(word_tokenizer, word_texts[:20], context_size=16, contexts_per_document=None)
    together = [token for context in found for token in context.tokens[1:]]
    assert together == [token for text in word_texts[:20] for token in word_tokenizer(text)["input_ids"]]
    assert all(context.tokens[0] == word_tokenizer.bos_token_id for context in found)


def test_corpus_ends_at_the_tokens_asked_for(word_tokenizer, word_texts):
    found = contexts(word_tokenizer, iter(word_texts), tokens=100, context_size=16)
    assert sum(len(context.tokens) - 1 for context in found) == 100


def test_only_some_contexts_of_a_document_and_a_seed(word_tokenizer, word_texts):
    long = " ".join(word_texts[:20])
    found = contexts(word_tokenizer, [long], context_size=16, contexts_per_document=3)
    assert len(found) == 3
    again = contexts(word_tokenizer, [long], context_size=16, contexts_per_document=3)
    other = contexts(word_tokenizer, [long], 1, context_size=16, contexts_per_document=3)
    assert found == again != other


def test_text_without_full_stops_is_kept_to_what_is_near(word_tokenizer):
    text = " ".join(["word1"] * 400) + " the " + " ".join(["word2"] * 400)
    found = contexts(word_tokenizer, [text], context_size=32, contexts_per_document=None)
    (context,) = [context for context in found if "the" in context.text.split()]
    position = [context.text[start:end] for start, end in context.spans].index("the")
    instance = context.instance(position, [position])
    assert instance.text == "the"
    assert len(instance.sentence) < 700


def test_a_spool_gives_contexts_back(word_tokenizer, word_texts, tmp_path):
    found = contexts(word_tokenizer, word_texts[:5], context_size=16)
    store = ContextStore(tmp_path / "store")
    places = [store.write(context) for context in found]
    assert [store.read(place) for place in reversed(places)] == found[::-1]
    store.close()


def test_wrong_input_is_refused(word_tokenizer):
    with pytest.raises(ValueError, match="row 1 of the text holds None"):
        contexts(word_tokenizer, [{"text": "word1"}, {"text": None}])
    with pytest.raises(ValueError, match="use a fast tokenizer"):
        contexts(object(), ["word1"])
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        CorpusSettings(tokens=0)


def test_tokens_that_share_a_character_are_marked_as_one():
    texts = {
        "ru": "Это предложение на русском языке. Мы читаем книгу дома. " * 8,
        "ja": "日本語の文章です。猫が好きです。" * 8,
        "emoji": "Good morning 😀😃👍🏽 to you 👩‍👩‍👧. See you 🎉🎉. " * 8,
    }
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(
        texts.values(), trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level)
    overlapping = 0
    for text in texts.values():
        for context in text_contexts(tokenizer, [text], CorpusSettings(tokens=200, context_size=64)):
            for sentence in set(context.sentence_of):
                members = [i for i, number in enumerate(context.sentence_of) if number == sentence]
                instance = context.instance(members[0], members)
                assert instance.highlighted.replace("<<", "").replace(">>", "") == instance.sentence
                assert "<<>>" not in instance.highlighted
                overlapping += len(instance.highlights) < len(members)
    assert overlapping > 10


def test_what_is_no_text_is_refused(word_tokenizer):
    with pytest.raises(ValueError, match="row 0 has no column 'text' but input_ids"):
        list(text_contexts(word_tokenizer, [{"input_ids": [1]}], CorpusSettings()))
    with pytest.raises(ValueError, match="choose one of the splits train, test"):
        list(text_contexts(word_tokenizer, {"train": [], "test": []}, CorpusSettings()))


def test_sentences_may_be_read_each_by_itself(word_tokenizer):
    texts = ["Word1 word2 the. Word3 word4.", "word5 word6 . word7", "Word8."]
    settings = {"context_size": 16, "contexts_per_document": None, "tokens": None}
    found = contexts(word_tokenizer, texts, sentences=3, **settings)
    # A row in small letters is one sentence, as those of BookCorpus.
    assert [context.text for context in found] == ["Word1 word2 the.", "Word3 word4.", "word5 word6 . word7"]
    assert found[1].instance(2, [2]).position == 2, "BOS is 0"
    assert len(contexts(word_tokenizer, texts, sentences=9, **settings)) == 4
