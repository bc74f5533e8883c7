import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer
from sae_lens.registry import get_sae_training_class
from transformers import PreTrainedTokenizerFast

from bae_lens.activations import batch_order
from bae_lens.activations import cache as cache_module
from bae_lens.activations.cache import CachedActivations
from bae_lens.activations.cache_writer import cache_activations
from bae_lens.activations.contexts import PADDING, Contexts, ContextSettings, choose_contexts
from bae_lens.activations.forward import hook_widths
from bae_lens.saes.standardization import Standardization
from bae_lens.storage import checksum, locked

HOOK = "blocks.0.hook_resid_post"
SETTINGS = ContextSettings(context_size=9, cached_tokens=640, held_out_tokens=80, contexts_per_document=2)


@pytest.fixture
def contexts(tiny_tokenizer: PreTrainedTokenizerFast, tiny_dataset: Dataset) -> Contexts:
    return choose_contexts(tiny_tokenizer, tiny_dataset, SETTINGS)["train"]


@pytest.fixture
def states(tiny_model: HookedSAETransformer, contexts: Contexts, tmp_path: Path) -> CachedActivations:
    return cache_activations(tiny_model, contexts, [HOOK], tmp_path / "states")[HOOK]


def test_rows_are_what_the_model_computes(states, tiny_model, contexts):
    _, cache = tiny_model.run_with_cache(contexts.tokens[5:6], prepend_bos=False)
    assert states.hook_name == HOOK
    assert torch.allclose(states.rows(torch.arange(5 * 9, 6 * 9)), cache[HOOK][0], atol=1e-6)


def test_special_tokens_padding_and_outlier_norms_are_not_content(tiny_model, tmp_path):
    tokens = torch.tensor([[0, 4, 5, 6], [0, 7, PADDING, PADDING]])
    states = cache_activations(tiny_model, Contexts(tokens, torch.tensor([1, 2])), [HOOK], tmp_path)[HOOK]
    assert states.content.tolist() == [1, 2, 3, 5]
    states = CachedActivations(tmp_path, HOOK)
    states.norms = torch.tensor([99, 1, 5.1, 0.9, 99, 1, 99, 99])[:, None]
    assert states.outliers.nonzero().flatten().tolist() == [2]
    assert states.content.tolist() == [1, 3, 5]


def test_several_hooks_come_from_one_pass_and_stop_at_the_deepest(tiny_model, contexts, tmp_path, monkeypatch):
    run, calls = tiny_model.run_with_cache, []

    def counted(*args, **kwargs):
        calls.append((len(args[0]), kwargs["stop_at_layer"]))
        return run(*args, **kwargs)

    monkeypatch.setattr(tiny_model, "run_with_cache", counted)
    hooks = ["blocks.1.mlp.hook_post", HOOK, "blocks.0.mlp.hook_post"]
    hook_widths(tiny_model, hooks)
    calls.clear()
    both = cache_activations(tiny_model, contexts, hooks, tmp_path / "both", batch_size=80)
    assert calls == [(80, 2)]
    assert list(both) == hooks
    assert {hook: states.widths for hook, states in both.items()} == {
        "blocks.1.mlp.hook_post": {"blocks.1.mlp.hook_post": 32},
        HOOK: {HOOK: 16},
        "blocks.0.mlp.hook_post": {"blocks.0.mlp.hook_post": 32},
    }
    _, cache = run(contexts.tokens[5:6], prepend_bos=False)
    for hook, states in both.items():
        assert torch.allclose(states.rows(torch.arange(5 * 9, 6 * 9)), cache[hook][0], atol=1e-6)
        assert torch.equal(states.content, both[HOOK].content)


