import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bae_lens.activations import position_cache
from bae_lens.activations.position_cache import PositionActivations, Windows, collect, random_windows
from bae_lens.storage import checksum

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]


@pytest.fixture
def windows(tiny_tokenizer, tiny_dataset):
    return random_windows(tiny_tokenizer, tiny_dataset, 8, 40)


def overwrite(folder, change):
    """Another value in the array, as if it had been written there."""
    array, sums = (np.load(folder / name, mmap_mode="r+") for name in ("activations.npy", "checksums.npy"))
    change(array)
    sums[:] = [checksum([array[:, :, window]]) for window in range(len(sums))]
    array.flush()
    sums.flush()


def test_windows_begin_with_bos_and_are_whole(windows, tiny_tokenizer):
    assert windows.tokens.shape == (40, 9)
    assert (windows.tokens[:, 0] == tiny_tokenizer.bos_token_id).all()
    assert (windows.tokens[:, 1:] >= 4).all()
    assert (windows.column(1), windows.column(8)) == (1, 8)
    assert Windows(windows.tokens, windows.document).column(1) == 0


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


def test_states_are_the_models(tiny_model, windows, tmp_path):
    states = collect(tiny_model, windows, HOOKS, [1, 4, 8], tmp_path, batch_size=16)
    assert states.activations.shape == (2, 3, 40, 16)
    _, cache = tiny_model.run_with_cache(windows.tokens, prepend_bos=False)
    for i, hook in enumerate(HOOKS):
        for j, position in enumerate([1, 4, 8]):
            torch.testing.assert_close(states.vectors([(i, j)])[0], cache[hook][:, position][states.kept])


def test_model_stops_at_the_deepest_hook(tiny_model, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_model.blocks[1], "forward", lambda *_, **__: pytest.fail("went further"))
    collect(tiny_model, windows, HOOKS[:1], [1], tmp_path)


