import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from bae_lens.activations import position_cache
from bae_lens.activations.position_cache import PositionActivations, collect
from bae_lens.activations.windows import Windows, random_windows
from bae_lens.storage import checksum

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]


@pytest.fixture
def windows(tiny_tokenizer, tiny_dataset):
    return random_windows(tiny_tokenizer, tiny_dataset, 8, 40)


def overwrite(folder, change):
    """Other activations, as if they had been written there."""
    array = np.load(folder / "activations.npy")
    change(array)
    write(folder, array)


def write(folder, array):
    norms = np.linalg.norm(array.astype(np.float64), axis=-1).astype(np.float32)
    sums = [[[checksum(both) for both in zip(n[:, None], a)] for n, a in zip(*pair)] for pair in zip(norms, array)]  # noqa: B905
    for name, values in (("activations", array), ("norms", norms), ("checksums", np.array(sums))):
        np.save(folder / f"{name}.npy", values)
    documents = np.load(folder / "documents.npy")
    complete = {"documents": checksum([documents]), "norms": checksum([norms])}
    (folder / "complete.json").write_text(json.dumps(complete))


def test_states_are_the_models(tiny_model, windows, tmp_path):
    states = collect(tiny_model, windows, HOOKS, [1, 4, 8], tmp_path, batch_size=16)
    assert states.activations.shape == (2, 3, 40, 16)
    _, cache = tiny_model.run_with_cache(windows.tokens.long(), prepend_bos=False)
    for i, hook in enumerate(HOOKS):
        for j, position in enumerate([1, 4, 8]):
            torch.testing.assert_close(states.vectors([(i, j)])[0], cache[hook][:, position][states.kept])


def test_model_stops_at_the_deepest_hook(tiny_model, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_model.blocks[1], "forward", lambda *_, **__: pytest.fail("went further"))
    collect(tiny_model, windows, HOOKS[:1], [1], tmp_path)


def test_interrupted_pass_goes_on(tiny_model, windows, tmp_path, monkeypatch):
    whole = collect(tiny_model, windows, HOOKS, [1, 8], tmp_path / "whole", batch_size=8)
    original, calls = position_cache.run_at_hooks, []

    def interrupted(*arguments, **named):
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **named)

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


def test_outliers_are_over_ten_times_the_median_of_their_hook_and_position(tmp_path):
    vectors = np.ones((1, 2, 5, 1), dtype=np.float32)
    vectors[0, 0, :, 0] = [1, 10.0, 0.9, 10.1, 1]  # in units of the median norm, which is 1
    vectors[0, 1] *= 1e30  # whose squares are beyond float32
    np.save(tmp_path / "documents.npy", np.arange(5))
    source = {"hook_names": HOOKS[:1], "positions": [1, 2], "dtype": "float32"}
    (tmp_path / "source.json").write_text(json.dumps(source))
    write(tmp_path, vectors)
    states = PositionActivations(tmp_path)
    assert states.kept.tolist() == [0, 1, 2, 4]
    torch.testing.assert_close(states.vectors([(0, 0)]).flatten(), torch.tensor([1, 10.0, 0.9, 1]))


def flip(path, index):
    array = np.load(path, mmap_mode="r+")
    array[index] += 1
    array.flush()


def test_damaged_windows_are_found_when_read_and_computed_again(tiny_model, windows, tmp_path, monkeypatch):
    whole = collect(tiny_model, windows, HOOKS, [1, 8], tmp_path, batch_size=8).activations.copy()
    flip(tmp_path / "activations.npy", (1, 0, 7, 3))
    states = PositionActivations(tmp_path)
    states.vectors([(0, 0), (0, 1)])
    where = r"1 windows at blocks.1.hook_resid_pre, position 1, in .* are damaged"
    with pytest.raises(ValueError, match=f"{where}; run the same again, which computes them again"):
        states.vectors([(1, 0)])
    calls, original = [], position_cache.run_at_hooks
    monkeypatch.setattr(
        position_cache, "run_at_hooks", lambda *given, **named: (calls.append(given), original(*given, **named))[1]
    )
    with pytest.warns(UserWarning, match="1 of 40 windows in .* are damaged and computed again"):
        again = collect(tiny_model, windows, HOOKS, [1, 8], tmp_path, batch_size=8)
    assert len(calls) == 1
    np.testing.assert_array_equal(again.activations, whole)
    assert len(again.kept) == 40


def test_damaged_norms_are_computed_again(tiny_model, windows, tmp_path):
    whole = collect(tiny_model, windows, HOOKS, [1, 8], tmp_path).norms
    flip(tmp_path / "norms.npy", (0, 1, 3))
    with pytest.raises(ValueError, match=r"the norms in .* are damaged; run the same again"):
        PositionActivations(tmp_path)
    with pytest.warns(UserWarning, match="1 of 40 windows"):
        assert collect(tiny_model, windows, HOOKS, [1, 8], tmp_path).norms.equal(whole)


