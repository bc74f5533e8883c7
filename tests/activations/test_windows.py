import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bae_lens.activations.windows import (
    Windows,
    first_windows,
    kept_windows,
    random_windows,
    text_fingerprint,
    tokenizer_fingerprint,
)
from bae_lens.storage import check_folder


@pytest.fixture
def windows(tiny_tokenizer, tiny_dataset):
    return random_windows(tiny_tokenizer, tiny_dataset, 8, 40)


def test_windows_begin_with_bos_and_are_whole(windows, tiny_tokenizer):
    assert windows.tokens.shape == (40, 9)
    assert (windows.tokens[:, 0] == tiny_tokenizer.bos_token_id).all()
    assert (windows.tokens[:, 1:] >= 4).all()
    assert windows.columns([1, 8]).tolist() == [[1, 8]] * 40
    assert Windows(windows.tokens, windows.document).columns([1]).tolist() == [[0]] * 40


def test_windows_are_pieces_of_the_text_that_do_not_overlap(tiny_tokenizer):
    words = [f"w{i}" for i in range(60)]
    found = random_windows(tiny_tokenizer, [{"text": " ".join(words)}], 7, 8).tokens[:, 1:] - 4
    assert (found.diff(dim=1) == 1).all()
    assert len(found.unique()) == found.numel()
    other = random_windows(tiny_tokenizer, [{"text": " ".join(words)}], 7, 8, seed=1).tokens[:, 1:] - 4
    assert not torch.equal(found, other)


def test_windows_know_their_document_and_are_few_of_each(tiny_tokenizer):
    long, short = " ".join(f"w{i}" for i in range(60)), "w1 w2"
    documents = [{"text": text} for text in (long, short, long, long)]
    assert random_windows(tiny_tokenizer, documents, 3, 18).document.tolist() == [0] * 8 + [2] * 8 + [3] * 2
    assert random_windows(tiny_tokenizer, documents, 3, 12, per_document=12).document.tolist() == [0] * 12


def test_windows_do_not_begin_where_documents_do(tiny_tokenizer):
    words = " ".join(f"w{i}" for i in range(60))
    first = random_windows(tiny_tokenizer, [{"text": words}] * 200, 32, 200).tokens[:, 1]
    assert len(first.unique()) > 20


def test_short_documents_are_counted(tiny_tokenizer):
    documents = [{"text": "w1 w2"}, {"text": "w1 w2 w3 w4"}, {"text": "w3"}, {"text": "w1 w2 w3"}]
    assert random_windows(tiny_tokenizer, documents, 3, 2).too_short == 2


def test_too_little_text_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"1 of 2 windows of 3 tokens, at most 8 a document \(1 documents are"):
        random_windows(tiny_tokenizer, [{"text": "w1 w2 w3"}, {"text": "w1"}], 3, 2)
    with pytest.raises(ValueError, match="at least 1 token long, got 0"):
        random_windows(tiny_tokenizer, [], 0, 2)
    for numbers in ((0, 8), (2, 0)):
        with pytest.raises(ValueError, match=f"got {numbers[0]} and {numbers[1]}"):
            random_windows(tiny_tokenizer, [], 3, numbers[0], per_document=numbers[1])


def test_windows_are_arrays_of_32_bits(windows):
    assert windows.tokens.dtype == torch.int32


def test_tokens_at_a_position_are_those_after_bos(windows):
    assert windows.tokens_at(1).equal(windows.tokens[:, 1])
    assert replace(windows, starts_with_bos=False).tokens_at(1).equal(windows.tokens[:, 0])


@pytest.mark.parametrize(("positions", "message"), [([9], "8 tokens, got 9"), ([0], "got 0"), ([], "got none")])
def test_positions_beyond_the_windows_are_refused(windows, positions, message):
    with pytest.raises(ValueError, match=message):
        windows.columns(positions)