def test_interrupted_pass_goes_on(tiny_model, windows, tmp_path, monkeypatch):
    whole = collect(tiny_model, windows, HOOKS, [1, 8], tmp_path / "whole", batch_size=8)
    original, calls = position_cache.run_at_hooks, []

    def interrupted(*arguments):
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(position_cache, "run_at_hooks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(tiny_model, windows, HOOKS, [1, 8], tmp_path / "parts", batch_size=8)
    with pytest.raises(FileNotFoundError, match="no complete activations"):
        PositionActivations(tmp_path / "parts")
    parts = collect(tiny_model, windows, HOOKS, [1, 8], tmp_path / "parts", batch_size=8)
    assert len(calls) == 6  # 2 batches, the one interrupted, and the 3 that were missing
    np.testing.assert_array_equal(parts.activations, whole.activations)


def test_outliers_take_their_window_out_everywhere(tiny_model, windows, tmp_path):
    collect(tiny_model, windows, HOOKS, [1, 8], tmp_path)
    overwrite(tmp_path, lambda array: array[1, 0, 7].__imul__(100))
    states = PositionActivations(tmp_path)
    assert 7 not in states.kept
    assert torch.equal(states.documents, windows.document[states.kept])
    assert len(states.kept) == 39
    assert states.vectors([(0, 0), (0, 1)]).shape == (2, 39, 16)


def test_outliers_are_over_five_times_the_median_of_their_hook_and_position(tmp_path):
    norms = np.ones((1, 2, 5, 1), dtype=np.float32)
    norms[0, 0, :, 0] = [1, 5.0, 0.9, 5.1, 1]  # in units of the median, which is 1
    norms[0, 1] *= 1e30  # whose squares are beyond float32
    sums = np.array([checksum([norms[:, :, window]]) for window in range(5)])
    for name, array in (("activations.npy", norms), ("documents.npy", np.arange(5)), ("checksums.npy", sums)):
        np.save(tmp_path / name, array)
    source, complete = {"hook_names": HOOKS[:1], "positions": [1, 2]}, {"documents": checksum([np.arange(5)])}
    for name, content in (("source.json", source), ("complete.json", complete)):
        (tmp_path / name).write_text(json.dumps(content))
    assert PositionActivations(tmp_path).kept.tolist() == [0, 1, 2, 4]


def flip(path, index):
    array = np.load(path, mmap_mode="r+")
    array[index] += 1
    array.flush()


def test_damaged_windows_are_found_when_read_and_computed_again(tiny_model, windows, tmp_path, monkeypatch):
    whole = collect(tiny_model, windows, HOOKS, [1, 8], tmp_path, batch_size=8).activations.copy()
    flip(tmp_path / "activations.npy", (1, 0, 7, 3))
    with pytest.raises(ValueError, match=r"1 windows in .* are damaged; run the same again, which computes them again"):
        _ = PositionActivations(tmp_path).kept
    calls, original = [], position_cache.run_at_hooks
    monkeypatch.setattr(position_cache, "run_at_hooks", lambda *given: (calls.append(given), original(*given))[1])
    with pytest.warns(UserWarning, match="1 of 40 windows in .* are damaged and computed again"):
        again = collect(tiny_model, windows, HOOKS, [1, 8], tmp_path, batch_size=8)
    assert len(calls) == 1
    np.testing.assert_array_equal(again.activations, whole)
    assert len(again.kept) == 40


def test_interrupted_pass_is_checked_before_it_goes_on(tiny_model, windows, tmp_path):
    whole = collect(tiny_model, windows, HOOKS, [1, 8], tmp_path, batch_size=8).activations.copy()
    (tmp_path / "complete.json").unlink()
    flip(tmp_path / "activations.npy", (0, 1, 39, 0))
    with pytest.warns(UserWarning, match="1 of 40 windows"):
        again = collect(tiny_model, windows, HOOKS, [1, 8], tmp_path, batch_size=8)
    np.testing.assert_array_equal(again.activations, whole)


def test_damaged_documents_are_refused(tiny_model, windows, tmp_path):
    collect(tiny_model, windows, HOOKS, [1], tmp_path)
    flip(tmp_path / "documents.npy", 3)
    with pytest.raises(ValueError, match=r"documents.npy in .* is damaged; remove the folder to start over"):
        PositionActivations(tmp_path)


def test_pass_of_a_version_without_checksums_is_made_again(tiny_model, windows, tmp_path):
    collect(tiny_model, windows, HOOKS, [1], tmp_path)
    (tmp_path / "checksums.npy").unlink()
    (tmp_path / "complete.json").write_text(json.dumps({"windows": 40}))
    flip(tmp_path / "activations.npy", (0, 0, 3, 3))
    assert len(collect(tiny_model, windows, HOOKS, [1], tmp_path).kept) == 40


def test_folder_of_something_else_is_refused(tiny_model, windows, tmp_path):
    collect(tiny_model, windows, HOOKS, [1], tmp_path)
    with pytest.raises(ValueError, match=r"something else \(positions.0: 1 there, 2 now\); choose another folder"):
        collect(tiny_model, windows, HOOKS, [2], tmp_path)
    for other in (replace(windows, tokens=windows.tokens.flip(0)), replace(windows, document=torch.arange(40))):
        with pytest.raises(ValueError, match=r"something else \(windows: '\w{16}' there, .*\); choose another folder"):
            collect(tiny_model, other, HOOKS, [1], tmp_path)
    tiny_model.blocks[1].mlp.W_out.data[3] *= 1.1
    with pytest.raises(ValueError, match=r"something else \(model: '\w{16}' there, .*\); choose another folder"):
        collect(tiny_model, windows, HOOKS, [1], tmp_path)


def test_hook_asked_for_twice_is_there_twice(tiny_model, windows, tmp_path):
    states = collect(tiny_model, windows, [HOOKS[0], HOOKS[0]], [1], tmp_path)
    assert states.vectors([(0, 0)]).equal(states.vectors([(1, 0)]))


@pytest.mark.parametrize(
    ("hooks", "positions", "message"),
    [
        (["blocks.7.hook_resid_post"], [1], "no hook"),
        (HOOKS, [9], "between 1 and the windows' 8 tokens, got 9"),
        (HOOKS, [0], "got 0"),
        (HOOKS, [], "at least one hook and one position"),
        (["blocks.0.hook_resid_post", "blocks.0.mlp.hook_post"], [1], "equally wide"),
        (["blocks.0.attn.hook_pattern"], [8], "one vector a token"),
    ],
)
def test_impossible_requests_are_refused(tiny_model, windows, tmp_path, hooks, positions, message):
    with pytest.raises(ValueError, match=message):
        collect(tiny_model, windows, hooks, positions, tmp_path)


def test_windows_beyond_the_context_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="beyond the model's context of 32"):
        collect(tiny_model, Windows(torch.full((4, 40), 5), torch.arange(4)), HOOKS, [40], tmp_path)


def test_states_that_are_not_finite_are_refused(tiny_model, windows, tmp_path):
    tiny_model.W_E.data[windows.tokens[3, 1]] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        collect(tiny_model, windows, HOOKS, [1], tmp_path)
    assert json.loads((tmp_path / "source.json").read_text())["positions"] == [1]
    with pytest.raises(FileNotFoundError, match="no complete activations"):
        PositionActivations(tmp_path)