def test_killed_pass_goes_on_with_the_bytes_of_one_that_was_not(tiny_model, windows, tmp_path, monkeypatch):
    collect(tiny_model, windows, HOOKS, [1, 8], tmp_path / "whole", batch_size=8)
    original = position_cache.run_at_hooks
    calls: list[int] = []

    def killed(*arguments, **named):
        calls.append(len(calls))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    monkeypatch.setattr(position_cache, "run_at_hooks", killed)
    child = os.fork()
    if child == 0:
        collect(tiny_model, windows, HOOKS, [1, 8], tmp_path / "parts", batch_size=8)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert np.count_nonzero(np.load(tmp_path / "parts" / "checksums.npy")) == 2 * 2 * 16
    calls[:] = [0] * 3
    collect(tiny_model, windows, HOOKS, [1, 8], tmp_path / "parts", batch_size=8)
    assert len(calls) == 6
    for name in ("activations", "norms", "checksums", "documents"):
        assert (tmp_path / "parts" / f"{name}.npy").read_bytes() == (tmp_path / "whole" / f"{name}.npy").read_bytes()


def test_batch_of_windows_equals_one_at_a_time(tiny_model, windows, tmp_path):
    together, alone = (collect(tiny_model, windows, HOOKS, [1, 4, 8], tmp_path / str(n), n) for n in (40, 1))
    np.testing.assert_allclose(together.activations, alone.activations, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "precision"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_takes_half_the_disk(tiny_model, windows, tmp_path, dtype, precision):
    whole = collect(tiny_model, windows, HOOKS, [1, 8], tmp_path / "whole")
    half = collect(tiny_model, windows, HOOKS, [1, 8], tmp_path / "half", dtype=dtype)
    assert 2 * half.activations.nbytes == whole.activations.nbytes
    exact, rounded = (states.vectors([(0, 0), (1, 1)]) for states in (whole, half))
    assert rounded.dtype == torch.float32
    assert not rounded.equal(exact)
    torch.testing.assert_close(rounded, exact, rtol=precision, atol=1e-7)
    with pytest.raises(ValueError, match=f"something else \\(dtype: 'float32' there, '{dtype}' now\\)"):
        collect(tiny_model, windows, HOOKS, [1, 8], tmp_path / "whole", dtype=dtype)


def test_activations_beyond_float16_are_refused(tiny_model, windows, tmp_path):
    tiny_model.W_E.data *= 1e6
    message = r"at blocks.0.hook_resid_post, activations of up to \S+ do not fit in float16, .* in bfloat16 or float32"
    with pytest.raises(ValueError, match=message):
        collect(tiny_model, windows, HOOKS, [1], tmp_path / "half", dtype="float16")
    collect(tiny_model, windows, HOOKS, [1], tmp_path / "bfloat", dtype="bfloat16")


def test_vectors_are_read_in_blocks_onto_the_device(tiny_model, windows, tmp_path, monkeypatch):
    states = collect(tiny_model, windows, HOOKS, [1, 8], tmp_path)
    whole = states.vectors([(1, 0), (0, 1), (1, 0)])
    monkeypatch.setattr(position_cache, "ROWS_AT_A_TIME", 7)
    assert PositionActivations(tmp_path).vectors([(1, 0), (0, 1), (1, 0)]).equal(whole)
    flip(tmp_path / "activations.npy", (0, 1, 39, 2))
    with pytest.raises(ValueError, match="1 windows at"):
        PositionActivations(tmp_path).vectors([(0, 1)])
    assert states.vectors([(0, 0)], "meta").device.type == "meta"


def test_prompts_are_measured_where_their_demonstrations_end(tiny_model, windows, tmp_path):
    ends = torch.stack([torch.arange(40) % 3 + 2, torch.arange(40) % 2 + 7], dim=1)
    prompts = replace(windows, ends=ends)
    assert torch.equal(prompts.columns([2, 1]), ends.flip(1))
    assert torch.equal(prompts.tokens_at(2), windows.tokens[torch.arange(40), ends[:, 1]])
    states = collect(tiny_model, prompts, HOOKS, [1, 2], tmp_path, batch_size=4)
    _, cache = tiny_model.run_with_cache(windows.tokens.long(), prepend_bos=False)
    for position in (0, 1):
        expected = cache[HOOKS[1]][torch.arange(40), ends[:, position]][states.kept]
        torch.testing.assert_close(states.vectors([(1, position)])[0], expected)
    with pytest.raises(ValueError, match="between 1 and the windows' 2 demonstrations, got 3"):
        collect(tiny_model, prompts, HOOKS, [3], tmp_path)


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
    with pytest.raises(ValueError, match="column 39 of the windows lies beyond the model's context of 32 tokens"):
        collect(tiny_model, Windows(torch.full((4, 40), 5), torch.arange(4)), HOOKS, [40], tmp_path)
    prompts = Windows(torch.full((4, 40), 5), torch.arange(4), ends=torch.tensor([[3, 35]] * 4))
    with pytest.raises(ValueError, match="column 35 of the windows lies beyond the model's context of 32 tokens"):
        collect(tiny_model, prompts, HOOKS, [2], tmp_path)


def test_states_that_are_not_finite_are_refused(tiny_model, windows, tmp_path):
    tiny_model.W_E.data[windows.tokens[3, 1]] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        collect(tiny_model, windows, HOOKS, [1], tmp_path)
    assert json.loads((tmp_path / "source.json").read_text())["positions"] == [1]
    with pytest.raises(FileNotFoundError, match="no complete activations"):
        PositionActivations(tmp_path)