def test_first_windows_begin_where_documents_do(tiny_tokenizer):
    documents = [{"text": "w1 w2 w3 w4"}, {"text": "w9"}, {"text": "w5 w6 w7"}]
    first = first_windows(tiny_tokenizer, documents, 3, 2)
    assert (first.tokens[:, 1:] - 4).tolist() == [[1, 2, 3], [5, 6, 7]]
    assert (first.document.tolist(), first.too_short, first.starts_with_bos) == ([0, 2], 1, True)
    with pytest.raises(ValueError, match="2 of 3 windows of 3 tokens, at most 1 a document"):
        first_windows(tiny_tokenizer, documents, 3, 3)


def test_position_that_no_document_reaches_is_refused(tiny_tokenizer):
    documents = [{"text": "w1 w2 w3"}, {"text": "w1"}]
    message = "no document reaches position 4, the longest of 2 has 3 tokens; add longer documents, or ask for shorter"
    for cut in (random_windows, first_windows):
        with pytest.raises(ValueError, match=message):
            cut(tiny_tokenizer, documents, 4, 2)


def test_kept_windows_are_not_cut_again(windows, tmp_path):
    def again() -> Windows:
        pytest.fail("cut again")

    folder, source = tmp_path / "run" / "windows", {"text": "a", "sizes": (8, 40)}
    assert kept_windows(folder, source, lambda: windows) is windows
    kept = kept_windows(folder, source, again)
    assert kept.tokens.equal(windows.tokens)
    assert kept.document.equal(windows.document)
    assert (kept.starts_with_bos, kept.too_short) == (windows.starts_with_bos, windows.too_short)
    check_folder(tmp_path / "run")  # a run that goes no further may begin again there


def test_windows_of_another_text_or_damaged_ones_are_cut_again(windows, tmp_path):
    folder, other = tmp_path / "windows", replace(windows, tokens=windows.tokens.flip(0))
    kept_windows(folder, {"text": "a"}, lambda: windows)
    assert kept_windows(folder, {"text": "b"}, lambda: other) is other
    assert kept_windows(folder, {"text": "b"}, lambda: windows).tokens.equal(other.tokens)
    tokens = np.load(folder / "tokens.npy", mmap_mode="r+")
    tokens[3, 3] += 1
    tokens.flush()
    assert kept_windows(folder, {"text": "b"}, lambda: other) is other
    assert kept_windows(folder, {"text": "b"}, lambda: windows).tokens.equal(other.tokens)


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"source": {"text": "a"}}', "no json"])
def test_windows_whose_source_is_damaged_are_cut_again(windows, tmp_path, content):
    folder, other = tmp_path / "windows", replace(windows, tokens=windows.tokens.flip(0))
    kept_windows(folder, {"text": "a"}, lambda: windows)
    (folder / "source.json").write_text(content)
    assert kept_windows(folder, {"text": "a"}, lambda: other) is other
    assert kept_windows(folder, {"text": "a"}, lambda: windows).tokens.equal(other.tokens)


def test_windows_with_ends_are_not_kept(windows, tmp_path):
    prompts = replace(windows, ends=torch.ones(len(windows.tokens), 3, dtype=torch.int64))
    with pytest.raises(
        ValueError, match="kept without ends, got those of 3 demonstrations; make them anew with prompt_w"
    ):
        kept_windows(tmp_path / "windows", {"text": "a"}, lambda: prompts)
    assert not (tmp_path / "windows").exists()


def test_text_is_known_by_its_documents_in_order():
    documents = [{"text": f"document {i}"} for i in range(5000)]
    known = text_fingerprint(documents)
    assert text_fingerprint([row["text"] for row in documents]) == known
    for other in (documents[:-1], documents[::-1], [*documents[:5], {"text": "another"}, *documents[6:]]):
        assert text_fingerprint(other) != known


def test_tokenizer_is_known_by_how_it_cuts(tiny_tokenizer):
    known = tokenizer_fingerprint(tiny_tokenizer)
    tiny_tokenizer(["w1", "w1 w2"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tiny_tokenizer) == known
    vocabulary = SimpleNamespace(bos_token_id=0, get_vocab=lambda: {"a": 0, "b": 1})
    assert tokenizer_fingerprint(vocabulary) != tokenizer_fingerprint(
        SimpleNamespace(**{**vars(vocabulary), "bos_token_id": None})
    )
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["w60"])
    assert tokenizer_fingerprint(other) != known
