from dataclasses import replace

import numpy as np
import pytest
import torch

from bae_lens.activations.contexts import (
    PADDING,
    ContextSettings,
    choose_contexts,
    held_out_documents,
    kept_contexts,
    split_of,
)

SETTINGS = ContextSettings(context_size=9, cached_tokens=640, held_out_tokens=80, contexts_per_document=2)


def test_contexts_are_split_by_document_and_have_the_tokens_asked_for(tiny_tokenizer, tiny_dataset):
    contexts = choose_contexts(tiny_tokenizer, tiny_dataset, SETTINGS)
    train, test = contexts["train"], contexts["test"]
    assert contexts.keys() == {"train", "test"}
    assert train.tokens.shape == (80, 9)
    assert test.tokens.shape == (10, 9)
    assert (train.document % 10 != 0).all()
    assert (test.document % 10 == 0).all()
    assert (train.tokens[:, 0] == tiny_tokenizer.bos_token_id).all()
    assert train.document.bincount().max() == 2


def test_context_holds_consecutive_tokens_of_its_document(tiny_tokenizer, tiny_dataset):
    train = choose_contexts(tiny_tokenizer, tiny_dataset, SETTINGS)["train"]
    words = tiny_dataset[int(train.document[3])]["text"]
    assert tiny_tokenizer.decode(train.tokens[3, 1:]) in words


def test_same_seed_gives_the_same_contexts_and_another_seed_others(tiny_tokenizer, tiny_dataset):
    tokens = [choose_contexts(tiny_tokenizer, tiny_dataset, SETTINGS, seed)["train"].tokens for seed in (1, 1, 2)]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


def test_tuning_documents_are_others_and_training_is_the_same_without_them(tiny_tokenizer, tiny_dataset):
    plain = choose_contexts(tiny_tokenizer, tiny_dataset, SETTINGS)
    settings = replace(SETTINGS, tuning_tokens=40)
    contexts = choose_contexts(tiny_tokenizer, tiny_dataset, settings, tune=True)
    assert contexts["tune"].tokens.shape == (5, 9)
    documents = {split: set(chosen.document.tolist()) for split, chosen in contexts.items()}
    assert {index % 10 for index in documents["tune"]} == {5}
    assert {index % 10 for index in documents["test"]} == {0}
    assert not {index % 10 for index in documents["train"]} & {0, 5}
    assert {index % 10 for index in plain["train"].document.tolist()} == {1, 2, 3, 4, 6, 7, 8, 9}


def test_of_ten_documents_one_is_for_test_and_one_for_tuning():
    splits = ["test", "train", "train", "train", "train", "tune", "train", "train", "train", "train"]
    assert [split_of(number) for number in range(20)] == splits * 2


@pytest.mark.parametrize("streamed", [False, True])
def test_held_out_documents_are_those_that_test_contexts_are_from(tiny_tokenizer, tiny_dataset, streamed):
    text = tiny_dataset.to_iterable_dataset() if streamed else tiny_dataset
    shuffled = list(text.shuffle(seed=3))
    test = choose_contexts(tiny_tokenizer, shuffled, SETTINGS)["test"]

    found = [row["text"] for row in held_out_documents(text, seed=3)]

    assert found == [row["text"] for row in shuffled[::10]]
    assert {shuffled[number]["text"] for number in test.document.tolist()} <= set(found)


def test_held_out_documents_may_be_in_the_order_of_the_corpus(tiny_dataset):
    shuffled = [row["text"] for row in held_out_documents(tiny_dataset, seed=3)]
    ordered = [row["text"] for row in held_out_documents(tiny_dataset, seed=3, in_corpus_order=True)]
    assert ordered == [text for text in tiny_dataset["text"] if text in set(shuffled)]
    assert ordered != shuffled


@pytest.mark.filterwarnings("ignore:the text gave")
def test_tuning_without_a_document_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"no tune document among 5 .* the 6th for tune\); add text"):
        choose_contexts(tiny_tokenizer, [{"text": "w1 w2"}] * 5, SETTINGS, tune=True)


def test_short_document_is_padded(tiny_tokenizer):
    with pytest.warns(UserWarning, match=r"gave 2 of the (640 train|80 test) tokens asked for"):
        contexts = choose_contexts(tiny_tokenizer, [{"text": "w1 w2"}] * 2, SETTINGS)
    assert contexts["train"].tokens[0].tolist() == [0, 5, 6] + [PADDING] * 6
    assert len(contexts["test"].tokens) == 1


def test_one_document_is_too_few(tiny_tokenizer):
    with pytest.raises(ValueError, match="no train document among 1"):
        choose_contexts(tiny_tokenizer, [{"text": "w1 w2"}], SETTINGS)
    with pytest.raises(ValueError, match="no train document among 0"):
        choose_contexts(tiny_tokenizer, [], SETTINGS)


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="cached_tokens must be at least 1, got 0"):
        ContextSettings(cached_tokens=0)
    with pytest.raises(ValueError, match="context_size must be at least 3, got 2"):
        ContextSettings(context_size=2)


def test_row_without_text_is_named(tiny_tokenizer):
    with pytest.raises(ValueError, match="row 1 of the text holds None instead of a string"):
        choose_contexts(tiny_tokenizer, [{"text": "w1 w2"}, {"text": None}], SETTINGS)


def test_kept_contexts_are_chosen_once(tiny_tokenizer, tiny_dataset, tmp_path):
    chosen = choose_contexts(tiny_tokenizer, tiny_dataset, SETTINGS, tune=True)
    assert kept_contexts(tmp_path / "contexts", lambda: chosen) is chosen
    again = kept_contexts(tmp_path / "contexts", lambda: pytest.fail("chosen again"))
    assert again.keys() == {"train", "test", "tune"}
    for split, contexts in chosen.items():
        assert torch.equal(again[split].tokens, contexts.tokens)
        assert torch.equal(again[split].document, contexts.document)


def test_contexts_that_were_damaged_are_refused(tiny_tokenizer, tiny_dataset, tmp_path):
    kept_contexts(tmp_path / "contexts", lambda: choose_contexts(tiny_tokenizer, tiny_dataset, SETTINGS))
    tokens = np.load(tmp_path / "contexts" / "test" / "tokens.npy", mmap_mode="r+")
    tokens[0, 1] += 1
    tokens.flush()
    with pytest.raises(ValueError, match=r"the test contexts kept in .* are damaged; remove that folder"):
        kept_contexts(tmp_path / "contexts", dict)


def test_contexts_that_could_not_be_chosen_are_not_kept(tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no train document among 0"):
        kept_contexts(tmp_path / "contexts", lambda: choose_contexts(tiny_tokenizer, [], SETTINGS))
    assert not (tmp_path / "contexts").exists()