def test_an_outlier_at_any_hook_is_one_at_all_of_them(tiny_model, contexts, tmp_path, monkeypatch):
    hooks = [HOOK, "blocks.1.hook_resid_post"]
    hook_widths(tiny_model, hooks)
    run = tiny_model.run_with_cache

    def with_outliers(tokens, **kwargs):
        output, cache = run(tokens, **kwargs)
        cache[hooks[0]][3, 4] *= 100
        cache[hooks[1]][5, 6] *= 100
        return output, cache

    monkeypatch.setattr(tiny_model, "run_with_cache", with_outliers)
    cache_activations(tiny_model, contexts, hooks, tmp_path, batch_size=len(contexts.tokens))
    for hook in hooks:
        states = CachedActivations(tmp_path, hook)
        assert states.outliers.nonzero().flatten().tolist() == [3 * 9 + 4, 5 * 9 + 6]
        assert len(states.content) == 638


def test_interrupted_cache_of_two_hooks_goes_on_at_both(tiny_model, contexts, tmp_path, monkeypatch):
    hooks = [HOOK, "blocks.1.mlp.hook_post"]
    whole = cache_activations(tiny_model, contexts, hooks, tmp_path / "whole", batch_size=32)
    run, calls = tiny_model.run_with_cache, []

    def fail_at_second(*args, **kwargs):
        calls.append(len(args[0]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_model, "run_with_cache", fail_at_second)
        with pytest.raises(KeyboardInterrupt):
            cache_activations(tiny_model, contexts, hooks, tmp_path / "cut", batch_size=32)
        resumed = cache_activations(tiny_model, contexts, hooks, tmp_path / "cut", batch_size=32)
    assert calls == [32, 32, 32, 16]
    for hook in hooks:
        assert np.array_equal(resumed[hook].activations, whole[hook].activations)
        assert torch.equal(resumed[hook].norms, whole[hook].norms)


def test_interrupted_cache_computes_only_what_is_missing(tiny_model, contexts, states, tmp_path, monkeypatch):
    run, calls = tiny_model.run_with_cache, []

    def fail_at_third(*args, **kwargs):
        calls.append(len(args[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(tiny_model, "run_with_cache", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        cache_activations(tiny_model, contexts, [HOOK], tmp_path / "again", batch_size=16)
    with pytest.raises(FileNotFoundError, match="no complete cache"):
        CachedActivations(tmp_path / "again", HOOK)
    resumed = cache_activations(tiny_model, contexts, [HOOK], tmp_path / "again", batch_size=16)[HOOK]
    assert len(calls) == 3 + 3
    assert np.array_equal(resumed.activations, states.activations)
    assert torch.equal(resumed.norms, states.norms)
    cache_activations(tiny_model, contexts, [HOOK], tmp_path / "again")
    assert len(calls) == 6


def damage(path: Path, *place: int) -> None:
    array = np.lib.format.open_memmap(path, mode="r+")
    array[place] += 1
    array.flush()


def test_damaged_activations_are_found_when_read_and_computed_again(tiny_model, contexts, tmp_path):
    hooks = [HOOK, "blocks.1.mlp.hook_post"]
    whole = {
        hook: at.activations.copy() for hook, at in cache_activations(tiny_model, contexts, hooks, tmp_path).items()
    }
    for hook, context in ((HOOK, 3), (hooks[1], 20)):
        damage(tmp_path / hook / "activations.npy", context, 2, 1)

    opened = cache_activations(tiny_model, contexts, hooks, tmp_path)
    assert torch.equal(opened[HOOK].rows(torch.arange(27)), torch.from_numpy(whole[HOOK][:3]).flatten(0, 1))
    with pytest.raises(ValueError, match=r"1 contexts in .* damaged; run the same again, which computes them again"):
        opened[HOOK].rows(torch.tensor([5, 31]))
    with pytest.warns(UserWarning, match=f"2 of {len(contexts.tokens)} contexts .* damaged and computed again"):
        repaired = cache_activations(tiny_model, contexts, hooks, tmp_path)

    for hook in hooks:
        np.testing.assert_allclose(repaired[hook].activations, whole[hook], atol=1e-5)
        assert len(repaired[hook].rows(repaired[hook].content)) == 640
    cache_activations(tiny_model, contexts, hooks, tmp_path)  # without a warning


def test_damaged_norms_and_tokens_are_found_when_the_cache_is_opened(tiny_model, contexts, states):
    norms = states.norms.clone()
    damage(states.folder / "norms.npy", 4, 4)
    with pytest.raises(ValueError, match=r"its norms in .* are damaged; run the same again"):
        CachedActivations(states.folder, HOOK)
    with pytest.warns(UserWarning, match=f"1 of {len(contexts.tokens)} contexts .* damaged and computed again"):
        assert torch.allclose(cache_activations(tiny_model, contexts, [HOOK], states.folder)[HOOK].norms, norms)
    damage(states.folder / "tokens.npy", 4, 4)
    with pytest.raises(ValueError, match=r"tokens.npy or document.npy in .* are damaged; remove the folder"):
        CachedActivations(states.folder, HOOK)


def test_complete_cache_is_opened_without_reading_its_activations(states, tiny_model, contexts, monkeypatch):
    monkeypatch.setattr("bae_lens.activations.cache.damaged_contexts", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(tiny_model, "run_with_cache", lambda *_, **__: pytest.fail("ran"))
    opened = cache_activations(tiny_model, contexts, [HOOK], states.folder)[HOOK]
    assert torch.equal(opened.content, states.content)


def test_interrupted_cache_is_checked_before_it_goes_on(tiny_model, contexts, states):
    (states.folder / "complete.json").unlink()
    damage(states.folder / HOOK / "activations.npy", 7, 0, 0)
    with pytest.warns(UserWarning, match="1 of 80 contexts"):
        cache_activations(tiny_model, contexts, [HOOK], states.folder)


def test_folder_of_another_cache_is_refused(states, tiny_model, contexts):
    other_hook = r"something else \(hook_names.0: 'blocks.0.hook_resid_post' there, 'blocks.1.hook_resid_post' now\)"
    with pytest.raises(ValueError, match=other_hook):
        cache_activations(tiny_model, contexts, ["blocks.1.hook_resid_post"], states.folder)
    for other in (
        Contexts(contexts.tokens + 1, contexts.document),
        Contexts(contexts.tokens, contexts.document + 1),
        Contexts(contexts.tokens[:-1], contexts.document[:-1]),
    ):
        with pytest.raises(ValueError, match=r"something else \(contexts: '\w{16}' there, .*\); choose another folder"):
            cache_activations(tiny_model, other, [HOOK], states.folder)


def test_model_is_known_by_its_weights_and_not_by_its_name(states, tiny_model, contexts):
    tiny_model.cfg.model_name = "renamed"
    assert torch.equal(cache_activations(tiny_model, contexts, [HOOK], states.folder)[HOOK].norms, states.norms)
    tiny_model.blocks[0].mlp.b_out.data[0] += 0.1
    with pytest.raises(ValueError, match=r"something else \(model: '\w{16}' there, .*\); choose another folder"):
        cache_activations(tiny_model, contexts, [HOOK], states.folder)


def test_cache_of_an_older_version_is_refused(tiny_model, contexts, tmp_path):
    older = {"model": "tiny", "hook_names": [HOOK], "special_tokens": [0, 1, 2, 3]}
    for name in ("source.json", "complete.json"):
        (tmp_path / name).write_text(json.dumps(older))
    with pytest.raises(ValueError, match=r"holds something else \(model: 'tiny' there, .*; contexts: nothing there"):
        cache_activations(tiny_model, contexts, [HOOK], tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no complete cache of {HOOK} at .*; cache_activations makes one"):
        CachedActivations(tmp_path, HOOK)


def test_folder_at_which_another_process_is_at_work_is_refused(tiny_model, contexts, tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another process is at work in"):
        cache_activations(tiny_model, contexts, [HOOK], tmp_path)


def test_disk_without_room_is_refused_before_the_model_runs(tiny_model, contexts, tmp_path, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    hook_widths(tiny_model, [HOOK])
    monkeypatch.setattr(tiny_model, "run_with_cache", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(OSError, match=r"No space left on device: .*norms.npy needs .* GiB; make room, or choose"):
        cache_activations(tiny_model, contexts, [HOOK], tmp_path)
    assert not list(tmp_path.rglob("*norms*"))


def test_norms_beyond_the_squares_of_float32_are_right(tiny_model, contexts, tmp_path):
    tiny_model.blocks[0].hook_resid_post.add_hook(lambda x, **_: 1e30 * x / x.norm(dim=-1, keepdim=True))
    norms = cache_activations(tiny_model, contexts, [HOOK], tmp_path)[HOOK].norms
    torch.testing.assert_close(norms, torch.full_like(norms, 1e30))


def test_hidden_states_that_are_not_finite_name_their_batch(tiny_model, contexts, tmp_path):
    tiny_model.embed.W_E.data[contexts.tokens[20, 3]] = torch.nan
    with pytest.raises(
        ValueError, match=r"batch \d+: the model.s activations at blocks.0.hook_resid_post are not finite"
    ):
        cache_activations(tiny_model, contexts, [HOOK], tmp_path)


def test_hook_must_exist_and_give_one_vector_a_token(tiny_model, contexts, tmp_path):
    with pytest.raises(ValueError, match=r"no hook 'blocks.0.resid_post'; near ones: .*blocks.0.hook_resid_post"):
        cache_activations(tiny_model, contexts, [HOOK, "blocks.0.resid_post"], tmp_path)
    with pytest.raises(ValueError, match="must give one vector a token"):
        hook_widths(tiny_model, ["blocks.0.attn.hook_pattern"])


def test_heads_are_concatenated(tiny_model):
    widths = hook_widths(tiny_model, ["blocks.0.mlp.hook_post", "blocks.0.attn.hook_z"])
    assert list(widths.items()) == [("blocks.0.attn.hook_z", 16), ("blocks.0.mlp.hook_post", 32)]  # as they are reached


def test_standardized_content_is_centred_with_mean_square_norm_d(states):
    standardized = states.standardization(states.rows(states.content)).double()
    assert standardized.mean(0).abs().max() < 1e-5
    assert standardized.square().sum(1).mean().item() == pytest.approx(16, rel=1e-5)


def test_small_variance_far_from_zero_is_that_of_the_content(states, monkeypatch):
    small = torch.randn(len(states.contexts.tokens.flatten()), 16).sign()  # of variance 1/256^2, beside a mean of 2^16
    monkeypatch.setattr(states, "rows", lambda indices: 2.0**16 + small[indices] / 2**7)
    standardized = states.standardization
    x = states.rows(states.content).double()
    expected = (16 / (x - x.mean(0)).square().sum(1).mean()).sqrt().item()
    assert standardized.scale == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(standardized.mean.double(), x.mean(0), rtol=1e-7, atol=0)


def test_hidden_states_without_variance_are_refused(states, monkeypatch):
    monkeypatch.setattr(states, "rows", lambda indices: torch.ones(len(indices), 16))
    with pytest.raises(ValueError, match="all the same"):
        _ = states.standardization


@pytest.mark.parametrize("architecture", ["bae", "standard", "topk", "gated", "jumprelu", "batchtopk"])
def test_folding_the_standardization_is_exact(architecture):
    sae_class, config_class = get_sae_training_class(architecture)
    k: dict[str, Any] = {"k": 4} if "topk" in architecture else {}
    sae = sae_class(config_class(d_in=16, d_sae=64, dtype="float64", decoder_init_norm=1.0, **k))
    standardization = Standardization(torch.randn(16), 0.37)
    x = 3 * torch.randn(32, 16, dtype=torch.float64)
    codes, out = sae.encode(standardization(x)), sae.decode(sae.encode(standardization(x)))
    standardization.fold_into(sae)
    assert torch.equal(sae.encode(x) != 0, codes != 0)
    assert torch.allclose(sae(x), out / standardization.scale + standardization.mean.double(), atol=1e-9)


def test_an_epoch_of_batches_visits_every_row_once_in_a_seeded_order(states):
    per_epoch = len(states.content) // 64
    batches = states.shuffled(64, seed=3)
    epochs = [torch.cat([next(batches) for _ in range(per_epoch)]) for _ in range(2)]
    everything = states.standardization(states.rows(states.content))
    assert len(epochs[0]) == len(everything) == 640
    assert torch.equal(epochs[0].sort(0).values, everything.sort(0).values)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(next(states.shuffled(64, seed=3)), epochs[0][:64])
    other = states.shuffled(64, seed=4)
    for epoch in epochs:
        assert not torch.equal(torch.cat([next(other) for _ in range(per_epoch)]), epoch)


def test_neighboring_seeds_share_no_epoch(states):
    first, second = states.shuffled(640, seed=0), states.shuffled(640, seed=1)
    next(first)
    assert not torch.equal(next(first), next(second))


@pytest.mark.parametrize("name", ["complete.json", "tokens.npy", "norms.npy", f"{HOOK}/activations.npy"])
def test_damaged_file_is_named(states, name):
    path = states.folder / name
    path.write_bytes(path.read_bytes()[:-9] if name != "tokens.npy" else b"")
    with pytest.raises(ValueError, match=rf"{name} cannot be read .* remove its folder to start over"):
        CachedActivations(states.folder, HOOK)


def test_batches_from_a_later_step_are_those_of_the_whole_run(states):
    whole = states.shuffled(64, seed=0)
    expected = [next(whole) for _ in range(15)][13]
    assert torch.equal(next(states.shuffled(64, seed=0, start_step=13)), expected)


@pytest.fixture
def small_windows(states, monkeypatch):
    """Blocks of 32 rows, of which the 80 contexts of 9 have 22.5, in windows of 4."""
    monkeypatch.setattr(cache_module, "BLOCK_ROWS", 32)
    monkeypatch.setattr(batch_order, "WINDOW_BLOCKS", 4)
    return states


def rows_of_batches(states, monkeypatch, *arguments):
    """Which rows each batch holds, endlessly."""
    monkeypatch.setattr(states, "_gather", lambda rows, pinned: rows)  # noqa: ARG005
    return states._gathered(*arguments, pinned=False)


def test_windows_do_not_show_in_the_batches(small_windows, monkeypatch):
    batches = rows_of_batches(small_windows, monkeypatch, 50, 3, 0)
    epochs = [[next(batches) for _ in range(640 // 50)] for _ in range(2)]
    for epoch in epochs:
        assert [len(rows) for rows in epoch] == [50] * 12
        assert len(torch.cat(epoch).unique()) == 600
        assert torch.isin(torch.cat(epoch), small_windows.content).all()
    assert epochs[0][0].tolist() != epochs[1][0].tolist()
    assert small_windows.order == "windows of 4 blocks of 32 rows"
    for step in (0, 3, 11, 12, 13, 23):
        assert torch.equal(
            next(rows_of_batches(small_windows, monkeypatch, 50, 3, step)), [*epochs[0], *epochs[1]][step]
        )


def test_a_batch_holds_rows_of_many_documents(small_windows, monkeypatch):
    rows = next(rows_of_batches(small_windows, monkeypatch, 64, 0, 0))
    documents = small_windows.contexts.document[rows // 9]
    assert len((rows // 32).unique()) == 4  # blocks
    assert len(documents.unique()) >= 8  # each of some 16 rows
    neighbors = (documents[1:] == documents[:-1]).float().mean()
    assert neighbors < 0.35  # where all lie together it is nearly 1, and mixed at random about 1/8


@pytest.mark.parametrize("n", [2, 3])
def test_batches_of_several_processes_are_those_of_one(small_windows, monkeypatch, n):
    states = small_windows
    whole = states.shuffled(50, seed=1)
    parts = []
    for index in range(n):
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, "shard", lambda rows, index=index: rows.tensor_split(n)[index])
            own = states.shuffled(50, seed=1)
            parts.append([next(own) for _ in range(14)])
    for step in zip(*parts, strict=True):
        assert torch.equal(torch.cat(step), next(whole))


def test_what_was_checked_once_is_not_checked_again_until_it_changes(states, monkeypatch):
    summed = []
    monkeypatch.setattr(cache_module, "checksum", lambda arrays: (summed.append(1), checksum(arrays))[1])
    standardization = states.standardization
    assert len(summed) == 80
    summed.clear()
    again = CachedActivations(states.folder, HOOK)
    assert torch.equal(again.standardization.mean, standardization.mean)
    assert again.standardization.scale == standardization.scale
    assert torch.equal(next(again.shuffled(64, seed=0)), next(states.shuffled(64, seed=0)))
    assert len(again.rows(again.content)) == 640
    assert summed == [1]  # of the norms
    damage(states.folder / HOOK / "activations.npy", 3, 4, 5)
    with pytest.raises(ValueError, match=r"1 contexts in .* are damaged"):
        _ = CachedActivations(states.folder, HOOK).standardization


def test_what_is_not_content_is_checked_too(tiny_model, tmp_path):
    tokens = torch.tensor([[0, 4, 5, 6], [0, PADDING, PADDING, PADDING]])
    states = cache_activations(tiny_model, Contexts(tokens, torch.tensor([1, 2])), [HOOK], tmp_path)[HOOK]
    damage(tmp_path / HOOK / "activations.npy", 1, 0, 0)
    with pytest.raises(ValueError, match="1 contexts in"):
        _ = states.standardization


def test_a_cache_without_its_standardization_is_read_once_more(states):
    first = states.standardization
    path = states.folder / HOOK / "standardization.json"
    for content in (None, "{}", "half of a fi"):
        path.unlink() if content is None else path.write_text(content)
        assert CachedActivations(states.folder, HOOK).standardization.scale == first.scale
        assert json.loads(path.read_text())["scale"] == first.scale


def test_less_content_than_a_batch_is_refused(states):
    with pytest.raises(ValueError, match="a batch of 641 needs as many tokens, but only 640"):
        next(states.shuffled(641, seed=0))


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 11), ("bfloat16", 8)])
def test_half_precision_on_disk_is_the_nearest_number(tiny_model, contexts, states, tmp_path, dtype, digits):
    half = cache_activations(tiny_model, contexts, [HOOK], tmp_path / dtype, dtype=dtype)[HOOK]
    assert half.activations.itemsize == 2
    assert half.dtype == dtype
    x, exact = half.rows(half.content), states.rows(states.content)
    assert x.dtype == torch.float32
    assert torch.equal(x, exact.to(getattr(torch, dtype)).float())
    assert (x / exact - 1)[exact.abs() > 1e-2].abs().max() < 2.0**-digits
    assert torch.equal(half.content, states.content)
    assert torch.equal(next(half.shuffled(64, 0)), half.standardization(half.rows(rows_of_first(half))))
    again = cache_activations(tiny_model, contexts, [HOOK], tmp_path / dtype, dtype=dtype)[HOOK]
    assert again.dtype == dtype
    damage(tmp_path / dtype / HOOK / "activations.npy", 3, 4, 5)
    with pytest.raises(ValueError, match="1 contexts in"):
        CachedActivations(tmp_path / dtype, HOOK).rows(torch.arange(27, 36))


def rows_of_first(states):
    seed = int(np.random.SeedSequence([0, 0]).generate_state(1)[0])
    return states.content[torch.randperm(len(states.content), generator=torch.Generator().manual_seed(seed))[:64]]


def test_a_cache_is_of_one_dtype(tiny_model, contexts, states):
    with pytest.raises(ValueError, match=r"dtype: nothing there, 'float16' now"):
        cache_activations(tiny_model, contexts, [HOOK], states.folder, dtype="float16")


def test_activations_that_float16_does_not_hold_are_refused_and_named(tiny_model, contexts, tmp_path, monkeypatch):
    run = tiny_model.run_with_cache

    def larger(tokens, **kwargs):
        output, cache = run(tokens, **kwargs)
        if HOOK in cache:
            cache[HOOK][3, 4, 5] = 70000.0
        return output, cache

    hook_widths(tiny_model, [HOOK])
    monkeypatch.setattr(tiny_model, "run_with_cache", larger)
    with pytest.raises(
        ValueError, match=r"batch 0: activations of up to 7e\+04 do not fit in float16, which ends at 6.55"
    ):
        cache_activations(tiny_model, contexts, [HOOK], tmp_path, dtype="float16")
